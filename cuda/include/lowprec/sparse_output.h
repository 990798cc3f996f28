// Where the sums of block-sparse products go, four neighbours at a time. Device code.
#pragma once

#include <cstdint>

#include "lowprec/tensor_core_output.h"

namespace lowprec {

constexpr int kSparseTokens = 64;  // of a tile

struct SparseOutput {
  Output to;
  int64_t tokens;
  int64_t features;
  bool first;   // features first
  bool direct;  // float32, bfloat16 or float16 sums, four of which lie at multiples of their size
};

/// Two sums in 16 bits each.
LOWPREC_DEVICE uint32_t narrow_pair(bool half, float low, float high) {
  uint32_t pair;
  if (half) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

/// In whatever form, and so many of them.
static __device__ __noinline__ void write_slowly(const SparseOutput& out, int64_t index, float4 run, int count) {
  const float sums[4] = {run.x, run.y, run.z, run.w};
  store_four(out.to, index, sums, count);
}

/// Four neighbours of a row of the result, from `place` on: tokens where features come first, else features.
LOWPREC_DEVICE void write_run(const SparseOutput& out, int64_t row, int64_t place, float4 run) {
  const int64_t left = out.tokens - (out.first ? place : row);
  if (left <= 0) return;
  const int64_t index = row * (out.first ? out.tokens : out.features) + place;
  if (!out.direct) {
    write_slowly(out, index, run, out.first && left < 4 ? static_cast<int>(left) : 4);
  } else if (out.to.bytes == 4) {
    *reinterpret_cast<float4*>(static_cast<float*>(out.to.data) + index) = run;
  } else {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out.to.data) + index) = {narrow_pair(out.to.half, run.x, run.y),
                                                                              narrow_pair(out.to.half, run.z, run.w)};
  }
}

/// The i-th four sums of a tile of tokens and a block of outputs, which lies as the result does.
LOWPREC_DEVICE void write_four(const SparseOutput& out, int64_t token, int64_t output, int block, int i, float4 run) {
  const int width = out.first ? kSparseTokens : block, shift = 31 - __clz(width);
  const int64_t row = (out.first ? output : token) + (4 * i >> shift);
  write_run(out, row, (out.first ? token : output) + (4 * i & (width - 1)), run);
}

}  // namespace lowprec
