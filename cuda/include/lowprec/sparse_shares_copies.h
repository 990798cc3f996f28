// What block-sparse products of codes by equal shares are given, and the warp that gathers it. Device code, without
// torch.
#pragma once

#include <cstdint>

#include "lowprec/sparse_kernel.h"
#include "lowprec/sparse_ring.h"
#include "lowprec/sparse_shares.h"

namespace lowprec {

struct SharesCall {
  const uint8_t* x;  // features first
  int64_t x_stride;
  const uint8_t* w;
  const int* pairs;
  SparseLine line;
  float* partial;   // [shares, tokens of a tile, block]
  uint32_t* flags;  // [shares]: 0, and 1 once the share's partial sums are there
  float scale;      // of sums, a power of two
  int stages;       // of the ring
  PairDecode x_codes;
  PairDecode w_codes;
  SparseOutput out;
};

/// The shape of a thread block, and of its shared memory.
template <int kBlock>
struct SharesShape {
  static constexpr int slots = sparse_slots(kBlock);  // of a stage
  static constexpr int steps = slots * kBlock / 64;   // of 16 features, of a warp
  static constexpr int resident = sparse_resident(kBlock);
  static constexpr int threads = 5 * 32;
  static constexpr int w_slot = kBlock * kBlock;
  static constexpr int x_bytes = slots * kBlock * kSparseTokens;
  static constexpr int w_bytes = slots * w_slot;
  static constexpr int stage = x_bytes + w_bytes;
  static constexpr int min_stages = 3;
  static constexpr int max_stages = 8;
  static constexpr int notices = 16 * max_stages;         // behind the barriers, two of each stage
  static constexpr int area = notices + 16 * max_stages;  // of sums
  static constexpr int ring = area + 768 * kBlock;
};

/// Where operands lie in a stage, for the lanes of `ldmatrix`.
template <int kBlock, bool kTranspose>
struct SharesPlaces {
  static constexpr int chunks_of_w = max(kBlock / 16, 1);  // of 16 bytes, in a row
  /// Where codes of w lie beside each other along the features, a register has four: two for either half of an
  /// instruction's terms. So x takes its features in that order.
  static constexpr bool by_fours = kTranspose && kBlock >= 16;

  /// The feature of a quarter's that is the term `row` of an instruction.
  LOWPREC_INLINE static int feature_of(int row) { return by_fours ? 4 * (row % 8 / 2) + row / 8 * 2 + row % 2 : row; }

  /// x: 16 features of two times 16 tokens.
  LOWPREC_INLINE static int of_x(int quarter, int tile, int lane) {
    return swizzled<4>(16 * quarter + feature_of(lane / 8 % 2 * 8 + lane % 8), tile + lane / 16);
  }

  /// w: 16 features of 16 outputs from 16 · i on and, where there are more, of 16 more; or four tiles of 16 features.
  LOWPREC_INLINE static int of_w(int quarter, int i, int lane) {
    const int matrix = lane / 8, feature = 16 * quarter;
    if constexpr (!kTranspose) {
      return swizzled<chunks_of_w>(feature + matrix % 2 * 8 + lane % 8, i + (kBlock > 16 ? matrix / 2 : 0));
    }
    const int tile = (kBlock > 16 ? matrix : matrix % 2) + 2 * i;
    return swizzled<chunks_of_w>(feature / kBlock * kBlock + 8 * tile + lane % 8, feature % kBlock / 16);
  }

  /// Where the sums of a lane's registers belong in 16 tokens and b outputs.
  LOWPREC_INLINE static int token_of(int lane, int i) { return 2 * (lane / 4) + i / 2; }
  LOWPREC_INLINE static int output_of(int lane, int tile, int i) {
    const int column = lane % 4 * 2 + i % 2;
    return !kTranspose && kBlock >= 16 ? tile / 2 * 16 + 2 * column + tile % 2 : 8 * tile + column;
  }
};

/// Keep what has been worked out, and do not work it out again.
LOWPREC_DEVICE void hold(int& x) { asm volatile("" : "+r"(x)); }

/// A thread's way around the ring.
template <int kBlock>
struct SharesRing {
  using Shape = SharesShape<kBlock>;

  char* const shared;
  const int stages;
  int at = 0;
  uint32_t parity = 0;

  LOWPREC_DEVICE uint32_t full() const { return shared_address(shared) + 16 * at; }
  LOWPREC_DEVICE uint32_t empty() const { return full() + 8; }
  LOWPREC_DEVICE char* stage() const { return shared + Shape::ring + at * Shape::stage; }
  LOWPREC_DEVICE int4& notice() const { return reinterpret_cast<int4*>(shared + Shape::notices)[at]; }

  LOWPREC_DEVICE void advance() {
    if (++at < stages) return;
    at = 0;
    parity ^= 1;
  }

  /// By one thread, for all. A stage is full when each lane's copies have arrived, and the notice.
  LOWPREC_DEVICE void begin() const {
    for (int n = 0; n < stages; ++n) {
      begin_barrier(shared_address(shared) + 16 * n, 33);
      begin_barrier(shared_address(shared) + 16 * n + 8, 4);
    }
  }
};

/// What the last warp does: it gathers blocks into stages. An instruction copies 16 tokens or w's bytes for each lane.
template <int kBlock, bool kTranspose>
struct SharesProducer {
  using Shape = SharesShape<kBlock>;
  static constexpr int kChunks = kSparseTokens / 16;  // of x, of a feature
  static constexpr int kSlotsAtOnce = min(32 / kChunks, Shape::slots);
  static constexpr int kStep = 32 / kChunks / kSlotsAtOnce;  // rows of each of them
  static constexpr int kRows = 8 / kStep;                    // before places repeat
  static constexpr int kChunksOfW = Shape::w_slot / 16;

