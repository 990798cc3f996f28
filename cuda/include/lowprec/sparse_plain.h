// Block-sparse products of float64, and of float32: a thread adds up the terms of one output, in order. Device code.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/tensor_core_output.h"

namespace lowprec {

constexpr int kSparsePlainThreads = 128;

template <class T>
struct SparsePlainCall {
  const T* x;
  int64_t token_stride;
  int64_t feature_stride;
  const T* w;
  const float* gate;
  const int* offsets;
  const int* pairs;
  T* out;
  int64_t tokens;
  int64_t features;  // of the result
  int block;
  bool first;
  bool transpose;
};

/// The terms of one block, under a gate that is not closed.
template <class T>
LOWPREC_DEVICE T add_block(const SparsePlainCall<T>& call, const T* x, const T* w, int64_t step, T gate, T sum) {
  for (int k = 0; k < call.block; ++k) {
    const T weight = call.gate ? w[k * step] * gate : w[k * step];
    sum = fma(x[k * call.feature_stride], weight, sum);
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kSparsePlainThreads) sparse_plain_kernel(const SparsePlainCall<T> call) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSparsePlainThreads;
  const int64_t first_index = static_cast<int64_t>(blockIdx.x) * kSparsePlainThreads + threadIdx.x;
  for (int64_t index = first_index; index < call.tokens * call.features; index += threads) {
    const int64_t token = call.first ? index % call.tokens : index / call.features;
    const int64_t feature = call.first ? index / call.tokens : index % call.features;
    const int64_t column = feature / call.block, place = feature % call.block;
    T sum = 0;
    for (int64_t n = call.offsets[column]; n < call.offsets[column + 1]; ++n) {
      const int64_t input = call.pairs[2 * n], id = call.pairs[2 * n + 1];
      const float gate = call.gate ? call.gate[id] : 1;
      if (gate == 0) continue;
      const T* x = call.x + token * call.token_stride + input * call.block * call.feature_stride;
      const T* w = call.w + id * call.block * call.block + place * (call.transpose ? call.block : 1);
      sum = add_block(call, x, w, call.transpose ? 1 : call.block, static_cast<T>(gate), sum);
    }
    call.out[index] = sum;
  }
}

/// Write float32 sums, in rows so far apart, in another form without gaps.
__global__ void __launch_bounds__(kSparsePlainThreads)
    write_sums_kernel(const float* sums, int64_t count, int64_t row, int64_t pitch,
                      const __grid_constant__ Output out) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSparsePlainThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSparsePlainThreads + threadIdx.x;
  for (int64_t i = 4 * first; i < count; i += 4 * threads) {
    const int some = count - i < 4 ? static_cast<int>(count - i) : 4;
    float four[4] = {};
    if (row == pitch && some == 4) {
      const float4 run = *reinterpret_cast<const float4*>(sums + i);
      four[0] = run.x, four[1] = run.y, four[2] = run.z, four[3] = run.w;
    } else {
      for (int n = 0; n < some; ++n) four[n] = sums[(i + n) / row * pitch + (i + n) % row];
    }
    store_four(out, i, four, some);
  }
}

}  // namespace lowprec
