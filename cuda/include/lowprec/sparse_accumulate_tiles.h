// Block-sparse products under an accumulator by the steps of accumulate_quick.h: operands packed as accumulate_tiles.h
// does, with notes of what decides which way a tile's terms can be added. Every output's terms are added in order by
// one thread. Device code only, without torch.
#pragma once

#include <cstdint>
#include <new>

#include "lowprec/accumulate_tiles.h"
#include "lowprec/sparse_accumulate.h"
#include "lowprec/sparse_accumulate_single.h"

namespace lowprec {

/// A thread's outputs: four lines of the left operand by eight of the right one.
struct Patch {
  static constexpr int rows = 4, width = 8;
  static constexpr int outputs = rows * width;
  static constexpr int most_threads = 256;
  using Sums = float[rows][width];
  using Values = float[outputs];

  int left_step, right_step;  // from term to term in a stage
  int64_t first_output;
  int64_t output_row, output_column;  // from output to output

  static LOWPREC_DEVICE int threads() { return blockDim.x; }
  static LOWPREC_DEVICE int row_at(int i) { return i; }
  static LOWPREC_DEVICE int column_at(int j) { return j; }
  LOWPREC_DEVICE int row_step() const { return left_step; }
  LOWPREC_DEVICE int column_step() const { return right_step; }
  LOWPREC_DEVICE int64_t output(int i, int j) const { return first_output + i * output_row + j * output_column; }
};

/// What sums by patches share.
struct PatchSums {
  Product scales;
  SumPlan<Float32> plan;
  AccumulatorSpec spec;
  Tower tower;
};

/// Terms of a stage of a product: those that a tile of packed weights has.
LOWPREC_INLINE int stage_terms(int block) { return min(block, kDepth); }

/// The weights of a product, packed by so many terms, [blocks, parts, terms, block], with notes of each part.
struct PackedBlocks {
  float* tiles;
  TileNotes* notes;
};

constexpr int kPackWarps = 8;

/// A warp packs so many terms of a block.
static __global__ void __launch_bounds__(32 * kPackWarps)
    pack_blocks_kernel(const float* weights, int64_t blocks, int block, bool transpose, float scale, float inverse,
                       const PackedBlocks to) {
  const int terms = stage_terms(block), parts = block / terms, lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kPackWarps;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kPackWarps + threadIdx.x / 32; at < blocks * parts;
       at += warps) {
    const int part = static_cast<int>(at % parts) * terms;
    const float* from = weights + at / parts * block * block;
    const auto read = [&](int k, int column) {
      return from[transpose ? column * block + part + k : (part + k) * block + column];
    };
    TileNotes notes{};
    for (int i = lane; i < terms * block; i += 32) {
      const float x = transpose ? read(i % terms, i / terms) : read(i / block, i % block);
      const float scaled = x * scale;
      const uint32_t magnitude = as_bits(scaled) & ~Float32::sign;
      notes.largest = magnitude > notes.largest ? magnitude : notes.largest;
      notes.digits |= significand(as_bits(scaled));
      notes.odd |= scaled * inverse != x || magnitude >= Float32::infinity;
    }
    notes.largest = __reduce_max_sync(0xFFFFFFFFu, notes.largest);
    notes.digits = __reduce_or_sync(0xFFFFFFFFu, notes.digits);
    notes.odd = __reduce_or_sync(0xFFFFFFFFu, notes.odd);
    const float by = notes.odd ? 1.0f : scale;
    for (int i = lane; i < terms * block; i += 32) {
      const int k = transpose ? i % terms : i / block, column = transpose ? i / terms : i % block;
      to.tiles[at * terms * block + k * block + column] = read(k, column) * by;
    }
    if (lane == 0) to.notes[at] = notes;
  }
}

/// The notes of a stage's tiles.
struct StageNotes {
  TileNotes left, right;
};

LOWPREC_DEVICE void copy_notes(TileNotes* to, const TileNotes* from, bool closed) {
  static_assert(sizeof(TileNotes) == 16);
  copy_some(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(from), closed ? 0 : 16);
}

// Products.

