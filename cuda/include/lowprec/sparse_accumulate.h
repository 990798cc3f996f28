// Block-sparse products under an accumulator: which terms an output has, as the layout's tables say. The terms are
// those of the blocks that are present, in ascending order of the feature that is summed over; an update's go by token.
//
// Operands are in one form here: values of a carrier, or what a leaf takes in their place.
#pragma once

#include <cstdint>

#include "lowprec/accumulate.h"

namespace lowprec {

/// An operand's elements by token and feature.
template <class Bits>
struct Features {
  const Bits* data;
  int64_t token_stride;
  int64_t feature_stride;

  LOWPREC_INLINE Bits at(int64_t token, int64_t feature) const {
    return data[token * token_stride + feature * feature_stride];
  }
};

/// Gates of weights: one that is 0 closes its block, whose terms are then +0 whatever the operands hold.
struct Gates {
  const float* gate = nullptr;

  LOWPREC_INLINE bool closed(int32_t weight) const { return gate && gate[weight] == 0; }
};

/// An input block and the weight that it meets.
struct BlockPair {
  int32_t input;
  int32_t weight;
};

/// A direction's table: where each output block's pairs begin, and the pairs.
struct DirectionTable {
  const int32_t* table;
  int outputs;

  LOWPREC_INLINE int begin(int output) const { return table[output]; }
  LOWPREC_INLINE int count(int output) const { return table[output + 1] - table[output]; }
  LOWPREC_INLINE BlockPair pair(int i) const {
    const int32_t* at = table + outputs + 1 + 2 * static_cast<int64_t>(i);
    return {at[0], at[1]};
  }
};

/// Both factors of a term.
template <class Bits>
struct Factors {
  Bits a, b;
};

/// A product by the weights, or by their transposes. Its result is [N, C], or [C, N] if features come `first`.
template <class Bits>
struct SparseProduct {
  Features<Bits> x;
  const Bits* weights;
  DirectionTable table;
  Gates gates;
  int block;
  bool transpose;
  bool first;
  int64_t tokens;
  Bits zero = 0;  // how operands say it

  LOWPREC_INLINE int64_t outputs() const { return tokens * table.outputs * block; }

  /// The terms of one output.
  struct Terms {
    const SparseProduct& of;
    int64_t token;
    int column;  // in its block
    int begin;
    int64_t count;

    LOWPREC_INLINE Factors<Bits> operator()(int64_t k) const {
      const BlockPair pair = of.table.pair(begin + static_cast<int>(k / of.block));
      if (of.gates.closed(pair.weight)) return {of.zero, of.zero};
      const int row = static_cast<int>(k % of.block);
      const int place = of.transpose ? column * of.block + row : row * of.block + column;
      return {of.x.at(token, static_cast<int64_t>(pair.input) * of.block + row),
              of.weights[static_cast<int64_t>(pair.weight) * of.block * of.block + place]};
    }
  };

  LOWPREC_INLINE Terms terms(int64_t output) const {
    const int64_t features = static_cast<int64_t>(table.outputs) * block;
    const int64_t token = first ? output % tokens : output / features;
    const int64_t feature = first ? output / tokens : output % features;
    const int j = static_cast<int>(feature / block);
    return {*this, token, static_cast<int>(feature % block), table.begin(j),
            static_cast<int64_t>(table.count(j)) * block};
  }

  LOWPREC_INLINE int64_t terms_of_column(int i) const { return static_cast<int64_t>(table.count(i)) * block; }
};

/// The update of every weight, [blocks, b, b], by tokens of all pairs one after the other.
template <class Bits>
struct SparseUpdate {
  Features<Bits> x;
  Features<Bits> dy;
  const int32_t* table;  // input and output block of each weight
  Gates gates;
  int blocks;
  int block;
  int64_t tokens;

  LOWPREC_INLINE int64_t outputs() const { return static_cast<int64_t>(blocks) * block * block; }

  struct Terms {
    const SparseUpdate& of;
    int64_t row, column;  // features
    int64_t count;

    LOWPREC_INLINE Factors<Bits> operator()(int64_t k) const { return {of.x.at(k, row), of.dy.at(k, column)}; }
  };

  LOWPREC_INLINE Terms terms(int64_t output) const {
    const int size = block * block;
    const int64_t weight = output / size;
    const int place = static_cast<int>(output % size);
    return {*this, static_cast<int64_t>(table[2 * weight]) * block + place / block,
            static_cast<int64_t>(table[2 * weight + 1]) * block + place % block, tokens};
  }

  /// A sum under its gate.
  template <class Value>
  LOWPREC_INLINE Value close(int64_t output, Value sum) const {
    if (!gates.gate) return sum;
    const float gate = gates.gate[output / (block * block)];
    return gate == 0 ? Value(0) : static_cast<Value>(gate) * sum;
  }
};

/// Either, for kernels that are the same for both.
template <class Bits>
struct SparseSums {
  bool updates;
  SparseProduct<Bits> product;
  SparseUpdate<Bits> update;

  LOWPREC_INLINE int64_t outputs() const { return updates ? update.outputs() : product.outputs(); }

  /// The terms of an output.
  struct Terms {
    bool updates;
    typename SparseProduct<Bits>::Terms product;
    typename SparseUpdate<Bits>::Terms update;

    LOWPREC_INLINE int64_t count() const { return updates ? update.count : product.count; }
    LOWPREC_INLINE Factors<Bits> operator()(int64_t k) const { return updates ? update(k) : product(k); }
  };

  LOWPREC_INLINE Terms terms(int64_t output) const {
    if (updates) return {true, {product, 0, 0, 0, 0}, update.terms(output)};
    return {false, product.terms(output), {update, 0, 0, 0}};
  }

  /// Columns, of which each has its own number of terms.
  LOWPREC_INLINE int columns() const { return updates ? 1 : product.table.outputs; }
  LOWPREC_INLINE int64_t terms_of_column(int i) const { return updates ? update.tokens : product.terms_of_column(i); }

  template <class Value>
  LOWPREC_INLINE Value close(int64_t output, Value sum) const {
    return updates ? update.close(output, sum) : sum;
  }
};

/// How many values enter the lowest level.
LOWPREC_INLINE int64_t leaves_of(const AccumulatorSpec& spec, int64_t terms) {
  if (spec.leaf == Leaf::terms) return terms;
  if (spec.leaf == Leaf::exact || spec.terms == 0) return terms > 0 ? 1 : 0;
  return (terms - 1 + spec.terms) / spec.terms;
}

}  // namespace lowprec
