// Block-sparse products of codes by codes, by thread blocks that stay, each with an equal share of the work. Device
// code, without torch. docs/kernels/sparse.md has the reasons.
//
// The last warp fills a ring of stages of 64 or 128 features by asynchronous copies, from one column on to the next.
// The other four multiply 64 tokens, each 16 features of a stage (and 16 of its second half) by all b outputs, so that
// everything is read, and decoded to float16 or bfloat16, by one warp alone. Their sums are added up at a column's end.
// Slots without a block are zeros.
#pragma once

#include <cstdint>

#include "lowprec/sparse_shares_copies.h"

namespace lowprec {

/// What the other four do: they multiply.
template <int kBlock, bool kTranspose>
struct SharesConsumer {
  using Shape = SharesShape<kBlock>;
  using Places = SharesPlaces<kBlock, kTranspose>;
  static constexpr int kTiles = kBlock / 8;
  static constexpr int kParts = kTiles * 32;  // of four sums, of 16 tokens
  static constexpr int kAtOnce = 2;           // of other shares

  const SharesCall& call;
  const int quarter;  // of 64 features while multiplying, of 64 tokens after that
  const int lane;
  SharesRing<kBlock> ring;
  int x_at[2];
  int w_at[max(kTiles / 4, 1)];
  float sums[4][kTiles][4];
  float total[kTiles][4];

