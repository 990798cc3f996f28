// Block-sparse products on tensor cores: y = x · W, or dx = dy · Wᵀ. Device code, without torch.
// docs/kernels/sparse.md has the reasons.
//
// A warp multiplies 64 tokens of x by the blocks of one output column (or half a column of 64) and keeps the sums in
// registers. Operands go from memory into the registers that mma.sync takes them from: which token, feature or output
// stands in which row or column of an instruction is free, as long as both operands and the result agree, and is chosen
// such that a lane reads and writes runs of neighbours. What warps of a block have in common they find in the L1 cache.
//
// With g = lane / 4 and t = lane % 4:
//   features: a stage takes 16 of one block, a lane those from 4t on; or 8 of two blocks, a lane those from 2t on.
//   outputs: a lane has those from (outputs of the warp / 4) · t on.
//   tokens: features first, a lane has those from 8g on; last, those of 8m + g.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/sparse_output.h"
#include "lowprec/sparse_pairs.h"

namespace lowprec {

constexpr int kSparseTokens = 64;  // of a warp
constexpr int kSparseWarps = 8;    // of a block, at most

/// What the warps of a thread block share out: parts of a column's list, halves of a column, tokens, and columns.
struct SparseShape {
  int splits;
  int halves;
  int token_warps;
  int columns;
  int column_groups;  // thread blocks to cover all columns

  LOWPREC_INLINE int warps() const { return splits * halves * token_warps * columns; }
};

struct SparseCall {
  const void* x;
  int64_t x_stride;  // between features where they come first, else between tokens
  const void* w;     // [blocks, block, block]
  const float* gate;
  const int* offsets;
  const int* pairs;
  const int* order;
  int outputs;  // columns of blocks
  int block;
  bool half;  // float16, and not bfloat16
  PairDecode x_codes;
  PairDecode w_codes;
  SparseShape shape;
  SparseOutput out;
};

/// A warp's share.
struct SparsePlace {
  int split;
  int half;
  int64_t token;
  int column;  // -1: none

