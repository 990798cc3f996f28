// Block-sparse products whose sums are in IEEE single precision, one term after the other: by fused multiply-adds on
// tiles in shared memory. Every output's terms are added in order by one thread. Device code only, without torch.
//
// A thread has a few lines of the left operand (tokens, or features of x in an update) times eight of the right one.
// Tiles lie as the operands do in memory: terms along each line, or lines along each term.
#pragma once

#include <cstdint>

#include "lowprec/accumulate_kernel.h"
#include "lowprec/sparse_accumulate.h"

namespace lowprec {

constexpr int kStageTerms = 8;               // terms of a stage in shared memory
constexpr int kUpdateStages = 3;             // that are there at once
constexpr int kLinePitch = kStageTerms + 4;  // floats of a line's terms: eight lines then lie in different banks
constexpr int kRight = 8;                    // right lines of a thread

/// Copy up to 16 bytes into shared memory, zeros after the first so many. Both places are multiples of 16 bytes.
LOWPREC_DEVICE void copy_some(float* to, const float* from, int bytes) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}

LOWPREC_DEVICE void end_stage_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Wait until at most so many stages' copies are under way.
template <int kLeft>
LOWPREC_DEVICE void wait_for_stages() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

/// Bytes of four floats of which so many are left.
LOWPREC_DEVICE int bytes_left(int64_t left) { return left >= 4 ? 16 : left <= 0 ? 0 : static_cast<int>(left) * 4; }

/// A thread's lines of one operand in a stage: where the first is, and how to come to the next lines and terms.
template <bool kAlong>
struct StageLines {
  int first;  // line
  int next;   // from line to line, where terms lie along them; else they are neighbours
  int pitch;  // floats from term to term, where lines lie along them

  /// Four terms of each line.
  template <int kLines>
  LOWPREC_DEVICE void read(const float* stage, int k, float (&to)[4][kLines]) const {
    if constexpr (kAlong) {
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const auto terms = *reinterpret_cast<const float4*>(stage + (first + i * next) * kLinePitch + k);
        to[0][i] = terms.x, to[1][i] = terms.y, to[2][i] = terms.z, to[3][i] = terms.w;
      }
    } else {
#pragma unroll
      for (int t = 0; t < 4; ++t) read_lines(stage + (k + t) * pitch + first, to[t]);
    }
  }

  /// Which line of the tile the i-th is.
  LOWPREC_DEVICE int line(int i) const { return kAlong ? first + i * next : first + i; }

 private:
  template <int kLines>
  static LOWPREC_DEVICE void read_lines(const float* from, float (&to)[kLines]) {
    if constexpr (kLines % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kLines; i += 4) {
        const float4 lines = *reinterpret_cast<const float4*>(from + i);
        to[i] = lines.x, to[i + 1] = lines.y, to[i + 2] = lines.z, to[i + 3] = lines.w;
      }
    } else {
      static_assert(kLines == 2);
      const float2 lines = *reinterpret_cast<const float2*>(from);
      to[0] = lines.x, to[1] = lines.y;
    }
  }
};

/// Add up to eight terms of a stage to a thread's sums.
template <int kLeft, bool kLeftAlong, bool kRightAlong>
LOWPREC_DEVICE void add_stage(const float* left, const StageLines<kLeftAlong>& rows, const float* right,
                              const StageLines<kRightAlong>& columns, int count, float (&sums)[kLeft][kRight]) {
#pragma unroll
  for (int k = 0; k < kStageTerms; k += 4) {
    float a[4][kLeft], b[4][kRight];
    rows.read(left, k, a);
    columns.read(right, k, b);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (k + t >= count) return;
#pragma unroll
      for (int i = 0; i < kLeft; ++i) {
#pragma unroll
        for (int j = 0; j < kRight; ++j) sums[i][j] = __fmaf_rn(a[t][i], b[t][j], sums[i][j]);
      }
    }
  }
}