  /// Input and weight of a pair, negative for none.
  struct Link {
    int input;
    int id;
  };

  const SharesCall& call;
  const int lane;
  SharesRing<kBlock> ring;
  const char* column;  // of x, for a piece
  const char* w;
  int x_to[kRows];
  int w_to[2];

  LOWPREC_DEVICE SharesProducer(const SharesCall& call, SharesRing<kBlock> ring)
      : call(call), lane(threadIdx.x % 32), ring(ring) {
    constexpr int across = SharesPlaces<kBlock, kTranspose>::chunks_of_w;
    w = reinterpret_cast<const char*>(call.w) + lane % kChunksOfW * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      x_to[i] = swizzled<kChunks>(slot_at_once() * kBlock + row_at_once() + i * kStep, lane % kChunks);
      hold(x_to[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      w_to[i] = Shape::x_bytes + swizzled<across>((32 * i + lane) / across, lane % across);
      hold(w_to[i]);
    }
  }

  LOWPREC_DEVICE int slot_at_once() const { return lane / kChunks % kSlotsAtOnce; }
  LOWPREC_DEVICE int row_at_once() const { return lane / kChunks / kSlotsAtOnce; }

  LOWPREC_DEVICE Link link_at(const SparsePiece& piece, int n) const {
    if (n >= piece.count) return {-1, -1};
    const int* pair = call.pairs + 2 * (static_cast<int64_t>(piece.begin) + n);
    return {__ldg(pair), __ldg(pair + 1)};
  }

  /// Tokens beyond the last one are the last ones again: their sums go nowhere.
  LOWPREC_DEVICE void begin_piece(const SparsePiece& piece) {
    const int64_t at = static_cast<int64_t>(piece.tile) * kSparseTokens + lane % kChunks * 16;
    const int64_t last = (call.out.tokens - 1) / 16 * 16;
    column = reinterpret_cast<const char*>(call.x) + row_at_once() * call.x_stride + (at < last ? at : last);
  }

  LOWPREC_DEVICE void copy_x(uint32_t to, const Link& link, int first, int mask) const {
#pragma unroll
    for (int base = 0; base < Shape::slots; base += kSlotsAtOnce) {
      const int slot = base + slot_at_once();
      const bool there = mask >> slot & 1;
      const char* from = column + __shfl_sync(~0u, link.input, first + slot) * (call.x_stride * kBlock);
#pragma unroll
      for (int i = 0; i < kBlock / kStep; ++i) {
        copy_chunk(to + x_to[i % kRows] + (base * kBlock + i / kRows * 8) * kSparseTokens, from, !there);
        from += call.x_stride * kStep;
      }
    }
  }

  LOWPREC_DEVICE void copy_w(uint32_t to, const Link& link, int first, int mask) const {
    constexpr int kOfSlot = max(kChunksOfW / 32, 1);  // instructions
    const char* from = nullptr;
    bool there = false;
#pragma unroll
    for (int k = 0; k < Shape::w_bytes / 512; ++k) {
      if (k % kOfSlot == 0) {
        const int slot = (32 * k + lane) / kChunksOfW;
        from = w + static_cast<int64_t>(__shfl_sync(~0u, link.id, first + slot)) * Shape::w_slot;
        there = mask >> slot & 1;
      }
      copy_chunk(to + w_to[k % 2] + k / 2 * 1024, from + k % kOfSlot * 512, !there);
    }
  }

  /// The next stage: slots of a batch of 32 pairs from the `first` one on.
  LOWPREC_DEVICE void fill(const SparsePiece& piece, const Link& link, int first, PieceEnd end) {
    await_phase(ring.empty(), ring.parity ^ 1);
    const int mask = __ballot_sync(~0u, link.id >= 0) >> first & ((1 << Shape::slots) - 1);
    const uint32_t to = shared_address(ring.stage());
    copy_x(to, link, first, mask);
    copy_w(to, link, first, mask);
    arrive_after_copies(ring.full());
    if (lane == 0) {
      ring.notice() = {mask, static_cast<int>(end), piece.column, piece.tile};
      arrive(ring.full());
    }
    ring.advance();
  }

  /// All stages of a share. A piece without pairs has one, too.
  LOWPREC_DEVICE void run() {
    SparseWalk walk(call.line, blockIdx.x);
    SparsePiece piece{0, 0, 0, 0, PieceEnd::none};
    bool more = walk.take(piece);
    int n = 0;
    Link link = link_at(piece, lane);
    begin_piece(piece);
#pragma unroll 1
    while (more) {
      SparsePiece piece_ahead = piece;
      int n_ahead = n + 32;
      if (n_ahead >= piece.count) {
        n_ahead = 0;
        more = walk.take(piece_ahead);
      }
      const Link ahead = more ? link_at(piece_ahead, n_ahead + lane) : Link{-1, -1};
      const int left = min(piece.count - n, 32);
#pragma unroll 1
      for (int first = 0; first < left || first == 0; first += Shape::slots) {
        fill(piece, link, first, n_ahead == 0 && first + Shape::slots >= left ? piece.end : PieceEnd::none);
      }
      if (n_ahead == 0) begin_piece(piece_ahead);
      piece = piece_ahead;
      n = n_ahead;
      link = ahead;
    }
    fill(piece, {-1, -1}, 0, PieceEnd::all);
  }
};

}  // namespace lowprec