  LOWPREC_DEVICE SharesConsumer(const SharesCall& call, SharesRing<kBlock> ring)
      : call(call), quarter(threadIdx.x / 32), lane(threadIdx.x % 32), ring(ring) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x_at[i] = Places::of_x(quarter, 2 * i, lane);
      hold(x_at[i]);
    }
#pragma unroll
    for (int i = 0; i < max(kTiles / 4, 1); ++i) {
      w_at[i] = Shape::x_bytes + Places::of_w(quarter, 2 * i, lane);
      hold(w_at[i]);
    }
  }

  // Products.

  /// The first operands of a quarter of a stage: of four times 16 tokens.
  LOWPREC_DEVICE void load_x(uint32_t (&a)[4][4], int step) const {
    const uint32_t x = shared_address(ring.stage()) + step * 64 * kSparseTokens;
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_matrices<true>(words[i], x + x_at[i]);
    for_code_decoding<false>(call.x_codes.way, [&]<Decoding kWay>() {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint2 tokens = decode_columns<kWay>(call.x_codes, words[i / 4][i % 4]);
        a[i / 2][i % 2 * 2] = tokens.x;
        a[i / 2][i % 2 * 2 + 1] = tokens.y;
      }
    });
  }

  /// The second operands of one tile, from two blocks of 8.
  template <Decoding kWay>
  LOWPREC_DEVICE void read_small_w(uint32_t (&b)[4], int step) const {
    const auto* w = reinterpret_cast<const uint8_t*>(ring.stage()) + Shape::x_bytes + 128 * (quarter + 4 * step);
    const int row = lane / 4, place = lane % 4 * 2;
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kTranspose) {
        words[i] = *reinterpret_cast<const uint16_t*>(w + 64 * i + 8 * row + place);
      } else {
        words[i] = w[64 * i + 8 * place + row] | w[64 * i + 8 * place + 8 + row] << 8;
      }
    }
    const uint2 both = decode_word<kWay>(call.w_codes, words[0] | words[1] << 16);
    b[0] = both.x;
    b[1] = both.y;
  }

  /// Of two tiles: the lower and the upper terms of each.
  template <Decoding kWay>
  LOWPREC_DEVICE void read_two_tiles(uint32_t (&b)[4], uint32_t low, uint32_t high) const {
    if constexpr (kTranspose) {
      const uint2 first = decode_word<kWay>(call.w_codes, low), second = decode_word<kWay>(call.w_codes, high);
      b[0] = first.x, b[1] = first.y, b[2] = second.x, b[3] = second.y;
    } else {
      const uint2 lower = decode_columns<kWay>(call.w_codes, low), upper = decode_columns<kWay>(call.w_codes, high);
      b[0] = lower.x, b[1] = upper.x, b[2] = lower.y, b[3] = upper.y;
    }
  }

  /// Of four tiles from `tile` on, or of two.
  template <Decoding kWay>
  LOWPREC_DEVICE void read_w(uint32_t (&b)[2][4], int step, int tile) const {
    const uint32_t at = shared_address(ring.stage()) + w_at[tile / 4] + step * 64 * kBlock;
    uint32_t words[4];
    if constexpr (kTiles == 2) {
      load_matrices<!kTranspose>(reinterpret_cast<uint32_t (&)[2]>(words), at);
    } else {
      load_matrices<!kTranspose>(words, at);
      read_two_tiles<kWay>(b[1], words[2], words[3]);
    }
    read_two_tiles<kWay>(b[0], words[0], words[1]);
  }

  template <bool kHalf>
  LOWPREC_DEVICE void multiply_tiles(const uint32_t (&a)[4][4], const uint32_t (&b)[4], int tile) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      multiply_add<kHalf>(sums[m][tile], a[m], b[0], b[1]);
      if constexpr (kBlock > 8) multiply_add<kHalf>(sums[m][tile + 1], a[m], b[2], b[3]);
    }
  }

  LOWPREC_DEVICE void multiply(int step) {
    uint32_t a[4][4], b[2][4];
    load_x(a, step);
    for_code_decoding<true>(call.w_codes.way, [&]<Decoding kWay>() {
      if constexpr (kBlock == 8) {
        read_small_w<kWay>(b[0], step);
        multiply_tiles<is_half(kWay)>(a, b[0], 0);
      } else {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 4) {
          read_w<kWay>(b, step, tile);
          multiply_tiles<is_half(kWay)>(a, b[0], tile);
          if constexpr (kTiles > 2) multiply_tiles<is_half(kWay)>(a, b[1], tile + 2);
        }
      }
    });
  }

  LOWPREC_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 16 * kTiles; ++i) sums[i / (4 * kTiles)][i / 4 % kTiles][i % 4] = 0;
  }

  LOWPREC_DEVICE void run() {
    clear();
#pragma unroll 1
    while (true) {
      await_phase(ring.full(), ring.parity);
      const int4 now = ring.notice();
      const auto end = static_cast<PieceEnd>(now.y);
      if (end == PieceEnd::all) return;
#pragma unroll
      for (int step = 0; step < Shape::steps; ++step) {
        const int mask = now.x >> 16 * (quarter + 4 * step) / kBlock & (kBlock == 8 ? 3 : 1);
        if (mask) multiply(step);
      }
      __syncwarp();
      if (lane == 0) arrive(ring.empty());
      ring.advance();
      if (end == PieceEnd::none) continue;
      finish(now.z, now.w, end);
      clear();
    }
  }

  // Results.

  LOWPREC_DEVICE static void meet_others() { meet(1, 128); }
  LOWPREC_DEVICE float4* area() const { return reinterpret_cast<float4*>(ring.shared + Shape::area); }

  /// This warp's place in a share's partial sums.
  LOWPREC_DEVICE float4* partial(int share) const {
    return reinterpret_cast<float4*>(call.partial) + (static_cast<int64_t>(share) * 4 + quarter) * kParts + lane;
  }

  LOWPREC_DEVICE static float4 as_four(const float (&sums)[4]) { return {sums[0], sums[1], sums[2], sums[3]}; }

  LOWPREC_DEVICE static void add(float (&to)[4], const float4& term) {
    to[0] += term.x;
    to[1] += term.y;
    to[2] += term.z;
    to[3] += term.w;
  }

  /// What warp `of` shelves of the tokens of warp `to`.
  LOWPREC_DEVICE float4* shelf(int of, int to) const { return area() + (3 * of + to - (to > of)) * kParts + lane; }

  /// The sums of this warp's 16 tokens: quarters in their order.
  LOWPREC_DEVICE void gather() {
    const int own = 1 << quarter;  // not compared with m, for which a compiler would index registers
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if (own >> m & 1) continue;
      float4* to = shelf(quarter, m);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) to[32 * i] = as_four(sums[m][i]);
    }
    meet_others();
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) total[i / 4][i % 4] = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float4* from = shelf(m, quarter);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) add(total[i], own >> m & 1 ? as_four(sums[m][i]) : from[32 * i]);
    }
    meet_others();
  }

  LOWPREC_DEVICE void publish() const {
    float4* to = partial(blockIdx.x);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) to[32 * i] = as_four(total[i]);
    meet_others();
    if (threadIdx.x > 0) return;
    await_dependence();
    set_flag(call.flags + blockIdx.x);
  }

  /// Add what other shares have of an item, the first one's first, and this one's last. Those have begun before this
  /// one, and wait for nobody before they publish.
  LOWPREC_DEVICE void join() {
    const int share = blockIdx.x;
    await_dependence();
    const SparseCut item = call.line.cut(share);
    float others[kTiles][4] = {};
    for (int base = call.line.first_share(item); base < share; base += 32) {
      const bool there = base + lane < share && call.line.has_part(base + lane, item);
      if (there) await_flag(call.flags + base + lane);
      __syncwarp();
      for (uint32_t left = __ballot_sync(~0u, there); left;) {
        float4 terms[kAtOnce][kTiles] = {};
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          if (!left) break;
          const float4* from = partial(base + __ffs(left) - 1);
          left &= left - 1;
#pragma unroll
          for (int i = 0; i < kTiles; ++i) terms[n][i] = __ldcg(from + 32 * i);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce * kTiles; ++i) add(others[i % kTiles], terms[i / kTiles][i % kTiles]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) total[i / 4][i % 4] = others[i / 4][i % 4] + total[i / 4][i % 4];
  }

  LOWPREC_DEVICE void write(int column, int tile) const {
    auto* board = reinterpret_cast<float*>(area());
    const bool first = call.out.first;
    const SparseBoard shape(first, kBlock);
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int t = 16 * quarter + Places::token_of(lane, i % 4), n = Places::output_of(lane, i / 4, i % 4);
      board[first ? n * shape.pitch + t : t * shape.pitch + n] = total[i / 4][i % 4] * call.scale;
    }
    meet_others();
    const SparseRuns runs = shape.runs(call.out, static_cast<int64_t>(tile) * kSparseTokens,
                                       static_cast<int64_t>(column) * kBlock, sparse_runs(kBlock));
    runs.write([&](int n) { return shape.at(board, n); });
    meet_others();
  }

  LOWPREC_DEVICE void finish(int column, int tile, PieceEnd end) {
    gather();
    if (end == PieceEnd::published) return publish();
    if (end == PieceEnd::joined) join();
    write(column, tile);
  }
};

template <int kBlock, bool kTranspose>
__global__ void __launch_bounds__(SharesShape<kBlock>::threads, SharesShape<kBlock>::resident)
    sparse_shares_kernel(const __grid_constant__ SharesCall call) {
  extern __shared__ uint4 room[];
  const SharesRing<kBlock> ring{reinterpret_cast<char*>(room), call.stages};
  if (threadIdx.x == 0) ring.begin();
  __syncthreads();
  if (threadIdx.x < 128) {
    SharesConsumer<kBlock, kTranspose>(call, ring).run();
  } else {
    SharesProducer<kBlock, kTranspose>(call, ring).run();
  }
}

}  // namespace lowprec