/// A product, of which x is the operand `a` of the sums.
struct PatchProduct {
  PackedBlocks weights;
  DirectionTable table;
  Gates gates;
  int block;
  bool first;
  int64_t tokens;

  /// Lanes of a warp that share features: half of them where those have all tokens.
  LOWPREC_INLINE int lanes() const { return tokens <= 16 * Patch::rows && block > 8 ? 16 : 32; }
  LOWPREC_INLINE int threads() const { return lanes() * block / Patch::width; }
  LOWPREC_INLINE int stage_floats() const { return stage_terms(block) * (kTile + block) + 8; }
};

/// The stages of a column of blocks and a tile of tokens.
class PatchColumn {
 public:
  LOWPREC_DEVICE PatchColumn(const PatchProduct& of, const Packed& x, int column, int64_t tile, float* room, bool used)
      : of_(of),
        x_(x),
        tile_(x.tile(0, tile)),
        room_(room),
        terms_(stage_terms(of.block)),
        parts_(of.block / terms_),
        stages_(used ? of.table.count(column) * parts_ : 0),
        pairs_(of.table, of.gates, used ? of.table.begin(column) : 0, used ? of.table.count(column) : 0) {}

  LOWPREC_DEVICE int stages() const { return stages_; }
  LOWPREC_DEVICE int terms() const { return terms_; }
  LOWPREC_DEVICE const float* left(int stage) const { return at(stage) + kNotes; }
  LOWPREC_DEVICE const float* right(int stage) const { return at(stage) + kNotes + terms_ * kTile; }
  LOWPREC_DEVICE const StageNotes& notes(int stage) const { return *reinterpret_cast<const StageNotes*>(at(stage)); }

  LOWPREC_DEVICE void fetch(int stage) {
    if (stage < stages_) {
      const int part = stage % parts_;
      if (part == 0) pairs_.go_to(stage / parts_);
      const int feature = pairs_.input() * of_.block + part * terms_;
      const int64_t tile = tile_ + feature / kDepth, block = static_cast<int64_t>(pairs_.weight()) * parts_ + part;
      copy(at(stage) + kNotes, x_.tiles + tile * kTileSize + feature % kDepth * kTile, terms_ * kTile);
      copy(at(stage) + kNotes + terms_ * kTile, of_.weights.tiles + block * terms_ * of_.block, terms_ * of_.block);
      auto& notes = *reinterpret_cast<StageNotes*>(at(stage));
      if (threadIdx.x == 0) copy_notes(&notes.left, x_.notes + tile, pairs_.closed());
      if (threadIdx.x == 1) copy_notes(&notes.right, of_.weights.notes + block, pairs_.closed());
    }
    end_stage_copies();
  }

 private:
  static constexpr int kNotes = sizeof(StageNotes) / sizeof(float);

  LOWPREC_DEVICE float* at(int stage) const { return room_ + stage % 2 * of_.stage_floats(); }

  LOWPREC_DEVICE void copy(float* to, const float* from, int count) const {
    for (int i = threadIdx.x * 4; i < count; i += blockDim.x * 4) copy_some(to + i, from + i, pairs_.closed() ? 0 : 16);
  }

  const PatchProduct& of_;
  const Packed& x_;
  int64_t tile_;  // packed, of the first terms of x
  float* room_;
  int terms_;  // of a stage
  int parts_;  // stages of a block
  int stages_;
  PairReader pairs_;  // of the next stage to be fetched
};

/// The outputs of a thread in a column of blocks and a tile of tokens, [N, C] or [C, N].
LOWPREC_DEVICE Patch patch_of(const PatchProduct& of, int64_t token, int64_t feature) {
  const int64_t features = static_cast<int64_t>(of.table.outputs) * of.block;
  const int64_t token_step = of.first ? 1 : features, feature_step = of.first ? of.tokens : 1;
  return {kTile, of.block, token * token_step + feature * feature_step, token_step, feature_step};
}

// Updates.

/// An update, of which x and dy are the operands of the sums.
struct PatchUpdate {
  SparseUpdate<float> of;

