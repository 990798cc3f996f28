// The fused casts on the CPU: blocks of elements, unpacked to 64 bits where one loop is to serve every dtype.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "lowprec/convert.h"
#include "lowprec/fused_ops.h"
#include "lowprec/inline.h"
#include "lowprec/philox.h"

namespace lowprec {
namespace {

constexpr int64_t kBlock = 512;  // elements of a block, whose 64-bit words stay in the first-level cache
constexpr int64_t kGrain = 32;   // blocks that are worth a thread
constexpr int64_t kTile = 64;    // rows and columns of a tile that is transposed at once

uint64_t read_word(const MaybeTensor& word) {
  if (!word) return 0;
  STD_TORCH_CHECK(word->is_cpu(), "seed and offset of a cast on the CPU must be on the CPU");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(word->const_data_ptr()));
}

/// Where random words come from.
struct Draws {
  bool random;
  uint64_t seed;
  uint64_t offset;
  int bits;

  Draws(bool random, const Source& source)
      : random(random),
        seed(random ? read_word(source.seed) : 0),
        offset(random ? read_word(source.offset) : 0),
        bits(source.bits) {}
};

template <int kBits>
LOWPREC_CLONES void draw_fours(uint64_t seed, uint64_t offset, int64_t begin, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; i += 4) {
    const Words draws = draw_four<kBits>(seed, offset, begin + i);
    for (int j = 0; j < 4; ++j) words[i + j] = draws.word[j];
  }
}

/// The random words of elements begin .. begin + count, or zeros: `words` has room for six more than count.
const uint32_t* draw(const Draws& draws, int64_t begin, int64_t count, uint32_t* words) {
  if (!draws.random) {
    std::fill_n(words, count, 0);
    return words;
  }
  const int64_t before = begin % 4;
  const auto fours = draws.bits == 32 ? draw_fours<32> : draws.bits == 16 ? draw_fours<16> : draw_fours<8>;
  fours(draws.seed, draws.offset, begin - before, count + before, words);
  return words + before;
}

// Arrays of any width, by blocks of 64-bit words.

template <class T>
void load_as(const void* data, int64_t begin, int64_t count, uint64_t* words) {
  const auto* from = static_cast<const T*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) words[i] = from[i];
}

template <class T>
void store_as(void* data, int64_t begin, int64_t count, const uint64_t* words) {
  auto* to = static_cast<T*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(words[i]);
}

template <class F>
void for_width(int bytes, F f) {
  if (bytes == 8) return f(uint64_t{});
  if (bytes == 4) return f(uint32_t{});
  if (bytes == 2) return f(uint16_t{});
  return f(uint8_t{});
}

void load(const Array& from, int64_t begin, int64_t count, uint64_t* words) {
  for_width(from.bytes, [&](auto bits) { load_as<decltype(bits)>(from.data, begin, count, words); });
}

void store(const Array& to, int64_t begin, int64_t count, const uint64_t* words) {
  for_width(to.bytes, [&](auto bits) { store_as<decltype(bits)>(to.data, begin, count, words); });
}

/// Call block(begin, size, words) for every block, with its random words.
template <class F>
void for_blocks(int64_t count, const Draws& draws, F block) {
  parallel_for(0, (count + kBlock - 1) / kBlock, kGrain, [&](int64_t first, int64_t last) {
    alignas(64) uint32_t room[kBlock + 8];
    for (int64_t begin = first * kBlock; begin < std::min(last * kBlock, count); begin += kBlock) {
      const int64_t size = std::min(kBlock, count - begin);
      block(begin, size, draw(draws, begin, size, room));
    }
  });
}

LOWPREC_CLONES void accumulate_block(const Accumulate op, uint64_t* y, const uint64_t* x, int64_t count,
                                     const uint32_t* words) {
  for (int64_t i = 0; i < count; ++i) y[i] = op(y[i], x[i], words[i]);
}

template <Activation kind>
LOWPREC_CLONES void activate_block(const Activate op, uint64_t* x, const double* scale, const double* bias,
                                   int64_t count, const uint32_t* words) {
  for (int64_t i = 0; i < count; ++i) x[i] = op.apply<kind>(x[i], scale[i], bias[i], words[i]);
}

