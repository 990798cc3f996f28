// How a block-sparse product is launched. Without torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lowprec/sparse_kernel.h"

namespace lowprec {

/// Blocks beyond which a column comes in parts, where that is worth a second kernel. lowprec/block_tables.py plans by
/// the same number.
inline int64_t sparse_part_blocks(int64_t outputs, int64_t blocks, int64_t block) {
  const int64_t columns = std::max<int64_t>(outputs, 400);
  return std::max((2 * blocks + columns - 1) / columns, 256 / block);
}

inline int64_t sparse_parts(int64_t outputs, int64_t blocks, int64_t block) {
  return outputs + blocks / sparse_part_blocks(outputs, blocks, block);
}

/// Whether columns come in parts: where a long one would be the last to end, by far.
inline bool sparse_splits(int64_t tokens, int64_t block) { return tokens <= 2 * kSparseTokens && block >= 16; }

/// Whether features must come first: where a block's are less than two sectors of memory, and codes.
inline bool sparse_turns(int64_t block, bool x_codes) { return x_codes || block <= 16; }

/// Whether a column's tiles are taken up beside each other, so that its weights are read from memory once. Smaller ones
/// gain more by neighbours that share inputs.
inline bool sparse_beside(int64_t block) { return block >= 32; }

template <int kBlock, bool kTranspose, bool kCodes>
cudaError_t launch_sparse(const SparseCall& call, unsigned grid, cudaStream_t stream) {
  const SparseRoom room(call.x_codes.way != Decoding::none, call.w_codes.way != Decoding::none, kBlock);
  const auto kernel = sparse_kernel<kBlock, kTranspose, kCodes>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room.total());
  if (error != cudaSuccess) return error;
  kernel<<<grid, kSparseThreads, room.total(), stream>>>(call);
  return cudaGetLastError();
}

template <int kBlock>
cudaError_t launch_sparse(const SparseCall& call, bool transpose, unsigned grid, cudaStream_t stream) {
  const bool codes = call.x_codes.way != Decoding::none || call.w_codes.way != Decoding::none;
  if (codes && transpose) return launch_sparse<kBlock, true, true>(call, grid, stream);
  if (codes) return launch_sparse<kBlock, false, true>(call, grid, stream);
  if (transpose) return launch_sparse<kBlock, true, false>(call, grid, stream);
  return launch_sparse<kBlock, false, false>(call, grid, stream);
}

/// Multiply as described. `early`: whether the device is of compute capability 9.0 or later.
inline cudaError_t launch_sparse(SparseCall call, int block, bool transpose, bool early, cudaStream_t stream) {
  const int64_t tiles = (call.out.tokens + kSparseTokens - 1) / kSparseTokens, size = tiles * call.parts.count;
  if (size > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(size);
  if (sparse_beside(block) && !call.partial) call.beside = static_cast<int>(tiles);
  const auto launch = block == 8    ? launch_sparse<8>
                      : block == 16 ? launch_sparse<16>
                      : block == 32 ? launch_sparse<32>
                                    : launch_sparse<64>;
  const cudaError_t error = launch(call, transpose, grid, stream);
  if (error != cudaSuccess || !call.partial) return error;
  return launch_after(join_parts_kernel, grid, kSparseThreads, 0, early, stream, call, block);
}

}  // namespace lowprec
