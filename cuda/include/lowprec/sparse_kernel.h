// Block-sparse products on tensor cores: y = x · W, or dx = dy · Wᵀ. Device code, without torch.
// docs/kernels/sparse.md has the reasons.
//
// A thread block multiplies 64 tokens by the blocks of one output column, or of a part of its list. It walks the list
// in stages of 64 features, 64 / b blocks, which asynchronous copies gather into a ring in shared memory. A warp takes
// 16 tokens and all b outputs. Codes of x are decoded in the registers that instructions take them from; those of w by
// the thread that copied them, to a place of their own.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/sparse_output.h"
#include "lowprec/sparse_overlap.h"
#include "lowprec/sparse_pairs.h"
#include "lowprec/warp_matrix.h"

namespace lowprec {

constexpr int kSparseStages = 3;     // of the ring
constexpr int kSparseFeatures = 64;  // of a stage
constexpr int kSparseLinks = 128;    // pairs of the list that are kept in shared memory

/// Columns of a layout, or parts of them, in the order in which thread blocks take them up: of each the column, -1 for
/// none, where its pairs begin, how many they are, and of how many parts of the column it is one.
struct SparseParts {
  const int* of;
  int count;
};

struct SparseCall {
  const void* x;
  int64_t x_stride;  // between features where they come first, else between tokens; in multiples of 16 bytes
  const void* w;     // [blocks, block, block]
  const float* gate;
  const int* pairs;
  SparseParts parts;
  float* partial;  // sums of the parts of columns that have more than one
  bool first;      // features of x, as they must where x has codes
  bool half;       // float16, and not bfloat16
  PairDecode x_codes;
  PairDecode w_codes;
  SparseOutput out;
  int beside = 0;  // tiles of a column that thread blocks take up one after the other; 0: columns of a tile
};

/// The part of a list that is at hand, four times 32 pairs: where the inputs and weights of blocks begin, in bytes,
/// negative for none, and gates.
struct SparseLinks {
  int64_t x[kSparseLinks];
  int64_t w[kSparseLinks];
  float gate[kSparseLinks];
};

/// One pair of it.
struct SparseLink {
  int input;
  int id;
  float gate;
};

/// Bytes of a thread block's shared memory: the ring's stages of x and then w, two places for decoded w, the links.
struct SparseRoom {
  int x;
  int w;
  int decoded;

  LOWPREC_INLINE SparseRoom(bool x_codes, bool w_codes, int block)
      : x(kSparseFeatures * kSparseTokens * (x_codes ? 1 : 2)),
        w(kSparseFeatures * block * (w_codes ? 1 : 2)),
        decoded(w_codes ? 2 * kSparseFeatures * block : 0) {}

  LOWPREC_INLINE int stage() const { return x + w; }
  LOWPREC_INLINE int ring() const { return kSparseStages * stage(); }
  LOWPREC_INLINE int links() const { return ring() + 2 * decoded; }
  LOWPREC_INLINE int total() const { return links() + static_cast<int>(sizeof(SparseLinks)); }
};

/// Copy 16 bytes, or zeros.
LOWPREC_DEVICE void copy_chunk(uint32_t to, const void* from, bool zeros) {
  asm volatile(
      "{\n .reg .pred zeros;\n setp.ne.u32 zeros, %2, 0;\n"
      " cp.async.cg.shared.global [%0], [%1], 16, zeros;\n}" ::"r"(to),
      "l"(from), "r"(static_cast<uint32_t>(zeros))
      : "memory");
}

LOWPREC_DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kLeft>
LOWPREC_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

/// Where a chunk of 16 bytes lies in rows of so many chunks, such that eight rows' chunks at one place lie in different
/// banks.
template <int kChunks>
LOWPREC_INLINE int swizzled(int row, int chunk) {
  return 16 * (row * kChunks + (chunk ^ row / (8 / kChunks) % kChunks));
}

/// What a thread block does.
template <int kBlock, bool kTranspose, bool kCodes>
struct SparseProduct {
  static constexpr int kSlots = kSparseFeatures / kBlock;       // blocks of a stage
  static constexpr int kTiles = kBlock / 8;                     // instructions beside each other
  static constexpr int kCopies = 4;                             // of each operand, for a thread and stage, at most
  static constexpr int kSlotsOfX = kBlock == 64 ? 1 : kCopies;  // that a thread's copies of x are of, at most
  static constexpr int kSlotsOfW = kBlock == 32 ? 2 : 1;
  static constexpr int kTurns = kBlock >= 32 ? kTiles / 2 : 1;  // ways in which a warp's second operands are swizzled

