// Block-sparse products whose leaves are a tensor core's own sums of some terms, by the instruction mma.sync of 16
// rows, 8 columns and 16 terms: on Hopper it gives the bits of wgmma (docs/hopper.md), which the dense kernel takes.
// Written to be short: every lane gathers its fragments from memory. Device code only, without torch.
#pragma once

#include <cstdint>
#include <new>

#include "lowprec/sparse_accumulate_kernel.h"
#include "lowprec/tensor_core_portable.h"

namespace lowprec {

/// Operands of 16 bits, float16 or bfloat16, and the levels above the leaves.
struct LeafCall {
  SparseSums<uint16_t> of;
  bool half;
  SumPlan<Float32> plan;
  Levels levels;
};

/// The terms of a warp's outputs: 16 rows, and columns from `column` on, of a column of blocks or of a weight.
class LeafOperands {
 public:
  LOWPREC_DEVICE LeafOperands(const SparseSums<uint16_t>& of, int64_t group, int64_t row, int column)
      : of_(of), group_(group), row_(row + lane() / 4), column_(column + lane() / 4) {
    const int64_t feature = lane() % 4 * 2;
    output_row_ = row + lane() / 4, output_column_ = column + static_cast<int>(feature);
    if (of.updates) {
      left_ = static_cast<int64_t>(of.update.table[2 * group]) * block();
      right_ = static_cast<int64_t>(of.update.table[2 * group + 1]) * block();
      terms_ = of.update.tokens;
    } else {
      begin_ = of.product.table.begin(static_cast<int>(group));
      terms_ = of.product.terms_of_column(static_cast<int>(group));
    }
  }

  static LOWPREC_DEVICE int lane() { return threadIdx.x % 32; }
  LOWPREC_DEVICE int block() const { return of_.updates ? of_.update.block : of_.product.block; }
  LOWPREC_DEVICE int64_t rows() const { return of_.updates ? of_.update.block : of_.product.tokens; }
  LOWPREC_DEVICE int64_t terms() const { return terms_; }

  /// Fragments of the 16 terms from `first` on, and products of kTiles times eight columns.
  template <int kTiles>
  LOWPREC_DEVICE void multiply(int64_t first, bool half, int tiles, float (&leaf)[4 * kTiles]) {
    uint32_t a[4], b[kTiles][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t k = first + lane() % 4 * 2 + 8 * i;
      look_up(k);
      a[2 * i] = rows_at(k, row_), a[2 * i + 1] = rows_at(k, row_ + 8);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) b[n][i] = n < tiles ? columns_at(k, column_ + 8 * n) : 0;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (half) {
        multiply_fragments<true>(leaf + 4 * n, a, b[n]);
      } else {
        multiply_fragments<false>(leaf + 4 * n, a, b[n]);
      }
    }
  }

  /// The index in the result of the lane's i-th output, -1 for one that is not there.
  LOWPREC_DEVICE int64_t index(int i) const {
    const int64_t row = output_row_ + 8 * (i / 2 % 2);
    const int column = output_column_ + 8 * (i / 4) + i % 2;
    if (row >= rows() || column >= block()) return -1;
    if (of_.updates) return (group_ * block() + row) * block() + column;
    const int64_t feature = group_ * block() + column;
    return of_.product.first ? feature * of_.product.tokens + row : row * of_.product.table.outputs * block() + feature;
  }

 private:
  /// The pair of blocks of a product's term k.
  LOWPREC_DEVICE void look_up(int64_t k) {
    open_ = k < terms_;
    if (of_.updates || !open_) return;
    pair_ = of_.product.table.pair(begin_ + static_cast<int>(k / block()));
    open_ = !of_.product.gates.closed(pair_.weight);
  }

  /// Terms k and k + 1 of a row, or of a column.
  LOWPREC_DEVICE uint32_t rows_at(int64_t k, int64_t row) const {
    if (!open_ || row >= rows()) return 0;
    if (of_.updates) return tokens_at(of_.update.x, k, left_ + row);
    const int64_t feature = static_cast<int64_t>(pair_.input) * block() + k % block();
    return both(of_.product.x.at(row, feature), of_.product.x.at(row, feature + 1));
  }

  LOWPREC_DEVICE uint32_t columns_at(int64_t k, int column) const {
    if (!open_ || column >= block()) return 0;
    if (of_.updates) return tokens_at(of_.update.dy, k, right_ + column);
    const int size = block(), row = static_cast<int>(k % size);
    const uint16_t* weight = of_.product.weights + static_cast<int64_t>(pair_.weight) * size * size;
    if (of_.product.transpose) return both(weight[column * size + row], weight[column * size + row + 1]);
    return both(weight[row * size + column], weight[(row + 1) * size + column]);
  }

  LOWPREC_DEVICE uint32_t tokens_at(const Features<uint16_t>& x, int64_t token, int64_t feature) const {
    return both(x.at(token, feature), token + 1 < terms_ ? x.at(token + 1, feature) : uint16_t{0});
  }

