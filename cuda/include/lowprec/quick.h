// The quick way of the casts on a GPU, for as many elements as a thread takes at a time: numbers one by one on the
// float pipe, signs and codes a word at a time. Device code only.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "lowprec/cast.h"
#include "lowprec/container.h"
#include "lowprec/float_grid.h"
#include "lowprec/inline.h"

namespace lowprec {

/// Elements that move together, in accesses of up to 16 bytes; the same as words.
template <class T, int kWidth>
struct alignas(std::min<size_t>(sizeof(T) * kWidth, 16)) Chunk {
  static constexpr int words = kWidth * sizeof(T) / 4;

  T at[kWidth];

  LOWPREC_DEVICE uint32_t& word(int i) { return reinterpret_cast<uint32_t*>(at)[i]; }
  LOWPREC_DEVICE uint32_t word(int i) const { return reinterpret_cast<const uint32_t*>(at)[i]; }
};

/// How many elements a thread takes at a time: 16 bytes of the wider side, and no fewer than share a random counter. No
/// more than 8 either: so many codes make whole bytes, whatever their width.
template <class Op>
constexpr int chunk_width =
    std::clamp<int>(16 / std::max(sizeof(typename Op::Input), sizeof(typename Op::Output)), 4, 8);

template <class Op>
using Inputs = Chunk<typename Op::Input, chunk_width<Op>>;
template <class Op>
using Outputs = Chunk<typename Op::Output, chunk_width<Op>>;

/// The random words of a chunk.
template <class Op>
struct ChunkWords {
  uint32_t at[chunk_width<Op>];
};

/// The same bits in every T of a word.
template <class T>
LOWPREC_INLINE constexpr uint32_t repeat(uint32_t bits) {
  return sizeof(T) == 4 ? bits : sizeof(T) == 2 ? bits * 0x00010001u : bits * 0x01010101u;
}

/// A number of a container as float32.
LOWPREC_DEVICE float to_float(Float32, uint32_t bits) { return as_float(bits); }
LOWPREC_DEVICE float to_float(BFloat16, uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
LOWPREC_DEVICE float to_float(Float16, uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

/// A word of a container's numbers from float32 numbers that it holds.
LOWPREC_DEVICE uint32_t to_word(Float32, const float* x) { return as_bits(x[0]); }
LOWPREC_DEVICE uint32_t to_word(BFloat16, const float* x) { return __byte_perm(as_bits(x[0]), as_bits(x[1]), 0x7632); }
LOWPREC_DEVICE uint32_t to_word(Float16, const float* x) {
  const __half2 pair = __floats2half2_rn(x[0], x[1]);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class C, int kWidth>
LOWPREC_DEVICE void store(C container, const float* values, Chunk<typename C::Bits, kWidth>& out) {
  constexpr int share = 4 / sizeof(typename C::Bits);
#pragma unroll
  for (int i = 0; i < kWidth / share; ++i) out.word(i) = to_word(container, values + i * share);
}

template <class C, class AnyChunk>
LOWPREC_DEVICE void to_floats(C container, const AnyChunk& in, float* x) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(in.at) / sizeof(in.at[0])); ++i) x[i] = to_float(container, in.at[i]);
}

/// Whether none of the numbers is NaN: two to an instruction.
template <int kWidth>
LOWPREC_DEVICE bool all_numbers(const float* x) {
  bool numbers = true;
#pragma unroll
  for (int i = 0; i < kWidth; i += 2) numbers &= x[i] < x[i + 1] || x[i] >= x[i + 1];
  return numbers;
}

/// Signs for magnitudes that lie side by side in a word, the top bit of each field 0. Without -0 (`keep` is 0) zeros
/// have none; with it, `keep` is all ones.
template <bool kPlain>
LOWPREC_DEVICE uint32_t with_signs(uint32_t magnitudes, uint32_t signs, uint32_t top, uint32_t one, uint32_t keep) {
  if (kPlain) return magnitudes | (signs & top);
  const uint32_t nonzero = magnitudes + (top - one);  // a field's top bit
  return magnitudes | (signs & top & (nonzero | keep));
}

/// An op's quick way: `usable` is whether it serves the format at all, `plain` whether its shorter form does.
template <class Op>
struct Quick {
  static constexpr bool exists = false;
};

template <class C, class Mode>
class QuickQuantize {
 public:
  using Op = Quantize<C, Mode>;
  static constexpr bool exists = true;
  bool usable;
  bool plain;

