// The update of block-sparse weights by tensor cores. A thread block computes a tile: some weight blocks and, in shared
// memory, the inputs and outputs that these need, each once, a stage of tokens after the other. Warps share the tile's
// fragments; a fragment's sums stay in registers until all tokens are added.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/sparse_codes.h"
#include "lowprec/sparse_update_load.h"
#include "lowprec/sparse_update_store.h"
#include "lowprec/warp_matrix.h"

namespace lowprec {

/// What a warp computes at a time: 16 rows, two blocks of 8, by 8; 16 by 16; or 32 by 32, a quarter of a block of 64.
template <int kSide>
struct UpdateFragment {
  static constexpr int across = kSide / 8;                           // instructions
  static constexpr int down = kSide == 32 ? 2 : 1;                   // of them
  static constexpr int held = 128 / kUpdateWarps / (across * down);  // fragments of a warp
  static constexpr int together = held > 4   ? 4
                                  : held > 2 ? held / 2
                                             : held;   // without asking whether there are as many
  static constexpr int of_tile = held * kUpdateWarps;  // computed in one pass over the tokens
};

/// Where a tile's part of the plan lies.
struct UpdatePlan {
  const int* counts;
  const int* rows;
  const int* columns;
  const int* fragments;

  LOWPREC_DEVICE UpdatePlan(const int* plan, int tiles, int tile, int size) {
    const int64_t all = static_cast<int64_t>(tiles) * size, own = static_cast<int64_t>(tile) * size;
    counts = plan + 4 * tile;
    rows = plan + 4 * tiles + own;
    columns = plan + 4 * tiles + all + own;
    fragments = plan + 4 * tiles + 2 * all + 4 * own;
  }
};

/// A place among the tokens of all pairs.
struct UpdateCursor {
  int pair;
  int token;

  /// Where a chunk begins.
  static LOWPREC_DEVICE UpdateCursor at(const UpdateCall& call, int chunk) {
    UpdateCursor cursor{0, chunk};
    for (; cursor.pair < call.pairs; ++cursor.pair) {
      const int chunks = (call.pair[cursor.pair].tokens + kUpdateChunk - 1) / kUpdateChunk;
      if (cursor.token < chunks) break;
      cursor.token -= chunks;
    }
    cursor.token *= kUpdateChunk;
    return cursor;
  }

  LOWPREC_DEVICE void advance(const UpdateCall& call, int tokens) {
    token += tokens;
    if (token < call.pair[pair].tokens) return;
    token = 0;
    do ++pair;
    while (pair < call.pairs && call.pair[pair].tokens == 0);
  }

  LOWPREC_DEVICE bool operator!=(const UpdateCursor& other) const { return pair != other.pair || token != other.token; }

  /// Tokens from here on, no more than a stage takes.
  LOWPREC_DEVICE int left(const UpdateCall& call, int stage) const {
    return min(call.pair[pair].tokens - token, stage);
  }
};

/// The readers of operands that are codes.
template <bool kHalf>
struct UpdateCodes {
  CodeReader<kHalf> read[2];  // x, dy
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define LOWPREC_UPDATE 1
#endif

/// Whether codes may stay bytes. Before sm_90 tensor cores add 8 terms at a time, so that their order would change what
/// is lost.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kUpdateTakesBytes = true;
#else
constexpr bool kUpdateTakesBytes = false;
#endif

/// Write four matrices of 8 by 8: of each a lane gives where a row of 16 bytes lies, and has two numbers of another.
LOWPREC_DEVICE void store_matrices(uint32_t at, uint4 x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
#else
  const uint32_t values[4] = {x.x, x.y, x.z, x.w};
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t to = __shfl_sync(~0u, at, 8 * i + lane / 4) + lane % 4 * 4;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(values[i]) : "memory");
  }
#endif
}

LOWPREC_DEVICE uint4 load_granule(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}

