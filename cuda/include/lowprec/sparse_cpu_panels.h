// Block-sparse products by vectors: operands are packed once, as panels of a vector's width, and tiles of sums stay in
// registers from their first term to their last.
//
// To be included where the compiler's target has the vectors V, after everything else.
#pragma once

#include "lowprec/accumulate_panels.h"
#include "lowprec/sparse_cpu.h"

#ifdef LOWPREC_VECTORS

namespace lowprec {
namespace {

constexpr int64_t kTokens = 512;               // of an update that are packed at once
constexpr int64_t kSlice = 256;                // features that a task packs
constexpr int64_t kNearBytes = 512 * 1024;     // of packed operands that a core keeps near
constexpr int64_t kMultiplications = 1 << 16;  // that are worth a thread

/// A tile of sums: kRows rows by kVectors vectors.
template <class V, int kRows, int kVectors>
class SparseTile {
 public:
  using Scalar = typename V::Scalar;
  using Vector = typename V::Vector;

  /// Nothing yet: what leaves the first term as it is.
  LOWPREC_INLINE SparseTile() {
    each([](Vector& sum, int64_t, int64_t) { sum = V::splat(-Scalar(0)); });
  }
  /// Sums from before: rows lie `row_step` apart, vectors `step`.
  LOWPREC_INLINE SparseTile(const Scalar* sums, int64_t row_step, int64_t step) {
    each([&](Vector& sum, int64_t i, int64_t j) { sum = V::load(sums + i * row_step + j * step); });
  }

  /// Terms: rows of a by vectors of b. a is read as a[i · row_step + k · term_step], b as b[j · pitch + k · step].
  LOWPREC_INLINE void add(const Scalar* a, int64_t row_step, int64_t term_step, const Scalar* b, int64_t pitch,
                          int64_t step, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      Vector y[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) y[j] = V::load(b + j * pitch + k * step);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vector x = V::splat(a[i * row_step + k * term_step]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum_[i][j] = V::template fma<kNearest>(x, y[j], sum_[i][j]);
      }
    }
  }

  /// Terms that are +0, any number of them.
  LOWPREC_INLINE void add_zeros() {
    each([](Vector& sum, int64_t, int64_t) { sum = V::add(sum, V::splat(Scalar(0))); });
  }

  LOWPREC_INLINE void store(Scalar* sums, int64_t row_step, int64_t step) {
    each([&](Vector& sum, int64_t i, int64_t j) { V::store(sums + i * row_step + j * step, sum); });
  }

 private:
  template <class F>
  LOWPREC_INLINE void each(const F& f) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) f(sum_[i][j], i, j);
    }
  }

  Vector sum_[kRows][kVectors];
};

/// Some tokens of a product at a time, packed as panels [V::lanes tokens][features][V::lanes]: for each thread a region
/// of as many as stay near it.
template <class C, class V, int kRows>
class SparseColumnsOf {
 public:
  using Scalar = typename V::Scalar;
  static constexpr int64_t width = 2 * V::lanes;  // tokens of a tile

  explicit SparseColumnsOf(const SparseProduct<C>& product)
      : x_(product),
        pitch_(product.features * V::lanes),
        region_(std::max<int64_t>(kNearBytes / (2 * pitch_ * static_cast<int64_t>(sizeof(Scalar)) + 1), 1) * width),
        room_(std::min<int64_t>(region_ * torch::stable::get_num_threads(), x_.tokens)),
        panels_(((room_ - 1) / V::lanes + 1) * pitch_) {}

  void run() {
    for (first_ = 0; first_ < x_.tokens; first_ += room_) {
      tokens_ = std::min(room_, x_.tokens - first_);
      pack_tokens();
      multiply();
    }
  }