  LOWPREC_DEVICE explicit SparsePlace(const SparseCall& call) {
    const SparseShape& shape = call.shape;
    int warp = threadIdx.x / 32;
    split = warp % shape.splits;
    warp /= shape.splits;
    half = warp % shape.halves;
    warp /= shape.halves;
    const int token_tile = blockIdx.x / shape.column_groups * shape.token_warps + warp % shape.token_warps;
    token = static_cast<int64_t>(token_tile) * kSparseTokens;
    const int rank = blockIdx.x % shape.column_groups * shape.columns + warp / shape.token_warps;
    column = rank < call.outputs && token < call.out.tokens ? __ldg(call.order + rank) : -1;
  }
};

/// A block to multiply by: none where `id` is negative.
struct SparseLink {
  int input = 0;
  int id = -1;
  float gate = 1;
};

template <int kBytes>
LOWPREC_DEVICE void load_run(uint32_t* to, const void* from, bool there) {
  if constexpr (kBytes == 16) {
    const uint4 run = there ? __ldg(static_cast<const uint4*>(from)) : uint4{};
    to[0] = run.x, to[1] = run.y, to[2] = run.z, to[3] = run.w;
  } else if constexpr (kBytes == 8) {
    const uint2 run = there ? __ldg(static_cast<const uint2*>(from)) : uint2{};
    to[0] = run.x, to[1] = run.y;
  } else if constexpr (kBytes == 4) {
    to[0] = there ? __ldg(static_cast<const uint32_t*>(from)) : 0;
  } else {
    to[0] = there ? __ldg(static_cast<const uint16_t*>(from)) : 0;
  }
}

/// So many elements, of 16 bits or, where `codes`, of 8.
template <int kCount, bool kCodes>
LOWPREC_DEVICE void load_elements(uint32_t* to, const void* from, int64_t at, bool codes, bool there) {
  if (kCodes && codes) return load_run<kCount>(to, static_cast<const uint8_t*>(from) + at, there);
  load_run<2 * kCount>(to, static_cast<const uint16_t*>(from) + at, there);
}

/// An 8 × 8 matrix, of which a lane has two neighbours of a row, transposed.
LOWPREC_DEVICE uint32_t transpose_fragment(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

template <bool kHalf>
LOWPREC_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

/// Stages that a warp has in flight.
template <int kOutputs>
constexpr int kSparseDepth = kOutputs == 32 ? 2 : 3;
/// Thread blocks that a multiprocessor is to hold at least.
template <int kOutputs>
constexpr int kSparseBlocks = kOutputs == 32 ? 1 : 2;

/// What a warp does.
template <bool kFirst, int kOutputs, bool kTranspose, bool kCodes>
struct SparseWarp {
  static constexpr int kTiles = kOutputs / 8;            // instructions beside each other
  static constexpr int kRun = kOutputs / 4;              // neighbouring outputs of a lane
  static constexpr int kBlocks = kOutputs == 8 ? 2 : 1;  // of a stage
  static constexpr int kFeatures = 4 / kBlocks;          // neighbouring features of a lane, of each block
  static constexpr int kDepth = kSparseDepth<kOutputs>;

  /// 16 terms of every output, as they lie in memory.
  struct Stage {
    uint32_t x[16];
    uint32_t w[2 * kTiles];
    float gate[kBlocks];
  };

  const SparseCall& call;
  const SparsePlace& place;
  int lane_g;
  int lane_t;
  int begin;   // of the column's pairs
  int count;   // of them
  int chunks;  // stages of a block
  float sums[4][kTiles][4];

  LOWPREC_DEVICE SparseWarp(const SparseCall& call, const SparsePlace& place)
      : call(call), place(place), lane_g(threadIdx.x % 32 / 4), lane_t(threadIdx.x % 4) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i / kTiles][i % kTiles][c] = 0;
    }
  }

  LOWPREC_DEVICE int64_t row_in_tile(int run, int l) const { return run * (lane_g / 2) + 2 * l + lane_g % 2; }

  /// The blocks of a step.
  LOWPREC_DEVICE void find(int step, SparseLink (&links)[kBlocks]) const {
#pragma unroll
    for (int q = 0; q < kBlocks; ++q) {
      const int n = kBlocks == 2 ? 2 * step + q : step / chunks;
      links[q] = {};
      if (n >= count) continue;
      const int* pair = call.pairs + 2 * static_cast<int64_t>(begin + n);
      links[q].input = __ldg(pair);
      links[q].id = __ldg(pair + 1);
      if (call.gate) {
        links[q].gate = __ldg(call.gate + links[q].id);
        if (links[q].gate == 0) links[q].id = -1;
      }
    }
  }

  LOWPREC_DEVICE void load(Stage& stage, const SparseLink (&links)[kBlocks], int step) const {
    const int chunk = kBlocks == 2 ? 0 : 16 * (step % chunks);
#pragma unroll
    for (int q = 0; q < kBlocks; ++q) {
      const bool there = links[q].id >= 0;
      stage.gate[q] = links[q].gate;
      load_x(stage, q, static_cast<int64_t>(links[q].input) * call.block + chunk + kFeatures * lane_t, there);
      load_w(stage, q, static_cast<int64_t>(links[q].id) * call.block * call.block, chunk, there);
    }
  }

  LOWPREC_DEVICE void load_x(Stage& stage, int q, int64_t feature, bool there) const {
    const bool codes = call.x_codes.way != Decoding::none;
    if constexpr (kFirst) {
      const int64_t token = place.token + 8 * lane_g;
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) {
        load_elements<8, kCodes>(stage.x + 8 * q + 4 * f, call.x, (feature + f) * call.x_stride + token, codes,
                                 there && token < call.out.tokens);
      }
    } else {
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        const int64_t token = place.token + 8 * m + lane_g;
        load_elements<kFeatures, kCodes>(stage.x + 2 * m + q, call.x, token * call.x_stride + feature, codes,
                                         there && token < call.out.tokens);
      }
    }
  }

  LOWPREC_DEVICE void load_w(Stage& stage, int q, int64_t origin, int chunk, bool there) const {
    const bool codes = call.w_codes.way != Decoding::none;
    const int outputs = place.half * kOutputs;
    if constexpr (kBlocks == 2) {
      load_elements<2, kCodes>(stage.w + q, call.w, origin + 8 * lane_g + 2 * lane_t, codes, there);
    } else if constexpr (kTranspose) {
#pragma unroll
      for (int l = 0; l < kTiles; ++l) {
        const int64_t row = outputs + row_in_tile(kRun, l);
        load_elements<4, kCodes>(stage.w + 2 * l, call.w, origin + row * call.block + chunk + 4 * lane_t, codes, there);
      }
    } else {
#pragma unroll
      for (int l = 0; l < 2; ++l) {
        const int64_t row = chunk + row_in_tile(4, l);
        load_elements<kRun, kCodes>(stage.w + kTiles * l, call.w, origin + row * call.block + outputs + kRun * lane_t,
                                    codes, there);
      }
    }
  }

  /// Bytes of two words, codes, in the upper halves' bytes of one.
  template <Decoding kWay>
  LOWPREC_DEVICE uint32_t decode(const PairDecode& by, uint32_t low, uint32_t high, uint32_t places) const {
    const uint8_t up = is_half(kWay) ? by.half.up : by.wide.up;
    return decode_pair<kWay>(by, __byte_perm(low << up, high << up, places));
  }

  /// Features 2j and 2j + 1 of a lane's m-th token.
  template <Decoding kWay>
  LOWPREC_DEVICE uint32_t x_pair(const Stage& stage, int m, int j) const {
    if constexpr (kFirst) {
      const uint32_t *even = stage.x + 8 * j, *odd = even + 4;
      if constexpr (kWay == Decoding::none) return __byte_perm(even[m / 2], odd[m / 2], m % 2 ? 0x7632 : 0x5410);
      return decode<kWay>(call.x_codes, even[m / 4], odd[m / 4], m % 4 << 4 | (4 + m % 4) << 12);
    } else {
      if constexpr (kWay == Decoding::none) return stage.x[2 * m + j];
      if constexpr (kBlocks == 2) return decode<kWay>(call.x_codes, stage.x[2 * m + j], 0, 0x1000);
      return decode<kWay>(call.x_codes, stage.x[2 * m], 0, j ? 0x3020 : 0x1000);
    }
  }

  /// A lane's part of an instruction's second operand, before a gate: features pair j, outputs of tile n.
  template <Decoding kWay>
  LOWPREC_DEVICE uint32_t w_pair(const Stage& stage, int n, int j) const {
    // Rows and neighbours within a row.
    const int row = kTranspose && kBlocks == 1 ? n : j, at = kTranspose && kBlocks == 1 ? j : n;
    constexpr int words = kBlocks == 2 ? 1 : kTranspose ? 2 : kTiles;
    if constexpr (kWay == Decoding::none) return stage.w[words * row + at];
    return decode<kWay>(call.w_codes, stage.w[words * row + at / 2], 0, at % 2 ? 0x3020 : 0x1000);
  }

  /// By one rounding into the operands' dtype.
  LOWPREC_DEVICE uint32_t gated(uint32_t pair, float gate) const {
    if (call.half) return codes::multiply<true>(pair, narrow_pair(true, gate, gate));
    return codes::multiply<false>(pair, narrow_pair(false, gate, gate));
  }

  template <Decoding kWay>
  LOWPREC_DEVICE void second_operands(const Stage& stage, uint32_t (&b)[kTiles][2]) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) b[n][j] = w_pair<kWay>(stage, n, j);
    }
  }

  template <Decoding kWay>
  LOWPREC_DEVICE void first_operands(const Stage& stage, uint32_t (&a)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i][r] = x_pair<kWay>(stage, 2 * i + r % 2, r / 2);
    }
  }

  LOWPREC_DEVICE void multiply(const Stage& stage) {
    uint32_t b[kTiles][2], a[4][4];
    if constexpr (!kCodes) {
      second_operands<Decoding::none>(stage, b);
      first_operands<Decoding::none>(stage, a);
    } else {
      for_decoding(call.w_codes.way, [&]<Decoding kWay>() { second_operands<kWay>(stage, b); });
      for_decoding(call.x_codes.way, [&]<Decoding kWay>() { first_operands<kWay>(stage, a); });
    }
    if (call.gate) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) b[i / 2][i % 2] = gated(b[i / 2][i % 2], stage.gate[i % 2 * (kBlocks - 1)]);
    }
    if constexpr (!kTranspose) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) b[i / 2][i % 2] = transpose_fragment(b[i / 2][i % 2]);
    }
    if (call.half) {
      multiply_all<true>(a, b);
    } else {
      multiply_all<false>(a, b);
    }
  }

  template <bool kHalf>
  LOWPREC_DEVICE void multiply_all(const uint32_t (&a)[4][4], const uint32_t (&b)[kTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply_add<kHalf>(sums[i][n], a[i], b[n]);
    }
  }

  /// This warp's part of its column.
  LOWPREC_DEVICE void run() {
    chunks = call.block / 16;
    begin = __ldg(call.offsets + place.column);
    count = __ldg(call.offsets + place.column + 1) - begin;
    const int steps = kBlocks == 2 ? (count + 1) / 2 : count * chunks;
    const int share = (steps + call.shape.splits - 1) / call.shape.splits;
    int step = share * place.split;
    const int end = min(step + share, steps);
    SparseLink links[kBlocks];
    Stage stages[kDepth];
    if (step < end) find(step, links);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (step + d >= end) continue;
      load(stages[d], links, step + d);
      find(step + d + 1, links);
    }
    for (; step < end; step += kDepth) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (step + d >= end) break;
        multiply(stages[d]);
        if (step + d + kDepth >= end) continue;
        load(stages[d], links, step + d + kDepth);
        find(step + d + kDepth + 1, links);
      }
    }
  }

  /// Add up the parts of a column in their order. The sums are those of the first part's warp.
  LOWPREC_DEVICE void join(float* shared) {
    const int splits = call.shape.splits, lane = threadIdx.x % 32;
    if (splits == 1) return;
    float* parts = shared + static_cast<int>(threadIdx.x / 32 / splits) * (splits - 1) * kSparseTokens * kOutputs;
    if (place.split > 0) {
      float* part = parts + (place.split - 1) * kSparseTokens * kOutputs + lane;
#pragma unroll
      for (int i = 0; i < 16 * kTiles; ++i) part[32 * i] = sums[i / (4 * kTiles)][i / 4 % kTiles][i % 4];
    }
    __syncthreads();
    if (place.split > 0) return;
#pragma unroll 1
    for (int s = 1; s < splits; ++s, parts += kSparseTokens * kOutputs) {
#pragma unroll
      for (int i = 0; i < 16 * kTiles; ++i) sums[i / (4 * kTiles)][i / 4 % kTiles][i % 4] += parts[32 * i + lane];
    }
  }

  LOWPREC_DEVICE void write(float* shared) const {
    const int64_t output = static_cast<int64_t>(place.column) * call.block + place.half * kOutputs + kRun * lane_t;
    if (!call.out.direct) {
      const int splits = call.shape.splits;
      const int size = splits > 1 ? (splits - 1) * kSparseTokens * kOutputs : kSparseTokens * 8;
      float* room = shared + static_cast<int>(threadIdx.x / 32 / splits) * size;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; ++i) room[32 * i + threadIdx.x % 32] = sums[i / 4][n][i % 4];
        __syncwarp();
        write_slowly<kFirst>(call.out, room, place.token, output + 2 * n);
      }
    } else if constexpr (kFirst) {
      const int64_t token = place.token + 8 * lane_g;
      if (token >= call.out.tokens) return;
#pragma unroll
      for (int n = 0; n < kRun; ++n) {
        float run[8];
#pragma unroll
        for (int m = 0; m < 8; ++m) run[m] = sums[m / 2][n / 2][m % 2 * 2 + n % 2];
        write_run(call.out, (output + n) * call.out.tokens + token, run);
      }
    } else {
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        const int64_t token = place.token + 8 * m + lane_g;
        float run[kRun];
#pragma unroll
        for (int n = 0; n < kRun; ++n) run[n] = sums[m / 2][n / 2][m % 2 * 2 + n % 2];
        if (token < call.out.tokens) write_run(call.out, token * call.out.features + output, run);
      }
    }
  }
};

template <bool kFirst, int kOutputs, bool kTranspose, bool kCodes>
__global__ void __launch_bounds__(32 * kSparseWarps, kSparseBlocks<kOutputs>)
    sparse_kernel(const __grid_constant__ SparseCall call) {
  extern __shared__ float shared[];
  const SparsePlace place(call);
  SparseWarp<kFirst, kOutputs, kTranspose, kCodes> warp(call, place);
  if (place.column >= 0) warp.run();
  warp.join(shared);
  if (place.column >= 0 && place.split == 0) warp.write(shared);
}

}  // namespace lowprec
