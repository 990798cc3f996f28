// The kernel of products with tensor-core leaves on Hopper: a cluster of two blocks, each of which multiplies tiles of
// 128 rows and columns. One warp copies operands into a ring of shared memory, two warpgroups multiply and add up.
// While one leaf is multiplied the one before it is added to its sum.
#pragma once

#include <cstdint>

#include "lowprec/tensor_core.h"
#include "lowprec/tensor_core_hopper.h"

namespace lowprec {

constexpr int kTile = 128;      // rows and columns of a tile
constexpr int kStageSteps = 4;  // steps of a stage of the ring: rows of 128 bytes
constexpr int kRing = 5;        // stages
constexpr int kConsumers = 2;   // warpgroups that multiply, 64 rows each
constexpr int kCluster = 2;     // blocks that share their columns' operand, one below the other
constexpr int kBlockThreads = 128 * (1 + kConsumers);
constexpr int kOutputs = 64;            // of a thread
constexpr int kFlags = 4 * kConsumers;  // of a tile, one for each warp
constexpr int kHalf = 64 * 128;         // bytes of 64 rows of a stage, or of 64 columns

struct RingStage {
  uint8_t a[2 * kHalf];
  uint8_t b[2 * kHalf];
};

/// Where a warp's sums pass from its threads to rows: 16 rows of a tile.
using Rows = float[16][kTile];

struct Ring {
  RingStage stage[kRing];
  Rows rows[4 * kConsumers];
  Barrier full[kRing];
  Barrier empty[kRing];
};

constexpr int kRingBytes = sizeof(Ring) + 1024;  // for its alignment

/// The tiles of a product in the order in which clusters take them: bands of a few rows of tiles, column by column, so
/// that what is multiplied at one time shares its operands.
struct Schedule {
  int64_t row_pairs;
  int64_t columns;
  int64_t count;

  explicit LOWPREC_INLINE Schedule(const ProductShape& shape)
      : row_pairs((shape.rows + kCluster * kTile - 1) / (kCluster * kTile)),
        columns((shape.columns + kTile - 1) / kTile),
        count(shape.batch * row_pairs * columns) {}

  struct Tile {
    int64_t matrix;
    int64_t row;  // of the result, as is column
    int64_t column;
  };

  LOWPREC_DEVICE Tile at(int64_t i, uint32_t block) const {
    constexpr int64_t band = 4;
    const int64_t each = row_pairs * columns, matrix = i / each, within = i % each;
    const int64_t first = within / (band * columns) * band;
    const int64_t height = row_pairs - first < band ? row_pairs - first : band;
    const int64_t place = within - first * columns;
    return {matrix, ((first + place % height) * kCluster + block) * kTile, place / height * kTile};
  }
};

struct ProductCall {
  ProductShape shape;
  Operands kind;
  Output out;
  int* flags;        // which warps' sums must be formed again: written by sums that may fail,
  const int* again;  // and read by those that form them
  bool a_batched;    // whether each matrix has an operand of its own
  bool b_batched;
};

/// How a kernel multiplies: stages of operands that the compiler knows, or any steps of any.
template <Operands kKind>
struct Stages;
struct Steps;

// Devices before Hopper, which never run the kernel, know no clusters.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define LOWPREC_IN_CLUSTERS __cluster_dims__(kCluster, 1, 1)
#else
#define LOWPREC_IN_CLUSTERS
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Whether a pair of tiles is left out: no warp of it is to form its sums again.
LOWPREC_DEVICE bool is_done(const ProductCall& call, int64_t pair) {
  if (!call.again) return false;
  int any = 0;
  for (int i = 0; i < kCluster * kFlags; ++i) any |= call.again[pair * kCluster * kFlags + i];
  return any == 0;
}

/// Fills the ring, tile after tile. One thread's work.
LOWPREC_DEVICE void produce(const ProductCall& call, const CUtensorMap& a, const CUtensorMap& b, Ring& ring) {
  const bool along = bytes_of(call.kind) == 1;  // whether the second operand lies along the depth
  const int depth = 128 / bytes_of(call.kind);  // elements of a stage
  const Schedule schedule(call.shape);
  const uint32_t block = block_of_cluster();
  const int stages = (call.shape.steps + kStageSteps - 1) / kStageSteps;
  int slot = 0;
  uint32_t parity = 1;
  for (int64_t pair = blockIdx.x / kCluster; pair < schedule.count; pair += gridDim.x / kCluster) {
    if (is_done(call, pair)) continue;
    const Schedule::Tile tile = schedule.at(pair, block);
    const int row = static_cast<int>(tile.row), column = static_cast<int>(tile.column + 64 * block);
    const int matrix_a = call.a_batched ? static_cast<int>(tile.matrix) : 0;
    const int matrix_b = call.b_batched ? static_cast<int>(tile.matrix) : 0;
    for (int i = 0; i < stages; ++i) {
      RingStage& stage = ring.stage[slot];
      ring.empty[slot].wait(parity);
      ring.full[slot].expect(sizeof(RingStage));
      copy_box(stage.a, a, ring.full[slot], i * depth, row, matrix_a);
      uint8_t* half = stage.b + kHalf * block;
      copy_box(half, b, ring.full[slot], along ? i * depth : column, along ? column : i * depth, matrix_b,
               (1 << kCluster) - 1);
      if (++slot == kRing) slot = 0, parity ^= 1;
    }
  }
}

/// A warpgroup's place in the ring.
class Reader {
 public:
  LOWPREC_DEVICE Reader(Ring& ring, int group, Operands kind)
      : ring_(ring),
        kind_(kind),
        next_b_(bytes_of(kind) == 1 ? 32 >> 4 : 16 * 128 >> 4),
        a_(matrix(shared_address(ring.stage[0].a + kHalf * group), 16)),
        b_(matrix(shared_address(ring.stage[0].b), bytes_of(kind) == 1 ? 16 : kHalf)) {}

