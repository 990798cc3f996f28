// Sums and matrix products by vectors: how operands are packed, and how tiles of outputs walk through an accumulator's
// tree, all of a tile's sums together.
//
// To be included where the compiler's target has the vectors V, after everything else.
#pragma once

#include "lowprec/accumulate_step.h"

#ifdef LOWPREC_VECTORS

namespace lowprec {
namespace {

constexpr int64_t kChunk = 512;    // terms that are packed at once
constexpr int64_t kRowBlock = 64;  // outputs of a task
constexpr int64_t kColumnBlock = 128;
constexpr int64_t kDraws = 32;  // roundings of an output whose words are drawn at once

/// Cache lines of memory.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(new (std::align_val_t{64}) T[static_cast<size_t>(size)]) {}
  T* data() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(T* data) const { operator delete[](data, std::align_val_t{64}); }
  };
  std::unique_ptr<T[], Delete> data_;
};

template <class C>
LOWPREC_INLINE float as_float(typename C::Bits bits) {
  if constexpr (std::is_same_v<C, Float16>) {
    return _cvtsh_ss(bits);
  } else if constexpr (std::is_same_v<C, BFloat16>) {
    return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  } else {
    return bit_cast<float>(bits);
  }
}

/// An element as a number of the vectors' type, exact.
template <class C, class Scalar>
LOWPREC_INLINE Scalar number_of(typename C::Bits bits) {
  if constexpr (std::is_same_v<C, Float64>) {
    return bit_cast<double>(bits);
  } else {
    return as_float<C>(bits);
  }
}

/// Terms of lines, one at a time, as [terms][kWidth].
template <class C, int kWidth, class Scalar>
void pack_each(const Lines<C>& from, int64_t lines, int64_t terms, Scalar* to) {
  for (int64_t i = 0; i < lines; ++i) {
    for (int64_t k = 0; k < terms; ++k) {
      to[k * kWidth + i] = number_of<C, Scalar>(from.data[i * from.stride + k * from.step]);
    }
  }
}

/// One term of lines that lie side by side.
template <class C, class V>
void pack_row(const typename C::Bits* from, int64_t lines, typename V::Scalar* to) {
  int64_t i = 0;
  for (; i + V::lanes <= lines; i += V::lanes) V::store(to + i, V::template read<C>(from + i));
  for (; i < lines; ++i) to[i] = number_of<C, typename V::Scalar>(from[i]);
}

/// As many terms of as many lines as a vector has lanes, where a line's terms lie side by side.
template <class C, class V, int kWidth>
void pack_square(const Lines<C>& from, typename V::Scalar* to) {
  typename V::Vector square[V::lanes];
  for (int i = 0; i < V::lanes; ++i) square[i] = V::template read<C>(from.data + i * from.stride);
  V::transpose(square);
  for (int i = 0; i < V::lanes; ++i) V::store(to + i * kWidth, square[i]);
}

/// Terms [first, first + terms) of lines [begin, begin + kWidth), as [terms][kWidth]; missing lines are zero.
template <class C, class V, int kWidth>
void pack(const Lines<C>& from, int64_t begin, int64_t lines, int64_t first, int64_t terms, typename V::Scalar* to) {
  const auto* data = from.data + begin * from.stride + first * from.step;
  const int64_t width = std::min<int64_t>(lines - begin, kWidth);
  if (width < kWidth) std::fill(to, to + terms * kWidth, typename V::Scalar(0));
  if (from.stride == 0) {
    for (int64_t k = 0; k < terms; ++k) {
      std::fill_n(to + k * kWidth, width, number_of<C, typename V::Scalar>(data[k * from.step]));
    }
    return;
  }
  if (from.stride == 1) {
    for (int64_t k = 0; k < terms; ++k) pack_row<C, V>(data + k * from.step, width, to + k * kWidth);
    return;
  }
  for (int64_t i = 0; i < width; i += V::lanes) {
    const int64_t some = std::min<int64_t>(V::lanes, width - i);
    for (int64_t k = 0; k < terms; k += V::lanes) {
      const int64_t few = std::min<int64_t>(V::lanes, terms - k);
      const Lines<C> part{data + i * from.stride + k * from.step, from.stride, from.step};
      if (from.step == 1 && some == V::lanes && few == V::lanes) {
        pack_square<C, V, kWidth>(part, to + k * kWidth + i);
      } else {
        pack_each<C, kWidth>(part, some, few, to + k * kWidth + i);
      }
    }
  }
}

/// Everything that the tiles of one call share.
template <class V>
struct TilePlan {
  Tree tree;
  Target<V> target[kMaxLevels];
  Kernels<V> kernels[kMaxLevels];
  SumWords words;
  typename V::Draw draw;
  bool usable = false;
  alignas(64) typename V::Scalar ones[V::rows * V::vectors * V::lanes];