/// Wait until no more than so many of the latest groups of copies are under way.
LOWPREC_DEVICE void wait_for_copies(int pending) {
  if (pending >= 3) {
    asm volatile("cp.async.wait_group 3;" ::: "memory");
  } else if (pending == 2) {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
}

/// Codes that stay bytes until they are in registers: of e5m2, which is float16's upper byte, or e4m3fn; or of a plain
/// format of 8 bits, as bfloat16.
enum class UpdateBytes : int { e5m2, e4m3, plain };

/// Four codes to a word as 16-bit values, two to a word: the lower two and the upper two, or those at even and at odd
/// places, as those of a plain format always: that is less to do, and tokens are in one order in both operands.
template <UpdateBytes kOf, bool kAlternate, bool kHalf>
LOWPREC_DEVICE uint2 read_codes(const CodeReader<kHalf>& by, uint32_t word) {
  if constexpr (kOf == UpdateBytes::plain) {
    return {by.plain_pair(word << 8), by.plain_pair(word)};
  }
  if constexpr (kOf == UpdateBytes::e5m2) {
    return {__byte_perm(word, 0, kAlternate ? 0x2404 : 0x1404),
            kAlternate ? word & 0xff00ff00u : __byte_perm(word, 0, 0x3424)};
  }
  if constexpr (kAlternate) word = __byte_perm(word, 0, 0x3120);
  return {codes::e4m3_to_half(static_cast<uint16_t>(word)), codes::e4m3_to_half(static_cast<uint16_t>(word >> 16))};
}

/// A thread block's work on a tile. With kBytes both operands are codes and stay so in shared memory.
template <int kSide, bool kFirst, bool kHalf, bool kBytes>
class UpdateTile {
  using Fragment = UpdateFragment<kSide>;
  using Stage = UpdateStage<kFirst, kBytes>;
  static_assert(!kBytes || kSide > 8);
  /// Whether the instructions' rows and columns take features in pairs: ldmatrix turns bytes by twos.
  static constexpr bool paired = kBytes && !kFirst;

 public:
  /// Shared memory besides the stages: where fragments find their operands in a stage, which weights they are, the
  /// tile's inputs and outputs, and their columns, as many as blocks of kSide have: larger ones have fewer.
  static constexpr int most_columns = update_tile(kSide) * kSide / 4;
  static constexpr int head = (Fragment::of_tile * 24 + most_columns * static_cast<int>(sizeof(UpdateColumn)) +
                               2 * update_tile(kSide) * 4 + 127) /
                              128 * 128;
  static constexpr int board = kUpdateWarps * 4096;  // what sums are written by way of

  LOWPREC_DEVICE UpdateTile(const UpdateCall& call, const UpdateCodes<kHalf>& codes, unsigned char* shared)
      : call_(call),
        codes_(codes),
        plan_(call.plan, call.tiles, blockIdx.x, call.tile),
        row_count_(__ldg(plan_.counts)),
        column_count_(__ldg(plan_.counts + 1)),
        fragment_count_(__ldg(plan_.counts + 2)),
        stage_(kUpdateChunk, 0),
        log_block_(call.log_block),
        places_(reinterpret_cast<uint4*>(shared)),
        weights_(reinterpret_cast<int2*>(shared + Fragment::of_tile * 16)),
        columns_(reinterpret_cast<UpdateColumn*>(shared + Fragment::of_tile * 24)),
        slots_(reinterpret_cast<int*>(columns_ + most_columns)),
        base_(shared_address(shared) + head),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32) {}

  LOWPREC_DEVICE void run() {
    // Without regard to how many there are, so that nothing waits for that.
    int4 planned = planned_fragment(0);
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * call_.tile; i += kUpdateThreads) {
      slots_[i] = __ldg(i < call_.tile ? plan_.rows + i : plan_.columns + i - call_.tile);
    }
    const int part = call_.first_part + blockIdx.y, from = part * call_.part_chunks;
    const int to = min(from + call_.part_chunks, call_.chunks);
    begin_ = UpdateCursor::at(call_, from);
    end_ = to == call_.chunks ? UpdateCursor{call_.pairs, 0} : UpdateCursor::at(call_, to);
    choose_stages(to - from);
    const int fragments = fragment_count_ << log_quarters();
    for (int first = 0; first < fragments; first += Fragment::of_tile) {
      if (first > 0) planned = planned_fragment(first);
      pass(first, fragments, planned);
    }
  }

 private:
  /// The longest stages of which two fit, or one that takes all there is.
  LOWPREC_DEVICE void choose_stages(int chunks) {
    for (int tokens = kUpdateChunk; tokens >= 16; tokens /= 2) {
      stage_ = Stage(tokens, (row_count_ + column_count_) << log_block_);
      const int bytes = stage_.bytes(), room = call_.stage_bytes;
      stages_ = (bytes <= room) + (2 * bytes <= room) + (3 * bytes <= room) + (4 * bytes <= room);
      if (stages_ >= 2 || (stages_ == 1 && chunks == 1 && tokens == kUpdateChunk)) return;
    }
  }

  LOWPREC_DEVICE uint32_t stage(int i) const { return base_ + i * stage_.bytes(); }

  /// One pass over the tokens, for as many fragments as registers hold.
  LOWPREC_DEVICE void pass(int first, int fragments, int4 planned) {
    __syncthreads();
    place_fragment(planned, first, fragments);
    const int count = max(min(fragments - first, Fragment::of_tile) - warp_ + kUpdateWarps - 1, 0) / kUpdateWarps;
    float sum[Fragment::held][Fragment::down][Fragment::across][4] = {};
    __syncthreads();
    UpdateCursor cursor = begin_, ahead = begin_;
    int at = 0;
    for (int copied = 1; cursor != end_; ++copied) {
      copy(ahead, at);
      at = at + 1 == stages_ ? 0 : at + 1;
      if (copied < stages_) continue;
      const int valid = cursor.left(call_, stage_.tokens);
      wait_for_copies(stages_ - 1);
      __syncthreads();
      if constexpr (kBytes) {
        multiply_formats(stage(at), (valid + 15) / 16, count, sum);
      } else {
        multiply(stage(at), (valid + 15) / 16, count, sum);
      }
      __syncthreads();
      cursor.advance(call_, stage_.tokens);
    }
    wait_for_copies(0);
    if (!packs(call_.out)) {
      store(count, sum);
    } else if (call_.out.kind == UpdateOutput::float16) {
      store_packed<true>(count, sum);
    } else {
      store_packed<false>(count, sum);
    }
  }

  /// A block of 64 has four fragments.
  LOWPREC_DEVICE int log_quarters() const { return call_.block > kSide ? 2 : 0; }

  /// A thread's fragment of a pass as the plan has it, or any other. To be read at once: a compiler would rather wait.
  LOWPREC_DEVICE int4 planned_fragment(int first) const {
    const int number = min((first + static_cast<int>(threadIdx.x)) >> log_quarters(), call_.tile - 1);
    const int* const of = plan_.fragments + 4 * number;
    int4 planned;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(planned.x) : "l"(of));
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(planned.y) : "l"(of + 1));
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(planned.z) : "l"(of + 2));
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(planned.w) : "l"(of + 3));
    return planned;
  }

  /// Where the fragments of a pass find their operands. Places that are left over point anywhere within.
  LOWPREC_DEVICE void place_fragment(int4 planned, int first, int fragments) const {
    static_assert(Fragment::of_tile <= kUpdateThreads);
    const int i = threadIdx.x, part = call_.block > kSide ? i & 3 : 0;
    if (i >= Fragment::of_tile) return;
    const int column = (planned.y + row_count_) * call_.block + kSide * (part & 1);
    const int row = (planned.x & 0xffff) * call_.block + kSide * (part >> 1);
    const int second = kSide == 8 ? (planned.x >> 16) * call_.block : row;
    const bool any = first + i < fragments;
    places_[i] = any ? uint4{stage_.at(0, row), stage_.at(0, column), stage_.at(0, second), stage_.at(0, column)}
                     : uint4{0, 0, 0, 0};
    weights_[i] = {planned.z, planned.w};
  }

  /// Columns of x, of x and dy.
  LOWPREC_DEVICE int left_columns() const { return row_count_ << (log_block_ - Stage::log_each); }
  LOWPREC_DEVICE int columns() const { return (row_count_ + column_count_) << (log_block_ - Stage::log_each); }

  /// Find out where the columns of a pair begin.
  LOWPREC_DEVICE void find_columns(const UpdatePair& pair) const {
    const int left = left_columns(), all = columns();
#pragma unroll 1
    for (int i = threadIdx.x; i < all; i += kUpdateThreads) {
      const bool right = i >= left;
      const int own = right ? i - left : i, slot = own >> (log_block_ - Stage::log_each);
      const int block = slots_[(right ? call_.tile : 0) + slot];
      const int feature = (block << log_block_) + ((own << Stage::log_each) & ((1 << log_block_) - 1));
      const int64_t at = feature * (right ? pair.dy : pair.x).feature;
      const char* const data = static_cast<const char*>((right ? pair.dy : pair.x).data);
      columns_[i] = {data + (kBytes ? at : 2 * at), (right ? pair.dy : pair.x).stride};
    }
  }

  /// Copy the next tokens into a stage, if there are any.
  LOWPREC_DEVICE void copy(UpdateCursor& ahead, int to) {
    if (ahead != end_) {
      const UpdatePair& pair = call_.pair[ahead.pair];
      if (ahead.pair != pair_) {
        __syncthreads();
        find_columns(pair);
        pair_ = ahead.pair;
        __syncthreads();
      }
      copy_columns(pair, ahead.token, ahead.left(call_, stage_.tokens), stage(to));
      ahead.advance(call_, stage_.tokens);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  /// Both operands at once where they are alike.
  LOWPREC_DEVICE void copy_columns(const UpdatePair& pair, int token, int valid, uint32_t to) const {
    const int tokens = (valid + 15) & ~15, all = columns();
    if constexpr (kBytes) {
      return for_granules(stage_, to, 0, all, tokens, CopyGranules<kFirst, 1>{columns_, token, valid});
    }
    const bool alike = pair.x.stride != 0 && pair.dy.stride != 0;
#pragma unroll 1
    for (int begin = 0; begin < all;) {
      const int side = begin > 0, end = side || alike ? all : left_columns();
      const UpdateOperand& operand = side ? pair.dy : pair.x;
      if (operand.stride == 0) {
        for_granules(stage_, to, begin, end, tokens, CopyElements<kFirst>{columns_, operand, token, valid});
      } else {
        for_granules(stage_, to, begin, end, tokens, CopyGranules<kFirst, 2>{columns_, token, valid});
      }
      begin = end;
    }
  }

  /// Add the products of a stage: so many steps of 16 tokens.
  template <class Sums>
  LOWPREC_DEVICE void multiply(uint32_t base, int steps, int count, Sums& sum) const {
    constexpr int further = kSide > 8 ? 8 : 0;  // feature of a fragment's lower half: of 8, a block's own
    const int eighth = lane_ & 7, half = lane_ >> 3 & 1, upper = lane_ >> 4, pitch = stage_.pitch();
    const uint32_t places = shared_address(places_ + warp_) + 8 * half;
    const int beside = kFirst ? 16 * pitch : 32;  // 16 features on
    const int swizzle = kFirst ? stage_.swizzle(eighth) : 0;
    const uint32_t left_row = base + (kFirst ? (eighth + further * half) * pitch : (eighth + 8 * upper) * pitch);
    const uint32_t right_row = base + (kFirst ? (eighth + further * upper) * pitch : (eighth + 8 * half) * pitch);
    const uint32_t left_place = kFirst ? (upper ^ swizzle) << 4 : further * half * 2;
    const uint32_t right_place = kFirst ? (half ^ swizzle) << 4 : further * upper * 2;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t left = kFirst ? left_row + (left_place ^ step << 5) : left_row + left_place + step * 16 * pitch;
      const uint32_t right =
          kFirst ? right_row + (right_place ^ step << 5) : right_row + right_place + step * 16 * pitch;
#pragma unroll
      for (int group = 0; group < Fragment::held; group += Fragment::together) {
        if (group >= count) break;
#pragma unroll
        for (int i = group; i < group + Fragment::together; ++i) {
          uint32_t x, y;
          asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(places + 16 * kUpdateWarps * i));
          multiply_fragment(left + x, right + y, beside, sum[i]);
        }
      }
    }
  }

  /// Add the products of a stage of codes, decoded in the registers into which ldmatrix reads four a lane. With
  /// features first these are neighbouring tokens, and both operands' terms are in that order; else two tokens of two
  /// features.
  template <UpdateBytes kLeft, UpdateBytes kRight, class Sums>
  LOWPREC_DEVICE void multiply_codes(uint32_t base, int steps, int count, Sums& sum) const {
    constexpr int down = 2 * Fragment::down, across = Fragment::across;  // words of either operand
    const int pitch = stage_.pitch(), swizzle = kFirst ? stage_.swizzle(lane_ & 7) : 0;
    const uint32_t row = base + (kFirst && kSide == 32 ? lane_ : lane_ & 15) * pitch;
    const uint32_t places = shared_address(places_ + warp_) + (kSide == 32 ? 0 : lane_ / 16 * 4);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t from =
          kFirst ? row + ((step ^ swizzle) << 4) : row + step * 16 * pitch + (kSide == 32 ? lane_ / 16 * 16 : 0);
#pragma unroll
      for (int i = 0; i < Fragment::held; ++i) {
        if (i % Fragment::together == 0 && i >= count) break;
        const uint32_t place = places + 16 * kUpdateWarps * i;
        uint32_t words[down + across];
        if constexpr (kSide == 32) {
          uint32_t x, y;
          asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(place));
          load_matrices<!kFirst>(*reinterpret_cast<uint32_t (*)[4]>(words), from + x);
          load_matrices<!kFirst>(*reinterpret_cast<uint32_t (*)[4]>(words + down), from + y);
        } else {
          uint32_t own;  // the operand that this lane's half of the warp points to
          asm volatile("ld.shared.b32 %0, [%1];" : "=r"(own) : "r"(place));
          load_matrices<!kFirst>(words, from + own);
        }
        uint2 read[down + across];
#pragma unroll
        for (int n = 0; n < down; ++n) read[n] = read_codes<kLeft, !kFirst>(codes_.read[0], words[n]);
#pragma unroll
        for (int n = down; n < down + across; ++n) read[n] = read_codes<kRight, !kFirst>(codes_.read[1], words[n]);
#pragma unroll
        for (int m = 0; m < Fragment::down; ++m) {
          const uint2 low = read[2 * m], high = read[2 * m + 1];
          const uint32_t a[4] = {low.x, kFirst ? high.x : low.y, kFirst ? low.y : high.x, high.y};
#pragma unroll
          for (int n = 0; n < across; ++n) {
            if constexpr (kFirst) {
              multiply_add<kHalf>(sum[i][m][n], a, read[down + n].x, read[down + n].y);
            } else {
              const uint2 early = read[down + n / 2 * 2], late = read[down + n / 2 * 2 + 1];  // tokens
              multiply_add<kHalf>(sum[i][m][n], a, n % 2 ? early.y : early.x, n % 2 ? late.y : late.x);
            }
          }
        }
      }
    }
  }

  /// The same with the formats as constants, so that nothing is asked in between.
  template <class Sums>
  LOWPREC_DEVICE void multiply_formats(uint32_t base, int steps, int count, Sums& sum) const {
    using enum UpdateBytes;
    if constexpr (kHalf) {
      if (codes_.read[0].is_float16_top) {
        if (codes_.read[1].is_float16_top) return multiply_codes<e5m2, e5m2>(base, steps, count, sum);
        return multiply_codes<e5m2, e4m3>(base, steps, count, sum);
      }
      if (codes_.read[1].is_float16_top) return multiply_codes<e4m3, e5m2>(base, steps, count, sum);
      multiply_codes<e4m3, e4m3>(base, steps, count, sum);
    } else {
      multiply_codes<plain, plain>(base, steps, count, sum);
    }
  }

  static LOWPREC_DEVICE void multiply_fragment(uint32_t left, uint32_t right, int beside,
                                               float (&sum)[Fragment::down][Fragment::across][4]) {
    uint32_t a[Fragment::down][4];
#pragma unroll
    for (int m = 0; m < Fragment::down; ++m) load_matrices<!kFirst>(a[m], left + m * beside);
    if constexpr (kSide == 8) {
      uint32_t b[2];
      load_matrices<!kFirst>(b, right);
      multiply_add<kHalf>(sum[0][0], a[0], b[0], b[1]);
    } else {
#pragma unroll
      for (int n = 0; n < Fragment::across; n += 2) {
        uint32_t b[4];
        load_matrices<!kFirst>(b, right + n / 2 * beside);
#pragma unroll
        for (int m = 0; m < Fragment::down; ++m) {
          multiply_add<kHalf>(sum[m][n], a[m], b[0], b[1]);
          multiply_add<kHalf>(sum[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  /// Write sums, four fours of a thread at a time: so many loads of what was there before are under way at once.
  template <class Sums>
  LOWPREC_DEVICE void store(int count, const Sums& sum) const {
    constexpr int each = Fragment::down * (kSide == 8 ? 1 : Fragment::across);  // fours of a fragment
    static_assert(Fragment::held * each % 4 == 0);
    const bool odd = lane_ & 1;
    const int part = call_.block > kSide ? warp_ % 4 : 0;
    const int row = kSide * (part >> 1) + (paired ? 2 : 1) * (lane_ / 4);
    const int column = kSide * (part & 1) + 4 * (paired ? lane_ % 4 : lane_ % 4 / 2);
#pragma unroll
    for (int begin = 0; begin < Fragment::held * each; begin += 4) {
      if (begin / each >= count) break;
      Four four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int fragment = (begin + i) / each, q = (begin + i) % each;
        const auto& of = sum[fragment];
        const int m = q / Fragment::across, n = q / 2 * 2 % Fragment::across, h = q % 2;
        const float* const even = kSide == 8 ? of[0][0] : of[m][n] + 2 * h;
        const float* const other = kSide == 8 ? of[0][0] + 2 : of[m][n + 1] + 2 * h;
        const int place = kSide == 8 ? 0 : (16 * m + (paired ? 1 : 8) * h << log_block_) + 8 * (n + (odd && !paired));
        const int2 weights = weights_[kUpdateWarps * fragment + warp_];
        const int weight = kSide < 32 && fragment >= count ? -1 : kSide == 8 && odd ? weights.y : weights.x;
        const int64_t origin = static_cast<int64_t>(weight) << 2 * log_block_;
        four[i] = {kSide == 32 || weight >= 0, weight, origin + ((row << log_block_) + column + place),
                   paired ? float4{even[0], other[0], even[1], other[1]} : exchange(even, other, odd)};
      }
      write_fours(call_.out, four, blockIdx.y * (call_.weights << 2 * log_block_));
    }
  }

  /// Whether sums are written as 16-bit values, and nothing else is done to them.
  LOWPREC_DEVICE static bool packs(const UpdateOutput& out) {
    return !out.sums && !out.gate && out.beta == 0 && out.kind != UpdateOutput::float32;
  }

  /// Two sums of a lane's that are neighbours: the i-th such of four that are written together.
  template <bool kHalfOut, class Sums>
  static LOWPREC_DEVICE uint32_t packed(const Sums& sum, int round, int i) {
    const float* const two = kSide == 32   ? sum[round / 4][round % 4 / 2][i] + round % 2 * 2
                             : kSide == 16 ? sum[round][0][i % 2] + i / 2 * 2
                                           : sum[2 * round + i / 2][0][0] + i % 2 * 2;
    return narrow_pair<kHalfOut>(two[0], two[1]);
  }

  /// Write such sums by way of shared memory, where the stages were, so that a lane writes 16 bytes. A warp has 512
  /// bytes of rows in a round: 8 by 32, a fragment of 16 by 16, or two of 16 by 8. Granules of a row are exchanged.
  template <bool kHalfOut, class Sums>
  LOWPREC_DEVICE void store_packed(int count, const Sums& sum) const {
    constexpr int log_wide = kSide / 16;                          // log2 of granules in a row
    constexpr int rounds = 8, of_fragment = kSide == 32 ? 4 : 1;  // rounds of one
    static_assert(Fragment::held * Fragment::down * Fragment::across * 4 == rounds * 8);
    const int used = kSide == 8 ? (count + 1) / 2 : count * of_fragment;
    const uint32_t board = base_ + 512 * rounds * warp_;
    if constexpr (paired) {
      lay_pairs<kHalfOut>(board, count, sum);
    } else {
      const int matrix = lane_ / 8, row = (kSide == 32 ? 0 : kSide == 16 ? matrix / 2 * 8 : matrix * 8) + lane_ % 8;
      const uint32_t to = board + granule(row, kSide == 32 ? matrix : matrix % 2);
#pragma unroll
      for (int i = 0; i < rounds; ++i) {
        if (i >= used) break;
        store_matrices(to + 512 * i, {packed<kHalfOut>(sum, i, 0), packed<kHalfOut>(sum, i, 1),
                                      packed<kHalfOut>(sum, i, 2), packed<kHalfOut>(sum, i, 3)});
      }
    }
    __syncwarp();
    const int part = call_.block > kSide ? warp_ % 4 : 0;
    const int own = lane_ >> log_wide, column = lane_ & ((1 << log_wide) - 1);
    const uint32_t from = board + granule(own, column);
    auto* const out = static_cast<uint16_t*>(call_.out.data) + (kSide * (part >> 1) + own % kSide << log_block_) +
                      kSide * (part & 1) + 8 * column;
#pragma unroll
    for (int i = 0; i < rounds; ++i) {
      if (i >= used) break;
      const int fragment = kSide == 8 ? 2 * i + lane_ / 16 : i / of_fragment;
      const int2 weights = weights_[kUpdateWarps * fragment + warp_];
      const int weight = kSide == 8 && (lane_ & 8) ? weights.y : weights.x;
      const uint4 value = load_granule(from + 512 * i);
      if (kSide == 8 && (fragment >= count || weight < 0)) continue;
      const int64_t origin = (static_cast<int64_t>(weight) << 2 * log_block_) + (i % of_fragment * 8 << log_block_);
      *reinterpret_cast<uint4*>(out + origin) = value;
    }
  }

  /// Where features are paired, a lane has four neighbours of a row.
  template <bool kHalfOut, class Sums>
  LOWPREC_DEVICE void lay_pairs(uint32_t board, int count, const Sums& sum) const {
    constexpr int pitch = 2 * kSide;
    const uint32_t to = board + granule(lane_ / 4 * 2, lane_ % 4 / 2) + lane_ % 2 * 8;
#pragma unroll
    for (int i = 0; i < Fragment::held; ++i) {
      if (i >= count) break;
#pragma unroll
      for (int n = 0; n < Fragment::down * Fragment::across; ++n) {
        const int m = n / Fragment::across, h = n % 2, column = n / 2 * 2 % Fragment::across;
        const float* const even = sum[i][m][column] + 2 * h;
        const float* const odd = sum[i][m][column + 1] + 2 * h;
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"((to ^ column << 4) + (i * kSide + 16 * m + h) * pitch),
                     "r"(narrow_pair<kHalfOut>(even[0], odd[0])), "r"(narrow_pair<kHalfOut>(even[1], odd[1]))
                     : "memory");
      }
    }
  }

  /// Where a granule of a round lies: so that eight rows of one column, or one after the other, share no bank.
  static LOWPREC_DEVICE uint32_t granule(int row, int column) {
    if constexpr (kSide == 8) return row << 4;
    return kSide == 32 ? (row << 6) + ((column ^ (row >> 1 & 3)) << 4) : (row << 5) + ((column ^ (row >> 2 & 1)) << 4);
  }

  /// Neighbouring lanes exchange pairs of two instructions, so that each has four elements of a row.
  static LOWPREC_DEVICE float4 exchange(const float* even, const float* other, bool odd) {
    const float x = __shfl_xor_sync(~0u, odd ? even[0] : other[0], 1);
    const float y = __shfl_xor_sync(~0u, odd ? even[1] : other[1], 1);
    return odd ? float4{x, y, other[0], other[1]} : float4{even[0], even[1], x, y};
  }

  const UpdateCall& call_;
  const UpdateCodes<kHalf>& codes_;
  UpdatePlan plan_;
  int row_count_;
  int column_count_;
  int fragment_count_;
  Stage stage_;
  int stages_ = 1;
  int log_block_;
  uint4* places_;
  int2* weights_;
  UpdateColumn* columns_;
  int* slots_;
  uint32_t base_;
  int pair_ = -1;  // whose columns these are
  int warp_;
  int lane_;
  UpdateCursor begin_;
  UpdateCursor end_;
};

template <int kSide, bool kFirst, bool kHalf, bool kBytes>
__global__ void __launch_bounds__(kUpdateThreads, 2)
    update_kernel(const __grid_constant__ UpdateCall call, const __grid_constant__ UpdateCodes<kHalf> codes) {
#ifdef LOWPREC_UPDATE
  if constexpr (!kBytes || kUpdateTakesBytes) {
    extern __shared__ __align__(128) unsigned char shared[];
    UpdateTile<kSide, kFirst, kHalf, kBytes>(call, codes, shared).run();
  }
#endif
}

}  // namespace lowprec