  /// Put the next stage's products under way, and wait for those before. `keep`: whether they add to what is there. In
  /// straight code and of operands known to the compiler, or it waits for each.
  template <Operands kKind>
  LOWPREC_DEVICE void multiply_stage(float (&sum)[kOutputs], int keep) {
    constexpr int next_b = bytes_of(kKind) == 1 ? 32 >> 4 : 16 * 128 >> 4;
    ring_.full[slot_].wait(parity_);
    const uint32_t a = a_ + slot_ * kNextStage, b = b_ + slot_ * kNextStage;
    pin(sum);
    begin_products();
    multiply_matrices(kKind, sum, a, b, keep);
#pragma unroll
    for (int i = 1; i < kStageSteps; ++i) multiply_matrices(kKind, sum, a + kNextA * i, b + next_b * i, 1);
    commit_products();
    wait_products<1>();
    release();
    advance();
  }

  /// Do one step, and wait for it.
  LOWPREC_DEVICE void multiply_step(float (&sum)[kOutputs], int keep) {
    if (part_ == 0) ring_.full[slot_].wait(parity_);
    const uint32_t stage = slot_ * kNextStage;
    pin(sum);
    begin_products();
    multiply_matrices(kind_, sum, a_ + stage + kNextA * part_, b_ + stage + next_b_ * part_, keep);
    commit_products();
    wait_products<0>();
    pin(sum);
    if (++part_ == kStageSteps) end_stage();
  }

  /// Wait for all that is under way, and leave a stage that was read in part.
  LOWPREC_DEVICE void finish() {
    wait_products<0>();
    release();
    if (part_) end_stage();
  }

 private:
  // From a step's first matrix, or from a stage's, to the next one's, as the instructions count.
  static constexpr int kNextA = 32 >> 4;
  static constexpr int kNextStage = sizeof(RingStage) >> 4;

  LOWPREC_DEVICE void end_stage() {
    part_ = 0;
    advance();
    release();
  }

  LOWPREC_DEVICE void advance() {
    held_ = slot_;
    if (++slot_ == kRing) slot_ = 0, parity_ ^= 1;
  }

  /// Tell every block that fills the stage read last that it may.
  LOWPREC_DEVICE void release() {
    if (held_ >= 0 && threadIdx.x % 32 < kCluster) ring_.empty[held_].arrive_at(threadIdx.x % 32);
    held_ = -1;
  }

