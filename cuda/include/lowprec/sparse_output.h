// Where the sums of block-sparse products go: from registers, in runs of neighbours. Device code.
#pragma once

#include <cstdint>

#include "lowprec/tensor_core_output.h"

namespace lowprec {

struct SparseOutput {
  Output to;
  int64_t tokens;
  int64_t features;
  bool direct;  // float32, bfloat16 or float16 sums, whose runs lie at multiples of their size
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

/// A run of two, four or eight neighbours.
template <int kCount>
LOWPREC_DEVICE void write_run(const SparseOutput& out, int64_t index, const float (&run)[kCount]) {
  if (out.to.bytes == 4) {
    float* to = static_cast<float*>(out.to.data) + index;
    if constexpr (kCount == 2) {
      *reinterpret_cast<float2*>(to) = {run[0], run[1]};
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4)
        *reinterpret_cast<float4*>(to + i) = {run[i], run[i + 1], run[i + 2], run[i + 3]};
    }
    return;
  }
  uint32_t pairs[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) pairs[i] = narrow_pair(out.to.half, run[2 * i], run[2 * i + 1]);
  uint16_t* to = static_cast<uint16_t*>(out.to.data) + index;
  if constexpr (kCount == 2) {
    *reinterpret_cast<uint32_t*>(to) = pairs[0];
  } else if constexpr (kCount == 4) {
    *reinterpret_cast<uint2*>(to) = {pairs[0], pairs[1]};
  } else {
    *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

/// Sums of 64 tokens and 8 outputs, from where each lane has put its own 16, whatever their form and place: a lane's
/// are those of two outputs from `output` on.
template <bool kFirst>
__device__ __noinline__ void write_slowly(const SparseOutput& out, const float* sums, int64_t first_token,
                                          int64_t output) {
  const int lane = threadIdx.x % 32, g = lane / 4;
#pragma unroll 1
  for (int i = 0; i < (kFirst ? 4 : 8); ++i) {
    // Of four tokens from 4 (i % 2) on and output i / 2, or of two outputs and token i.
    float run[4];
#pragma unroll
    for (int u = 0; u < (kFirst ? 4 : 2); ++u) {
      const int m = kFirst ? i % 2 * 4 + u : i, n = kFirst ? i / 2 : u;
      run[u] = sums[32 * (m / 2 * 4 + m % 2 * 2 + n) + lane];
    }
    const int64_t token = first_token + (kFirst ? 8 * g + i % 2 * 4 : 8 * i + g);
    const int64_t left = out.tokens - token;
    if (left <= 0) continue;
    const int64_t index = kFirst ? (output + i / 2) * out.tokens + token : token * out.features + output;
    store_four(out.to, index, run, kFirst ? static_cast<int>(left < 4 ? left : 4) : 2);
  }
}

}  // namespace lowprec