  LOWPREC_INLINE int threads() const { return of.block == 64 ? 128 : 32; }
  LOWPREC_INLINE int weights() const { return threads() * Patch::outputs / (of.block * of.block); }
  LOWPREC_INLINE int side() const { return weights() * of.block; }                // floats of a term of one operand
  LOWPREC_INLINE int terms() const { return side() > 64 ? kDepth / 2 : kDepth; }  // of a stage
  LOWPREC_INLINE int stage_floats() const { return 2 * (terms() * side() + 4 * weights()); }
};

/// The stages of some weights.
class PatchWeights {
 public:
  LOWPREC_DEVICE PatchWeights(const PatchUpdate& update, const Product& operands, const UpdateWeights& weights,
                              float* room)
      : update_(update),
        operands_(operands),
        weights_(weights),
        room_(room),
        terms_(update.terms()),
        shift_(floor_log2(static_cast<uint64_t>(update.of.block / 4))) {}

  LOWPREC_DEVICE int stages() const { return static_cast<int>((update_.of.tokens + terms_ - 1) / terms_); }
  LOWPREC_DEVICE int terms() const { return terms_; }
  LOWPREC_DEVICE const float* side(int stage, bool right) const { return at(stage, right) + 4 * update_.weights(); }
  LOWPREC_DEVICE const TileNotes* notes(int stage, bool right) const {
    return reinterpret_cast<const TileNotes*>(at(stage, right));
  }

  LOWPREC_DEVICE void fetch(int stage) const {
    if (stage < stages()) {
      for (int i = 0; i < weights_.slots; ++i) copy(operands_.a, weights_.inputs[i], stage, false, i);
      for (int i = 0; i < update_.weights(); ++i) copy(operands_.b, weights_.outputs[i], stage, true, i);
    }
    end_stage_copies();
  }

 private:
  LOWPREC_DEVICE float* at(int stage, bool right) const {
    const int size = update_.stage_floats();
    return room_ + stage % 2 * size + (right ? size / 2 : 0);
  }

  LOWPREC_DEVICE void copy(const Packed& from, int block, int stage, bool right, int slot) const {
    const int size = update_.of.block, feature = block * size;
    const int term_of_all = stage * terms_;
    const int64_t tile = from.tile(0, feature / kTile) + term_of_all / kDepth;
    float* to = at(stage, right);
    const float* lines = from.tiles + tile * kTileSize + term_of_all % kDepth * kTile + feature % kTile;
    float* room = to + 4 * update_.weights() + slot * size;
    for (int i = threadIdx.x; i < terms_ * size / 4; i += blockDim.x) {
      const int term = i >> shift_, piece = (i & ((1 << shift_) - 1)) * 4;
      copy_some(room + term * update_.side() + piece, lines + term * kTile + piece, 16);
    }
    if (threadIdx.x == 0) copy_notes(reinterpret_cast<TileNotes*>(to) + slot, from.notes + tile, false);
  }

  const PatchUpdate& update_;
  const Product& operands_;
  const UpdateWeights& weights_;
  float* room_;
  int terms_;  // of a stage
  int shift_;  // log2 of the pieces of 16 bytes that a block has of a term
};

/// What a warp must know of all its lanes' tiles, but for whether this lane's own is scaled.
LOWPREC_DEVICE TileNotes of_warp(TileNotes notes) {
  const uint32_t any = __any_sync(0xFFFFFFFFu, notes.odd);
  return {__reduce_max_sync(0xFFFFFFFFu, notes.largest), __reduce_or_sync(0xFFFFFFFFu, notes.digits),
          notes.odd | any << 1, 0};
}

/// A product or an update.
struct PatchCall {
  PatchSums sums;
  bool updates;
  PatchProduct product;
  PatchUpdate update;

  LOWPREC_INLINE int stage_floats() const { return updates ? update.stage_floats() : product.stage_floats(); }
};

/// Where a thread's outputs and their terms are.
struct PatchPlace {
  Patch share;
  int left, right;              // first lines in a stage
  int left_notes, right_notes;  // of an update's stage
  int64_t terms;
  int64_t outputs;  // of the thread that there are: rows of a product, or none or all

