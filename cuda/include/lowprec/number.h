// A number taken apart into integers of any width, and rounded into any format in any mode, both told at run time.
//
// For kernels whose time goes elsewhere than into the cast: one function serves every dtype, code and mode. A float
// dtype is a format like any other, whose codes are its bits.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/format.h"
#include "lowprec/inline.h"

namespace lowprec {

__extension__ using uint128_t = unsigned __int128;  // strict C++ has no such type, every compiler here does

/// |x| = significand · 2^exponent where finite; the significand leaves the word's top bit free.
template <class Word>
struct NumberIn {
  Word significand;
  int exponent;
  bool negative;
  bool infinite;
  bool nan;
};

using Number = NumberIn<uint64_t>;
using WideNumber = NumberIn<uint128_t>;

/// Bits of a word.
template <class Word>
constexpr int width = 8 * static_cast<int>(sizeof(Word));

/// Index of the leading bit of a positive number below 2^63, or 2^127; 0 for 0.
LOWPREC_INLINE int floor_log2(uint64_t n) {
#ifdef __CUDA_ARCH__
  return 63 - __clzll(static_cast<long long>(n | 1));
#else
  // No two neighbouring bits are left, so the conversion cannot round up to the next power of two.
  n |= 1;
  return static_cast<int>(float_bits(n & ~(n >> 1)) >> Float64::fraction_bits) - Float64::bias;
#endif
}

LOWPREC_INLINE int floor_log2(uint128_t n) {
  const auto high = static_cast<uint64_t>(n >> 64), low = static_cast<uint64_t>(n);
  if (high) return 64 + floor_log2(high);
  return low >> 62 ? 62 + floor_log2(low >> 62) : floor_log2(low);
}

/// A significand with its leading bit at `kTop`, and the exponent of that bit.
template <class Word>
struct Normalised {
  Word significand;
  int exponent;
};

template <int kTop, class Word>
LOWPREC_INLINE Normalised<Word> normalise(const NumberIn<Word>& x) {
  const int leading = floor_log2(x.significand);
  return {x.significand << (kTop - leading), x.exponent + leading};
}

/// Codes of up to 64 bits and what they mean: those of a format, or the bits of a float dtype.
struct Layout {
  int mantissa_bits;
  int min_exponent;  // of the smallest normal number
  int gap;           // mantissa_bits where there are no subnormals, else 0
  bool has_infinity;
  bool has_negative_zero;
  bool nan_signed;
  uint64_t max_code;
  uint64_t sign_code;
  uint64_t nan_code;  // magnitude, or the sign where the NaN is the code of -0

  static Layout of(const Format& format) {
    // Without a normal number the top mantissa bit serves as exponent bit: the same codes for the same values.
    const bool plain = format.max_code() < 1u << format.mbits;
    const int mantissa_bits = format.mbits - plain;
    return {mantissa_bits,
            format.emin() - plain,
            format.subnormals ? 0 : mantissa_bits,
            format.has_infinity(),
            format.has_negative_zero(),
            format.specials == Specials::ieee || format.specials == Specials::fn,
            format.max_code(),
            format.sign_code(),
            format.nan_code()};
  }

  template <class C>
  static LOWPREC_INLINE constexpr Layout of(C) {
    return {C::fraction_bits, 1 - C::bias, 0, true, true, true, C::infinity - 1, C::sign, C::quiet_nan};
  }

  /// The number that a code stands for. Bits above the layout's width are ignored.
  LOWPREC_INLINE Number read(uint64_t code) const {
    const uint64_t magnitude = code & (sign_code - 1);
    const bool negative = (code & sign_code) != 0;
    const int field = max(static_cast<int>(magnitude >> mantissa_bits) - 1, 0);
    const uint64_t significand = magnitude - (static_cast<uint64_t>(field) << mantissa_bits);
    const bool infinite = has_infinity & (magnitude == max_code + 1);
    const bool missing = !has_negative_zero & negative & (magnitude == 0);
    const bool nan = ((magnitude > max_code) & !infinite) | missing;
    return {magnitude >> gap == 0 ? 0 : significand, field + min_exponent - mantissa_bits, negative, infinite, nan};
  }

