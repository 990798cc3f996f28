// Block-sparse products of many tokens on Hopper: when, and what the kernel of sparse_hopper.cu is given. Without
// torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lowprec/sparse_output.h"

namespace lowprec {

/// Thread blocks, whatever the device has: the order of sums follows from it. Those of an H100 or H200 are as many
/// multiprocessors.
constexpr int kHopperShares = 132;
constexpr int kHopperBlock = 64;   // features of a block
constexpr int kGroupTokens = 128;  // that a warpgroup multiplies

/// Warpgroups that multiply, and tokens of a tile.
LOWPREC_INLINE constexpr int hopper_groups(int64_t tokens) { return tokens > kGroupTokens ? 2 : 1; }
LOWPREC_INLINE constexpr int hopper_tile(int64_t tokens) { return hopper_groups(tokens) * kGroupTokens; }
LOWPREC_INLINE constexpr int64_t hopper_tiles(int64_t tokens) {
  return (tokens + hopper_tile(tokens) - 1) / hopper_tile(tokens);
}

/// Whether there are tokens enough, and pairs of items for every share, below which the other kernel takes less time.
inline bool hopper_serves(int64_t tokens, int64_t blocks) {
  const int64_t least = hopper_groups(tokens) == 1 ? 3 : 8;
  return tokens >= 64 && blocks * hopper_tiles(tokens) >= least * kHopperShares;
}

/// Float32 sums that shares have of an item which another one ends, and flags that tell of them, one for each warp.
inline int64_t hopper_partials(int64_t tokens) { return int64_t{kHopperShares} * kHopperBlock * hopper_tile(tokens); }
inline int hopper_flags(int64_t tokens) { return kHopperShares * 4 * hopper_groups(tokens); }

struct SparseHopperCall {
  const void* x;
  int64_t x_stride;    // between features where they come first, else between tokens; in multiples of 16 bytes
  int64_t x_features;  // of x
  const void* w;       // [blocks, 64, 64]
  int64_t blocks;
  const int* offsets;  // of columns' pairs
  const int* pairs;
  int outputs;  // columns
  float* partial;
  uint32_t* flags;
  bool half;       // float16, and not bfloat16
  bool transpose;  // whether blocks are [out, in]
  SparseOutput out;
};

/// Multiply, on a device of compute capability 9.0.
cudaError_t launch_sparse_hopper(const SparseHopperCall& call, cudaStream_t stream);

}  // namespace lowprec