/// Sums begin at what leaves any first term as it is.
template <int kLeft>
LOWPREC_DEVICE void begin_sums(float (&sums)[kLeft][kRight]) {
#pragma unroll
  for (int i = 0; i < kLeft * kRight; ++i) sums[i / kRight][i % kRight] = -0.0f;
}

/// A warp's way through the pairs of a column, 32 of which it loads at once, well before they are needed.
class PairReader {
 public:
  LOWPREC_DEVICE PairReader(const DirectionTable& table, const Gates& gates, int begin, int count)
      : table_(table), gates_(gates), begin_(begin), count_(count) {
    load(0);
  }

  /// Go to the i-th pair, one after another from the first on.
  LOWPREC_DEVICE void go_to(int i) {
    if (i % 32 == 0) {
      now_ = ahead_;
      closed_pairs_ = gates_.gate ? __ballot_sync(0xFFFFFFFFu, gate_ == 0) : 0;
      load(i + 32);
    }
    input_ = __shfl_sync(0xFFFFFFFFu, now_.input, i % 32);
    weight_ = __shfl_sync(0xFFFFFFFFu, now_.weight, i % 32);
    closed_ = closed_pairs_ >> i % 32 & 1;
  }

  LOWPREC_DEVICE int input() const { return input_; }
  LOWPREC_DEVICE int weight() const { return weight_; }
  LOWPREC_DEVICE bool closed() const { return closed_; }

 private:
  LOWPREC_DEVICE void load(int i) {
    i += threadIdx.x % 32;
    if (i >= count_) return;
    ahead_ = table_.pair(begin_ + i);
    if (gates_.gate) gate_ = gates_.gate[ahead_.weight];
  }

  const DirectionTable& table_;
  const Gates& gates_;
  int begin_, count_;
  BlockPair now_{}, ahead_{};
  float gate_ = 1;
  uint32_t closed_pairs_ = 0;
  int input_ = 0, weight_ = 0;
  bool closed_ = false;
};

/// A product whose operands' rows are contiguous and begin at multiples of 16 bytes: x [N, pitch], or [C, pitch].
struct SingleProduct {
  SparseProduct<float> of;
  int64_t pitch;
};

/// A block of threads has the outputs of one column of blocks and 32 · kLeft tokens: a warp eight features of them.
template <int kLeft, bool kFirst, bool kTranspose>
class SingleColumn {
 public:
  static constexpr int kTokens = 32 * kLeft;
  static constexpr int kStages = kLeft == 2 ? 8 : 3;  // in shared memory: few warps wait for memory longer
  static constexpr int kLeftFloats = kFirst ? kStageTerms * kTokens : kTokens * kLinePitch;

  LOWPREC_DEVICE SingleColumn(const SingleProduct& product, int column, int64_t token, float* room)
      : product_(product),
        of_(product.of),
        token_(token),
        room_(room),
        parts_(of_.block / kStageTerms),
        stages_(of_.table.count(column) * parts_),
        pairs_(of_.table, of_.gates, of_.table.begin(column), of_.table.count(column)),
        rows_{kFirst ? lane() * kLeft : lane(), 32, kTokens},
        columns_{static_cast<int>(threadIdx.x / 32) * kRight, 1, of_.block} {}

  static LOWPREC_DEVICE int lane() { return threadIdx.x % 32; }
  static LOWPREC_INLINE int right_floats(int block) { return kTranspose ? block * kLinePitch : kStageTerms * block; }
  static LOWPREC_INLINE int stage_floats(int block) { return kLeftFloats + right_floats(block); }

  LOWPREC_DEVICE void sum(float (&sums)[kLeft][kRight]) {
    begin_sums(sums);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(i);
    for (int i = 0; i < stages_; ++i) {
      wait_for_stages<kStages - 2>();
      __syncthreads();
      fetch(i + kStages - 1);
      const float* stage = at(i);
      add_stage<kLeft, !kFirst, kTranspose>(stage, rows_, stage + kLeftFloats, columns_, kStageTerms, sums);
    }
  }

