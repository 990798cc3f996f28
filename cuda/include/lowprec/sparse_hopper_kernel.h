// The kernel of block-sparse products of many tokens on Hopper. Device code, without torch. docs/kernels/sparse.md has
// the reasons.
//
// An item is a tile of tokens of one output column, D[64 outputs, tokens] = Wᵀ · X over the column's pairs. Items lie
// column by column, the tiles of one beside each other, and their pairs in one line, of which every thread block has an
// equal share. One warp copies the blocks of x and w into a ring of shared memory, item after item; warpgroups multiply
// them. An item that several shares have is written by the last of them, which adds what the others publish.
#pragma once

#include <cstdint>

#include "lowprec/sparse_hopper.h"
#include "lowprec/sparse_overlap.h"
#include "lowprec/sparse_ring.h"
#include "lowprec/tensor_core_hopper.h"

namespace lowprec {

constexpr int kBoxBytes = 64 * 128;  // of 64 features of 64 tokens, and of a weight block
constexpr int kStageValues = 64;     // float32 sums of a thread
constexpr int kPassRow = 40;         // of 32 tokens, apart so that banks do not meet
constexpr int kPassColumn = 20;      // of 16 outputs
constexpr uint32_t kWarp = 0xFFFFFFFF;

/// Where a warp's sums pass from its threads to rows: 16 outputs of 32 tokens.
using Pass = float[16 * kPassRow];
static_assert(16 * kPassRow == 32 * kPassColumn);

template <int kGroups>
struct SparseRing {
  static constexpr int kStages = kGroups == 1 ? 8 : 5;
  struct Stage {
    uint8_t x[2 * kGroups][kBoxBytes];
    uint8_t w[kBoxBytes];
  };
  Stage stage[kStages];
  Pass pass[4 * kGroups];
  Barrier full[kStages];
  Barrier empty[kStages];

  static constexpr int kThreads = 128 * kGroups + 32;
};

template <int kGroups>
constexpr int kSparseRingBytes = sizeof(SparseRing<kGroups>) + 1024;  // for its alignment

// Shares.

/// The line of all items' pairs.
struct HopperLine {
  const int* offsets;  // of columns' pairs
  int outputs;
  int64_t tiles;
  int64_t pairs;  // of the layout

  LOWPREC_DEVICE explicit HopperLine(const SparseHopperCall& call)
      : offsets(call.offsets), outputs(call.outputs), tiles(hopper_tiles(call.out.tokens)), pairs(call.blocks) {}

  /// Where a share begins.
  LOWPREC_DEVICE int64_t begin(int share) const { return tiles * pairs * share / kHopperShares; }

  /// The column of a pair: the last one that begins no later. By a whole warp.
  LOWPREC_DEVICE int column_of(int64_t pair) const {
    const int lane = threadIdx.x % 32;
    int low = 0, size = outputs;
    while (size > 1) {
      const int step = (size + 31) / 32, at = lane * step;
      const bool before = at < size && __ldg(offsets + low + at) <= pair;
      const int last = (__popc(__ballot_sync(kWarp, before)) - 1) * step;
      low += last;
      size = min(step, size - last);
    }
    return low;
  }
};

/// A place in the line: an item, and how many of its pairs lie before.
struct HopperPlace {
  int column;
  int begin;  // of the column's pairs
  int count;  // of them
  int tile;
  int done;

  LOWPREC_DEVICE HopperPlace(const HopperLine& line, int64_t at) {
    column = line.column_of(at / line.tiles);
    begin = __ldg(line.offsets + column);
    count = __ldg(line.offsets + column + 1) - begin;
    const int64_t within = at - line.tiles * begin;
    tile = static_cast<int>(within / count);
    done = static_cast<int>(within - static_cast<int64_t>(tile) * count);
  }

