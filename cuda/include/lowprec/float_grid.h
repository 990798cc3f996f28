// Rounding by floating-point addition: on a GPU, whose float pipe is twice as wide as its integer pipe, the quick way
// of most formats. docs/kernels/cast.md says why it is exact; the tests hold it to the integer way bit for bit.
//
// Near x the format's values lie 2^(exponent - m) apart. The sum of x and 1.5 · 2^(23 + exponent - m) is a float32
// whose last digit counts those spacings, so one addition rounds, in the direction that its instruction names, and
// another one takes the large number off again without an error. Device code only: there no mode flushes or redirects
// anything.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/format.h"
#include "lowprec/grid.h"
#include "lowprec/inline.h"
#include "lowprec/round.h"

namespace lowprec {

LOWPREC_INLINE float as_float(uint32_t bits) { return bit_cast<float>(bits); }
LOWPREC_INLINE uint32_t as_bits(float x) { return bit_cast<uint32_t>(x); }

/// 2^exponent, which float32 holds.
LOWPREC_INLINE float power_of_two(int exponent) {
  const int field = exponent + Float32::bias;
  return as_float(field > 0 ? static_cast<uint32_t>(field) << Float32::fraction_bits
                            : 1u << (Float32::fraction_bits - 1 + field));
}

/// The float32 constants of a format; those of a magnitude's rounding.
struct FloatGrid {
  bool usable;          // whether the quick way gives the format's results for every number but NaN
  bool plain;           // subnormals, -0, and overflow to the largest value: a still shorter way
  bool minus_zero;      // whether -0 exists
  uint32_t least;       // bits of the smallest normal value
  uint32_t below;       // bits of the power whose spacing is that of numbers below it
  float large;          // 1.5 · 2^(23 - m)
  float half;           // 2^(-1 - m)
  uint32_t reciprocal;  // bits of 2^(32 + m), plus those of 1
  float largest;        // finite value
  float limit;          // what overflows is clamped to: the next value, or the largest one where the cast saturates

  FloatGrid() = default;

  LOWPREC_INLINE FloatGrid(const Format& format, bool saturate) {
    const Grid grid = Grid::of(format, Float32{});
    const int digits = grid.mantissa_bits;
    const uint32_t past = format.overflow_code(saturate);
    usable = fits(grid, grid.max_code + 1);
    minus_zero = format.has_negative_zero();
    plain = format.subnormals && minus_zero && past == grid.max_code;
    if (!usable) return;
    least = static_cast<uint32_t>(grid.min_exponent + 1) << Float32::fraction_bits;
    below = least + (static_cast<uint32_t>(grid.gap) << Float32::fraction_bits);
    large = 1.5f * power_of_two(Float32::fraction_bits - digits);
    half = power_of_two(-1 - digits);
    reciprocal = static_cast<uint32_t>(32 + digits + 2 * Float32::bias) << Float32::fraction_bits;
    largest = value(grid, grid.max_code);
    limit = value(grid, past);
  }

  /// The value of a normal number's magnitude code.
  static LOWPREC_INLINE float value(const Grid& grid, uint32_t code) {
    return as_float((code << (Float32::fraction_bits - grid.mantissa_bits)) +
                    (static_cast<uint32_t>(grid.min_exponent) << Float32::fraction_bits));
  }

  /// The power of two whose m-th digit is the spacing at a magnitude.
  template <bool kPlain>
  LOWPREC_INLINE float power(float x) const {
    const uint32_t own = as_bits(x) & Float32::infinity;
    if (kPlain) return as_float(own > least ? own : least);
    return as_float(own >= least ? own : below);
  }