  LOWPREC_DEVICE bool empty() const { return stages_ == 0; }
  LOWPREC_DEVICE int64_t token(int i) const { return token_ + rows_.line(i); }
  LOWPREC_DEVICE int feature() const { return columns_.first; }

 private:
  LOWPREC_DEVICE float* at(int stage) const { return room_ + stage % kStages * stage_floats(of_.block); }

  LOWPREC_DEVICE void fetch(int stage) {
    if (stage < stages_) {
      const int part = stage % parts_ * kStageTerms;
      if (part == 0) pairs_.go_to(stage / parts_);
      copy_tokens(at(stage), pairs_.input() * of_.block + part);
      copy_weights(at(stage) + kLeftFloats, of_.weights + static_cast<int64_t>(pairs_.weight()) * of_.block * of_.block,
                   part);
    }
    end_stage_copies();
  }

  LOWPREC_DEVICE void copy_tokens(float* to, int feature) const {
    constexpr int pieces = kTokens * kStageTerms / 4, across = kFirst ? kTokens / 4 : kStageTerms / 4;
#pragma unroll 2
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) {
      const int line = i / across, piece = i % across * 4;
      const int64_t token = token_ + (kFirst ? piece : line);
      const int64_t left = of_.tokens - token;
      const int bytes = pairs_.closed() ? 0 : kFirst ? bytes_left(left) : left > 0 ? 16 : 0;
      const int64_t place =
          kFirst ? (feature + line) * product_.pitch + token : token * product_.pitch + feature + piece;
      copy_some(to + line * (kFirst ? kTokens : kLinePitch) + piece, of_.x.data + (bytes ? place : 0), bytes);
    }
  }

  LOWPREC_DEVICE void copy_weights(float* to, const float* block, int part) const {
    const int pieces = of_.block * kStageTerms / 4;
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) {
      const int line = i / (kStageTerms / 4), piece = i % (kStageTerms / 4) * 4;
      const float* from = kTranspose ? block + line * of_.block + part + piece : block + part * of_.block + i * 4;
      copy_some(to + (kTranspose ? line * kLinePitch + piece : i * 4), from, pairs_.closed() ? 0 : 16);
    }
  }

  const SingleProduct& product_;
  const SparseProduct<float>& of_;
  int64_t token_;
  float* room_;
  int parts_;  // stages of a block
  int stages_;
  PairReader pairs_;  // of the next stage to be fetched
  StageLines<!kFirst> rows_;
  StageLines<kTranspose> columns_;
};

template <int kLeft, bool kFirst, bool kTranspose>
__global__ void __launch_bounds__(256)
    single_product_kernel(const __grid_constant__ SingleProduct product, float* out) {
  extern __shared__ float4 shared[];
  const SparseProduct<float>& of = product.of;
  using Column = SingleColumn<kLeft, kFirst, kTranspose>;
  const int column = static_cast<int>(blockIdx.x % of.table.outputs);
  Column sums(product, column, static_cast<int64_t>(blockIdx.x / of.table.outputs) * Column::kTokens,
              reinterpret_cast<float*>(shared));
  float values[kLeft][kRight];
  sums.sum(values);
  const int64_t features = static_cast<int64_t>(of.table.outputs) * of.block;
  const int64_t feature = static_cast<int64_t>(column) * of.block + sums.feature();
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
    const int64_t token = sums.token(i);
    if (token >= of.tokens) continue;
#pragma unroll
    for (int j = 0; j < kRight; ++j) {
      out[kFirst ? (feature + j) * of.tokens + token : token * features + feature + j] =
          sums.empty() ? 0.0f : values[i][j];
    }
  }
}

// Updates.

constexpr int kUpdateRows = 4;  // of a thread