  static LOWPREC_DEVICE uint32_t both(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

  const SparseSums<uint16_t>& of_;
  int64_t group_;
  int64_t row_;  // of the fragment that is read
  int column_;
  int64_t output_row_;
  int output_column_;
  int64_t left_ = 0, right_ = 0;
  int begin_ = 0;
  int64_t terms_;
  BlockPair pair_;
  bool open_;
};

/// The sums of leaves by one level in IEEE single precision.
template <int N>
class PlainLeaves {
 public:
  LOWPREC_DEVICE PlainLeaves(const LeafCall&, const Tree&, const SumWords&) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum_[i] = -0.0f;
  }

  LOWPREC_DEVICE void add(const float (&leaf)[N], const LeafOperands&) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum_[i] = __fadd_rn(sum_[i], leaf[i]);
  }

  LOWPREC_DEVICE void finish(float (&values)[N], const LeafOperands&) const {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = sum_[i];
  }

 private:
  float sum_[N];
};

/// The sums of leaves by any levels that run kStages times at most, in memory.
template <int N, int kStages>
class LeafTree {
 public:
  LOWPREC_DEVICE LeafTree(const LeafCall& call, const Tree& tree, const SumWords& words)
      : call_(call), tree_(tree), words_(words) {
    for (int i = 0; i < tree.stages; ++i) done_[i] = taken_[i] = 0;
  }

  LOWPREC_DEVICE void add(const float (&leaf)[N], const LeafOperands& at) {
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = leaf[i];
    rise(0, values, at);
  }

  LOWPREC_DEVICE void finish(float (&values)[N], const LeafOperands& at) {
    for (int stage = 0; stage + 1 < tree_.stages; ++stage) {
      if (taken_[stage] == 0) continue;
      taken_[stage] = 0;
      for (int i = 0; i < N; ++i) values[i] = partial_[stage][i];
      rise(stage + 1, values, at);
    }
    for (int i = 0; i < N; ++i) values[i] = partial_[tree_.stages - 1][i];
  }

 private:
  LOWPREC_DEVICE void rise(int s, float (&values)[N], const LeafOperands& at) {
    for (;; ++s) {
      const Stage& stage = tree_.stage[s];
      const bool random = call_.plan.level[stage.level].random;
#pragma unroll 1
      for (int i = 0; i < N; ++i) {
        const uint32_t word = random ? words_(at.index(i), stage.first + done_[s]) : 0;
        const Term<Float32> term = term_of<Float32>(as_bits(values[i]));
        values[i] = partial_[s][i] =
            round_sum(call_.plan, stage.level, taken_[s] == 0, taken_[s] == 0 ? 0.0f : partial_[s][i], term, word);
      }
      ++done_[s];
      if (++taken_[s] < stage.fan_in || s + 1 == tree_.stages) return;
      taken_[s] = 0;
    }
  }

  const LeafCall& call_;
  const Tree& tree_;
  const SumWords& words_;
  float partial_[kStages][N];
  int64_t done_[kStages];   // inputs that a stage had
  int64_t taken_[kStages];  // those of its present group
};

constexpr int kLeafWarps = 4;

/// A warp has 16 rows and kTiles times eight columns.
template <int kTiles, class Sums>
__global__ void __launch_bounds__(32 * kLeafWarps)
    sum_leaves_kernel(const __grid_constant__ LeafCall call, int64_t groups, int64_t row_tiles, float* out) {
  __shared__ alignas(Tree) unsigned char tree_room[kLeafWarps][sizeof(Tree)];
  constexpr int outputs = 4 * kTiles;
  auto& tree = *reinterpret_cast<Tree*>(tree_room[threadIdx.x / 32]);
  const SumWords words = words_of(call.levels, call.of);
  const int across = (call.of.updates ? call.of.update.block : call.of.product.block) / 8;
  const int tiles = across < kTiles ? across : kTiles, parts = across / tiles;
  const int64_t count = groups * row_tiles * parts, warps = static_cast<int64_t>(gridDim.x) * kLeafWarps;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kLeafWarps + threadIdx.x / 32; at < count; at += warps) {
    const int64_t group = at / parts % groups, row = at / parts / groups * 16;
    LeafOperands operands(call.of, group, row, static_cast<int>(at % parts) * tiles * 8);
    const int64_t leaves = leaves_of(call.levels.spec, operands.terms());
    __syncwarp();
    if (threadIdx.x % 32 == 0) new (&tree) Tree(call.levels.spec, leaves);
    __syncwarp();
    Sums sums(call, tree, words);
    const int64_t size = call.levels.spec.terms ? call.levels.spec.terms : operands.terms();
    for (int64_t n = 0; n < leaves; ++n) {
      float leaf[outputs] = {};
      const int64_t end = (n + 1) * size < operands.terms() ? (n + 1) * size : operands.terms();
#pragma unroll 1
      for (int64_t k = n * size; k < end; k += kPortableStep) {
        operands.template multiply<kTiles>(k, call.half, tiles, leaf);
      }
      sums.add(leaf, operands);
    }
    float values[outputs] = {};
    if (leaves > 0) sums.finish(values, operands);
#pragma unroll
    for (int i = 0; i < outputs; ++i) {
      const int64_t index = operands.index(i);
      if (index >= 0 && i / 4 < tiles) out[index] = call.of.close(index, values[i]);
    }
  }
}

}  // namespace lowprec
