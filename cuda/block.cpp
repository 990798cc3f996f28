// Casts to and from block formats on the CPU: strips of blocks side by side, shared out among torch's threads.
//
// A strip is read twice, for its scales and for the cast; the second time it comes from the cache.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lowprec/block_ops.h"
#include "lowprec/draws.h"
#include "lowprec/inline.h"

namespace lowprec {
namespace {

constexpr int64_t kColumns = 1024;   // of a strip that one thread works on at a time, if its blocks are not wider
constexpr int64_t kPiece = 1 << 16;  // elements of a whole tensor's block that one thread works on at a time
constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread
constexpr int64_t kWords = 2048;     // random words at a time

/// The largest magnitude, whatever it is: a maximum is all that the compiler turns into vector code.
template <class C>
LOWPREC_CLONES typename C::Word largest_of(const typename C::Bits* x, int64_t count) {
  typename C::Word largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const typename C::Word magnitude = x[i] & (C::sign - 1);
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest;
}

/// The peak of `rows` runs, `pitch` apart.
template <class C>
Peak<C> peak_of(const typename C::Bits* x, int64_t count, int64_t rows = 1, int64_t pitch = 0) {
  Peak<C> peak;
  for (int64_t row = 0; row < rows; ++row) peak.amax = std::max(peak.amax, largest_of<C>(x + row * pitch, count));
  if (peak.amax < C::infinity) return peak;
  peak.amax = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < count; ++i) peak.add(x[row * pitch + i] & (C::sign - 1));
  }
  return peak;
}

/// The largest magnitudes of blocks one element wide, with a row more of each.
template <class C>
LOWPREC_CLONES void largest_add(const typename C::Bits* x, typename C::Word* largest, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const typename C::Word magnitude = x[i] & (C::sign - 1);
    largest[i] = largest[i] > magnitude ? largest[i] : magnitude;
  }
}

template <class C>
Peak<C> peak_of_all(const typename C::Bits* x, int64_t count) {
  std::vector<Peak<C>> peaks((count + kPiece - 1) / kPiece);
  parallel_for(0, static_cast<int64_t>(peaks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) peaks[i] = peak_of<C>(x + i * kPiece, std::min(kPiece, count - i * kPiece));
  });
  Peak<C> whole;
  for (const auto& peak : peaks) whole.merge(peak);
  return whole;
}

template <class At>
LOWPREC_INLINE void cast_all(const At at, const typename At::Bits* x, typename At::Output* out, int64_t count,
                             const uint32_t* words, uint32_t mode) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = at(x[i], At::random ? words[i] : mode);
}

/// Elements under one scale: one loop for regular grids and one for the others.
template <class At>
LOWPREC_CLONES void cast_run(At at, const typename At::Bits* x, typename At::Output* out, int64_t count,
                             const uint32_t* words, uint32_t mode) {
  if (at.grid.regular) {
    at.grid.regular = true;
    return cast_all(at, x, out, count, words, mode);
  }
  at.grid.regular = false;
  cast_all(at, x, out, count, words, mode);
}

/// Elements under a scale each.
template <class Blocks>
LOWPREC_CLONES void cast_each(const Blocks& blocks, const typename Blocks::Scale* scales,
                              const typename Blocks::At::Bits* x, typename Blocks::Output* out, int64_t count,
                              const uint32_t* words, uint32_t mode) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    auto at = blocks.at(scales[i]);
    at.grid.regular = false;
    out[i] = at(x[i], Blocks::At::random ? words[i] : mode);
  }
}

/// The random words of any run of elements of one tensor, for as long as the next one is not asked for.
template <bool kRandom>
class Words2048 {
 public:
  explicit Words2048(const Draws& draws) : draws_(draws) {}

  const uint32_t* of(int64_t begin, int64_t count) {
    if (!kRandom) return nullptr;
    const int64_t from = begin - begin % 4;
    draw(draws_, from, begin - from + count, words_);
    return words_ + (begin - from);
  }

 private:
  const Draws draws_;
  alignas(64) uint32_t words_[kRandom ? kWords + 8 : 1];
};

/// A cast of a contiguous tensor: everything that does not change from strip to strip.
template <class Blocks>
struct Job {
  using C = typename Blocks::Container;
  using At = typename Blocks::At;
  using Words = Words2048<At::random>;

  const Blocks& blocks;
  const typename C::Bits* x;
  typename Blocks::Output* out;
  uint8_t* scales;
  const Tiles& tiles;
  const Draws& draws;
  uint32_t mode;

  uint8_t code(const Peak<C>& peak, const typename Blocks::Scale& scale) const {
    return static_cast<uint8_t>(peak.nan ? blocks.nan() : blocks.scales.code(scale));
  }

  void cast(const At& at, int64_t begin, int64_t count, Words& words) const {
    for (int64_t i = begin; i < begin + count; i += kWords) {
      const int64_t size = At::random ? std::min(kWords, begin + count - i) : count;
      cast_run(at, x + i, out + i, size, words.of(i, size), mode);
      if (!At::random) return;
    }
  }

  /// One block that is the whole tensor.
  void whole() const {
    const Peak<C> peak = peak_of_all<C>(x, tiles.columns);
    const auto scale = blocks.scales.of(peak.amax, peak.infinite);
    if (scales) *scales = code(peak, scale);
    const At at = blocks.at(scale);
    parallel_for(0, (tiles.columns + kPiece - 1) / kPiece, 1, [&](int64_t first, int64_t last) {
      Words words(draws);
      const int64_t begin = first * kPiece;
      cast(at, begin, std::min(last * kPiece, tiles.columns) - begin, words);
    });
  }

