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

  /// Where significands of an exponent begin. Wraps below exponent 0, and differences come out right all the same.
  static LOWPREC_INLINE Word origin(int exponent) { return static_cast<Word>(exponent) << C::fraction_bits; }

  LOWPREC_INLINE Word significand() const { return bits - origin(exponent); }
};

/// The bits of an integer as a float of its own width: exact below 2^24 and 2^53.
LOWPREC_INLINE uint32_t float_bits(uint32_t n) {
  return bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(n)));
}
LOWPREC_INLINE uint64_t float_bits(uint64_t n) {
  return bit_cast<uint64_t>(static_cast<double>(static_cast<int64_t>(n)));
}

/// significand · 2^(exponent - point) as a normal number, with an exponent below 0 where need be. Zero has no leading
/// one to normalise by; its exponent falls below those of all other numbers.
template <class C>
LOWPREC_INLINE Magnitude<C> normalise(typename C::Word significand, int exponent, int point) {
  // The float of an integer is normalised already. What is left to do is to move its exponent.
  using Float = std::conditional_t<(sizeof(significand) > 4), Float64, Float32>;
  const auto x = Magnitude<Float>::read(float_bits(significand));
  const int move = exponent + 1 - point - Float::bias;
  return {(x.bits >> (Float::fraction_bits - C::fraction_bits)) + Magnitude<C>::origin(move), x.exponent + move};
}

/// The bits of a magnitude that the container holds, though its exponent may be below 0: what it drops then is zeros.
template <class C>
LOWPREC_INLINE typename C::Word denormalise(Magnitude<C> x) {
  const int missing = min(max(-x.exponent, 0), C::fraction_bits + 1);
  return (x.significand() >> missing) + Magnitude<C>::origin(x.exponent + missing);
}

}  // namespace lowprec