  QuickQuantize() = default;
  LOWPREC_INLINE QuickQuantize(const Format& format, bool saturate) : grid_(format, saturate) {
    const bool stays = format.overflow_code(saturate) == format.max_code();
    // A conversion to float16 need not keep a NaN's bits.
    usable = grid_.usable && (C::exponent_bits == 8 || stays || format.has_infinity());
    plain = grid_.plain;
    overflow_ = as_float(stays                   ? as_bits(grid_.largest)
                         : format.has_infinity() ? Float32::infinity
                                                 : Float32::quiet_nan);
    keep_ = format.has_negative_zero() ? ~0u : 0;
  }

  template <bool kPlain>
  LOWPREC_DEVICE void apply(const Inputs<Op>& in, const ChunkWords<Op>& draws, Outputs<Op>& out) const {
    constexpr int width = chunk_width<Op>;
    constexpr int share = 4 / sizeof(typename Op::Output);
    constexpr uint32_t one = repeat<typename Op::Output>(1);
    constexpr uint32_t top = repeat<typename Op::Output>(C::sign);
    float x[width], y[width];
    to_floats(C{}, in, x);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      y[i] = round_magnitude<Mode, kPlain>(grid_, x[i], draws.at[i]);
      if (!kPlain) y[i] = y[i] > grid_.largest ? overflow_ : y[i];
    }
#pragma unroll
    for (int i = 0; i < Outputs<Op>::words; ++i) {
      out.word(i) = with_signs<kPlain>(to_word(C{}, y + i * share), in.word(i), top, one, keep_);
    }
    if (!all_numbers<width>(x)) keep_nan(x, in, out);
  }

 private:
  static LOWPREC_DEVICE void keep_nan(const float* x, const Inputs<Op>& in, Outputs<Op>& out) {
#pragma unroll
    for (int i = 0; i < chunk_width<Op>; ++i) out.at[i] = x[i] == x[i] ? out.at[i] : in.at[i];
  }

  FloatGrid grid_;
  float overflow_;
  uint32_t keep_;
};

/// The top 8 or 16 bits of numbers, a word of them from the first on.
template <class Code>
LOWPREC_DEVICE uint32_t top_bits(Float32, const uint32_t* x) {
  if (sizeof(Code) == 2) return __byte_perm(x[0], x[1], 0x7632);
  return __byte_perm(__byte_perm(x[0], x[1], 0x0073), __byte_perm(x[2], x[3], 0x0073), 0x5410);
}
template <class Code, class C>
LOWPREC_DEVICE uint32_t top_bits(C, const uint16_t* x) {
  const auto* pairs = reinterpret_cast<const uint32_t*>(x);
  return sizeof(Code) == 2 ? pairs[0] : __byte_perm(pairs[0], pairs[1], 0x7531);
}

template <class C, class Mode, class Code>
class QuickEncode {
 public:
  using Op = Encode<C, Mode, Code>;
  static constexpr bool exists = true;
  bool usable;
  bool plain;

  QuickEncode() = default;
  LOWPREC_INLINE QuickEncode(const Format& format, bool saturate) : grid_(format, saturate) {
    usable = grid_.usable;
    plain = grid_.plain;
    keep_ = format.has_negative_zero() ? ~0u : 0;
    sign_ = repeat<Code>(format.sign_code());
    sign_drop_ = 8 * static_cast<int>(sizeof(Code)) - format.bits();
    nan_ = format.nan_code();
    nan_sign_ = format.specials == Specials::finite ? 0 : format.sign_code();
    if (!usable) return;
    // As a float32 of this scale a value has its code at the top of its bits.
    scale_ = power_of_two(1 - static_cast<int>(grid_.least >> Float32::fraction_bits));
    drop_ = Float32::fraction_bits - Grid::of(format, Float32{}).mantissa_bits;
  }

