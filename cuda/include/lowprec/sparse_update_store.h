// How the update is written: gates, what was there before, one rounding.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/sparse_update.h"
#include "lowprec/warp_matrix.h"

namespace lowprec {

/// The lower one of two 16-bit values as float32. The upper one of bfloat16 as the lower one of the word moved down.
template <bool kHalf>
LOWPREC_DEVICE float unpack(uint32_t pair) {
  if constexpr (!kHalf) return __uint_as_float(pair << 16);
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(static_cast<uint16_t>(pair)));
  return result;
}

template <bool kHalf>
LOWPREC_DEVICE float4 unpack(uint2 four) {
  return {unpack<kHalf>(four.x), unpack<kHalf>(four.x >> 16), unpack<kHalf>(four.y), unpack<kHalf>(four.y >> 16)};
}

/// Four neighbouring elements of a row of a weight block: where they go, and their sums.
struct Four {
  bool any;
  int weight;
  int64_t element;
  float4 sum;
};

/// gate · sum, or nothing if the gate is closed.
LOWPREC_DEVICE float4 gated(float4 sum, float gate) {
  if (gate == 0) return {0, 0, 0, 0};
  return {__fmul_rn(gate, sum.x), __fmul_rn(gate, sum.y), __fmul_rn(gate, sum.z), __fmul_rn(gate, sum.w)};
}

/// beta · old + sum.
LOWPREC_DEVICE float4 added(float4 sum, float beta, float4 old) {
  const auto add = [&](float was, float more) { return __fadd_rn(__fmul_rn(beta, was), more); };
  return {add(old.x, sum.x), add(old.y, sum.y), add(old.z, sum.z), add(old.w, sum.w)};
}

/// Write elements of float32.
template <int N>
LOWPREC_DEVICE void write_singles(float* data, float beta, const Four (&four)[N]) {
  float4 old[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (beta != 0 && four[i].any) old[i] = *reinterpret_cast<const float4*>(data + four[i].element);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (!four[i].any) continue;
    *reinterpret_cast<float4*>(data + four[i].element) = beta != 0 ? added(four[i].sum, beta, old[i]) : four[i].sum;
  }
}

/// Write elements of 16 bits.
template <bool kHalf, int N>
LOWPREC_DEVICE void write_halves(uint16_t* data, float beta, const Four (&four)[N]) {
  uint2 old[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (beta != 0 && four[i].any) old[i] = *reinterpret_cast<const uint2*>(data + four[i].element);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float4 sum = four[i].sum;
    if (beta != 0) sum = added(sum, beta, unpack<kHalf>(old[i]));
    const uint2 value = {narrow_pair<kHalf>(sum.x, sum.y), narrow_pair<kHalf>(sum.z, sum.w)};
    if (four[i].any) *reinterpret_cast<uint2*>(data + four[i].element) = value;
  }
}

/// Write some fours, or their sums alone, these from `part` on.
template <int N>
LOWPREC_DEVICE void write_fours(const UpdateOutput& out, Four (&four)[N], int64_t part) {
  if (out.sums) return write_singles(out.sums + part, 0, four);
  if (out.gate) {
#pragma unroll
    for (int i = 0; i < N; ++i) four[i].sum = gated(four[i].sum, __ldg(out.gate + max(four[i].weight, 0)));
  }
  if (out.kind == UpdateOutput::float32) return write_singles(static_cast<float*>(out.data), out.beta, four);
  if (out.kind == UpdateOutput::float16) return write_halves<true>(static_cast<uint16_t*>(out.data), out.beta, four);
  write_halves<false>(static_cast<uint16_t*>(out.data), out.beta, four);
}

/// Add up the parts of sums in their order, four elements a thread, and write them.
__global__ void __launch_bounds__(kUpdateThreads)
    add_parts_kernel(const __grid_constant__ UpdateOutput out, int parts, int64_t size, int block_size) {
  const int64_t element = 4 * (static_cast<int64_t>(blockIdx.x) * kUpdateThreads + threadIdx.x);
  if (element >= size) return;
  float4 sum = {0, 0, 0, 0};
  for (int part = 0; part < parts; ++part) {
    const float4 more = *reinterpret_cast<const float4*>(out.sums + part * size + element);
    sum = {__fadd_rn(sum.x, more.x), __fadd_rn(sum.y, more.y), __fadd_rn(sum.z, more.z), __fadd_rn(sum.w, more.w)};
  }
  UpdateOutput to = out;
  to.sums = nullptr;
  Four four[1] = {{true, static_cast<int>(element / block_size), element, sum}};
  write_fours(to, four, 0);
}

}  // namespace lowprec
