// How the update is written: gates, what was there before, one rounding.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/sparse_update.h"

namespace lowprec {

/// Two float32 as 16-bit values, the first one below.
LOWPREC_DEVICE uint32_t pack(float low, float high, bool half) {
  uint32_t result;
  if (half) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
}

/// And back: the lower or the upper one.
LOWPREC_DEVICE float unpack(uint32_t pair, bool upper, bool half) {
  if (!half) return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16);
  float result;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(result) : "r"(upper ? pair >> 16 : pair));
  return result;
}

/// What four neighbouring elements held.
LOWPREC_DEVICE float4 read_four(const UpdateOutput& out, int64_t element) {
  if (out.kind == UpdateOutput::float32)
    return *reinterpret_cast<const float4*>(static_cast<float*>(out.data) + element);
  const uint2 old = *reinterpret_cast<const uint2*>(static_cast<uint16_t*>(out.data) + element);
  const bool half = out.kind == UpdateOutput::float16;
  return {unpack(old.x, false, half), unpack(old.x, true, half), unpack(old.y, false, half), unpack(old.y, true, half)};
}

/// Write four neighbouring elements of a weight block from their sums.
static __device__ __noinline__ void write_four(const UpdateOutput& out, int64_t weight, int64_t element, float4 sum) {
  float4 value = sum;
  if (out.gate) {
    const float gate = __ldg(out.gate + weight);
    const bool open = gate != 0;
    value = {open ? __fmul_rn(gate, sum.x) : 0.0f, open ? __fmul_rn(gate, sum.y) : 0.0f,
             open ? __fmul_rn(gate, sum.z) : 0.0f, open ? __fmul_rn(gate, sum.w) : 0.0f};
  }
  if (out.beta != 0) {
    const float4 old = read_four(out, element);
    const auto add = [&](float was, float more) { return __fadd_rn(__fmul_rn(out.beta, was), more); };
    value = {add(old.x, value.x), add(old.y, value.y), add(old.z, value.z), add(old.w, value.w)};
  }
  if (out.kind == UpdateOutput::float32) {
    *reinterpret_cast<float4*>(static_cast<float*>(out.data) + element) = value;
    return;
  }
  const bool half = out.kind == UpdateOutput::float16;
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out.data) + element) = {pack(value.x, value.y, half),
                                                                           pack(value.z, value.w, half)};
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
  write_four(out, element / block_size, element, sum);
}

}  // namespace lowprec
