// The model of Hopper's tensor cores on CUDA: 64x64 results of one leaf to a block, 4x4 to a thread. A step's operands
// stand in shared memory with exponent and significand apart, and are read twice: for the largest exponent, and to add.

#include <algorithm>
#include <cstdint>

#include "lowprec/hopper_ops.h"

namespace lowprec {
namespace {

constexpr int kWidth = 64;  // of a panel
constexpr int kTile = 4;    // results of a thread in a row and in a column
constexpr int kSide = kWidth / kTile;
constexpr int kThreads = kSide * kSide;
constexpr int64_t kBlocksPerMultiprocessor = 32;

/// A step of a panel's operands, and four lines of it at a time.
template <class Unit>
struct Stage {
  alignas(16) int32_t exponents[Unit::step][kWidth];
  alignas(16) int32_t significands[Unit::step][kWidth];

  /// Take apart this thread's share of the words. Whether any of them is infinite or NaN.
  __device__ __forceinline__ bool load(const int32_t* words, int scale) {
    int32_t seen = 0;
#pragma unroll
    for (int i = 0; i < Unit::step * kWidth; i += kThreads) {
      const int at = i + static_cast<int>(threadIdx.x);
      const int32_t word = words[at];
      (&exponents[0][0])[at] = operand::exponent(word);
      (&significands[0][0])[at] = operand::significand(word) * scale;
      seen |= word;
    }
    return seen & operand::special;
  }
};

struct Four {
  int32_t at[kTile];

  static __device__ __forceinline__ Four of(const int32_t* line, int group) {
    const int4 words = reinterpret_cast<const int4*>(line)[group];
    return {{words.x, words.y, words.z, words.w}};
  }
};

/// The whole model, for the few steps in which an operand is not finite.
template <class Unit>
__device__ __noinline__ uint32_t slow_step(const int32_t* a, const int32_t* b, uint32_t accumulator) {
  return hopper_step<Unit>(a, kWidth, b, kWidth, accumulator);
}

template <class Unit>
__device__ __forceinline__ void finite_step(const Stage<Unit>& a, const Stage<Unit>& b, int row, int column,
                                            uint32_t (&accumulators)[kTile][kTile]) {
  int largest[kTile][kTile], products[kTile][kTile] = {};
#pragma unroll
  for (int i = 0; i < kTile * kTile; ++i) largest[i / kTile][i % kTile] = hopper_exponent((&accumulators[0][0])[i]);
#pragma unroll 8
  for (int k = 0; k < Unit::step; ++k) {
    const Four x = Four::of(a.exponents[k], row), y = Four::of(b.exponents[k], column);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) largest[i][j] = max(largest[i][j], x.at[i] + y.at[j]);
    }
  }
#pragma unroll 4
  for (int k = 0; k < Unit::step; ++k) {
    const Four x = Four::of(a.exponents[k], row), y = Four::of(b.exponents[k], column);
    const Four left = Four::of(a.significands[k], row), right = Four::of(b.significands[k], column);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        products[i][j] += hopper_product(left.at[i], right.at[j], largest[i][j] - x.at[i] - y.at[j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const int64_t total = hopper_total<Unit>(products[i][j], accumulators[i][j], largest[i][j]);
      const uint32_t after = hopper_result<Unit>(total, largest[i][j]);
      if (!hopper_special(accumulators[i][j])) accumulators[i][j] = after;
    }
  }
}

/// A tile of one leaf: which panels, and what it writes.
template <class Unit>
__global__ void __launch_bounds__(kThreads, 2)
    leaves_kernel(const int32_t* a, const int32_t* b, const Leaves leaves, uint32_t* out, int64_t tiles) {
  __shared__ Stage<Unit> left, right;
  const int row = static_cast<int>(threadIdx.x) / kSide, column = static_cast<int>(threadIdx.x) % kSide;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t leaf = tile % leaves.count, q = tile / leaves.count;
    const int64_t columns = q % leaves.right.count(), rows = q / leaves.right.count() % leaves.left.count();
    const int64_t batch = q / leaves.right.count() / leaves.left.count(), first = leaf * leaves.terms * kWidth;
    const int32_t* x = a + leaves.left.first_word(batch, rows) + first;
    const int32_t* y = b + leaves.right.first_word(batch, columns) + first;
    uint32_t accumulators[kTile][kTile] = {};
    for (int64_t step = leaves.template steps<Unit>(leaf); step > 0; --step) {
      const bool special = left.load(x, 1 << hopper_lift<Unit>) | right.load(y, 1);
      if (__syncthreads_or(special)) {
        for (int i = 0; i < kTile * kTile; ++i) {
          uint32_t& accumulator = accumulators[i / kTile][i % kTile];
          accumulator = slow_step<Unit>(x + row * kTile + i / kTile, y + column * kTile + i % kTile, accumulator);
        }
      } else {
        finite_step<Unit>(left, right, row, column, accumulators);
      }
      __syncthreads();
      x += Unit::step * kWidth;
      y += Unit::step * kWidth;
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const int64_t line = rows * kWidth + row * kTile + i, across = columns * kWidth + column * kTile + j;
        if (line < leaves.left.lines && across < leaves.right.lines) {
          out[leaves.place(batch, line, across, leaf)] = accumulators[i][j];
        }
      }
    }
  }
}

template <class Unit, class C>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const typename C::Bits* x, const Panels panels, int32_t* words, int64_t count) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    words[i] = panels.read<Unit, C>(x, i);
  }
}

int grid_size(int64_t blocks, int device) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return static_cast<int>(std::min(blocks, multiprocessors * kBlocksPerMultiprocessor));
}

struct Cuda {
  static constexpr int64_t kLeftWidth = kWidth, kRightWidth = kWidth;

  template <class Unit, class C>
  static void pack(const Tensor& x, const Panels& panels, const Tensor& words) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t count = panels.words();
    pack_kernel<Unit, C>
        <<<grid_size((count + kThreads - 1) / kThreads, x.get_device_index()), kThreads, 0, current_stream(x)>>>(
            static_cast<const typename C::Bits*>(x.const_data_ptr()), panels,
            static_cast<int32_t*>(words.mutable_data_ptr()), count);
    check_cuda(cudaGetLastError());
  }

  template <class Unit>
  static void run(const Tensor& a, const Tensor& b, const Leaves& leaves, const Tensor& out) {
    const DeviceGuard guard(a.get_device_index());
    const int64_t tiles = leaves.left.batches * leaves.left.count() * leaves.right.count() * leaves.count;
    leaves_kernel<Unit><<<grid_size(tiles, a.get_device_index()), kThreads, 0, current_stream(a)>>>(
        static_cast<const int32_t*>(a.const_data_ptr()), static_cast<const int32_t*>(b.const_data_ptr()), leaves,
        static_cast<uint32_t*>(out.mutable_data_ptr()), tiles);
    check_cuda(cudaGetLastError());
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { register_hopper<Cuda>(library); }

}  // namespace
}  // namespace lowprec
