// The update of block-sparse weights by tensor cores. A thread block computes a tile: some weight blocks and, in shared
// memory, the inputs and outputs that these need, each once, a stage of tokens after the other. Warps share the tile's
// fragments; a fragment's sums stay in registers until all tokens are added.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/sparse_update_load.h"
#include "lowprec/sparse_update_store.h"

namespace lowprec {

/// What a warp computes at a time: 16 rows, two blocks of 8, by 8; 16 by 16; or 32 by 32, a quarter of a block of 64.
template <int kSide>
struct UpdateFragment {
  static constexpr int across = kSide / 8;                    // instructions
  static constexpr int down = kSide == 32 ? 2 : 1;            // of them
  static constexpr int held = 16 / (across * down);           // fragments of a warp
  static constexpr int together = held > 4 ? held / 4 : 1;    // without asking whether there are as many
  static constexpr int of_tile = held * kUpdateThreads / 32;  // computed in one pass over the tokens
};

/// A tile of the plan.
struct UpdatePlan {
  const int* rows;
  const int* columns;
  const int* fragments;
  int row_count;
  int column_count;
  int fragment_count;

  LOWPREC_DEVICE UpdatePlan(const int* plan, int tiles, int tile, int size) {
    const int64_t all = static_cast<int64_t>(tiles) * size, own = static_cast<int64_t>(tile) * size;
    rows = plan + 4 * tiles + own;
    columns = plan + 4 * tiles + all + own;
    fragments = plan + 4 * tiles + 2 * all + 4 * own;
    row_count = __ldg(plan + 4 * tile);
    column_count = __ldg(plan + 4 * tile + 1);
    fragment_count = __ldg(plan + 4 * tile + 2);
  }
};

/// A place among the tokens of all pairs.
struct UpdateCursor {
  int pair;
  int64_t token;

  /// Where a chunk begins.
  static LOWPREC_DEVICE UpdateCursor at(const UpdateCall& call, int chunk) {
    UpdateCursor cursor{0, chunk};
    for (; cursor.pair < call.pairs; ++cursor.pair) {
      const int64_t chunks = (call.pair[cursor.pair].tokens + kUpdateChunk - 1) / kUpdateChunk;
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
    const int64_t rest = call.pair[pair].tokens - token;
    return rest < stage ? static_cast<int>(rest) : stage;
  }
};

/// The readers of codes, and which operands are such.
template <bool kHalf>
struct UpdateCodes {
  CodeReader<kHalf> read[2];  // x, dy
  bool codes[2];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define LOWPREC_UPDATE 1
#endif

LOWPREC_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <bool kTransposed>
LOWPREC_DEVICE void load_matrices(uint32_t (&x)[4], uint32_t at) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at));
  }
}

template <bool kTransposed>
LOWPREC_DEVICE void load_matrices(uint32_t (&x)[2], uint32_t at) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at));
  }
}

template <bool kHalf>
LOWPREC_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
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

/// A thread block's work on a tile.
template <int kSide, bool kFirst, bool kHalf>
class UpdateTile {
  using Fragment = UpdateFragment<kSide>;

 public:
  /// Shared memory besides the stages: the tile's inputs and outputs, and where fragments find theirs in a stage.
  static constexpr int head = (2 * update_tile(kSide) * 4 + Fragment::of_tile * 16 + 127) / 128 * 128;