 private:
  /// Whether sums neither overflow nor run out of digits. One digit at least: without any, ties go by the exponent's
  /// parity. Fractions of stochastic rounding are scaled by up to 2^(32 + m - emin), and values to be encoded by
  /// 2^(-126 - emin): both have to be float32 numbers.
  static LOWPREC_INLINE bool fits(const Grid& grid, uint32_t next_code) {
    const int digits = grid.mantissa_bits;
    if (digits < 1 || digits > 20 || grid.skipped) return false;
    if (grid.min_exponent < 31 + digits || grid.min_exponent > Float32::bias + 22) return false;
    const int fields = static_cast<int>(next_code >> digits);
    const int top = fields + grid.min_exponent + Float32::fraction_bits - digits;
    const int top_below = grid.min_exponent + 1 + Float32::fraction_bits;
    return fields < 255 && top < 255 && top_below < 255;
  }
};

/// A magnitude as a whole number of spacings on top of the large number; `power` is the grid's at x.
template <class Mode>
struct FloatSum;

template <>
struct FloatSum<NearestEven> {
  static LOWPREC_DEVICE float add(const FloatGrid& grid, float power, float x, uint32_t, uint32_t) {
    return __fmaf_rn(power, grid.large, x);
  }
};

/// Half a spacing more, then down: rounding down twice is rounding down once to the coarser grid.
template <>
struct FloatSum<NearestAway> {
  static LOWPREC_DEVICE float add(const FloatGrid& grid, float power, float x, uint32_t, uint32_t) {
    return __fmaf_rz(power, grid.large, __fmaf_rz(power, grid.half, x));
  }
};

template <>
struct FloatSum<TowardZero> {
  static LOWPREC_DEVICE float add(const FloatGrid& grid, float power, float x, uint32_t, uint32_t) {
    return __fmaf_rz(power, grid.large, x);
  }
};

// These two add the number with its sign, so that the instruction's direction is the mode's.
template <>
struct FloatSum<Up> {
  static LOWPREC_DEVICE float add(const FloatGrid& grid, float power, float x, uint32_t sign, uint32_t) {
    return __fmaf_ru(power, grid.large, as_float(as_bits(x) | sign));
  }
};

template <>
struct FloatSum<Down> {
  static LOWPREC_DEVICE float add(const FloatGrid& grid, float power, float x, uint32_t sign, uint32_t) {
    return __fmaf_rd(power, grid.large, as_float(as_bits(x) | sign));
  }
};

template <>
struct FloatSum<ToOdd> {
  static LOWPREC_DEVICE float add(const FloatGrid& grid, float power, float x, uint32_t, uint32_t) {
    const float sum = __fmaf_rz(power, grid.large, x);
    const bool exact = __fmaf_rn(-power, grid.large, sum) == x;
    return as_float(as_bits(sum) | (exact ? 0 : 1));
  }
};

/// x, and one more where a + b carries out of 32 bits.
LOWPREC_DEVICE uint32_t add_carry(uint32_t x, uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  asm("{\n .reg .u32 sum;\n add.cc.u32 sum, %1, %2;\n addc.u32 %0, %0, 0;\n}" : "+r"(x) : "r"(a), "r"(b));
  return x;
#else
  return x + (a + b < b ? 1 : 0);
#endif
}

/// One spacing more where the fraction's first 32 bits and the word carry.
template <>
struct FloatSum<Stochastic> {
  static LOWPREC_DEVICE float add(const FloatGrid& grid, float power, float x, uint32_t, uint32_t word) {
    const float sum = __fmaf_rz(power, grid.large, x);
    const float rest = x - __fmaf_rn(-power, grid.large, sum);
    const uint32_t fraction = __float2uint_rz(rest * as_float(grid.reciprocal - as_bits(power)));
    return as_float(add_carry(as_bits(sum), fraction, word));
  }
};

/// The magnitude of a number, rounded; what overflows becomes `limit`. NaN has no result here.
template <class Mode, bool kPlain>
LOWPREC_DEVICE float round_magnitude(const FloatGrid& grid, float x, uint32_t word) {
  const uint32_t sign = as_bits(x) & Float32::sign;
  const float magnitude = fabsf(x);
  const bool over = kPlain || Mode::overflows(sign != 0) || magnitude == as_float(Float32::infinity);
  const float clamped = fminf(magnitude, over ? grid.limit : grid.largest);
  const float power = grid.power<kPlain>(clamped);
  return fabsf(__fmaf_rn(-power, grid.large, FloatSum<Mode>::add(grid, power, clamped, sign, word)));
}

/// Value to value of the format for a number that is no NaN, both as float32.
template <class Mode>
class FloatQuantize {
 public:
  FloatGrid grid;

  FloatQuantize() = default;
  LOWPREC_INLINE FloatQuantize(const Format& format, bool saturate) : grid(format, saturate) {
    const bool stays = format.overflow_code(saturate) == format.max_code();
    overflow_ = stays ? as_bits(grid.largest) : format.has_infinity() ? Float32::infinity : Float32::quiet_nan;
  }

  /// Whether an overflow becomes a NaN, whose bits a conversion to another dtype need not keep.
  LOWPREC_INLINE bool makes_nan() const { return overflow_ > Float32::infinity; }

