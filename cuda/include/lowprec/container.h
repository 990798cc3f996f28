// The dtypes that hold values, taken apart into integers and put together again.
//
// Nothing here computes with floating-point numbers of the tensor, so no mode of the machine (flush to zero, say) can
// change a result.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

/// An IEEE 754 binary format in `Bits` with `kPrecision` significand bits, the leading one included.
template <class BitsType, int kPrecision>
struct Container {
  using Bits = BitsType;
  /// What its bits are computed in.
  using Word = std::conditional_t<(sizeof(Bits) > 4), uint64_t, uint32_t>;

  static constexpr int fraction_bits = kPrecision - 1;
  static constexpr int exponent_bits = 8 * static_cast<int>(sizeof(Bits)) - kPrecision;
  static constexpr int bias = (1 << (exponent_bits - 1)) - 1;
  static constexpr Word sign = Word(1) << (exponent_bits + fraction_bits);
  static constexpr Word infinity = ((Word(1) << exponent_bits) - 1) << fraction_bits;
  static constexpr Word quiet_nan = infinity | (Word(1) << (fraction_bits - 1));
};

using Float64 = Container<uint64_t, 53>;
using Float32 = Container<uint32_t, 24>;
using Float16 = Container<uint16_t, 11>;
using BFloat16 = Container<uint16_t, 8>;

/// A magnitude: significand · 2^exponent up to a constant factor, exponents counted as a container's exponent field
/// counts them. A significand with its leading one at bit `fraction_bits` is normal.
template <class Word>
struct Magnitude {
  Word significand;
  int exponent;
};

/// Take apart the bits of a finite magnitude, or a magnitude code: both are an exponent field above a fraction.
/// Exponents count from 1. Leaving one unit of the field on the fraction sets the leading one of a normal number, and no
/// bit of a subnormal one.
template <class Word>
LOWPREC_INLINE Magnitude<Word> unpack(Word bits, int fraction_bits) {
  const int exponent = max(static_cast<int>(bits >> fraction_bits), 1);
  return {bits - (static_cast<Word>(exponent - 1) << fraction_bits), exponent};
}

/// The inverse, for exponents from 1. A significand of 2^(fraction_bits + 1) carries into the exponent.
template <class Word>
LOWPREC_INLINE Word pack(Magnitude<Word> x, int fraction_bits) {
  return x.significand + (static_cast<Word>(x.exponent - 1) << fraction_bits);
}

/// Index of the leading one, from the exact float of n; below 2^24.
LOWPREC_INLINE int floor_log2(uint32_t n) {
  return static_cast<int>(bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(n))) >> 23) - 127;
}

/// Index of the leading one, from the exact double of n; below 2^53.
LOWPREC_INLINE int floor_log2(uint64_t n) {
  return static_cast<int>(bit_cast<uint64_t>(static_cast<double>(static_cast<int64_t>(n))) >> 52) - 1023;
}

/// Let the exponent of a subnormal number sink, by up to `depth`, until its leading one stands where normal numbers have
/// theirs. Zero, which has none, sinks below every format.
template <class C>
LOWPREC_INLINE Magnitude<typename C::Word> normalise(Magnitude<typename C::Word> x, int depth) {
  LOWPREC_SKIP_IF(depth == 0, x);
  constexpr int bottom = -4096;
  const int missing = min(C::fraction_bits - floor_log2(x.significand), depth);
  const int exponent = x.exponent - missing;
  return {x.significand << missing, x.significand == 0 ? bottom : exponent};
}

/// Let it rise to 1 again. The bits that this drops are zero, if the container holds the number.
template <class C>
LOWPREC_INLINE Magnitude<typename C::Word> denormalise(Magnitude<typename C::Word> x, int depth) {
  LOWPREC_SKIP_IF(depth == 0, x);
  const int missing = min(max(1 - x.exponent, 0), depth);
  return {x.significand >> missing, x.exponent + missing};
}

}  // namespace lowprec