/// Scale and bias of the elements of a block.
void spread(const Affine& affine, int64_t begin, int64_t count, double* scale, double* bias) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t channel = affine.varies() ? affine.channel(begin + i) : 0;
    scale[i] = affine.scale.at(channel);
    bias[i] = affine.bias.at(channel);
  }
}

// Casts into both layouts.

template <class Op>
LOWPREC_CLONES void cast_segment(const Op op, const typename Op::Input* x, typename Op::Output* out, int64_t count,
                                 const uint32_t* words) {
  NoTally none;
  for (int64_t i = 0; i < count; ++i) out[i] = op(x[i], Op::random ? words[i] : 0, none);
}

template <class D, class C>
LOWPREC_CLONES void widen_segment(const typename D::Bits* x, typename C::Bits* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen<D, C>(x[i]);
}

template <class D, class C>
LOWPREC_CLONES void narrow_segment(const typename C::Bits* x, typename D::Bits* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = narrow<C, D>(x[i]);
}

/// Casts of dtype D computed in C, to values or codes or both: codes of both are those of the values.
template <class D, class C, class Mode>
class Both {
 public:
  using Value = typename D::Bits;
  using Code = std::conditional_t<(sizeof(typename C::Bits) > 4), uint32_t, uint16_t>;

  Both(const Format& format, bool saturate, bool values, bool codes) {
    if (values) quantize_.emplace(format, saturate);
    if (values && codes) exact_.emplace(format, saturate);
    if (!values) encode_.emplace(format, saturate);
  }

  void operator()(const Value* x, int64_t count, const uint32_t* words, Value* values, Code* codes) const {
    typename C::Bits wide[kTile], rounded[kTile];
    widen_segment<D, C>(x, wide, count);
    if (encode_) return cast_segment(*encode_, wide, codes, count, words);
    cast_segment(*quantize_, wide, rounded, count, words);
    narrow_segment<D, C>(rounded, values, count);
    if (exact_) cast_segment(*exact_, rounded, codes, count, words);
  }

 private:
  std::optional<Quantize<C, Mode>> quantize_;
  std::optional<Encode<C, TowardZero, Code>> exact_;
  std::optional<Encode<C, Mode, Code>> encode_;
};

/// A place among the matrices of a batch: `height` x `width` elements from a corner.
struct Corner {
  int64_t row;  // counted over all matrices
  int64_t column;
  int64_t height;
  int64_t width;
};

/// Write a tile [kTile][kTile] into a result: as it stands, or transposed.
template <class T, class From>
void write_tile(const From* tile, const Corner& at, int64_t rows, int64_t columns, bool transposed, void* out) {
  const int64_t matrix = at.row / rows, row = at.row % rows;
  T* to = static_cast<T*>(out) + matrix * rows * columns;
  if (!transposed) {
    for (int64_t r = 0; r < at.height; ++r) {
      T* line = to + (row + r) * columns + at.column;
      for (int64_t c = 0; c < at.width; ++c) line[c] = static_cast<T>(tile[r * kTile + c]);
    }
    return;
  }
  for (int64_t c = 0; c < at.width; ++c) {
    T* line = to + (at.column + c) * rows + row;
    for (int64_t r = 0; r < at.height; ++r) line[r] = static_cast<T>(tile[r * kTile + c]);
  }
}