  /// To the next item. By a whole warp.
  LOWPREC_DEVICE void advance(const HopperLine& line) {
    done = 0;
    if (++tile < line.tiles) return;
    tile = 0;
    begin += count;
    for (column += 1;; column += 32) {  // columns without pairs are no items
      const int end = __ldg(line.offsets + min(column + 1 + static_cast<int>(threadIdx.x % 32), line.outputs));
      const uint32_t after = __ballot_sync(kWarp, end > begin);
      if (!after) continue;
      const int first = __ffs(after) - 1;
      column += first;
      count = __shfl_sync(kWarp, end, first) - begin;
      return;
    }
  }
};

/// Call f(place, count) for each item of which a share has pairs: from where, and how many. First the item that the
/// share begins and another one ends, last the one that others began: by then those have long published theirs.
template <class F>
LOWPREC_DEVICE void for_items(const HopperLine& line, int share, F f) {
  const int64_t begin = line.begin(share), end = line.begin(share + 1);
  HopperPlace place(line, end - 1), head = place;
  const int before = place.done + 1;  // of the last item's pairs
  const int64_t tail = before < place.count && end - before >= begin ? end - before : end;
  int64_t from = tail, to = end, rest = begin;
  place.done = 0;
#pragma unroll 1
  for (int part = 0; part < 3; ++part) {
    if (part == 1) {
      if (begin == tail) return;
      place = head = HopperPlace(line, begin);
      rest = head.done ? min(begin + head.count - head.done, tail) : begin;
      from = rest, to = tail;
      if (head.done && from < to) place.advance(line);
    } else if (part == 2) {
      place = head;
      from = begin, to = rest;
    }
#pragma unroll 1
    while (from < to) {
      const int64_t left = to - from, item = place.count - place.done;
      const int count = static_cast<int>(item < left ? item : left);
      f(place, count);
      from += count;
      if (from < to) place.advance(line);
    }
  }
}

// Results.

/// The runs of a warp's pass that a thread writes.
class PassRuns {
 public:
  LOWPREC_DEVICE PassRuns(const SparseOutput& out, const Pass& pass, int64_t token, int64_t output)
      : runs_(runs(out, token, output)),
        from_(pass + place(out.first)),
        step_(out.first ? 4 * kPassRow : 8 * kPassColumn) {}

  LOWPREC_DEVICE void write_sums() const { runs_.write_sums<4>(*this); }
  LOWPREC_DEVICE void write_codes() const { runs_.write_codes<4>(*this); }

  LOWPREC_DEVICE float4 operator()(int n) const { return *reinterpret_cast<const float4*>(from_ + n * step_); }

 private:
  static LOWPREC_DEVICE int row(bool first) { return threadIdx.x % 32 / (first ? 8 : 4); }
  static LOWPREC_DEVICE int column(bool first) { return threadIdx.x % (first ? 8 : 4) * 4; }
  static LOWPREC_DEVICE int place(bool first) { return row(first) * (first ? kPassRow : kPassColumn) + column(first); }

  static LOWPREC_DEVICE SparseRuns runs(const SparseOutput& out, int64_t token, int64_t output) {
    const bool first = out.first;
    return {out, (first ? output : token) + row(first), (first ? token : output) + column(first), first ? 4 : 8, 4};
  }

  SparseRuns runs_;
  const float* from_;
  int step_;
};

/// Not inline, as it would be four times.
static __device__ __noinline__ void write_pass(const SparseOutput& out, const Pass& pass, int64_t token,
                                               int64_t output) {
  const PassRuns runs(out, pass, token, output);
  out.form == RunForm::codes ? runs.write_codes() : runs.write_sums();
}

/// Write a warp's sums, 16 outputs of 128 tokens, by rows of the result.
LOWPREC_DEVICE void write_values(const SparseOutput& out, Pass& pass, int64_t token, int64_t output,
                                 const float (&sums)[kStageValues]) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) {
    const int64_t first_token = token + 32 * chunk;
    if (first_token >= out.tokens) return;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 pair = {sums[16 * chunk + 2 * i], sums[16 * chunk + 2 * i + 1]};
      const int n = row + i % 2 * 8, t = i / 2 * 8 + column;
      if (out.first) {
        *reinterpret_cast<float2*>(pass + n * kPassRow + t) = pair;
      } else {
        pass[t * kPassColumn + n] = pair.x;
        pass[(t + 1) * kPassColumn + n] = pair.y;
      }
    }
    __syncwarp();
    write_pass(out, pass, first_token, output);
  }
}

/// Where a warp's sums of an item belong.
LOWPREC_DEVICE void write_item(const SparseOutput& out, Pass& pass, int column, int tile, int group,
                               const float (&sums)[kStageValues]) {
  const int64_t token = static_cast<int64_t>(tile) * hopper_tile(out.tokens) + group * kGroupTokens;
  write_values(out, pass, token, static_cast<int64_t>(column) * kHopperBlock + threadIdx.x % 128 / 32 * 16, sums);
}

// Parts of items.