  template <bool kPlain>
  LOWPREC_DEVICE void apply(const Inputs<Op>& in, const ChunkWords<Op>& draws, Outputs<Op>& out) const {
    constexpr int width = chunk_width<Op>;
    constexpr int share = 4 / sizeof(Code);
    float x[width], y[width];
    to_floats(C{}, in, x);
#pragma unroll
    for (int i = 0; i < width; ++i) y[i] = round_magnitude<Mode, kPlain>(grid_, x[i], draws.at[i]) * scale_;
#pragma unroll
    for (int i = 0; i < Outputs<Op>::words; ++i) {
      const uint32_t signs = top_bits<Code>(C{}, in.at + i * share) >> sign_drop_;
      out.word(i) = with_signs<kPlain>(magnitudes(y + i * share), signs, sign_, repeat<Code>(1), keep_);
    }
    if (!all_numbers<width>(x)) put_nan(x, in, out);
  }

 private:
  /// The magnitude codes of scaled values. Eight-bit ones lie in the upper halves of their floats.
  LOWPREC_DEVICE uint32_t magnitudes(const float* y) const {
    if (sizeof(Code) == 2) return __byte_perm(as_bits(y[0]) >> drop_, as_bits(y[1]) >> drop_, 0x5410);
    const uint32_t low = __byte_perm(as_bits(y[0]), as_bits(y[1]), 0x7632) >> (drop_ - 16);
    const uint32_t high = __byte_perm(as_bits(y[2]), as_bits(y[3]), 0x7632) >> (drop_ - 16);
    return __byte_perm(low, high, 0x6420);
  }

  /// With the sign of the number as it was given: a NaN's conversion from float16 need not keep it.
  LOWPREC_DEVICE void put_nan(const float* x, const Inputs<Op>& in, Outputs<Op>& out) const {
#pragma unroll
    for (int i = 0; i < chunk_width<Op>; ++i) {
      const uint32_t nan = nan_ | (in.at[i] & C::sign ? nan_sign_ : 0);
      out.at[i] = x[i] == x[i] ? out.at[i] : static_cast<Code>(nan);
    }
  }

  FloatGrid grid_;
  float scale_;
  int drop_;
  int sign_drop_;
  uint32_t sign_;  // the sign bits of a word
  uint32_t keep_;
  uint32_t nan_;
  uint32_t nan_sign_;
};

/// A code's digits, put where a float32 has its own, are its value but for a power of two.
template <class Code, class C>
class QuickDecode {
 public:
  using Op = Decode<Code, C>;
  static constexpr bool exists = true;
  bool usable;
  bool plain;  // every code is that of a value, and means what its digits say

  QuickDecode() = default;
  LOWPREC_INLINE QuickDecode(const Format& format, bool) {
    const Grid grid = Grid::of(format, Float32{});
    const uint32_t magnitude = format.top_code();
    usable = static_cast<int>(magnitude >> grid.mantissa_bits) < 255 && !grid.skipped &&
             grid.min_exponent > -Float32::bias && grid.min_exponent <= Float32::bias;
    plain = format.max_code() == magnitude && format.has_negative_zero() && format.subnormals;
    if (!usable) return;
    scale_ = power_of_two(grid.min_exponent);
    lift_ = 1u << (Float32::fraction_bits - grid.mantissa_bits);
    magnitude_ = repeat<Code>(magnitude);
    sign_lift_ = kBits - format.bits();
    normal_ = repeat<Code>(kTop - (1u << grid.gap));
    finite_ = repeat<Code>(kTop - 1 - format.max_code());
    keep_ = format.has_negative_zero() ? ~0u : 0;
    past_ = format.max_code() + 1;
    infinity_ = format.has_infinity() ? C::infinity : C::quiet_nan;
  }