  const SparseCall& call;
  const bool x_codes;
  const bool w_codes;
  const SparseRoom room;
  char* const shared;
  SparseLinks& links;
  const int64_t token;  // the tile's first one
  const int part;
  const int column;
  const int begin;  // of the pairs
  const int count;  // of them
  const int parts;  // of the column
  // A thread's copies: from where in a block, to where in a stage, and by which slot's block.
  const char* x_from[kCopies];
  int x_slot[kSlotsOfX];
  int x_to;
  const char* w_from;
  int w_slot[kSlotsOfW];
  int w_to;
  int w_copies;
  // Where a warp's operands lie in a stage.
  int x_at[4];
  int w_at[kTurns];
  SparseLink ahead;
  float sums[kTiles][4];

  LOWPREC_DEVICE SparseProduct(const SparseCall& call, char* shared)
      : call(call),
        x_codes(kCodes && call.x_codes.way != Decoding::none),
        w_codes(kCodes && call.w_codes.way != Decoding::none),
        room(x_codes, w_codes, kBlock),
        shared(shared),
        links(*reinterpret_cast<SparseLinks*>(shared + room.links())),
        token(static_cast<int64_t>(call.beside ? blockIdx.x % call.beside : blockIdx.x / call.parts.count) *
              kSparseTokens),
        part(call.beside ? blockIdx.x / call.beside : blockIdx.x % call.parts.count),
        column(__ldg(call.parts.of + 4 * part)),
        begin(__ldg(call.parts.of + 4 * part + 1)),
        count(__ldg(call.parts.of + 4 * part + 2)),
        parts(__ldg(call.parts.of + 4 * part + 3)) {}

  // The list.

  /// A pair of the list, as none where its gate is closed.
  LOWPREC_DEVICE SparseLink link_at(int n) const {
    SparseLink link{-1, -1, 0};
    if (n >= count) return link;
    const int* at = call.pairs + 2 * (static_cast<int64_t>(begin) + n);
    link.input = __ldg(at);
    link.id = __ldg(at + 1);
    if (!call.gate) return link;
    link.gate = __ldg(call.gate + link.id);
    return link.gate == 0 ? SparseLink{-1, -1, 0} : link;
  }

  LOWPREC_DEVICE void keep(int n, const SparseLink& link) {
    const int64_t far = (call.first ? call.x_stride : 1) * kBlock * (x_codes ? 1 : 2);
    links.x[n % kSparseLinks] = link.input * far;
    links.w[n % kSparseLinks] = static_cast<int64_t>(link.id) * kBlock * kBlock * (w_codes ? 1 : 2);
    links.gate[n % kSparseLinks] = link.gate;
  }

  /// The first warp has the first 64 pairs at hand, and 32 more on their way.
  LOWPREC_DEVICE void begin_list() {
    const int lane = threadIdx.x;
    if (lane < 32) {
      const SparseLink low = link_at(lane), high = link_at(32 + lane);
      keep(lane, low);
      keep(32 + lane, high);
      ahead = link_at(64 + lane);
    }
    __syncthreads();
  }

  /// With the first of 32 pairs taken, those after the next 32 are wanted.
  LOWPREC_DEVICE void go_on(int stage) {
    const int n = stage * kSlots;
    if (threadIdx.x >= 32 || n % 32 || n == 0) return;
    keep(n + 32 + threadIdx.x, ahead);
    ahead = link_at(n + 64 + threadIdx.x);
  }

  // Copies.

