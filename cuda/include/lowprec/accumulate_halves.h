// Matrix products of 16-bit operands whose sums are rounded to their own dtype, each once, to nearest even: two at a
// time by the device's fused multiply-add, which is just that. It keeps subnormal numbers, infinities and NaN.
#pragma once

#include <cstdint>

#include "lowprec/accumulate_tiles.h"

namespace lowprec {

constexpr int kHalfDepth = 2 * kDepth;  // terms of a tile, which has as many bytes as one of float32

/// Lay 16-bit elements out in tiles, as they are.
static __global__ void __launch_bounds__(kTileThreads) pack_halves_kernel(const Lines from, const Packed to) {
  __shared__ uint16_t elements[kHalfDepth][kTile + 2];
  const auto* data = static_cast<const uint16_t*>(from.of.data);
  auto* tiles = reinterpret_cast<uint16_t*>(to.tiles);
  constexpr int size = kTile * kHalfDepth;
  for (int64_t tile = blockIdx.x; tile < to.count(); tile += gridDim.x) {
    const PackedAt at(tile, to);
    for (int i = threadIdx.x; i < size; i += kTileThreads) {
      const int term = from.by_terms() ? i % kHalfDepth : i / kTile,
                line = from.by_terms() ? i / kHalfDepth : i % kTile;
      const int64_t k = at.depth * kHalfDepth + term, l = at.block * kTile + line;
      const bool inside = k < from.terms && l < from.lines;
      elements[term][line] =
          inside ? data[at.batch * from.batch_stride + l * from.line_stride + k * from.term_stride] : uint16_t{0};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kTileThreads) tiles[tile * size + i] = elements[i / kTile][i % kTile];
    __syncthreads();
  }
}

/// Two sums in a word, s = round(a · b + s).
template <bool kBfloat>
LOWPREC_DEVICE void multiply_add(uint32_t a, uint32_t b, uint32_t& s) {
  if constexpr (kBfloat) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(s) : "r"(a), "r"(b));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(s) : "r"(a), "r"(b));
  }
}

/// One of a word's halves, in both.
template <bool kHigh>
LOWPREC_DEVICE uint32_t both_halves(uint32_t x) {
  uint32_t both;
  if constexpr (kHigh) {
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }" : "=r"(both) : "r"(x));
  } else {
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }" : "=r"(both) : "r"(x));
  }
  return both;
}

/// The value of one of a word's halves.
template <bool kBfloat>
LOWPREC_DEVICE float value_of(uint32_t x, bool high) {
  if (kBfloat) return as_float(high ? x & 0xFFFF0000u : x << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(high ? x >> 16 : x)));
  return value;
}

template <bool kBfloat>
class HalfSums {
 public:
  static constexpr int side = 8;
  static constexpr int pairs = side / 2;
  using To = Share<side, side>;
  using Values = typename To::Values;

  LOWPREC_DEVICE HalfSums(const Context<To>& in, UpperSums<To>& upper) : in_(in), upper_(upper) { begin(); }

  LOWPREC_DEVICE void add(const uint16_t* a, const uint16_t* b, int left) {
    const Tree& tree = in_.plan.tree;
    while (left > 0) {
      const int64_t free = tree.stage[0].fan_in - added_;
      const int count = free < left ? static_cast<int>(free) : left;
      add_terms(a, b, count);
      added_ += count;
      left -= count;
      a += count * kTile;
      b += count * kTile;
      if (free == count && tree.stages > 1) rise();
    }
  }

  LOWPREC_DEVICE void finish(Values& values) {
    if (in_.plan.tree.stages == 1) return read(values);
    if (added_ > 0) rise();
    upper_.finish(values);
  }

 private:
  LOWPREC_DEVICE void begin() {
#pragma unroll
    for (int i = 0; i < side * pairs; ++i) s_[i / pairs][i % pairs] = 0x80008000u;  // -0, which leaves any first term
    added_ = 0;
  }

  LOWPREC_DEVICE void add_terms(const uint16_t* a, const uint16_t* b, int count) {
#pragma unroll 2
    for (int k = 0; k < count; ++k, a += kTile, b += kTile) {
      const uint4 x = *reinterpret_cast<const uint4*>(a), y = *reinterpret_cast<const uint4*>(b);
      const uint32_t left[pairs] = {x.x, x.y, x.z, x.w}, right[pairs] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < side; ++i) {
        const uint32_t each = i % 2 ? both_halves<true>(left[i / 2]) : both_halves<false>(left[i / 2]);
#pragma unroll
        for (int j = 0; j < pairs; ++j) multiply_add<kBfloat>(each, right[j], s_[i][j]);
      }
    }
  }

  LOWPREC_DEVICE void read(Values& values) const {
#pragma unroll
    for (int at = 0; at < To::outputs; ++at) values[at] = value(at);
  }

  LOWPREC_DEVICE float value(int at) const { return value_of<kBfloat>(s_[at / side][at % side / 2], at % 2); }

  LOWPREC_DEVICE void rise() {
    if (upper_.single()) {
      const bool first = upper_.begins();
#pragma unroll
      for (int at = 0; at < To::outputs; ++at) upper_.add_single(at, value(at), first);
    } else {
      Values values;
      read(values);
      upper_.add(0, values);
    }
    begin();
  }

  const Context<To>& in_;
  UpperSums<To>& upper_;
  uint32_t s_[side][pairs];
  int64_t added_;
};

template <bool kBfloat>
__global__ void __launch_bounds__(kTileThreads, 2)
    halves_kernel(const __grid_constant__ Product of, const __grid_constant__ SumPlan<Float32> plan,
                  const __grid_constant__ Tower tower, const SumDraws draws, float* out) {
  using To = typename HalfSums<kBfloat>::To;
  __shared__ alignas(16) float tiles[2][2][kTileSize];
  const TileAt at(blockIdx.x, of.a.blocks, of.b.blocks);
  const float* a = of.a.tiles + of.a.tile(at.batch, at.down) * kTileSize;
  const float* b = of.b.tiles + of.b.tile(at.batch, at.across) * kTileSize;

  const To share = share_of<To>(of, at);
  const SumWords words = draws.read(plan.tree.roundings);
  const Context<To> in{of, plan, plan.tree, words, share};
  UpperSums<To> upper(in, tower);
  HalfSums<kBfloat> sums(in, upper);

  const auto fetch = [&](int64_t depth) {
    copy_tile<kTile>(tiles[depth % 2][0], a + depth * kTileSize);
    copy_tile<kTile>(tiles[depth % 2][1], b + depth * kTileSize);
    asm volatile("cp.async.commit_group;");
  };
  fetch(0);
  for (int64_t depth = 0; depth < of.a.depths; ++depth) {
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    if (depth + 1 < of.a.depths) fetch(depth + 1);
    const int64_t left = of.terms - depth * kHalfDepth;
    sums.add(reinterpret_cast<const uint16_t*>(tiles[depth % 2][0]) + share.row,
             reinterpret_cast<const uint16_t*>(tiles[depth % 2][1]) + share.column,
             left < kHalfDepth ? static_cast<int>(left) : kHalfDepth);
  }
  typename To::Values values;
  sums.finish(values);
  write_values(share, values, out);
}

}  // namespace lowprec