  /// `wide` as in `Target`.
  TilePlan(const AccumulatorSpec& spec, int64_t terms, int64_t roundings, uint64_t seed, uint64_t offset, bool wide)
      : tree(spec, terms), words{seed, offset, std::max(roundings, tree.roundings)}, draw(seed, offset) {
    std::fill(std::begin(ones), std::end(ones), typename V::Scalar(1));
    if (spec.leaf != Leaf::terms || spec.has_product || terms == 0) return;
    for (int i = 0; i < spec.levels; ++i) {
      target[i] = Target<V>(spec.level[i], wide);
      if (target[i].path == Path::none) return;
      kernels[i] = Kernels<V>::of(target[i], spec.level[i].rounding);
    }
    usable = true;
  }
};

/// How far sums are: what all outputs of a block have in common.
struct Progress {
  int64_t done[kMaxStages] = {};   // inputs that a stage had
  int64_t taken[kMaxStages] = {};  // those of its present group
};

/// A tile's partial sums: kOutputs for each stage.
template <class V, int kRows, int kVectors>
class Tile {
 public:
  using Scalar = typename V::Scalar;
  static constexpr int width = kVectors * V::lanes;
  static constexpr int outputs = kRows * width;
  static constexpr int left_width = kRows == 1 ? width : kRows;

  Tile(const TilePlan<V>& plan, Scalar* partial, const uint64_t* index, uint32_t* words)
      : plan_(plan), partial_(partial), index_(index), words_(words) {}

  /// Add terms: a [count][left_width], b [count][width].
  void add(Progress& progress, const Scalar* a, const Scalar* b, int64_t count) const {
    for (int64_t k = 0; k < count;) {
      const int64_t steps = run(progress, 0, a + k * left_width, b + k * width, count - k);
      k += steps;
      if (full(progress, 0)) rise(progress, 0);
    }
  }

  /// The sums, [kRows][width]. Groups that are short end here.
  const Scalar* finish(Progress& progress) const {
    for (int i = 0; i + 1 < plan_.tree.stages; ++i) {
      if (progress.taken[i] > 0) rise(progress, i);
    }
    return partial_ + (plan_.tree.stages - 1) * outputs;
  }

 private:
  bool full(const Progress& progress, int i) const {
    return i + 1 < plan_.tree.stages && progress.taken[i] == plan_.tree.stage[i].fan_in;
  }

  /// Up to `count` inputs of a stage, as many as its group takes; returns how many.
  int64_t run(Progress& progress, int i, const Scalar* a, const Scalar* b, int64_t count) const {
    const Stage& stage = plan_.tree.stage[i];
    const auto& target = plan_.target[stage.level];
    Scalar* sums = partial_ + i * outputs;
    if (progress.taken[i] == 0) std::fill(sums, sums + outputs, target.start);
    int64_t steps = std::min(count, stage.fan_in - progress.taken[i]);
    if (target.random) {
      steps = std::min(steps, kDraws);
      draw(stage.first + progress.done[i], steps);
    }
    const auto& kernels = plan_.kernels[stage.level];
    (i == 0 && kRows > 1 ? kernels.tile : kernels.row)(target, a, b, steps, words_, sums);
    progress.done[i] += steps;
    progress.taken[i] += steps;
    return steps;
  }

  /// End a stage's group, and every group above that this fills.
  void rise(Progress& progress, int i) const {
    do {
      progress.taken[i] = 0;
      run(progress, i + 1, plan_.ones, partial_ + i * outputs, 1);
      ++i;
    } while (full(progress, i));
  }

  /// The words of roundings [n, n + count), [count][outputs].
  void draw(int64_t n, int64_t count) const {
    for (int i = 0; i < outputs; i += 8) plan_.draw(index_ + i, n, count, words_ + i, outputs);
  }

  const TilePlan<V>& plan_;
  Scalar* partial_;
  const uint64_t* index_;  // of each output's first word
  uint32_t* words_;
};

/// A block of outputs, by tiles of kRows by kVectors vectors.
template <class C, class V, int kRows, int kVectors>
class Block {
 public:
  using Scalar = typename V::Scalar;
  using Output = typename CarrierOf<C>::Bits;
  using AnyTile = Tile<V, kRows, kVectors>;
  static constexpr int64_t row_block = kRows > 1 ? kRowBlock : 4;
  static constexpr int64_t column_block = kRows > 1 ? kColumnBlock : AnyTile::width;
  static constexpr int64_t across = column_block / AnyTile::width;
  static constexpr int64_t down = row_block / kRows;

  explicit Block(const TilePlan<V>& plan)
      : plan_(plan),
        left_(down * AnyTile::left_width * kChunk),
        right_(column_block * kChunk),
        partial_(row_block * column_block * plan.tree.stages),
        index_(row_block * column_block),
        words_(AnyTile::outputs * kDraws) {}

