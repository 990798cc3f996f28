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

constexpr int64_t kTokens = 512;               // that are packed at once
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
  LOWPREC_INLINE SparseTile(const Scalar* sums, int64_t pitch) {
    each([&](Vector& sum, int64_t i, int64_t j) { sum = V::load(sums + i * pitch + j * V::lanes); });
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

  LOWPREC_INLINE void store(Scalar* sums, int64_t pitch) {
    each([&](Vector& sum, int64_t i, int64_t j) { V::store(sums + i * pitch + j * V::lanes, sum); });
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

/// Up to kTokens tokens of a product, packed as panels [V::lanes tokens][features][V::lanes].
template <class C, class V, int kRows>
class SparseColumnsOf {
 public:
  using Scalar = typename V::Scalar;
  static constexpr int64_t width = 2 * V::lanes;  // tokens of a tile

  SparseColumnsOf(const SparseProduct<C>& product, Scalar* panels)
      : x_(product), pitch_(product.features * V::lanes), panels_(panels) {}

  void run(int64_t first) {
    first_ = first;
    tokens_ = std::min(kTokens, x_.tokens - first);
    pack_tokens();
    // Work is counted through all outputs of the tokens that stay near, then of the next.
    const int64_t near = std::max<int64_t>(kNearBytes / (pitch_ * static_cast<int64_t>(sizeof(Scalar)) * 2), 1) * width;
    const int64_t work = x_.columns.work(), regions = (tokens_ - 1) / near + 1;
    const int64_t each = std::min(near, tokens_) * x_.w.block * x_.w.block;
    parallel_for(0, regions * work, kMultiplications / each + 1, [&](int64_t begin, int64_t end) {
      const DefaultArithmetic arithmetic;
      const Buffer<Scalar> sums(x_.w.block * width);
      for (int64_t region = begin / work; region * work < end; ++region) {
        const int64_t last = x_.columns.at(std::min(end - region * work, work));
        for (int64_t j = x_.columns.at(std::max<int64_t>(begin - region * work, 0)); j < last; ++j) {
          column(j, region * near, std::min((region + 1) * near, tokens_), sums.data());
        }
      }
    });
  }

 private:
  void pack_tokens() const {
    const int64_t panels = (tokens_ - 1) / V::lanes + 1, slices = (x_.features - 1) / kSlice + 1;
    parallel_for(0, panels * slices, kMultiplications / (kSlice * V::lanes), [&](int64_t begin, int64_t end) {
      const DefaultArithmetic arithmetic;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / slices, feature = task % slices * kSlice;
        pack<C, V, V::lanes>(x_.x, first_ + panel * V::lanes, first_ + tokens_, feature,
                             std::min(kSlice, x_.features - feature), panels_ + panel * pitch_ + feature * V::lanes);
      }
    });
  }

  /// An output block, for tokens [begin, end).
  void column(int64_t j, int64_t begin, int64_t end, Scalar* sums) const {
    for (int64_t token = begin; token < end; token += width) {
      const int64_t count = std::min(end - token, width);
      for (int64_t i = 0; i < x_.w.block; i += kRows) {
        count > V::lanes ? tile<2>(j, token, i, sums + i * width) : tile<1>(j, token, i, sums + i * width);
      }
      x_.token_step == 1 ? write_rows(j, token, count, sums) : write_columns(j, token, count, sums);
    }
  }

  /// kRows outputs of a block, from the row-th on, for kVectors vectors of tokens.
  template <int kVectors>
  void tile(int64_t j, int64_t token, int64_t row, Scalar* sums) const {
    const auto& w = x_.w;
    const int32_t first = x_.columns.offsets[j], last = x_.columns.offsets[j + 1];
    const Scalar* panel = panels_ + token / V::lanes * pitch_;
    SparseTile<V, kRows, kVectors> tile;
    for (int64_t n = first; n < last; ++n) {
      const int64_t input = x_.columns.pairs[2 * n], id = x_.columns.pairs[2 * n + 1];
      if (w.closed(id)) {
        tile.add_zeros();
      } else {
        tile.add(w.at(id) + row * w.output_step, w.output_step, w.term_step, panel + input * w.block * V::lanes, pitch_,
                 V::lanes, w.block);
      }
    }
    if (first == last) tile.add_zeros();
    tile.store(sums, width);
  }

  Scalar* out(int64_t j, int64_t token, int64_t row) const {
    return x_.out + (first_ + token) * x_.token_step + (j * x_.w.block + row) * x_.feature_step;
  }

  void write_rows(int64_t j, int64_t token, int64_t count, const Scalar* sums) const {
    for (int64_t i = 0; i < x_.w.block; ++i) std::copy_n(sums + i * width, count, out(j, token, i));
  }

  void write_columns(int64_t j, int64_t token, int64_t count, const Scalar* sums) const {
    alignas(64) Scalar line[V::lanes];
    typename V::Vector square[V::lanes];
    for (int64_t i = 0; i < x_.w.block; i += V::lanes) {
      const int64_t some = std::min<int64_t>(x_.w.block - i, V::lanes);
      for (int64_t t = 0; t < count; t += V::lanes) {
        for (int64_t n = 0; n < V::lanes; ++n) square[n] = V::load(sums + (i + std::min(n, some - 1)) * width + t);
        V::transpose(square);
        for (int64_t n = 0; n < std::min<int64_t>(count - t, V::lanes); ++n) {
          V::store(line, square[n]);
          std::copy_n(line, some, out(j, token + t + n, i));
        }
      }
    }
  }

  const SparseProduct<C>& x_;
  int64_t pitch_;  // of panels
  Scalar* panels_;
  int64_t first_ = 0;
  int64_t tokens_ = 0;
};

template <class C, class V, int kRows>
void multiply_sparse_by(const SparseProduct<C>& x) {
  const int64_t panels = (std::min(kTokens, x.tokens) - 1) / V::lanes + 1;
  const Buffer<typename V::Scalar> packed(panels * x.features * V::lanes);
  SparseColumnsOf<C, V, kRows> columns(x, packed.data());
  for (int64_t first = 0; first < x.tokens; first += kTokens) columns.run(first);
}

/// The sums of a weight gradient over up to kTokens tokens at a time, packed as panels [V::lanes features][tokens]
/// [V::lanes]. V8 are the vectors for blocks narrower than V.
template <class C, class V, class V8, int kRows>
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
        for (int64_t n = begin; n < end; ++n) block(x_.order[n]);
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

  void block(int64_t id) const {
    const int64_t b = x_.block;
    const Scalar* left = place(left_.data(), x_.at[2 * id] * b);
    const Scalar* right = place(right_.data(), x_.at[2 * id + 1] * b);
    Scalar* sums = x_.out + id * b * b;
    if (b < V::lanes) return tiles<V8, 8, 1>(left, right, sums);
    b == V::lanes ? tiles<V, 8, 1>(left, right, sums) : tiles<V, kRows, 2>(left, right, sums);
  }

  /// Where a feature's first token lies, feature a multiple of the rows of a tile.
  const Scalar* place(const Scalar* panels, int64_t feature) const {
    return panels + feature / V::lanes * pitch() + feature % V::lanes;
  }
  int64_t pitch() const { return tokens_ * V::lanes; }

  template <class AnyV, int kTileRows, int kVectors>
  void tiles(const Scalar* left, const Scalar* right, Scalar* sums) const {
    for (int64_t row = 0; row < x_.block; row += kTileRows) {
      for (int64_t column = 0; column < x_.block; column += kVectors * AnyV::lanes) {
        Scalar* at = sums + row * x_.block + column;
        auto tile =
            first_ > 0 ? SparseTile<AnyV, kTileRows, kVectors>(at, x_.block) : SparseTile<AnyV, kTileRows, kVectors>();
        tile.add(place(left, row), 1, V::lanes, place(right, column), pitch(), V::lanes, count_);
        tile.store(at, x_.block);
      }
    }
  }

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