  template <bool kPlain>
  LOWPREC_DEVICE float apply(float x, uint32_t word) const {
    return finish<kPlain>(x, round_magnitude<Mode, kPlain>(grid, x, word));
  }

  /// What x becomes, with its magnitude rounded by any mode.
  template <bool kPlain>
  LOWPREC_DEVICE float finish(float x, float rounded) const {
    const uint32_t sign = as_bits(x) & Float32::sign;
    if (kPlain) return as_float(as_bits(rounded) | sign);
    const uint32_t bits = rounded > grid.largest ? overflow_ : as_bits(rounded);
    return as_float(grid.minus_zero || rounded != 0 ? bits | sign : bits);
  }

 private:
  uint32_t overflow_;
};

/// Number to code, for a number that is no NaN.
template <class Mode>
class FloatEncode {
 public:
  FloatGrid grid;

  FloatEncode() = default;
  LOWPREC_INLINE FloatEncode(const Format& format, bool saturate) : grid(format, saturate) {
    if (!grid.usable) return;
    // As a float32 of this scale a value has its code at the top of its bits.
    scale_ = power_of_two(1 - static_cast<int>(grid.least >> Float32::fraction_bits));
    drop_ = Float32::fraction_bits - Grid::of(format, Float32{}).mantissa_bits;
    sign_drop_ = 32 - format.bits();
    sign_ = format.sign_code();
  }

  template <bool kPlain>
  LOWPREC_DEVICE uint32_t apply(float x, uint32_t word) const {
    return finish<kPlain>(x, round_magnitude<Mode, kPlain>(grid, x, word));
  }

  /// The code of x, with its magnitude rounded by any mode.
  template <bool kPlain>
  LOWPREC_DEVICE uint32_t finish(float x, float rounded) const {
    const uint32_t code = as_bits(rounded * scale_) >> drop_;
    const uint32_t sign = (as_bits(x) >> sign_drop_) & sign_;
    return kPlain || grid.minus_zero || code != 0 ? code | sign : code;
  }

 private:
  float scale_;
  int drop_;
  int sign_drop_;
  uint32_t sign_;
};

/// Code to value as float32, for the codes of finite values: their digits, put where float32 has its own, are the value
/// but for a power of two.
class FloatDecode {
 public:
  bool usable;
  bool plain;  // every code is that of a value, and means what its digits say

  FloatDecode() = default;
  explicit LOWPREC_INLINE FloatDecode(const Format& format) {
    const Grid grid = Grid::of(format, Float32{});
    const int fields = static_cast<int>(format.top_code() >> grid.mantissa_bits);
    const int exponent_bits = format.bits() - 1 - grid.mantissa_bits;
    usable = grid.mantissa_bits <= Float32::fraction_bits && fields < 255 && !grid.skipped &&
             grid.min_exponent > -Float32::bias && grid.min_exponent <= Float32::bias && format.bits() <= 16;
    plain = format.max_code() == format.top_code() && format.has_negative_zero() && format.subnormals;
    if (!usable) return;
    scale_ = power_of_two(grid.min_exponent);
    lift_ = 33 - format.bits();
    drop_ = 9 - exponent_bits;
    max_ = format.max_code() << lift_;
    least_ = (1u << grid.gap) << lift_;
    minus_zero_ = format.has_negative_zero();
  }

  /// Whether a code is that of a finite value.
  LOWPREC_INLINE bool finite(uint32_t code) const {
    const uint32_t magnitude = code << lift_;
    const bool is_nan = !minus_zero_ && magnitude == 0 && (code << (lift_ - 1)) != 0;
    return magnitude <= max_ && !is_nan;
  }

  template <bool kPlain>
  LOWPREC_INLINE float apply(uint32_t code) const {
    const uint32_t magnitude = code << lift_;
    const float value = as_float(magnitude >> drop_) * scale_;
    const uint32_t sign = (code << (lift_ - 1)) & Float32::sign;
    if (kPlain) return as_float(as_bits(value) | sign);
    const uint32_t bits = magnitude >= least_ ? as_bits(value) : 0;
    return as_float(minus_zero_ || bits != 0 ? bits | sign : bits);
  }

 private:
  float scale_;
  int lift_;
  int drop_;
  uint32_t max_;    // the largest finite magnitude, lifted to the top of a word
  uint32_t least_;  // the smallest magnitude that is not zero
  bool minus_zero_;
};

}  // namespace lowprec