  Ring& ring_;
  Operands kind_;
  int next_b_;
  uint32_t a_;
  uint32_t b_;
  int slot_ = 0;
  uint32_t parity_ = 0;
  int part_ = 0;   // steps of the present stage that are done
  int held_ = -1;  // the stage whose last products may be under way
};

LOWPREC_INLINE int stages_of(const ProductShape& shape, int leaf) {
  return (shape.steps_of(leaf) + kStageSteps - 1) / kStageSteps;
}

/// Multiply the leaf after the `n`-th, of whole stages, into `leaf`, and meanwhile add the n-th to its sum.
template <Operands kKind, class Sum>
LOWPREC_DEVICE void multiply_leaf(Reader& reader, const ProductShape& shape, float (&leaf)[kOutputs],
                                  float (&before)[kOutputs], int n, Sum& sum, const Fragment& where) {
  const int stages = stages_of(shape, n + 1);
  reader.multiply_stage<kKind>(leaf, 0);
  pin(before);
  sum.add(before, n, false, where);
  pin(before);
#pragma unroll 1
  for (int i = 1; i < stages; ++i) reader.multiply_stage<kKind>(leaf, 1);
}

/// The sums of a tile whose leaves are whole stages, the last one perhaps with zeros at its end.
template <Operands kKind, class Sum>
LOWPREC_DEVICE void sum_stages(const ProductShape& shape, Reader& reader, Sum& sum, const Fragment& where) {
  float even[kOutputs], odd[kOutputs];
#pragma unroll 1
  for (int i = 0; i < stages_of(shape, 0); ++i) reader.multiply_stage<kKind>(even, i);
  int n = 0;  // the leaf that is multiplied, or has been
#pragma unroll 1
  for (; n + 2 < shape.leaves; n += 2) {
    multiply_leaf<kKind>(reader, shape, odd, even, n, sum, where);
    multiply_leaf<kKind>(reader, shape, even, odd, n + 1, sum, where);
  }
  if (n + 1 < shape.leaves) {
    multiply_leaf<kKind>(reader, shape, odd, even, n, sum, where);
    reader.finish();
    pin(odd);
    sum.add(odd, n + 1, true, where);
  } else {
    reader.finish();
    pin(even);
    sum.add(even, n, true, where);
  }
}

/// The sums of a tile whose leaves are any steps of any operands: nothing overlaps but the warpgroups.
template <class Sum>
LOWPREC_DEVICE void sum_steps(const ProductShape& shape, Reader& reader, Sum& sum, const Fragment& where) {
  float leaf[kOutputs];
#pragma unroll 1
  for (int n = 0; n < shape.leaves; ++n) {
#pragma unroll 1
    for (int i = 0; i < shape.steps_of(n); ++i) reader.multiply_step(leaf, i);
    if (n + 1 < shape.leaves) {
      sum.add(leaf, n, false, where);
    } else {
      sum.add(leaf, n, true, where);
    }
  }
  reader.finish();
}

template <Operands kKind>
struct Stages {
  template <class Sum>
  static LOWPREC_DEVICE void run(const ProductShape& shape, Reader& reader, Sum& sum, const Fragment& where) {
    sum_stages<kKind>(shape, reader, sum, where);
  }
};

struct Steps {
  template <class Sum>
  static LOWPREC_DEVICE void run(const ProductShape& shape, Reader& reader, Sum& sum, const Fragment& where) {
    sum_steps(shape, reader, sum, where);
  }
};

/// Write a warp's sums, 16 rows of a tile, by whole rows.
template <class Sum>
LOWPREC_DEVICE void store_rows(const ProductCall& call, const Sum& sum, Rows& rows, const Schedule::Tile& tile,
                               int64_t row) {
  if (!call.out.data) return;
  const int lane = threadIdx.x % 32, column = lane * 4;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kOutputs; i += 2) {
    *reinterpret_cast<float2*>(&rows[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + lane % 4 * 2]) = {sum.value(i),
                                                                                                 sum.value(i + 1)};
  }
  __syncwarp();
  const int64_t left = call.shape.columns - tile.column - column;
  const int64_t below = call.shape.rows - row;
  if (left <= 0) return;
#pragma unroll 1
  for (int r = 0; r < 16 && r < below; ++r) {
    const float4 four = *reinterpret_cast<const float4*>(&rows[r][column]);
    const float sums[4] = {four.x, four.y, four.z, four.w};
    store_four(call.out, call.shape.index(tile.matrix, row + r, tile.column + column), sums,
               static_cast<int>(left < 4 ? left : 4));
  }
}

template <class Way, class Sum>
LOWPREC_DEVICE void consume(const ProductCall& call, const typename Sum::Setting& setting, Ring& ring, int group) {
  const Schedule schedule(call.shape);
  const uint32_t block = block_of_cluster();
  const int thread = threadIdx.x % 128;
  Reader reader(ring, group, call.kind);
  for (int64_t pair = blockIdx.x / kCluster; pair < schedule.count; pair += gridDim.x / kCluster) {
    if (is_done(call, pair)) continue;
    const Schedule::Tile tile = schedule.at(pair, block);
    const int64_t row = tile.row + 64 * group + thread / 32 * 16;
    const Fragment where(call.shape, tile.matrix, row + thread % 32 / 4, tile.column + thread % 4 * 2);
    Sum sum(setting);
    Way::run(call.shape, reader, sum, where);
    store_rows(call, sum, ring.rows[group * 4 + thread / 32], tile, row);
    if (call.flags) {
      const bool failed = __any_sync(0xFFFFFFFF, sum.met_special());
      const int64_t flag = (pair * kCluster + block) * kFlags + group * 4 + thread / 32;
      if (thread % 32 == 0) call.flags[flag] = failed;
    }
  }
}

#endif

template <class Way, class Sum>
__global__ void LOWPREC_IN_CLUSTERS __launch_bounds__(kBlockThreads, 1)
    product_kernel(const __grid_constant__ ProductCall call, const __grid_constant__ typename Sum::Setting setting,
                   const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t room[];
  Ring& ring = *reinterpret_cast<Ring*>((reinterpret_cast<uintptr_t>(room) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (int i = 0; i < kRing; ++i) {
      ring.full[i].init(1);
      ring.empty[i].init(kCluster * kConsumers * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  sync_cluster();
  const int group = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x / 128), 0);  // known to be one of a warp
  if (group == kConsumers) {
    give_registers<40>();
    if (threadIdx.x % 128 == 0) produce(call, a, b, ring);
  } else {
    take_registers<232>();
    consume<Way, Sum>(call, setting, ring, group);
  }
  sync_cluster();
#endif
}

}  // namespace lowprec