  /// Blocks side by side, from the one at `tile` on: `rows` high, `columns` wide together, x[begin] first.
  struct Strip {
    int64_t begin;
    int64_t tile;
    int64_t rows;
    int64_t columns;
  };

  void wide(const Strip& strip, Words& words) const {
    for (int64_t from = 0, tile = strip.tile; from < strip.columns; from += tiles.width, ++tile) {
      const int64_t width = std::min(tiles.width, strip.columns - from);
      const int64_t begin = strip.begin + from;
      const Peak<C> peak = peak_of<C>(x + begin, width, strip.rows, tiles.columns);
      const auto scale = blocks.scales.of(peak.amax, peak.infinite);
      if (scales) scales[tile] = code(peak, scale);
      const At at = blocks.at(scale);
      for (int64_t row = 0; row < strip.rows; ++row) cast(at, begin + row * tiles.columns, width, words);
    }
  }

  void narrow(const Strip& strip, Words& words) const {
    alignas(64) typename C::Word largest[kColumns] = {};
    typename Blocks::Scale each[kColumns];
    for (int64_t row = 0; row < strip.rows; ++row) {
      largest_add<C>(x + strip.begin + row * tiles.columns, largest, strip.columns);
    }
    for (int64_t i = 0; i < strip.columns; ++i) {
      Peak<C> peak{largest[i], 0, 0};
      if (largest[i] >= C::infinity) peak = peak_of<C>(x + strip.begin + i, 1, strip.rows, tiles.columns);
      each[i] = blocks.scales.of(peak.amax, peak.infinite);
      if (scales) scales[strip.tile + i] = code(peak, each[i]);
    }
    for (int64_t row = 0; row < strip.rows; ++row) {
      const int64_t begin = strip.begin + row * tiles.columns;
      cast_each(blocks, each, x + begin, out + begin, strip.columns, words.of(begin, strip.columns), mode);
    }
  }

  void strips() const {
    const int64_t step = std::max(kColumns / tiles.width, int64_t{1}) * tiles.width;
    const int64_t pieces = (tiles.columns + step - 1) / step, down = tiles.down();
    const int64_t grain = std::max(kGrain / (tiles.height * std::min(step, tiles.columns)), int64_t{1});
    parallel_for(0, tiles.batch * down * pieces, grain, [&](int64_t first, int64_t last) {
      Words words(draws);
      for (int64_t i = first; i < last; ++i) {
        const int64_t column = i % pieces * step, strip = i / pieces, row = strip % down * tiles.height;
        const int64_t begin = (strip / down * tiles.rows + row) * tiles.columns + column;
        const Strip piece{begin, strip * tiles.across() + column / tiles.width,
                          std::min(tiles.height, tiles.rows - row), std::min(step, tiles.columns - column)};
        tiles.width == 1 ? narrow(piece, words) : wide(piece, words);
      }
    });
  }
};

template <class Op>
LOWPREC_CLONES void decode_run(const Op op, const typename Op::Scale scale, const typename Op::Input* codes,
                               typename Op::Output* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = op(codes[i], scale);
}

struct Cpu {
  static void gather(const Tensor& x, const Tensor& results, const Tensor& notes, const Gathered& to) {
    gather_on_cpu(x, results, notes, to);
  }

  template <class Blocks>
  static void cast(Blocks blocks, const Tensor& x, const Tensor& out, uint8_t* scales, const Tiles& tiles,
                   const Source& source, int64_t mode, const uint32_t* tensor_scale) {
    using C = typename Blocks::Container;
    if (tensor_scale) blocks.take(*tensor_scale);
    const Draws draws = Blocks::At::random ? Draws(source) : Draws();
    const Job<Blocks> job{blocks,
                          static_cast<const typename C::Bits*>(x.const_data_ptr()),
                          static_cast<typename Blocks::Output*>(out.mutable_data_ptr()),
                          scales,
                          tiles,
                          draws,
                          static_cast<uint32_t>(mode)};
    if (tiles.whole()) {
      job.whole();
    } else if (x.numel() > 0) {
      job.strips();
    }
  }

  template <class C>
  static void tensor_scale(const TensorScale& op, C container, const Tensor& x, const Tensor& out) {
    const auto peak = peak_of_all<C>(static_cast<const typename C::Bits*>(x.const_data_ptr()), x.numel());
    *static_cast<uint32_t*>(out.mutable_data_ptr()) = op.of(peak.amax, peak.infinite, container);
  }

  template <class Op>
  static void decode(Op op, const Tensor& codes, const Tensor& scales, const uint32_t* tensor_scale, const Tensor& out,
                     const Tiles& tiles) {
    if (tensor_scale) op.take(*tensor_scale);
    const auto* from = static_cast<const typename Op::Input*>(codes.const_data_ptr());
    const auto* scale = static_cast<const uint8_t*>(scales.const_data_ptr());
    auto* to = static_cast<typename Op::Output*>(out.mutable_data_ptr());
    const int64_t across = tiles.across(), down = tiles.down();
    parallel_for(0, tiles.batch * tiles.rows, std::max(kGrain / tiles.columns, int64_t{1}),
                 [&](int64_t first, int64_t last) {
                   for (int64_t row = first; row < last; ++row) {
                     const int64_t strip = row / tiles.rows * down + row % tiles.rows / tiles.height;
                     for (int64_t tile = 0; tile < across; ++tile) {
                       const int64_t column = tile * tiles.width, begin = row * tiles.columns + column;
                       decode_run(op, op.scale(scale[strip * across + tile]), from + begin, to + begin,
                                  std::min(tiles.width, tiles.columns - column));
                     }
                   }
                 });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_blocks<Cpu>(library); }

}  // namespace
}  // namespace lowprec