 private:
  void pack_tokens() const {
    const int64_t panels = (tokens_ - 1) / V::lanes + 1, slices = (x_.features - 1) / kSlice + 1;
    parallel_for(0, panels * slices, kMultiplications / (kSlice * V::lanes), [&](int64_t begin, int64_t end) {
      const DefaultArithmetic arithmetic;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / slices, feature = task % slices * kSlice;
        pack<C, V, V::lanes>(x_.x, first_ + panel * V::lanes, first_ + tokens_, feature,
                             std::min(kSlice, x_.features - feature),
                             panels_.data() + panel * pitch_ + feature * V::lanes);
      }
    });
  }

  /// Work is counted through all outputs of a region, then of the next.
  void multiply() const {
    const int64_t work = x_.columns.work(), regions = (tokens_ - 1) / region_ + 1;
    const int64_t each = std::min(region_, tokens_) * x_.w.block * x_.w.block;
    parallel_for(0, regions * work, kMultiplications / each + 1, [&](int64_t begin, int64_t end) {
      const DefaultArithmetic arithmetic;
      const Buffer<Scalar> sums(x_.w.block * width);
      for (int64_t region = begin / work; region * work < end; ++region) {
        const int64_t last = x_.columns.at(std::min(end - region * work, work));
        for (int64_t j = x_.columns.at(std::max<int64_t>(begin - region * work, 0)); j < last; ++j) {
          column(j, region * region_, std::min((region + 1) * region_, tokens_), sums.data());
        }
      }
    });
  }

  /// An output block, for tokens [begin, end).
  void column(int64_t j, int64_t begin, int64_t end, Scalar* sums) const {
    for (int64_t token = begin; token < end; token += width) {
      const int64_t count = std::min(end - token, width);
      count > V::lanes ? block<2>(j, token, sums) : block<1>(j, token, sums);
      x_.token_step == 1 ? write_rows(j, token, count, sums) : write_columns(j, token, count, sums);
    }
  }

  /// The sums of an output block for kVectors vectors of tokens. Of wide blocks all rows of tiles take one block of
  /// weights after the other, which then is read once; of narrow ones a tile takes all of them.
  template <int kVectors>
  void block(int64_t j, int64_t token, Scalar* sums) const {
    using Tile = SparseTile<V, kRows, kVectors>;
    const int64_t b = x_.w.block;
    const int32_t first = x_.columns.offsets[j], last = x_.columns.offsets[j + 1];
    const Scalar* panel = panels_.data() + token / V::lanes * pitch_;
    const bool wide = b > 2 * kRows;
    const int32_t apart = wide ? 1 : std::max(last - first, 1);
    for (int32_t n = first; n == first || n < last; n += apart) {
      for (int64_t row = 0; row < b; row += kRows) {
        Tile tile = n == first ? Tile() : Tile(sums + row * width, width, V::lanes);
        for (int32_t pair = n; pair < std::min(n + apart, last); ++pair) {
          if (pair + 1 < last && (wide || row == 0)) fetch(pair + 1, row, wide ? kRows : b, panel);
          add(tile, pair, row, panel);
        }
        if (first == last) tile.add_zeros();
        tile.store(sums + row * width, width, V::lanes);
      }
    }
  }

  template <class Tile>
  LOWPREC_INLINE void add(Tile& tile, int64_t pair, int64_t row, const Scalar* panel) const {
    const auto& w = x_.w;
    const int64_t input = x_.columns.pairs[2 * pair], id = x_.columns.pairs[2 * pair + 1];
    if (w.closed(id)) return tile.add_zeros();
    tile.add(w.at(id) + row * w.output_step, w.output_step, w.term_step, panel + input * w.block * V::lanes, pitch_,
             V::lanes, w.block);
  }

  /// Fetch rows of a pair's operands that the next sums need.
  LOWPREC_INLINE void fetch(int64_t pair, int64_t row, int64_t rows, const Scalar* panel) const {
    const int64_t b = x_.w.block;
    const Scalar* w = x_.w.at(x_.columns.pairs[2 * pair + 1]);
    const Scalar* x = panel + x_.columns.pairs[2 * pair] * b * V::lanes;
    for (int64_t i = row * b; i < (row + rows) * b; i += 64 / sizeof(Scalar)) __builtin_prefetch(w + i);
    for (int64_t i = row; i < row + rows; ++i) {
      __builtin_prefetch(x + i * V::lanes);
      __builtin_prefetch(x + i * V::lanes + pitch_);
    }
  }

  Scalar* out(int64_t j, int64_t token, int64_t row) const {
    return x_.out + (first_ + token) * x_.token_step + (j * x_.w.block + row) * x_.feature_step;
  }

  void write_rows(int64_t j, int64_t token, int64_t count, const Scalar* sums) const {
    for (int64_t i = 0; i < x_.w.block; ++i) std::copy_n(sums + i * width, count, out(j, token, i));
  }

  void write_columns(int64_t j, int64_t token, int64_t count, const Scalar* sums) const {
    for (int64_t i = 0; i < x_.w.block; i += V::lanes) {
      for (int64_t t = 0; t < count; t += V::lanes) {
        x_.w.block < V::lanes ? write_square<8>(j, token, i, t, count, sums)
                              : write_square<V::lanes>(j, token, i, t, count, sums);
      }
    }
  }

  /// kFeatures outputs, from the row-th on, of as many tokens as there are lanes, from the t-th on.
  template <int kFeatures>
  void write_square(int64_t j, int64_t token, int64_t row, int64_t t, int64_t count, const Scalar* sums) const {
    constexpr int features = std::min(kFeatures, V::lanes);
    alignas(64) Scalar line[V::lanes];
    typename V::Vector square[V::lanes];
    for (int n = 0; n < V::lanes; ++n) square[n] = V::load(sums + (row + std::min(n, features - 1)) * width + t);
    V::transpose(square);
    for (int64_t n = 0; n < std::min<int64_t>(count - t, V::lanes); ++n) {
      V::store(line, square[n]);
      std::copy_n(line, features, out(j, token + t + n, row));
    }
  }

  const SparseProduct<C>& x_;
  int64_t pitch_;   // of panels
  int64_t region_;  // tokens
  int64_t room_;    // for so many tokens
  Buffer<Scalar> panels_;
  int64_t first_ = 0;
  int64_t tokens_ = 0;
};

