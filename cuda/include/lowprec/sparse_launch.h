// Which kernel multiplies by block-sparse weights, and how its warps share the work. Without torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lowprec/sparse_kernel.h"

namespace lowprec {

/// Enough warps to keep the memory busy, each with enough to do; tokens together where weights are most of what is
/// read.
inline SparseShape sparse_shape(const SparseCall& call, int64_t blocks, int multiprocessors) {
  const int halves = call.block == 64 ? 2 : 1;
  const int64_t token_tiles = (call.out.tokens + kSparseTokens - 1) / kSparseTokens;
  const int64_t steps = std::max<int64_t>(blocks * call.block / 16 / std::max(call.outputs, 1), 1);  // of a column
  const int64_t wanted = 32LL * multiprocessors;
  SparseShape shape{1, halves, 1, 1, 1};
  const int warps = call.block >= 32 ? 4 : kSparseWarps;
  while (call.block >= 32 && shape.warps() < warps && shape.token_warps < token_tiles) shape.token_warps *= 2;
  const int64_t least = static_cast<int64_t>(call.outputs) * halves * token_tiles;
  while (shape.warps() < warps && least * shape.splits < wanted && steps >= 8 * shape.splits) shape.splits *= 2;
  shape.columns = std::max(1, warps / shape.warps());
  shape.column_groups = (call.outputs + shape.columns - 1) / shape.columns;
  return shape;
}

template <bool kFirst, int kOutputs, bool kTranspose>
cudaError_t launch_sparse(const SparseCall& call, int64_t token_tiles, cudaStream_t stream) {
  const SparseShape& shape = call.shape;
  const int64_t grid = (token_tiles + shape.token_warps - 1) / shape.token_warps * shape.column_groups;
  const int columns = shape.warps() / shape.splits;
  const int parts = (shape.splits - 1) * kSparseTokens * kOutputs, slow = call.out.direct ? 0 : kSparseTokens * 8;
  const int shared = columns * std::max(parts, slow) * static_cast<int>(sizeof(float));
  const bool codes = call.x_codes.way != Decoding::none || call.w_codes.way != Decoding::none;
  const auto kernel =
      codes ? sparse_kernel<kFirst, kOutputs, kTranspose, true> : sparse_kernel<kFirst, kOutputs, kTranspose, false>;
  if (grid > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), 32 * shape.warps(), shared, stream>>>(call);
  return cudaGetLastError();
}

template <bool kFirst, int kOutputs>
cudaError_t launch_sparse(const SparseCall& call, bool transpose, int64_t token_tiles, cudaStream_t stream) {
  if (transpose) return launch_sparse<kFirst, kOutputs, true>(call, token_tiles, stream);
  return launch_sparse<kFirst, kOutputs, false>(call, token_tiles, stream);
}

/// Multiply as described; `call.shape` is set.
inline cudaError_t launch_sparse(const SparseCall& call, bool first, bool transpose, cudaStream_t stream) {
  const int64_t tiles = (call.out.tokens + kSparseTokens - 1) / kSparseTokens;
  switch (call.block) {
    case 8:
      if (first) return launch_sparse<true, 8>(call, transpose, tiles, stream);
      return launch_sparse<false, 8>(call, transpose, tiles, stream);
    case 16:
      if (first) return launch_sparse<true, 16>(call, transpose, tiles, stream);
      return launch_sparse<false, 16>(call, transpose, tiles, stream);
    default:
      if (first) return launch_sparse<true, 32>(call, transpose, tiles, stream);
      return launch_sparse<false, 32>(call, transpose, tiles, stream);
  }
}

}  // namespace lowprec