  /// The code of a magnitude's code with a sign.
  LOWPREC_INLINE uint64_t with_sign(uint64_t code, bool negative) const {
    return negative & (has_negative_zero | (code != 0)) ? code | sign_code : code;
  }

  LOWPREC_INLINE uint64_t nan(bool negative) const { return negative & nan_signed ? nan_code | sign_code : nan_code; }
};

/// A rounding mode as what moves a number to its upper neighbour, by its place in Python's `Rounding`.
struct Choice {
  bool nearest;
  bool tie_to_even;
  bool tie_away;
  bool positive;  // any rest of a positive number
  bool negative;
  bool to_odd;
  bool random;

  static constexpr Choice of(int64_t mode) {
    return {mode <= 1, mode == 0, mode == 1, mode == 3, mode == 4, mode == 5, mode == 6};
  }

  /// Whether a finite number past the largest one goes to infinity.
  LOWPREC_INLINE bool overflows(bool minus) const { return nearest | random | (minus ? negative : positive); }
};

/// Rounds numbers to magnitude codes of a layout. `word` is a random word in the top bits.
struct Rounder {
  Layout to;
  Choice choice;
  uint64_t overflow_code;

  Rounder(const Layout& to, int64_t mode, bool saturate)
      : to(to), choice(Choice::of(mode)), overflow_code(to.max_code + (saturate ? 0 : 1)) {}

  /// Of a number that is no NaN. An infinity, or the NaN in its place, is max_code + 1.
  template <class Word>
  LOWPREC_INLINE uint64_t operator()(const NumberIn<Word>& number, uint32_t word) const {
    constexpr int top = width<Word> - 2;
    const auto x = normalise<top>(number);
    const int exponent = max(x.exponent, to.min_exponent);
    const int gap = x.exponent < to.min_exponent ? to.gap : 0;
    const int count = top - to.mantissa_bits + (exponent - x.exponent) + gap;  // of the digits that go
    const int shift = min(count, top + 1);
    // Of a number that lies further below, all that counts is that it is not zero, and its fraction.
    const Word significand = count > top + 1 ? static_cast<Word>(number.significand != 0) : x.significand;
    const Word kept = significand >> shift;
    const Word rest = significand - (kept << shift);
    const uint64_t lower =
        static_cast<uint64_t>(kept) + (static_cast<uint64_t>(exponent - to.min_exponent) << to.mantissa_bits);
    const bool up = goes_up(lower, rest, Word{1} << (shift - 1), fraction(x.significand, count), number.negative, word);
    const uint64_t code = lower + (static_cast<uint64_t>(up) << gap);
    const bool infinite = number.infinite | choice.overflows(number.negative);
    const uint64_t large = infinite ? overflow_code : to.max_code;
    if (number.significand == 0 && !number.infinite) return 0;
    return (code > to.max_code) | number.infinite ? large : code;
  }

 private:
  /// The first 32 bits of what lies below the kept digits.
  template <class Word>
  static LOWPREC_INLINE uint32_t fraction(Word significand, int count) {
    const Word left = significand << max(32 - count, 0);
    return static_cast<uint32_t>(left >> min(max(count - 32, 0), width<Word> - 1));
  }

  template <class Word>
  LOWPREC_INLINE bool goes_up(uint64_t lower, Word rest, Word half, uint32_t fraction, bool minus,
                              uint32_t word) const {
    const bool odd = lower & 1;
    const bool above = choice.nearest & (rest > half);
    const bool tie = (rest == half) & (choice.tie_away | (choice.tie_to_even & odd));
    const bool directed = (rest != 0) & ((minus ? choice.negative : choice.positive) | (choice.to_odd & !odd));
    const bool carry = choice.random & (static_cast<uint32_t>(fraction + word) < word);
    return above | tie | directed | carry;
  }
};

/// Writes magnitude codes of one layout as values of another, a float dtype that holds all of them.
struct Writer {
  Layout from;
  Layout to;
  bool same;