  LOWPREC_DEVICE UpdateTile(const UpdateCall& call, const UpdateCodes<kHalf>& codes, unsigned char* shared)
      : call_(call),
        codes_(codes),
        plan_(call.plan, call.tiles, blockIdx.x, update_tile(call.block)),
        stage_(kUpdateChunk, (plan_.row_count + plan_.column_count) * call.block),
        log_block_(call.log_block),
        slots_(reinterpret_cast<int*>(shared)),
        places_(reinterpret_cast<uint4*>(shared + 2 * update_tile(kSide) * 4)),
        base_(shared_address(shared) + head),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32) {}

  LOWPREC_DEVICE void run() {
    for (int i = threadIdx.x; i < plan_.row_count; i += kUpdateThreads) slots_[i] = __ldg(plan_.rows + i);
    for (int i = threadIdx.x; i < plan_.column_count; i += kUpdateThreads) {
      slots_[plan_.row_count + i] = __ldg(plan_.columns + i);
    }
    const int part = blockIdx.y;
    const int from = static_cast<int>(static_cast<int64_t>(call_.chunks) * part / call_.parts);
    const int to = static_cast<int>(static_cast<int64_t>(call_.chunks) * (part + 1) / call_.parts);
    begin_ = UpdateCursor::at(call_, from);
    end_ = UpdateCursor::at(call_, to);
    choose_stages(to - from);
    const int fragments = plan_.fragment_count * (call_.block > kSide ? 4 : 1);
    for (int first = 0; first < fragments; first += Fragment::of_tile) pass(first, fragments);
  }

 private:
  /// The longest stages of which two fit, or one that takes all there is.
  LOWPREC_DEVICE void choose_stages(int chunks) {
    for (int tokens = kUpdateChunk; tokens >= 16; tokens /= 2) {
      stage_ = UpdateStage<kFirst>(tokens, stage_.features);
      stages_ = min(call_.stage_bytes / stage_.bytes(), 4);
      if (stages_ >= 2 || (stages_ == 1 && chunks == 1 && tokens == kUpdateChunk)) return;
    }
  }

  LOWPREC_DEVICE uint32_t stage(int i) const { return base_ + i * stage_.bytes(); }

  /// One pass over the tokens, for as many fragments as registers hold.
  LOWPREC_DEVICE void pass(int first, int fragments) {
    __syncthreads();
    place_fragments(first, fragments);
    const int count = max(min(fragments - first, Fragment::of_tile) - warp_ + 7, 0) / 8;
    float sum[Fragment::held][Fragment::down][Fragment::across][4] = {};
    __syncthreads();
    UpdateCursor ahead = begin_;
    for (int i = 0; i < stages_; ++i) copy(ahead, i);
    int now = 0;
    for (UpdateCursor cursor = begin_; cursor != end_; cursor.advance(call_, stage_.tokens)) {
      wait_for_copies(stages_ - 1);
      __syncthreads();
      multiply(stage(now), (cursor.left(call_, stage_.tokens) + 15) / 16, count, sum);
      __syncthreads();
      copy(ahead, now);
      now = now + 1 == stages_ ? 0 : now + 1;
    }
    wait_for_copies(0);
    store(first, count, sum);
  }

  /// Where the fragments of a pass find their operands. Places that are left over point anywhere within.
  LOWPREC_DEVICE void place_fragments(int first, int fragments) const {
    for (int i = threadIdx.x; i < Fragment::of_tile; i += kUpdateThreads) {
      uint4 place = {0, 0, 0, 0};
      if (first + i < fragments) {
        const int quarters = call_.block > kSide ? 4 : 1, part = (first + i) % quarters;
        const int* of = plan_.fragments + 4 * ((first + i) / quarters);
        const int rows = __ldg(of), column = (__ldg(of + 1) + plan_.row_count) * call_.block + kSide * (part & 1);
        const int row = (rows & 0xffff) * call_.block + kSide * (part >> 1);
        const int second = kSide == 8 ? (rows >> 16) * call_.block : row;
        place = {stage_.at(0, row), stage_.at(0, column), stage_.at(0, second), stage_.at(0, column)};
      }
      places_[i] = place;
    }
  }

  /// Copy the next tokens into a stage, if there are any.
  LOWPREC_DEVICE void copy(UpdateCursor& ahead, int to) {
    if (ahead != end_) {
      const UpdatePair& pair = call_.pair[ahead.pair];
      const int valid = ahead.left(call_, stage_.tokens);
#pragma unroll 1
      for (int side = 0; side < 2; ++side) copy_operand(side, side ? pair.dy : pair.x, ahead.token, valid, stage(to));
      ahead.advance(call_, stage_.tokens);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  LOWPREC_DEVICE void copy_operand(int side, const UpdateOperand& operand, int64_t token, int valid, uint32_t to) {
    const UpdateSlots slots{slots_ + (side ? plan_.row_count : 0), side ? plan_.column_count : plan_.row_count,
                            side ? plan_.row_count << log_block_ : 0, log_block_};
    const CodeReader<kHalf>& read = codes_.read[side];
    if (!operand.quick) {
      const CopyStrided<kHalf> how{operand.data, kFirst ? operand.token : operand.feature, codes_.codes[side], read};
      copy_blocks(stage_, to, operand, slots, token, valid, how);
    } else if (codes_.codes[side]) {
      copy_blocks(stage_, to, operand, slots, token, valid,
                  CopyCodes<kHalf>{static_cast<const uint8_t*>(operand.data), read});
    } else {
      copy_blocks(stage_, to, operand, slots, token, valid, CopyValues{static_cast<const uint16_t*>(operand.data)});
    }
  }

  /// Add the products of a stage: so many steps of 16 tokens.
  template <class Sums>
  LOWPREC_DEVICE void multiply(uint32_t base, int steps, int count, Sums& sum) const {
    constexpr int further = kSide > 8 ? 8 : 0;  // feature of a fragment's lower half: of 8, a block's own
    const int eighth = lane_ & 7, half = lane_ >> 3 & 1, upper = lane_ >> 4;
    const uint32_t places = shared_address(places_ + warp_) + 8 * half;
    const int beside = kFirst ? 16 * stage_.pitch() : 32;  // 16 features on
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int token = 16 * step;
      const uint32_t left = base + (kFirst ? stage_.at(token + 8 * upper, eighth + further * half)
                                           : stage_.at(token + eighth + 8 * upper, further * half));
      const uint32_t right = base + (kFirst ? stage_.at(token + 8 * half, eighth + further * upper)
                                            : stage_.at(token + eighth + 8 * half, further * upper));
#pragma unroll
      for (int group = 0; group < Fragment::held; group += Fragment::together) {
        if (group >= count) break;
#pragma unroll
        for (int i = group; i < group + Fragment::together; ++i) {
          uint32_t x, y;
          asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(places + 16 * 8 * i));
          multiply_fragment(left + x, right + y, beside, sum[i]);
        }
      }
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

  /// Write sums. Neighbouring lanes exchange pairs, so that each has four elements of a row.
  template <class Sums>
  LOWPREC_DEVICE void store(int first, int count, const Sums& sum) const {
#pragma unroll
    for (int i = 0; i < Fragment::held; ++i) {
      if (i >= count) break;
      const int quarters = call_.block > kSide ? 4 : 1, number = first + 8 * i + warp_, part = number % quarters;
      const int* of = plan_.fragments + 4 * (number / quarters);
      const int row = kSide * (part >> 1) + lane_ / 4, column = kSide * (part & 1) + 4 * (lane_ % 4 / 2);
      const bool odd = lane_ & 1;
      if constexpr (kSide == 8) {
        const float4 four = exchange(sum[i][0][0] + 0, sum[i][0][0] + 2, odd);
        write(__ldg(of + 2 + odd), row, column, four);
      } else {
        const int weight = __ldg(of + 2);
#pragma unroll
        for (int m = 0; m < Fragment::down; ++m) {
#pragma unroll
          for (int n = 0; n < Fragment::across; n += 2) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float4 four = exchange(sum[i][m][n] + 2 * h, sum[i][m][n + 1] + 2 * h, odd);
              write(weight, row + 16 * m + 8 * h, column + 8 * (n + odd), four);
            }
          }
        }
      }
    }
  }

  static LOWPREC_DEVICE float4 exchange(const float* even, const float* odd_pair, bool odd) {
    const float x = __shfl_xor_sync(~0u, odd ? even[0] : odd_pair[0], 1);
    const float y = __shfl_xor_sync(~0u, odd ? even[1] : odd_pair[1], 1);
    return odd ? float4{x, y, odd_pair[0], odd_pair[1]} : float4{even[0], even[1], x, y};
  }

  LOWPREC_DEVICE void write(int weight, int row, int column, float4 four) const {
    if (weight < 0) return;
    const int64_t element = ((static_cast<int64_t>(weight) << log_block_) + row << log_block_) + column;
    if (call_.out.sums) {
      const int64_t part = blockIdx.y * (call_.weights << 2 * log_block_);
      *reinterpret_cast<float4*>(call_.out.sums + part + element) = four;
    } else {
      write_four(call_.out, weight, element, four);
    }
  }

  const UpdateCall& call_;
  const UpdateCodes<kHalf>& codes_;
  UpdatePlan plan_;
  UpdateStage<kFirst> stage_;
  int stages_ = 1;
  int log_block_;
  int* slots_;
  uint4* places_;
  uint32_t base_;
  int warp_;
  int lane_;
  UpdateCursor begin_;
  UpdateCursor end_;
};

template <int kSide, bool kFirst, bool kHalf>
__global__ void __launch_bounds__(kUpdateThreads, 2)
    update_kernel(const __grid_constant__ UpdateCall call, const __grid_constant__ UpdateCodes<kHalf> codes) {
#ifdef LOWPREC_UPDATE
  extern __shared__ __align__(128) unsigned char shared[];
  UpdateTile<kSide, kFirst, kHalf>(call, codes, shared).run();
#endif
}

}  // namespace lowprec