  /// Tokens beyond the last one are the last ones again: their sums go nowhere.
  LOWPREC_DEVICE void plan_x() {
    const int wide = x_codes ? 16 : 8, bytes = 16 / wide, chunks = kSparseTokens / wide;
    const int chunk = threadIdx.x % chunks, first_row = threadIdx.x / chunks;
    const int64_t tokens = call.out.tokens, last = call.first ? (tokens - 1) / wide * wide : tokens - 1;
    x_to = x_codes ? swizzled<4>(first_row, chunk) : swizzled<8>(first_row, chunk);
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      const int row = first_row + k * (kSparseThreads / chunks), feature = call.first ? row : chunk * wide;
      const int64_t own = token + (call.first ? chunk * wide : row), at = own < last ? own : last;
      const int64_t place = call.first ? feature % kBlock * call.x_stride + at : at * call.x_stride + feature % kBlock;
      x_from[k] = static_cast<const char*>(call.x) + place * bytes;
      if (k < kSlotsOfX) x_slot[k] = min(feature / kBlock, kSlots - 1);
    }
  }

  LOWPREC_DEVICE void plan_w() {
    const int chunks = kBlock * kBlock / (w_codes ? 16 : 8), i = threadIdx.x;
    w_from = static_cast<const char*>(call.w) + 16 * (i % chunks);
    w_to = room.x + (w_codes ? 16 * i : swizzled<kTiles>(i / kTiles, i % kTiles));
    w_copies = (kSlots * chunks - i + kSparseThreads - 1) / kSparseThreads;
#pragma unroll
    for (int k = 0; k < kSlotsOfW; ++k) w_slot[k] = min((i + k * kSparseThreads) / chunks, kSlots - 1);
  }

  LOWPREC_DEVICE char* stage_at(int stage) const { return shared + stage % kSparseStages * room.stage(); }