/// An update whose operands' rows are contiguous and begin at multiples of 16 bytes: [N, pitch], or [C, pitch].
struct SingleUpdate {
  SparseUpdate<float> of;
  int64_t x_pitch;
  int64_t dy_pitch;
};

/// How a block of threads shares weights, neighbours in their order: those of one row have x in common.
struct UpdateShape {
  int threads;
  int weights;
  int rows;  // different input blocks that there is room for at once

  explicit LOWPREC_INLINE UpdateShape(int block)
      : threads(block == 64 ? 128 : 64),
        weights(threads * kUpdateRows * kRight / (block * block)),
        rows(min(weights, 8)) {}

  LOWPREC_INLINE int blocks() const { return rows + weights; }
};

constexpr int kMostWeights = 32;

/// Which weights a block of threads has, and their blocks of x and dy.
struct UpdateWeights {
  int inputs[kMostWeights];  // each once, where neighbours have the same
  int outputs[kMostWeights];
  int slot[kMostWeights];  // of inputs
  int slots;

  LOWPREC_DEVICE void load(const SparseUpdate<float>& of, int64_t first, int count) {
    if (const int i = threadIdx.x; i < 32) {
      const int64_t wanted = first + (i < count ? i : count - 1);
      const int64_t weight = wanted < of.blocks ? wanted : of.blocks - 1;
      const int input = of.table[2 * weight];
      const int before = __shfl_up_sync(0xFFFFFFFFu, input, 1);
      const uint32_t changes = __ballot_sync(0xFFFFFFFFu, i == 0 || input != before);
      slot[i] = __popc(changes & (0xFFFFFFFFu >> (31 - i))) - 1;
      outputs[i] = of.table[2 * weight + 1];
      inputs[slot[i]] = input;
      if (i == 0) slots = __popc(changes);
    }
    __syncthreads();
  }
};

template <bool kFirst>
class SingleUpdates {
 public:
  LOWPREC_DEVICE SingleUpdates(const SingleUpdate& update, const UpdateWeights& weights, float* room)
      : update_(update),
        of_(update.of),
        weights_(weights),
        shape_(of_.block),
        room_(room),
        pitch_(kFirst ? of_.block * kLinePitch + 4 : of_.block),
        term_pitch_(of_.block * shape_.blocks()) {
    const int threads = of_.block * of_.block / (kUpdateRows * kRight), across = of_.block / kRight;
    const int thread = threadIdx.x % threads;
    weight_ = threadIdx.x / threads;
    const int row = thread / across, column = thread % across;
    rows_ = {kFirst ? row : row * kUpdateRows, of_.block / kUpdateRows, term_pitch_};
    columns_ = {kFirst ? column : column * kRight, across, term_pitch_};
  }

  static LOWPREC_INLINE int stage_floats(int block) {
    const UpdateShape shape(block);
    return shape.blocks() * (kFirst ? block * kLinePitch + 4 : block * kStageTerms);
  }

  LOWPREC_DEVICE void sum(float (&sums)[kUpdateRows][kRight]) {
    begin_sums(sums);
    for (int base = 0; base < weights_.slots; base += shape_.rows) sum_rows(base, sums);
  }

  LOWPREC_DEVICE int weight() const { return weight_; }
  LOWPREC_DEVICE int place(int i, int j) const { return rows_.line(i) * of_.block + columns_.line(j); }

