// The update of block-sparse weights on CUDA: what host and kernels agree on.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

constexpr int kUpdatePairs = 48;  // of one launch: what its arguments have room for
constexpr int kUpdateWarps = 8;
constexpr int kUpdateThreads = 32 * kUpdateWarps;
constexpr int kUpdateChunk = 64;  // tokens between places where sums may be split

/// Weight blocks of a tile, by features of a block: `UPDATE_TILES` of lowprec/block_tables.py.
LOWPREC_INLINE constexpr int update_tile(int block) { return block == 8 ? 160 : 4096 / (block * block) * 4; }

/// One operand of one pair; strides in elements.
struct UpdateOperand {
  const void* data;
  int64_t token;
  int64_t feature;
  int stride;  // bytes from row to row if 16 of a row may be copied at once, else 0
};

struct UpdatePair {
  UpdateOperand x;
  UpdateOperand dy;
  int tokens;
};

/// What the update is written to.
struct UpdateOutput {
  enum Kind { float32, bfloat16, float16 };

  void* data;   // [weights, block, block]
  float* sums;  // or float32 sums alone: [parts, weights, block, block], this launch's first
  const float* gate;
  float beta;
  Kind kind;
};

/// A launch: the pairs it adds up, and the tiles by which it does.
struct UpdateCall {
  UpdatePair pair[kUpdatePairs];
  int pairs;
  int parts;        // that the tokens are split into
  int part_chunks;  // chunks of each, the last may have fewer
  int first_part;   // of this launch
  int chunks;       // of all pairs
  int block;
  int log_block;
  int64_t weights;
  int tiles;
  int tile;         // weight blocks of one
  int stage_bytes;  // of shared memory for operands
  const int* plan;
  UpdateOutput out;
};

}  // namespace lowprec