  static LOWPREC_DEVICE PatchPlace of_product(const PatchProduct& of, int column, int64_t tile) {
    const int left = threadIdx.x % of.lanes() * Patch::rows, right = threadIdx.x / of.lanes() * Patch::width;
    const int64_t token = tile * kTile + left;
    const Patch share = patch_of(of, token, static_cast<int64_t>(column) * of.block + right);
    return {share, left, right, 0, 0, static_cast<int64_t>(of.table.count(column)) * of.block, of.tokens - token};
  }

  static LOWPREC_DEVICE PatchPlace of_update(const PatchUpdate& update, const UpdateWeights& weights, int64_t first) {
    const SparseUpdate<float>& of = update.of;
    const int threads = update.threads() / update.weights(), mine = threadIdx.x / threads;
    const int thread = threadIdx.x % threads, across = of.block / Patch::width;
    const int row = thread / across * Patch::rows, column = thread % across * Patch::width;
    const int64_t output = (first + mine) * of.block * of.block + row * of.block + column;
    const Patch share{update.side(), update.side(), output, of.block, 1};
    return {share,     weights.slot[mine] * of.block + row,       mine * of.block + column, weights.slot[mine], mine,
            of.tokens, first + mine < of.blocks ? Patch::rows : 0};
  }
};

template <class Ways>
__global__ void __launch_bounds__(Patch::most_threads, 2)
    patch_kernel(const __grid_constant__ PatchCall call, const __grid_constant__ Ways ways, float* out) {
  extern __shared__ float4 shared[];
  __shared__ UpdateWeights weights;
  __shared__ alignas(Tree) unsigned char tree_room[sizeof(Tree)];
  auto& tree = *reinterpret_cast<Tree*>(tree_room);
  float* room = reinterpret_cast<float*>(shared) + (call.sums.tower.single ? blockDim.x * Patch::outputs : 0);
  const Product& scales = call.sums.scales;
  const int columns = call.product.table.outputs, column = static_cast<int>(blockIdx.x % columns);
  const int64_t tile = blockIdx.x / columns, first = static_cast<int64_t>(blockIdx.x) * call.update.weights();
  if (call.updates) weights.load(call.update.of, first, call.update.weights());
  const PatchPlace place = call.updates ? PatchPlace::of_update(call.update, weights, first)
                                        : PatchPlace::of_product(call.product, column, tile);
  if (threadIdx.x == 0) new (&tree) Tree(call.sums.spec, place.terms);
  __syncthreads();
  PatchColumn pairs(call.product, scales.a, column, tile, room, !call.updates);
  const PatchWeights some(call.update, scales, weights, room);
  const int stages = call.updates ? some.stages() : pairs.stages(), each = call.updates ? some.terms() : pairs.terms();
  const auto fetch = [&](int stage) { call.updates ? some.fetch(stage) : pairs.fetch(stage); };

  const SumWords words{};
  const Context<Patch> in{scales, call.sums.plan, tree, words, place.share};
  UpperSums<Patch> upper(in, call.sums.tower);
  TileSums<Ways> sums(ways, in, upper);
  fetch(0);
  for (int i = 0; i < stages; ++i) {
    wait_for_stages<0>();
    __syncthreads();
    fetch(i + 1);
    const TileNotes a = of_warp(call.updates ? some.notes(i, false)[place.left_notes] : pairs.notes(i).left);
    const TileNotes b = of_warp(call.updates ? some.notes(i, true)[place.right_notes] : pairs.notes(i).right);
    const float* left = (call.updates ? some.side(i, false) : pairs.left(i)) + place.left;
    const float* right = (call.updates ? some.side(i, true) : pairs.right(i)) + place.right;
    const int64_t begin = static_cast<int64_t>(i) * each, rest = place.terms - begin;
    sums.add({a, b, left, right, begin, rest < each ? static_cast<int>(rest) : each});
  }
  typename Patch::Values values = {};
  if (stages > 0) sums.finish(values);
#pragma unroll
  for (int at = 0; at < Patch::outputs; ++at) {
    const int i = at / Patch::width;
    const int64_t output = place.share.output(i, at % Patch::width);
    if (i < place.outputs) out[output] = call.updates ? call.update.of.close(output, values[at]) : values[at];
  }
}

}  // namespace lowprec