/// Where a thread's sums of the part that a share publishes lie, and the flag that its warp sets.
struct Part {
  float4* sums;
  uint32_t* flag;

  LOWPREC_DEVICE Part(const SparseHopperCall& call, int share, int group) {
    const int64_t place = static_cast<int64_t>(share) * hopper_groups(call.out.tokens) + group;
    sums = reinterpret_cast<float4*>(call.partial) + place * (kStageValues / 4 * 128) + threadIdx.x % 128;
    flag = call.flags + place * 4 + threadIdx.x % 128 / 32;
  }
};

LOWPREC_DEVICE void publish(const SparseHopperCall& call, int group, const float (&sums)[kStageValues]) {
  const Part part(call, blockIdx.x, group);
#pragma unroll
  for (int i = 0; i < kStageValues / 4; ++i) {
    part.sums[128 * i] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
  }
  await_dependence();
  __syncwarp();
  if (threadIdx.x % 32 == 0) set_flag(part.flag);
}

/// Add the parts that the shares before this one have of an item, the last one's first.
LOWPREC_DEVICE void add_parts(const SparseHopperCall& call, const HopperLine& line, int group, int64_t item,
                              float (&sums)[kStageValues]) {
  await_dependence();
  int share = blockIdx.x;
#pragma unroll 1
  do {
    const Part part(call, --share, group);
    await_flag(part.flag);
#pragma unroll
    for (int i = 0; i < kStageValues / 4; ++i) {
      const float4 four = part.sums[128 * i];
      sums[4 * i] += four.x;
      sums[4 * i + 1] += four.y;
      sums[4 * i + 2] += four.z;
      sums[4 * i + 3] += four.w;
    }
  } while (line.begin(share) > item);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Fills the ring, item after item. A warp's work.
template <int kGroups, bool kFirst>
LOWPREC_DEVICE void produce(const SparseHopperCall& call, const CUtensorMap& x, const CUtensorMap& w,
                            SparseRing<kGroups>& ring) {
  using Ring = SparseRing<kGroups>;
  const int lane = threadIdx.x % 32;
  int slot = 0, window = -32, input = 0, id = 0;  // every lane has one of the 32 pairs from `window` on
  uint32_t parity = 1;
  const auto fill = [&](int token, int boxes, int x_block, int w_block) {
    auto& stage = ring.stage[slot];
    Barrier& full = ring.full[slot];
    ring.empty[slot].wait(parity);
    full.expect((boxes + 1) * kBoxBytes);
    copy_once(stage.w, w, full, 0, w_block * kHopperBlock, 0);
    const int feature = x_block * kHopperBlock;
    for (int i = 0; i < boxes; ++i) {
      const int from = token + 64 * i;
      copy_box(stage.x[i], x, full, kFirst ? from : feature, kFirst ? feature : from, 0);
    }
  };
  for_items(HopperLine(call), blockIdx.x, [&](const HopperPlace& place, int count) {
    const int token = place.tile * kGroups * kGroupTokens;
    const int boxes = static_cast<int>(min((call.out.tokens - token + 63) / 64, int64_t{2} * kGroups));
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int pair = place.begin + place.done + i;
      if (pair < window || pair >= window + 32) {
        window = pair;
        const int64_t at = min(pair + lane, static_cast<int>(call.blocks) - 1);
        input = __ldg(call.pairs + 2 * at);
        id = __ldg(call.pairs + 2 * at + 1);
      }
      const int x_block = __shfl_sync(kWarp, input, pair - window), w_block = __shfl_sync(kWarp, id, pair - window);
      if (lane == 0) fill(token, boxes, x_block, w_block);
      __syncwarp();
      if (++slot == Ring::kStages) slot = 0, parity ^= 1;
    }
  });
  await_dependence();  // or the flags' memory could be another kernel's before they are cleared
}

/// A warpgroup's place in the ring.
template <int kGroups, bool kHalf, bool kTranspose, bool kFirst>
class SparseReader {
 public:
  LOWPREC_DEVICE SparseReader(SparseRing<kGroups>& ring, int group)
      : ring_(ring),
        w_(matrix(shared_address(ring.stage[0].w), kBoxBytes)),
        x_(matrix(shared_address(ring.stage[0].x[2 * group]), kFirst ? kBoxBytes : 16)) {}