 private:
  /// The sums of the weights whose input blocks are among those from `base` on.
  LOWPREC_DEVICE void sum_rows(int base, float (&sums)[kUpdateRows][kRight]) {
    const int slot = weights_.slot[weight_] - base;
    const bool mine = slot >= 0 && slot < shape_.rows;
    const int left = (mine ? slot : 0) * pitch_, right = (shape_.rows + weight_) * pitch_;
    const int64_t stages = (of_.tokens + kStageTerms - 1) / kStageTerms;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kUpdateStages - 1; ++i) fetch(i, stages, base);
    for (int64_t i = 0; i < stages; ++i) {
      wait_for_stages<kUpdateStages - 2>();
      __syncthreads();
      fetch(i + kUpdateStages - 1, stages, base);
      if (!mine) continue;
      const float* stage = at(i);
      const int64_t count = of_.tokens - i * kStageTerms;
      if (count >= kStageTerms) {
        add_stage<kUpdateRows, kFirst, kFirst>(stage + left, rows_, stage + right, columns_, kStageTerms, sums);
      } else {
        add_stage<kUpdateRows, kFirst, kFirst>(stage + left, rows_, stage + right, columns_, static_cast<int>(count),
                                               sums);
      }
    }
    wait_for_stages<0>();
  }

  LOWPREC_DEVICE float* at(int64_t stage) const {
    return room_ + static_cast<int>(stage % kUpdateStages) * stage_floats(of_.block);
  }

  /// Copy a stage's tokens of all blocks: a block's pieces to neighbouring threads, as many blocks as there are threads
  /// for at once.
  LOWPREC_DEVICE void fetch(int64_t stage, int64_t stages, int base) const {
    if (stage < stages) {
      const int pieces = 2 * of_.block, piece = threadIdx.x % pieces, at_once = blockDim.x / pieces;
      const int across = kFirst ? kStageTerms / 4 : of_.block / 4;
      const int line = piece / across, along = piece % across * 4;
      const int64_t token = stage * kStageTerms + (kFirst ? along : line), left = of_.tokens - token;
      const int bytes = kFirst ? bytes_left(left) : left > 0 ? 16 : 0;
      const int first = kFirst ? line : along;  // feature
      float* to = at(stage) + (kFirst ? line * kLinePitch + along : line * term_pitch_ + along);
      const int rows = min(weights_.slots - base, shape_.rows);
      const auto copy = [&](const float* data, int64_t pitch, int block, int slot) {
        const int64_t feature = static_cast<int64_t>(block) * of_.block + first;
        const int64_t place = kFirst ? feature * pitch + token : token * pitch + feature;
        copy_some(to + slot * pitch_, data + (bytes ? place : 0), bytes);
      };
      int slot = threadIdx.x / pieces;
      for (; slot < rows; slot += at_once) copy(of_.x.data, update_.x_pitch, weights_.inputs[base + slot], slot);
      for (int i = threadIdx.x / pieces; i < shape_.weights; i += at_once) {
        copy(of_.dy.data, update_.dy_pitch, weights_.outputs[i], shape_.rows + i);
      }
    }
    end_stage_copies();
  }

  const SingleUpdate& update_;
  const SparseUpdate<float>& of_;
  const UpdateWeights& weights_;
  UpdateShape shape_;
  float* room_;
  int pitch_;       // floats from block to block of a stage
  int term_pitch_;  // from term to term, where features lie along them
  int weight_;      // of the thread, among those of its block
  StageLines<kFirst> rows_, columns_;
};

template <bool kFirst>
__global__ void __launch_bounds__(128) single_update_kernel(const __grid_constant__ SingleUpdate update, float* out) {
  extern __shared__ float4 shared[];
  __shared__ UpdateWeights weights;
  const SparseUpdate<float>& of = update.of;
  const UpdateShape shape(of.block);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * shape.weights;
  weights.load(of, first, shape.weights);
  SingleUpdates<kFirst> sums(update, weights, reinterpret_cast<float*>(shared));
  float values[kUpdateRows][kRight];
  sums.sum(values);
  const int64_t weight = first + sums.weight();
  if (weight >= of.blocks) return;
#pragma unroll
  for (int i = 0; i < kUpdateRows; ++i) {
#pragma unroll
    for (int j = 0; j < kRight; ++j) {
      const int64_t output = weight * of.block * of.block + sums.place(i, j);
      out[output] = of.tokens == 0 ? 0.0f : of.close(output, values[i][j]);
    }
  }
}

}  // namespace lowprec