  Writer(const Layout& from, const Layout& to)
      : from(from),
        to(to),
        same(from.mantissa_bits == to.mantissa_bits && from.max_code == to.max_code &&
             from.min_exponent == to.min_exponent && from.gap == 0) {}

  LOWPREC_INLINE uint64_t operator()(uint64_t code, bool negative) const {
    const uint64_t special = from.has_infinity ? to.max_code + 1 : to.nan_code;
    uint64_t bits = same ? code : finite(code);
    if (code > from.max_code) bits = special;
    return negative & (from.has_negative_zero | (code != 0)) ? bits | to.sign_code : bits;
  }

 private:
  LOWPREC_INLINE uint64_t finite(uint64_t code) const {
    const Number number = from.read(code);
    const auto x = normalise<62>(number);
    const int exponent = max(x.exponent, to.min_exponent);
    const int drop = 62 - to.mantissa_bits + (exponent - x.exponent);  // zeros all of them
    const uint64_t bits =
        (x.significand >> min(drop, 63)) + (static_cast<uint64_t>(exponent - to.min_exponent) << to.mantissa_bits);
    return number.significand == 0 ? 0 : bits;
  }
};

/// The exact product of numbers whose significands fill no more than half a word each. 0 · inf is NaN.
template <class Word>
LOWPREC_INLINE NumberIn<Word> multiply(const Number& a, const Number& b) {
  const bool invalid = (a.infinite & (b.significand == 0)) | (b.infinite & (a.significand == 0));
  return {static_cast<Word>(a.significand) * b.significand, a.exponent + b.exponent, a.negative != b.negative,
          static_cast<bool>(a.infinite | b.infinite), static_cast<bool>(a.nan | b.nan | invalid)};
}

/// The same number in a word at least as wide.
template <class Word>
LOWPREC_INLINE NumberIn<Word> widen(const Number& x) {
  return {x.significand, x.exponent, x.negative, x.infinite, x.nan};
}

/// The sum, exact but for a last bit that stands for all that lies below it: rounded to odd with three bits less than
/// the word has, for terms of at least eight bits less. So rounding it again is rounding the exact sum. `down`: the
/// sign of a sum of numbers that cancel.
template <class Word>
LOWPREC_INLINE NumberIn<Word> add(const NumberIn<Word>& a, const NumberIn<Word>& b, bool down) {
  constexpr int top = width<Word> - 3;
  constexpr int nowhere = -8192;  // the exponent of zero, below all others
  const auto p = normalise<top>(a);
  const auto q = normalise<top>(b);
  const int i = a.significand == 0 ? nowhere : p.exponent;
  const int j = b.significand == 0 ? nowhere : q.exponent;
  const bool first = (i > j) | ((i == j) & (p.significand >= q.significand));  // is the larger one
  const Word large = first ? p.significand : q.significand;
  const Word small = first ? q.significand : p.significand;
  const int distance = min(first ? i - j : j - i, width<Word> - 1);
  const Word shifted = small >> distance;
  const Word aligned = shifted | static_cast<Word>(shifted << distance != small);
  const bool opposite = a.negative != b.negative;
  const Word sum = opposite ? large - aligned : large + aligned;
  bool negative = first ? a.negative : b.negative;
  if (opposite & (sum == 0)) negative = down;
  const bool infinite = a.infinite | b.infinite;
  if (infinite) negative = a.infinite ? a.negative : b.negative;
  const bool nan = a.nan | b.nan | (a.infinite & b.infinite & opposite);
  return {sum, max(i, j) - top, negative, infinite, nan};
}

}  // namespace lowprec