  LOWPREC_DEVICE void copy(int stage) {
    constexpr int step = 16 * kSparseThreads;
    const uint32_t to = shared_address(stage_at(stage));
    const int n = stage * kSlots % kSparseLinks;
    int64_t x_block[kSlotsOfX], w_block[kSlotsOfW];  // all of them before the first copy, which no load passes
#pragma unroll
    for (int k = 0; k < kSlotsOfX; ++k) x_block[k] = links.x[n + x_slot[k]];
#pragma unroll
    for (int k = 0; k < kSlotsOfW; ++k) w_block[k] = links.w[n + w_slot[k]];
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      if (k == kCopies / 2 && x_codes) break;
      const int64_t block = x_block[k % kSlotsOfX];
      copy_chunk(to + x_to + k * step, x_from[k] + block, block < 0);
    }
#pragma unroll
    for (int k = 0; k < (kBlock == 64 ? kCopies : kSlotsOfW); ++k) {
      if (k >= w_copies) break;
      const int64_t block = w_block[k % kSlotsOfW];
      copy_chunk(to + w_to + k * step, w_from + (kBlock == 64 ? k * step : 0) + block, block < 0);
    }
  }

  /// A stage's decoded weights. Two stages' are kept: warps may still read the one before.
  LOWPREC_DEVICE char* decoded_at(int stage) const { return shared + room.ring() + stage % 2 * room.decoded; }

  /// The chunks of w that this thread copied.
  LOWPREC_DEVICE void decode_w(int stage) const {
    const char* from = stage_at(stage) + w_to;
    char* to = decoded_at(stage);
    for_decoding(call.w_codes.way, [&]<Decoding kWay>() {
      for (int k = 0; k < w_copies; ++k) {
        const uint4 word = *reinterpret_cast<const uint4*>(from + 16 * kSparseThreads * k);
        const uint2 a = decode_word<kWay>(call.w_codes, word.x), b = decode_word<kWay>(call.w_codes, word.y);
        const uint2 c = decode_word<kWay>(call.w_codes, word.z), d = decode_word<kWay>(call.w_codes, word.w);
        const int i = 2 * (threadIdx.x + k * kSparseThreads);
        *reinterpret_cast<uint4*>(to + swizzled<kTiles>(i / kTiles, i % kTiles)) = {a.x, a.y, b.x, b.y};
        *reinterpret_cast<uint4*>(to + swizzled<kTiles>((i + 1) / kTiles, (i + 1) % kTiles)) = {c.x, c.y, d.x, d.y};
      }
    });
  }

  // Products.

  /// Where this lane's row of a warp's first operand lies: of 16 features or, in codes, of 32.
  LOWPREC_DEVICE int x_place(int step) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (x_codes) return swizzled<4>(32 * step + lane, warp);
    if (call.first) return swizzled<8>(16 * step + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
    return swizzled<8>(16 * warp + lane % 16, 2 * step + lane / 16);
  }

  /// And of the second: 16 features of two tiles, or 32 of one.
  LOWPREC_DEVICE int w_place(int step, int tile) const {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    if constexpr (kBlock == 8) return swizzled<1>(16 * step + lane, 0);
    const int feature = 16 * step + matrix % 2 * 8, output = 8 * (tile + matrix / 2);
    if constexpr (!kTranspose) return swizzled<kTiles>(feature + lane % 8, output / 8);
    return swizzled<kTiles>(feature / kBlock * kBlock + output + lane % 8, feature % kBlock / 8);
  }

  LOWPREC_DEVICE void plan_products() {
#pragma unroll
    for (int step = 0; step < 4; ++step) x_at[step] = x_place(x_codes ? step % 2 : step);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) w_at[i] = kTranspose ? w_place(i, 0) : w_place(0, 2 * i);
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) sums[i / 4][i % 4] = 0;
  }

  /// The first operands of a stage. In codes a register has those of two tokens and features, which become two.
  LOWPREC_DEVICE void load_x(uint32_t (&a)[4][4], uint32_t x) const {
    if (x_codes) {
      uint32_t words[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_matrices<true>(words[i], x + x_at[i]);
      for_decoding(call.x_codes.way, [&]<Decoding kWay>() {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint2 tokens = decode_columns<kWay>(call.x_codes, words[i / 4][i % 4]);
          a[i / 2][i % 2 * 2] = tokens.x;
          a[i / 2][i % 2 * 2 + 1] = tokens.y;
        }
      });
    } else if (call.first) {
#pragma unroll
      for (int step = 0; step < 4; ++step) load_matrices<true>(a[step], x + x_at[step]);
    } else {
#pragma unroll
      for (int step = 0; step < 4; ++step) load_matrices<false>(a[step], x + x_at[step]);
    }
  }

  /// The second operand of 16 features: of two tiles from `tile` on, or of this step and the next.
  template <bool kHalf, bool kGated>
  LOWPREC_DEVICE void load_w(uint32_t (&b)[4], uint32_t w, int step, int tile, const float* gates) const {
    // Rows lie one after the other: those of eight features or outputs more differ by a constant from the plan's.
    const int turn = kTurns == 1 ? 0 : kTranspose ? step % kTurns : tile / 2;
    const int rows = kTranspose && kTurns > 1 ? step / kTurns * 16 * kTurns + 8 * tile : 16 * step;
    load_matrices<!kTranspose>(b, w + w_at[turn] + 2 * kBlock * rows);
    if constexpr (kGated) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float gate = gates[kBlock == 8 ? 2 * step + i : 16 * step / kBlock];
        b[i] = codes::multiply<kHalf>(b[i], narrow_pair<kHalf>(gate, gate));
      }
    }
  }

  template <bool kHalf, bool kGated>
  LOWPREC_DEVICE void multiply_stage(uint32_t x, uint32_t w, const float* gates) {
    uint32_t a[4][4], b[4];
    load_x(a, x);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if constexpr (kBlock == 8) {
        if (step % 2 == 0) load_w<kHalf, kGated>(b, w, step, 0, gates);
        multiply_add<kHalf>(sums[0], a[step], b[step % 2 * 2], b[step % 2 * 2 + 1]);
      } else {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
          load_w<kHalf, kGated>(b, w, step, tile, gates);
          multiply_add<kHalf>(sums[tile], a[step], b[0], b[1]);
          multiply_add<kHalf>(sums[tile + 1], a[step], b[2], b[3]);
        }
      }
    }
  }

  LOWPREC_DEVICE void multiply(int stage) {
    const uint32_t x = shared_address(stage_at(stage));
    const uint32_t w = w_codes ? shared_address(decoded_at(stage)) : x + room.x;
    const float* gates = links.gate + stage * kSlots % kSparseLinks;
    if (call.half) {
      call.gate ? multiply_stage<true, true>(x, w, gates) : multiply_stage<true, false>(x, w, gates);
    } else {
      call.gate ? multiply_stage<false, true>(x, w, gates) : multiply_stage<false, false>(x, w, gates);
    }
  }

  LOWPREC_DEVICE void run() {
    begin_list();
    plan_x();
    plan_w();
    const int stages = (count + kSlots - 1) / kSlots;
#pragma unroll 1
    for (int stage = 0; stage < kSparseStages - 1; ++stage) {
      if (stage < stages) copy(stage);
      end_copies();
      go_on(stage);
    }
    plan_products();
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      await_copies<kSparseStages - 2>();
      if (w_codes) decode_w(stage);
      __syncthreads();
      const int next = stage + kSparseStages - 1;
      if (next < stages) copy(next);
      end_copies();
      go_on(next);
      multiply(stage);
    }
    await_copies<0>();
    __syncthreads();
  }

  // Results.

  /// The sums, by outputs of the tile's tokens, or by tokens of the block's outputs.
  LOWPREC_DEVICE void write() const {
    auto* board = reinterpret_cast<float*>(shared);
    const bool first = call.out.first;
    const SparseBoard shape(first, kBlock);
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, place = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int t = 16 * warp + (x_codes ? 2 * g + i % 4 / 2 : g + i % 4 / 2 * 8), n = i / 4 * 8 + place + i % 2;
      board[first ? n * shape.pitch + t : t * shape.pitch + n] = sums[i / 4][i % 4];
    }
    __syncthreads();
    constexpr int count = sparse_runs(kBlock);
    if (parts == 1) {
      const SparseRuns runs = shape.runs(call.out, token, static_cast<int64_t>(column) * kBlock, count);
      return runs.write([&](int n) { return shape.at(board, n); });
    }
    auto* to = reinterpret_cast<float4*>(call.partial) + static_cast<int64_t>(blockIdx.x) * kSparseThreads * count;
    for (int n = 0; n < count; ++n) to[threadIdx.x + n * kSparseThreads] = shape.at(board, n);
  }
};