  /// The block's sums, from a row and a column on.
  void run(const Product<C>& x, int64_t row, int64_t column, Output* out) const {
    const DefaultArithmetic arithmetic;
    const int64_t tiles_down = std::min(down, (x.rows - row + kRows - 1) / kRows);
    const int64_t tiles_across = std::min(across, (x.columns - column + AnyTile::width - 1) / AnyTile::width);
    for_tiles(tiles_down, tiles_across, [&](int64_t i, int64_t j) { number(x, row + i * kRows, column, i, j); });
    Progress progress;
    for (int64_t first = 0; first < x.terms; first += kChunk) {
      const int64_t count = std::min(kChunk, x.terms - first);
      for (int64_t i = 0; i < tiles_down; ++i) pack_left(x, row + i * kRows, column, first, count, left(i));
      for (int64_t j = 0; j < tiles_across; ++j) {
        pack<C, V, AnyTile::width>(x.right, column + j * AnyTile::width, x.columns, first, count,
                                   right_.data() + j * AnyTile::width * kChunk);
      }
      Progress next;
      for_tiles(tiles_down, tiles_across, [&](int64_t i, int64_t j) {
        next = progress;
        tile(i, j).add(next, left(i), right_.data() + j * AnyTile::width * kChunk, count);
      });
      progress = next;
    }
    for_tiles(tiles_down, tiles_across, [&](int64_t i, int64_t j) {
      Progress last = progress;
      write(x, tile(i, j).finish(last), row + i * kRows, column + j * AnyTile::width, out);
    });
  }

 private:
  template <class F>
  static void for_tiles(int64_t down, int64_t across, const F& f) {
    for (int64_t j = 0; j < across; ++j) {
      for (int64_t i = 0; i < down; ++i) f(i, j);
    }
  }

  Scalar* left(int64_t i) const { return left_.data() + i * AnyTile::left_width * kChunk; }

  static void pack_left(const Product<C>& x, int64_t row, int64_t column, int64_t first, int64_t count, Scalar* to) {
    if constexpr (kRows == 1) {
      pack<C, V, AnyTile::width>(x.left_of_row(row), column, x.columns, first, count, to);
    } else {
      pack<C, V, kRows>(x.left, row, x.rows, first, count, to);
    }
  }

  AnyTile tile(int64_t i, int64_t j) const {
    const int64_t n = i * across + j;
    return {plan_, partial_.data() + n * AnyTile::outputs * plan_.tree.stages, index_.data() + n * AnyTile::outputs,
            words_.data()};
  }

  /// The index of each output's first random word.
  void number(const Product<C>& x, int64_t row, int64_t column, int64_t i, int64_t j) const {
    uint64_t* index = index_.data() + (i * across + j) * AnyTile::outputs;
    for (int64_t n = 0; n < AnyTile::outputs; ++n) {
      const int64_t output = x.output(row + n / AnyTile::width, column + j * AnyTile::width + n % AnyTile::width);
      index[n] = static_cast<uint64_t>(output * plan_.words.roundings);
    }
  }

  static void write(const Product<C>& x, const Scalar* sums, int64_t row, int64_t column, Output* out) {
    using Carrier = std::conditional_t<sizeof(Output) == 8, double, float>;
    for (int64_t i = 0; i < std::min<int64_t>(kRows, x.rows - row); ++i) {
      for (int64_t j = 0; j < std::min<int64_t>(AnyTile::width, x.columns - column); ++j) {
        out[x.output(row + i, column + j)] = bit_cast<Output>(static_cast<Carrier>(sums[i * AnyTile::width + j]));
      }
    }
  }

  const TilePlan<V>& plan_;
  Buffer<Scalar> left_;
  Buffer<Scalar> right_;
  Buffer<Scalar> partial_;
  Buffer<uint64_t> index_;
  Buffer<uint32_t> words_;
};

/// All outputs, shared out by blocks.
template <class C, class V, int kRows, int kVectors>
void multiply_blocks(const TilePlan<V>& plan, const Product<C>& x, typename CarrierOf<C>::Bits* out) {
  using AnyBlock = Block<C, V, kRows, kVectors>;
  const int64_t down = (x.rows - 1) / AnyBlock::row_block + 1;
  const int64_t across = (x.columns - 1) / AnyBlock::column_block + 1;
  parallel_for(0, x.batch * down * across, 1, [&](int64_t begin, int64_t end) {
    const AnyBlock block(plan);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % down * AnyBlock::row_block;
      const int64_t column = task / down % across * AnyBlock::column_block;
      block.run(x.at(task / down / across), row, column, out);
    }
  });
}

/// The product, with its longer side in the lanes; false if the vectors do not serve the accumulator.
template <class V, class C>
bool multiply_in(const AccumulatorSpec& spec, uint64_t seed, uint64_t offset, Product<C> x,
                 typename CarrierOf<C>::Bits* out) {
  const bool wide = sizeof(typename V::Scalar) > sizeof(typename CarrierOf<C>::Bits);
  const TilePlan<V> plan(spec, x.terms, x.roundings, seed, offset, wide);
  if (!plan.usable) return false;
  if (x.rows == 1 && x.columns == 1) x.join_batch();
  if (x.columns < kColumnBlock && x.columns < x.rows) x.transpose();
  x.rows < V::rows ? multiply_blocks<C, V, 1, V::rows * V::vectors>(plan, x, out)
                   : multiply_blocks<C, V, V::rows, V::vectors>(plan, x, out);
  return true;
}

}  // namespace
}  // namespace lowprec

#endif
