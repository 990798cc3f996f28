// From one float dtype to another, exactly: every number, infinities, and the bits of NaN.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lowprec/container.h"
#include "lowprec/inline.h"

namespace lowprec {

/// The bits of a number in a dtype that holds all numbers of its own.
template <class From, class To>
LOWPREC_INLINE typename To::Bits widen(typename From::Bits x) {
  if constexpr (std::is_same_v<From, To>) {
    return x;
  } else {
    using Word = typename To::Word;
    constexpr int more = To::fraction_bits - From::fraction_bits;
    const Word sign = static_cast<Word>(x & From::sign) << (8 * (sizeof(typename To::Bits) - sizeof(x)));
    const Word magnitude = x & (From::sign - 1);
    if constexpr (From::bias == To::bias) {
      return static_cast<typename To::Bits>(sign | magnitude << more);
    } else {
      constexpr int move = To::bias - From::bias;
      const Word normal = (magnitude << more) + Magnitude<To>::origin(move);
      const Word small = magnitude == 0 ? 0 : normalise<To>(magnitude, move, From::fraction_bits).bits;
      const Word special = (magnitude << more) | To::infinity;
      const Word finite = magnitude >> From::fraction_bits == 0 ? small : normal;
      return static_cast<typename To::Bits>(sign | (magnitude >= From::infinity ? special : finite));
    }
  }
}

/// The bits, in a narrower dtype, of a number that it holds; of a NaN those that have a place there.
template <class From, class To>
LOWPREC_INLINE typename To::Bits narrow(typename From::Bits x) {
  if constexpr (std::is_same_v<From, To>) {
    return x;
  } else {
    using Word = typename From::Word;
    constexpr int less = From::fraction_bits - To::fraction_bits;
    const Word sign = (x & From::sign) >> (8 * (sizeof(x) - sizeof(typename To::Bits)));
    const Word magnitude = x & (From::sign - 1);
    if constexpr (From::bias == To::bias) {
      return static_cast<typename To::Bits>(sign | magnitude >> less);
    } else {
      constexpr int move = From::bias - To::bias;
      const auto number = Magnitude<From>::read(magnitude);
      const int missing = min(max(move - number.exponent, 0), To::fraction_bits + 1);
      const Word normal = (magnitude - Magnitude<From>::origin(move)) >> less;
      const Word small = number.significand() >> (less + missing);
      const Word special = To::infinity | ((magnitude >> less) & ((Word{1} << To::fraction_bits) - 1));
      const Word finite = missing > 0 ? small : normal;
      return static_cast<typename To::Bits>(sign | (magnitude >= From::infinity ? special : finite));
    }
  }
}

}  // namespace lowprec