/// Thread blocks that a multiprocessor's registers have to hold, since its shared memory does. Larger blocks need no
/// telling (0).
constexpr int sparse_held(int block) { return block == 8 ? 7 : 0; }

template <int kBlock, bool kTranspose, bool kCodes>
__global__ void __launch_bounds__(kSparseThreads, sparse_held(kBlock))
    sparse_kernel(const __grid_constant__ SparseCall call) {
  extern __shared__ uint4 shared[];
  start_dependents();
  SparseProduct<kBlock, kTranspose, kCodes> product(call, reinterpret_cast<char*>(shared));
  if (product.column < 0) return;
  product.run();
  product.write();
}

/// Add up the parts of columns that have more than one, which lie beside each other, in their order.
static __global__ void __launch_bounds__(kSparseThreads)
    join_parts_kernel(const __grid_constant__ SparseCall call, int block) {
  const int part = blockIdx.x % call.parts.count, tile = blockIdx.x / call.parts.count;
  const int* at = call.parts.of + 4 * part;
  const int column = __ldg(at), parts = __ldg(at + 3);
  if (column < 0 || parts == 1 || (part > 0 && __ldg(at - 4) == column)) return;
  await_dependence();
  const int count = sparse_runs(block), size = kSparseThreads * count;
  const auto* from = reinterpret_cast<const float4*>(call.partial) + static_cast<int64_t>(blockIdx.x) * size;
  const SparseRuns runs =
      SparseBoard(call.out.first, block)
          .runs(call.out, static_cast<int64_t>(tile) * kSparseTokens, static_cast<int64_t>(column) * block, count);
  runs.write([&](int n) {
    const float4* terms = from + threadIdx.x + n * kSparseThreads;
    float4 sum = *terms;
    for (int part = 1; part < parts; ++part) {
      const float4 term = terms[static_cast<int64_t>(part) * size];
      sum = {sum.x + term.x, sum.y + term.y, sum.z + term.z, sum.w + term.w};
    }
    return sum;
  });
}

}  // namespace lowprec
