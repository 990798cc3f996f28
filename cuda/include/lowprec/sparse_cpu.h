// Block-sparse products on the CPU whose terms are added one after the other by fused multiply-adds: what the kernels
// of every set of instructions are told, and how they share the work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lowprec/accumulate_ops.h"
#include "lowprec/operands.h"

namespace lowprec {

/// What sums of a container's elements are carried in.
template <class C>
using NumberOf = std::conditional_t<std::is_same_v<C, Float64>, double, float>;

/// The pairs (input block, block of weights) of every output block, as a direction table has them.
struct SparseColumns {
  int64_t outputs;
  const int32_t* offsets;  // [outputs + 1]
  const int32_t* pairs;    // [offsets[outputs]][2]

  /// Pairs, and one for each output: what work is counted by.
  int64_t work() const { return offsets[outputs] + outputs; }

  /// The first output whose work begins at a place or after it.
  int64_t at(int64_t place) const {
    int64_t low = 0, high = outputs;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      offsets[middle] + middle < place ? low = middle + 1 : high = middle;
    }
    return low;
  }

  int64_t longest() const {
    int32_t longest = 0;
    for (int64_t j = 0; j < outputs; ++j) longest = std::max(longest, offsets[j + 1] - offsets[j]);
    return longest;
  }
};

/// Weights [blocks][block][block] of the sums' type. The term and the output of an element are told by strides.
template <class Number>
struct SparseWeights {
  const Number* data;
  int64_t block;
  int64_t term_step;
  int64_t output_step;
  const float* gate;  // of each block, or none

  const Number* at(int64_t id) const { return data + id * block * block; }
  /// Whether all terms of a block are +0, whatever its operands.
  bool closed(int64_t id) const { return gate && gate[id] == 0; }
};

/// x · W: tokens and their features, any strides; results with strides of which one is 1.
template <class C>
struct SparseProduct {
  Lines<C> x;  // tokens, each a line of features
  int64_t tokens;
  int64_t features;
  SparseColumns columns;
  SparseWeights<NumberOf<C>> w;
  NumberOf<C>* out;
  int64_t token_step;
  int64_t feature_step;
};

/// One pair of a weight gradient: as many tokens of x and of dy.
template <class C>
struct SparsePair {
  Lines<C> x;
  Lines<C> dy;
  int64_t tokens;
};

/// The sums of xᵀ · dy over pairs, [blocks][block][block], for blocks (input, output).
template <class C>
struct SparseUpdate {
  const SparsePair<C>* pairs;
  int64_t count;
  int64_t tokens;  // of all pairs
  int64_t inputs;  // features
  int64_t outputs;
  int64_t block;
  int64_t blocks;
  const int32_t* at;     // [blocks][2]
  const int32_t* order;  // [blocks]: ids, neighbours of which share operands
  NumberOf<C>* out;
};

/// Every output a sum in the order of its terms, each added by one fused multiply-add.
template <class C>
void multiply_sparse_avx512(const SparseProduct<C>& x);
template <class C>
void multiply_sparse_avx2(const SparseProduct<C>& x);
template <class C>
void update_sparse_avx512(const SparseUpdate<C>& x);
template <class C>
void update_sparse_avx2(const SparseUpdate<C>& x);

}  // namespace lowprec
