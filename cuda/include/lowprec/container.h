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

/// A magnitude: bits, and the exponent from which they count. What they exceed exponent << fraction_bits by is the
/// significand; a normal number's has its leading one at bit fraction_bits. Exponent 0 is that of the smallest normal
/// number, and of the subnormal ones, so that the bits of every finite number read as they stand.
template <class C>
struct Magnitude {
  using Word = typename C::Word;

  Word bits;
  int exponent;

  static LOWPREC_INLINE Magnitude read(Word bits) {
    return {bits, max(static_cast<int>(bits >> C::fraction_bits) - 1, 0)};
  }

  static LOWPREC_INLINE Magnitude of(Word significand, int exponent) {
    return {significand + origin(exponent), exponent};
  }

  /// Where significands of an exponent begin. Wraps below exponent 0, and differences come out right all the same.
  static LOWPREC_INLINE Word origin(int exponent) { return static_cast<Word>(exponent) << C::fraction_bits; }

  LOWPREC_INLINE Word significand() const { return bits - origin(exponent); }
};

/// Index of the leading one, from the exact float of n; below 2^24.
LOWPREC_INLINE int floor_log2(uint32_t n) {
  return static_cast<int>(bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(n))) >> 23) - 127;
}

/// Index of the leading one, from the exact double of n; below 2^53.
LOWPREC_INLINE int floor_log2(uint64_t n) {
  return static_cast<int>(bit_cast<uint64_t>(static_cast<double>(static_cast<int64_t>(n))) >> 52) - 1023;
}

/// Let the exponent of a subnormal number sink, by up to `depth`, until its leading one stands where normal numbers
/// have theirs. Zero, which has none, sinks below every format.
template <class C>
LOWPREC_INLINE Magnitude<C> normalise(Magnitude<C> x, int depth) {
  constexpr int bottom = -4096;
  const auto significand = x.significand();
  const int missing = min(C::fraction_bits - floor_log2(significand), depth);
  return Magnitude<C>::of(significand << missing, significand == 0 ? bottom : x.exponent - missing);
}

/// Let it rise to 0 again. The bits that this drops are zero, if the container holds the number.
template <class C>
LOWPREC_INLINE Magnitude<C> denormalise(Magnitude<C> x, int depth) {
  const int missing = min(max(-x.exponent, 0), depth);
  return Magnitude<C>::of(x.significand() >> missing, x.exponent + missing);
}

}  // namespace lowprec
