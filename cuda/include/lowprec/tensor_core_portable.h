// Products with tensor-core leaves on devices that are not Hopper's: by the instruction mma.sync of 16 rows, 8 columns
// and 16 terms, which Ampere and all after it have. Written to be short: operands go through shared memory by halves of
// words, whatever their strides.
#pragma once

#include <cstdint>

#include "lowprec/tensor_core.h"

namespace lowprec {

constexpr int kPortableTile = 64;  // rows and columns of a block, 32 of each for a warp
constexpr int kPortableThreads = 128;
constexpr int kPortableOutputs = 32;  // of a thread
constexpr int kPortableFlags = kPortableThreads / 32;
constexpr int kPortableStep = 16;  // terms of an instruction

/// An operand of 16-bit elements, its strides in elements.
struct StridedOperand {
  const uint16_t* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t column_stride;
};

struct PortableCall {
  ProductShape shape;
  int64_t depth;
  StridedOperand a;
  StridedOperand b;
  Output out;
  int* flags;
  const int* again;
};

#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 800 && !defined(__CUDA_ARCH_FEAT_SM90_ALL))
#define LOWPREC_PORTABLE 1
#endif

/// Which outputs a thread of a warp holds: of products of 16 rows and 8 columns, two below and four beside each other.
struct PortableFragment {
  const ProductShape& shape;
  int64_t matrix;
  int64_t row;
  int64_t column;

  LOWPREC_DEVICE int64_t index(int i) const {
    const int64_t r = row + 16 * (i / 16) + 8 * (i / 2 % 2), c = column + 8 * (i / 4 % 4) + i % 2;
    return r < shape.rows && c < shape.columns ? shape.index(matrix, r, c) : -1;
  }
};

struct PortableStage {
  uint16_t a[kPortableTile][kPortableStep + 8];  // rows of the depth
  uint16_t b[kPortableTile][kPortableStep + 8];  // columns of the depth
};

template <bool kHalf>
LOWPREC_DEVICE void multiply_fragments(float* d, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#ifdef LOWPREC_PORTABLE

/// Copy one step of both operands, zeros beyond their edges.
LOWPREC_DEVICE void load_step(const PortableCall& call, int64_t matrix, int64_t row, int64_t column, int step,
                              PortableStage& stage) {
  for (int i = threadIdx.x; i < kPortableTile * kPortableStep; i += kPortableThreads) {
    const int line = i / kPortableStep, k = i % kPortableStep;
    const int64_t depth = static_cast<int64_t>(step) * kPortableStep + k;
    const int64_t r = row + line, c = column + line;
    stage.a[line][k] =
        r < call.shape.rows && depth < call.depth
            ? call.a.data[matrix * call.a.batch_stride + r * call.a.row_stride + depth * call.a.column_stride]
            : 0;
    stage.b[line][k] =
        c < call.shape.columns && depth < call.depth
            ? call.b.data[matrix * call.b.batch_stride + depth * call.b.row_stride + c * call.b.column_stride]
            : 0;
  }
}

LOWPREC_DEVICE uint32_t pair_at(const uint16_t (&line)[kPortableStep + 8], int k) {
  return line[k] | static_cast<uint32_t>(line[k + 1]) << 16;
}

/// One step's products of a warp's 32 rows and columns.
template <bool kHalf>
LOWPREC_DEVICE void multiply_step(const PortableStage& stage, int row, int column, float (&leaf)[kPortableOutputs]) {
  const int g = threadIdx.x % 32 / 4, k = threadIdx.x % 4 * 2;
  uint32_t b[4][2];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    b[j][0] = pair_at(stage.b[column + 8 * j + g], k);
    b[j][1] = pair_at(stage.b[column + 8 * j + g], k + 8);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto &upper = stage.a[row + 16 * i + g], &lower = stage.a[row + 16 * i + g + 8];
    const uint32_t a[4] = {pair_at(upper, k), pair_at(lower, k), pair_at(upper, k + 8), pair_at(lower, k + 8)};
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_fragments<kHalf>(leaf + 16 * i + 4 * j, a, b[j]);
  }
}

#endif

template <bool kHalf, class Sum>
__global__ void __launch_bounds__(kPortableThreads)
    portable_product_kernel(const __grid_constant__ PortableCall call,
                            const __grid_constant__ typename Sum::Setting setting) {
#ifdef LOWPREC_PORTABLE
  __shared__ PortableStage stage;
  const int warp = threadIdx.x / 32, row = warp / 2 * 32, column = warp % 2 * 32;
  const int64_t across = (call.shape.columns + kPortableTile - 1) / kPortableTile;
  const int64_t down = (call.shape.rows + kPortableTile - 1) / kPortableTile;
  for (int64_t tile = blockIdx.x; tile < call.shape.batch * down * across; tile += gridDim.x) {
    const int64_t flags = tile * kPortableFlags;
    if (call.again) {
      int any = 0;
      for (int i = 0; i < kPortableFlags; ++i) any |= call.again[flags + i];
      if (any == 0) continue;
    }
    const int64_t matrix = tile / (down * across), top = tile / across % down * kPortableTile;
    const int64_t left = tile % across * kPortableTile;
    const PortableFragment where{call.shape, matrix, top + row + threadIdx.x % 32 / 4,
                                 left + column + threadIdx.x % 4 * 2};
    Sum sum(setting);
    float leaf[kPortableOutputs];
    int step = 0;
    for (int n = 0; n < call.shape.leaves; ++n) {
      for (float& x : leaf) x = 0;
      for (int left_steps = call.shape.steps_of(n); left_steps > 0; --left_steps, ++step) {
        __syncthreads();
        load_step(call, matrix, top, left, step, stage);
        __syncthreads();
        multiply_step<kHalf>(stage, row, column, leaf);
      }
      const bool last = n + 1 == call.shape.leaves;
      sum.add(leaf, n, last, where);
    }
    float values[kPortableOutputs];
#pragma unroll
    for (int i = 0; i < kPortableOutputs; ++i) values[i] = sum.value(i);
#pragma unroll 1
    for (int i = 0; i < kPortableOutputs && call.out.data; ++i) {
      const int64_t index = where.index(i);
      if (index >= 0) store_element(call.out, index, output_bits(call.out, values[i], index));
    }
    if (call.flags) {
      const bool failed = __any_sync(0xFFFFFFFF, sum.met_special());
      if (threadIdx.x % 32 == 0) call.flags[flags + warp] = failed;
    }
  }
#endif
}

}  // namespace lowprec
