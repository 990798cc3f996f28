// Features last to features first, for products of which a block's features are less than a sector of memory. Device
// code.
#pragma once

#include <cstdint>

namespace lowprec {

constexpr int kTransposeSide = 64;
constexpr int kTransposeThreads = 256;

/// x [rows, columns] to out [columns, rows], rows of both so far apart, and zeros up to there; T is the bits of an
/// element.
template <class T>
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_kernel(const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
  __shared__ T tile[kTransposeSide][kTransposeSide + 4 / sizeof(T)];
  const int64_t across = (columns + kTransposeSide - 1) / kTransposeSide;
  const int64_t row = blockIdx.x / across * kTransposeSide, column = blockIdx.x % across * kTransposeSide;
  const int lane = threadIdx.x % kTransposeSide, first = threadIdx.x / kTransposeSide;
#pragma unroll
  for (int r = 0; r < kTransposeSide; r += kTransposeThreads / kTransposeSide) {
    const int64_t i = row + first + r;
    if (i < rows && column + lane < columns) tile[first + r][lane] = x[i * x_stride + column + lane];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kTransposeSide; c += kTransposeThreads / kTransposeSide) {
    const int64_t i = column + first + c;
    if (i >= columns || row + lane >= out_stride) continue;
    out[i * out_stride + row + lane] = row + lane < rows ? tile[lane][first + c] : T{0};
  }
}

template <class T>
cudaError_t launch_transpose(const void* x, int64_t x_stride, void* out, int64_t out_stride, int64_t rows,
                             int64_t columns, cudaStream_t stream) {
  const int64_t down = (out_stride + kTransposeSide - 1) / kTransposeSide;
  const int64_t across = (columns + kTransposeSide - 1) / kTransposeSide;
  transpose_kernel<T><<<static_cast<unsigned>(down * across), kTransposeThreads, 0, stream>>>(
      static_cast<const T*>(x), x_stride, static_cast<T*>(out), out_stride, rows, columns);
  return cudaGetLastError();
}

}  // namespace lowprec