  /// Put the next stage's products under way, and wait for those before.
  LOWPREC_DEVICE void multiply_stage(float (&sums)[kStageValues], int keep) {
    ring_.full[slot_].wait(parity_);
    const uint32_t w = w_ + slot_ * kNextStage, x = x_ + slot_ * kNextStage;
    pin(sums);
    begin_products();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      constexpr int next_w = kTranspose ? kAlong : kAcross, next_x = kFirst ? kAcross : kAlong;
      multiply_matrices<kHalf, !kTranspose, kFirst>(sums, w + next_w * i, x + next_x * i, i ? 1 : keep);
    }
    commit_products();
    wait_products<1>();
    release();
    held_ = slot_;
    if (++slot_ == SparseRing<kGroups>::kStages) slot_ = 0, parity_ ^= 1;
  }

  /// Wait for all that is under way.
  LOWPREC_DEVICE void finish(float (&sums)[kStageValues]) {
    wait_products<0>();
    pin(sums);
    release();
  }

 private:
  // From one 16 features to the next, of matrices that lie along them or across, and from a stage to the next one, as
  // the instructions count.
  static constexpr int kAlong = 32 >> 4;
  static constexpr int kAcross = 16 * 128 >> 4;
  static constexpr int kNextStage = sizeof(typename SparseRing<kGroups>::Stage) >> 4;

  LOWPREC_DEVICE void release() {
    if (held_ >= 0 && threadIdx.x % 32 == 0) ring_.empty[held_].arrive();
    held_ = -1;
  }

  SparseRing<kGroups>& ring_;
  uint32_t w_;
  uint32_t x_;
  int slot_ = 0;
  uint32_t parity_ = 0;
  int held_ = -1;  // the stage whose products may be under way
};

/// Zeros where this thread block's columns, every so many, have no pairs.
LOWPREC_DEVICE void write_empty(const SparseHopperCall& call, Pass& pass, int group, float (&sums)[kStageValues]) {
#pragma unroll
  for (int i = 0; i < kStageValues; ++i) sums[i] = 0;
#pragma unroll 1
  for (int64_t base = blockIdx.x; base < call.outputs; base += 32 * kHopperShares) {
    const int64_t column = base + threadIdx.x % 32 * kHopperShares;
    const bool none = column < call.outputs && __ldg(call.offsets + column) == __ldg(call.offsets + column + 1);
    for (uint32_t left = __ballot_sync(kWarp, none); left; left &= left - 1) {
      const int empty = static_cast<int>(base + (__ffs(left) - 1) * kHopperShares);
      for (int tile = 0; tile < hopper_tiles(call.out.tokens); ++tile) {
        write_item(call.out, pass, empty, tile, group, sums);
      }
    }
  }
}

template <int kGroups, bool kHalf, bool kTranspose, bool kFirst>
LOWPREC_DEVICE void consume(const SparseHopperCall& call, SparseRing<kGroups>& ring, int group) {
  SparseReader<kGroups, kHalf, kTranspose, kFirst> reader(ring, group);
  Pass& pass = ring.pass[threadIdx.x / 32];
  float sums[kStageValues];
  write_empty(call, pass, group, sums);
  const HopperLine line(call);
  for_items(line, blockIdx.x, [&](const HopperPlace& place, int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) reader.multiply_stage(sums, i);
    reader.finish(sums);
    if (place.done + count < place.count) return publish(call, group, sums);
    if (place.done > 0) add_parts(call, line, group, line.begin(blockIdx.x) - place.done, sums);
    write_item(call.out, pass, place.column, place.tile, group, sums);
  });
}

#endif

template <int kGroups, bool kHalf, bool kTranspose, bool kFirst>
__global__ void __launch_bounds__(SparseRing<kGroups>::kThreads, 1)
    sparse_hopper_kernel(const __grid_constant__ SparseHopperCall call, const __grid_constant__ CUtensorMap x,
                         const __grid_constant__ CUtensorMap w) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t room[];
  auto& ring = *reinterpret_cast<SparseRing<kGroups>*>((reinterpret_cast<uintptr_t>(room) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (int i = 0; i < SparseRing<kGroups>::kStages; ++i) {
      ring.full[i].init(1);
      ring.empty[i].init(kGroups * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int group = __shfl_sync(kWarp, static_cast<int>(threadIdx.x / 128), 0);  // known to be one of a warp
  if (group == kGroups) {
    produce<kGroups, kFirst>(call, x, w, ring);
  } else {
    consume<kGroups, kHalf, kTranspose, kFirst>(call, ring, group);
  }
#endif
}

}  // namespace lowprec