/// The sums of a weight gradient over up to kTokens tokens at a time, packed as panels [V::lanes features][tokens]
/// [V::lanes]. No block is narrower than V.
template <class C, class V, int kRows>
class SparseUpdateOf {
 public:
  using Scalar = typename V::Scalar;

  explicit SparseUpdateOf(const SparseUpdate<C>& update)
      : x_(update),
        tokens_(std::min(kTokens, update.tokens)),
        left_(size(update.inputs)),
        right_(size(update.outputs)) {}

  void run() {
    for (first_ = 0; first_ < x_.tokens; first_ += kTokens) {
      count_ = std::min(kTokens, x_.tokens - first_);
      pack_features(x_.inputs, &SparsePair<C>::x, left_.data());
      pack_features(x_.outputs, &SparsePair<C>::dy, right_.data());
      const int64_t grain = kMultiplications / (count_ * x_.block * x_.block) + 1;
      parallel_for(0, x_.blocks, grain, [&](int64_t begin, int64_t end) {
        const DefaultArithmetic arithmetic;
        x_.block == V::lanes ? narrow(begin, end) : wide(begin, end);
      });
    }
  }

 private:
  static int64_t panels(int64_t features) { return (features - 1) / V::lanes + 1; }
  int64_t size(int64_t features) const { return panels(features) * tokens_ * V::lanes; }

  /// The tokens of all pairs, one after the other.
  void pack_features(int64_t features, Lines<C> SparsePair<C>::* operand, Scalar* to) const {
    parallel_for(0, panels(features), kMultiplications / (count_ * V::lanes) + 1, [&](int64_t begin, int64_t end) {
      const DefaultArithmetic arithmetic;
      for (int64_t panel = begin; panel < end; ++panel) {
        int64_t start = 0;  // of the pair
        for (int64_t n = 0; n < x_.count && start < first_ + count_; start += x_.pairs[n++].tokens) {
          const Lines<C>& tokens = x_.pairs[n].*operand;
          const int64_t from = std::max(first_, start), until = std::min(first_ + count_, start + x_.pairs[n].tokens);
          if (from >= until) continue;
          pack<C, V, V::lanes>(Lines<C>{tokens.data, tokens.step, tokens.stride}, panel * V::lanes, features,
                               from - start, until - from, to + (panel * tokens_ + from - first_) * V::lanes);
        }
      }
    });
  }

  /// Blocks as wide as a vector, by twos where they share x.
  void narrow(int64_t begin, int64_t end) const {
    for (int64_t id = begin; id < end; ++id) {
      if (id + 1 < end && x_.at[2 * id] == x_.at[2 * id + 2]) {
        tiles<kRows, 2>(id, 0, right(id + 1) - right(id), x_.block * x_.block);
        ++id;
      } else {
        tiles<8, 1>(id, 0, 0, 0);
      }
    }
  }

  void wide(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t column = 0; column < x_.block; column += 2 * V::lanes) {
        tiles<kRows, 2>(x_.order[n], column, pitch(), V::lanes);
      }
    }
  }

  /// The sums of a block from a column on; the second vector's dy lies `dy_step` further on, its sums `step`.
  template <int kTileRows, int kVectors>
  void tiles(int64_t id, int64_t column, int64_t dy_step, int64_t step) const {
    using Tile = SparseTile<V, kTileRows, kVectors>;
    for (int64_t row = 0; row < x_.block; row += kTileRows) {
      Scalar* sums = x_.out + (id * x_.block + row) * x_.block + column;
      Tile tile = first_ > 0 ? Tile(sums, x_.block, step) : Tile();
      tile.add(place(left_.data(), x_.at[2 * id] * x_.block + row), 1, V::lanes, right(id) + column * tokens_, dy_step,
               V::lanes, count_);
      tile.store(sums, x_.block, step);
    }
  }

  const Scalar* right(int64_t id) const { return place(right_.data(), x_.at[2 * id + 1] * x_.block); }

  /// Where a feature's first token lies.
  const Scalar* place(const Scalar* panels, int64_t feature) const {
    return panels + feature / V::lanes * pitch() + feature % V::lanes;
  }
  int64_t pitch() const { return tokens_ * V::lanes; }

  const SparseUpdate<C>& x_;
  int64_t tokens_;  // for which there is room
  Buffer<Scalar> left_;
  Buffer<Scalar> right_;
  int64_t first_ = 0;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace lowprec

#endif