template <class D, class C, class Mode>
void transpose_with(const Tensor& x, const Format& format, bool saturate, const Source& source, const MaybeTensor& rows,
                    const MaybeTensor& columns) {
  using Caster = Both<D, C, Mode>;
  const auto is_values = [&](const MaybeTensor& out) { return out && out->scalar_type() == x.scalar_type(); };
  const auto is_codes = [&](const MaybeTensor& out) { return out && out->scalar_type() != x.scalar_type(); };
  const Caster cast(format, saturate, is_values(rows) || is_values(columns), is_codes(rows) || is_codes(columns));
  const Draws draws(Mode::random, source);
  const int64_t height = x.size(x.dim() - 2), width = x.size(x.dim() - 1);
  const int64_t bands = (height + kTile - 1) / kTile, matrices = x.numel() / (height * width);
  const auto* from = static_cast<const typename D::Bits*>(x.const_data_ptr());

  const auto write = [&](const MaybeTensor& out, bool transposed, const Corner& at, const auto* values,
                         const auto* codes) {
    if (!out) return;
    void* to = out->mutable_data_ptr();
    if (is_values(out)) return write_tile<typename D::Bits>(values, at, height, width, transposed, to);
    for_width(bytes_of(out->scalar_type()),
              [&](auto code) { write_tile<decltype(code)>(codes, at, height, width, transposed, to); });
  };
  parallel_for(0, matrices * bands, std::max<int64_t>(1, kBlock * kGrain / (kTile * width)),
               [&](int64_t first, int64_t last) {
                 std::vector<typename D::Bits> values(kTile * kTile);
                 std::vector<typename Caster::Code> codes(kTile * kTile);
                 uint32_t room[kTile + 8];
                 for (int64_t band = first; band < last; ++band) {
                   const int64_t row = band / bands * height + band % bands * kTile;
                   const int64_t high = std::min(kTile, height - band % bands * kTile);
                   for (int64_t column = 0; column < width; column += kTile) {
                     const Corner at{row, column, high, std::min(kTile, width - column)};
                     for (int64_t r = 0; r < high; ++r) {
                       const int64_t begin = (row + r) * width + column;
                       const uint32_t* words = draw(draws, begin, at.width, room);
                       cast(from + begin, at.width, words, &values[r * kTile], &codes[r * kTile]);
                     }
                     write(rows, false, at, values.data(), codes.data());
                     write(columns, true, at, values.data(), codes.data());
                   }
                 }
               });
}

struct Cpu {
  static Vector vector(const MaybeTensor& x) { return x ? Vector(*x) : Vector(); }

  static void accumulate(const Accumulate& op, const Tensor& y, const Tensor& x, const Source& source, const Target&,
                         const std::optional<Format>&) {
    const Array sums(y), terms(x);
    for_blocks(y.numel(), Draws(op.round.choice.random, source),
               [&](int64_t begin, int64_t size, const uint32_t* words) {
                 uint64_t old[kBlock], added[kBlock];
                 load(sums, begin, size, old);
                 load(terms, begin, size, added);
                 accumulate_block(op, old, added, size, words);
                 store(sums, begin, size, old);
               });
  }

  static void activate(const Activate& op, Activation kind, const Tensor& x, const Tensor& out, const Affine& affine,
                       const Source& source, const Target&) {
    const Array from(x), to(out);
    for_activation(kind, [&](auto chosen) {
      for_blocks(x.numel(), Draws(op.round.choice.random, source),
                 [&](int64_t begin, int64_t size, const uint32_t* words) {
                   uint64_t bits[kBlock];
                   double scale[kBlock], bias[kBlock];
                   load(from, begin, size, bits);
                   spread(affine, begin, size, scale, bias);
                   activate_block<decltype(chosen)::value>(op, bits, scale, bias, size, words);
                   store(to, begin, size, bits);
                 });
    });
  }

  /// float32 serves dtypes and codes of up to 32 and 16 bits, float64 the others.
  static void transpose(const Tensor& x, const Format& format, int64_t rounding, bool saturate, const Source& source,
                        const MaybeTensor& rows, const MaybeTensor& columns) {
    for_rounding(rounding, [&](auto mode) {
      for_container(x.scalar_type(), [&](auto container) {
        using D = decltype(container);
        using Mode = decltype(mode);
        const auto run =
            format.bits() > 16 || sizeof(typename D::Bits) > 4
                ? transpose_with<D, Float64, Mode>
                : transpose_with<D, std::conditional_t<(sizeof(typename D::Bits) > 4), Float64, Float32>, Mode>;
        run(x, format, saturate, source, rows, columns);
      });
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_fused<Cpu>(library); }

}  // namespace
}  // namespace lowprec
