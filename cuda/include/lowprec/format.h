// A float format as plain data: the five integers of Python's `FloatFormat.fields` and what follows from them.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

/// Kinds of special values, in the order of Python's `SPECIALS`.
enum class Specials : int { finite, ieee, fn, fnuz, p3109 };

/// A `1-e-m` format. A magnitude code is a code without its sign bit; value grows with it.
struct Format {
  int ebits;
  int mbits;
  int bias;
  Specials specials;
  bool subnormals;

  /// Width of a code in bits.
  LOWPREC_INLINE constexpr int bits() const { return 1 + ebits + mbits; }
  /// Exponent of the smallest normal value.
  LOWPREC_INLINE constexpr int emin() const { return 1 - bias; }
  /// Exponent of the largest finite value.
  LOWPREC_INLINE constexpr int emax() const {
    const uint32_t code = max_code();
    const int field = static_cast<int>(code >> mbits);
    if (field > 0) return field - bias;
    int leading = 0;
    while (code >> (leading + 1)) ++leading;
    return leading + 1 - mbits - bias;
  }
  /// The largest magnitude code, finite or not.
  LOWPREC_INLINE constexpr uint32_t top_code() const { return sign_code() - 1; }
  /// The code with only the sign bit set: -0, or the NaN of formats that have no -0.
  LOWPREC_INLINE constexpr uint32_t sign_code() const { return 1u << (ebits + mbits); }
  LOWPREC_INLINE constexpr bool has_infinity() const {
    return specials == Specials::ieee || specials == Specials::p3109;
  }
  LOWPREC_INLINE constexpr bool has_negative_zero() const {
    return specials != Specials::fnuz && specials != Specials::p3109;
  }

  /// The magnitude code of the largest finite value.
  LOWPREC_INLINE constexpr uint32_t max_code() const {
    switch (specials) {
      case Specials::ieee:
        return top_code() - (1u << mbits);
      case Specials::fn:
      case Specials::p3109:
        return top_code() - 1;
      default:
        return top_code();
    }
  }

  /// Where an overflow goes unless the cast saturates: infinity, or the NaN that stands in for it. In every kind that
  /// has either, that is the next code; in `fnuz` the carry reaches the sign bit, and that is its NaN.
  LOWPREC_INLINE constexpr uint32_t overflow_code(bool saturate) const {
    return max_code() + (saturate || specials == Specials::finite ? 0 : 1);
  }

  /// The magnitude code of NaN; the largest value where the format has none.
  LOWPREC_INLINE constexpr uint32_t nan_code() const {
    switch (specials) {
      case Specials::ieee:
        return max_code() + 1 + (1u << (mbits - 1));
      case Specials::fn:
        return top_code();
      case Specials::finite:
        return max_code();
      default:
        return sign_code();
    }
  }

  /// Whether there is such a format, by the rules of Python's `FloatFormat`.
  LOWPREC_INLINE constexpr bool valid() const {
    if (ebits < 0 || mbits < 0 || bits() > 32 || bias < -kBiasLimit || bias > kBiasLimit) return false;
    if (specials < Specials::finite || specials > Specials::p3109) return false;
    if (ebits == 0 && (specials == Specials::ieee || !subnormals)) return false;
    if (specials == Specials::ieee && mbits == 0) return false;
    const uint32_t smallest = subnormals ? 1u : 1u << mbits;
    return ebits + mbits > 0 && max_code() >= smallest;
  }

 private:
  static constexpr int kBiasLimit = 4096;  // beyond what any format within float64 needs; keeps sums of exponents small
};

}  // namespace lowprec