  template <bool kPlain>
  LOWPREC_DEVICE void apply(const Inputs<Op>& in, const ChunkWords<Op>&, Outputs<Op>& out) const {
    constexpr uint32_t top = repeat<Code>(kTop);
    uint32_t special = 0;
#pragma unroll
    for (int i = 0; i < Inputs<Op>::words; ++i) {
      uint32_t magnitudes = in.word(i) & magnitude_;
      uint32_t signs = (in.word(i) << sign_lift_) & top;
      if (!kPlain) {
        const uint32_t nonzero = magnitudes + (top - repeat<Code>(1));
        special |= ((magnitudes + finite_) & top) | (signs & ~(nonzero | keep_));
        magnitudes &= ((magnitudes + normal_) & top) / kTop * (2 * kTop - 1);  // those that are not flushed
        signs &= (magnitudes + (top - repeat<Code>(1))) | keep_;
      }
      values(magnitudes, signs, out, i);
    }
    if (special) put_special(in, out);
  }

 private:
  static constexpr int kBits = 8 * sizeof(Code);
  static constexpr uint32_t kTop = 1u << (kBits - 1);
  static constexpr int kShare = 4 / sizeof(Code);

  LOWPREC_DEVICE void values(uint32_t magnitudes, uint32_t signs, Outputs<Op>& out, int word) const {
    constexpr int each = 4 / sizeof(typename Op::Output);  // values in a word
    float x[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const uint32_t magnitude = __byte_perm(magnitudes, 0, sizeof(Code) == 1 ? 0x4440 + i : 0x4410 + 0x22 * i);
      x[i] = as_float(magnitude * lift_) * scale_;
    }
#pragma unroll
    for (int i = 0; i < kShare; i += each) {
      const int first = (i + 1) * static_cast<int>(sizeof(Code)) - 1, last = first + static_cast<int>(sizeof(Code));
      const int places = each == 1 ? first << 12 | 0x444 : last << 12 | 0x404 | first << 4;
      out.word((word * kShare + i) / each) = to_word(C{}, x + i) | __byte_perm(signs, 0, places);
    }
  }

  /// The codes that are no values: infinities and NaN.
  LOWPREC_DEVICE void put_special(const Inputs<Op>& in, Outputs<Op>& out) const {
    const uint32_t mask = magnitude_ & (2 * kTop - 1);
#pragma unroll
    for (int i = 0; i < chunk_width<Op>; ++i) {
      const uint32_t magnitude = in.at[i] & mask, sign = in.at[i] & (mask + 1);
      const typename C::Bits bits = (magnitude == past_ ? infinity_ : C::quiet_nan) | (sign ? C::sign : 0);
      if (magnitude >= past_) out.at[i] = bits;
      if (!keep_ && sign && magnitude == 0) out.at[i] = static_cast<typename C::Bits>(C::quiet_nan);
    }
  }

  float scale_;
  uint32_t lift_;
  uint32_t magnitude_;  // the fields of a word's magnitudes
  int sign_lift_;
  uint32_t normal_;  // adding it carries into a field's top bit from the smallest nonzero magnitude on
  uint32_t finite_;  // likewise, past the largest finite one
  uint32_t keep_;
  uint32_t past_;  // the magnitude after the largest finite one
  uint32_t infinity_;
};

// Not float64, which does not pass through float32, nor codes wider than its significand.
template <class C, class Mode>
  requires(sizeof(typename C::Bits) <= 4)
struct Quick<Quantize<C, Mode>> : QuickQuantize<C, Mode> {
  using QuickQuantize<C, Mode>::QuickQuantize;
};
template <class C, class Mode, class Code>
  requires(sizeof(typename C::Bits) <= 4 && sizeof(Code) <= 2)
struct Quick<Encode<C, Mode, Code>> : QuickEncode<C, Mode, Code> {
  using QuickEncode<C, Mode, Code>::QuickEncode;
};
template <class Code, class C>
  requires(sizeof(typename C::Bits) <= 4 && sizeof(Code) <= 2)
struct Quick<Decode<Code, C>> : QuickDecode<Code, C> {
  using QuickDecode<Code, C>::QuickDecode;
};

}  // namespace lowprec
