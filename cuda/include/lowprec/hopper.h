// The arithmetic of Hopper's tensor cores (wgmma with fp8, or with fp16 and bf16, operands and an fp32 accumulator), as
// measured on an H100: docs/hopper.md says how.
//
// One step adds the products of `step` pairs of operands and the accumulator. All are aligned to the largest of their
// exponents, cut (toward zero) below the last of `fraction_bits` digits, and added exactly; the sum is cut to
// `kept_bits` behind its leading digit. A product's exponent is the sum of its operands', and subnormal operands have
// that of the smallest normal number. Zero products have none. Everything is integer arithmetic.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/inline.h"
#include "lowprec/number.h"

namespace lowprec {

struct HopperFp8 {
  static constexpr int step = 32;
  static constexpr int fraction_bits = 13;
  static constexpr int kept_bits = 13;
  static constexpr int precision = 4;  // digits of an operand's significand
};

struct HopperFp16 {
  static constexpr int step = 16;
  static constexpr int fraction_bits = 25;
  static constexpr int kept_bits = 23;
  static constexpr int precision = 11;
};

using Float8E5M2 = Container<uint8_t, 3>;
using Float8E4M3 = Container<uint8_t, 4>;

/// The magnitude's bits that stand for infinity (none reach past the last byte), and those from which on it is NaN.
template <class C>
inline constexpr typename C::Word infinity_bits = C::infinity;
template <>
inline constexpr uint32_t infinity_bits<Float8E4M3> = 0xff;
template <class C>
inline constexpr typename C::Word first_nan = C::infinity + 1;
template <>
inline constexpr uint32_t first_nan<Float8E4M3> = 0x7f;

/// An operand in one word: the exponent in the upper half; the sign, whether it is infinite or NaN, and a significand
/// of `precision` digits below. Zero and what is not finite have no significand, and an exponent below all others.
namespace operand {

constexpr int32_t sign = 0x8000;
constexpr int32_t nan = 0x2000;
constexpr int32_t infinite = 0x1000;
constexpr int32_t special = nan | infinite;
constexpr int32_t digits = 0xfff;
constexpr int32_t nowhere = -8192;
constexpr int32_t zero = nowhere * 0x10000;

LOWPREC_INLINE int exponent(int32_t word) { return word >> 16; }
LOWPREC_INLINE int significand(int32_t word) { return word & sign ? -(word & digits) : word & digits; }
LOWPREC_INLINE bool is_zero(int32_t word) { return (word & (digits | special)) == 0; }

/// The operand that a container's bits are. Of a significand longer than `precision` the rest is dropped.
template <class Unit, class C>
LOWPREC_INLINE int32_t read(typename C::Bits bits) {
  using Word = typename C::Word;
  constexpr int surplus = C::fraction_bits - (Unit::precision - 1);
  const Word magnitude = bits & (C::sign - 1);
  const int32_t minus = bits & C::sign ? sign : 0;
  if (magnitude >= first_nan<C>) return zero | nan;
  if (magnitude == infinity_bits<C>) return zero | infinite | minus;
  const auto x = Magnitude<C>::read(magnitude);
  const Word kept = surplus > 0 ? x.significand() >> max(surplus, 0) : x.significand() << max(-surplus, 0);
  if (kept == 0) return zero | minus;
  return (x.exponent + 1 - C::bias) * 0x10000 | minus | static_cast<int32_t>(kept);
}

}  // namespace operand

/// The accumulator's exponent. Zero has one here, below that of the smallest normal number: so nothing is ever aligned
/// to less.
LOWPREC_INLINE int hopper_exponent(uint32_t accumulator) {
  constexpr int floor = -133;
  const uint32_t magnitude = accumulator & ~Float32::sign;
  return magnitude == 0 ? floor : Magnitude<Float32>::read(magnitude).exponent + 1 - Float32::bias;
}

/// n · 2^-by rounded down, of any `by` from 0 on.
LOWPREC_INLINE int32_t shift_right(int32_t n, int by) {
#ifdef __CUDA_ARCH__
  return static_cast<int32_t>(__funnelshift_rc(static_cast<uint32_t>(n), 0, by));
#else
  return n >> min(by, 31);
#endif
}

/// A product on the grid below the largest exponent, from its left significand, shifted up by hopper_lift, its right
/// one, and how far its exponent is below the largest.
template <class Unit>
inline constexpr int hopper_lift = Unit::fraction_bits - 2 * (Unit::precision - 1);

LOWPREC_INLINE int32_t hopper_product(int32_t left, int32_t right, int distance) {
  const int32_t product = left * right;
  const int32_t minus = product >> 31;
  return (shift_right((product ^ minus) - minus, distance) ^ minus) - minus;
}

/// The sum, on the grid below the largest exponent, of a step's products and the accumulator. The products of a step
/// alone fit into 32 bits, just.
template <class Unit>
LOWPREC_INLINE int64_t hopper_total(int32_t products, uint32_t accumulator, int largest) {
  constexpr int lift = 2;  // to as many digits as the finest grid has
  const auto c = Magnitude<Float32>::read(accumulator & ~Float32::sign);
  const int exponent = c.exponent + 1 - Float32::bias;
  const auto lifted = static_cast<int32_t>(c.significand() << lift);
  const int distance = max(largest - exponent, 0);  // below 0 for zero alone
  const int32_t aligned = shift_right(lifted, distance + Float32::fraction_bits + lift - Unit::fraction_bits);
  return static_cast<int64_t>(products) + (accumulator & Float32::sign ? -aligned : aligned);
}

/// The accumulator that a sum on the grid below the largest exponent becomes. Zeros are positive.
template <class Unit>
LOWPREC_INLINE uint32_t hopper_result(int64_t total, int largest) {
  const bool negative = total < 0;
  const auto magnitude = static_cast<uint64_t>(negative ? -total : total);
  const int leading = floor_log2(magnitude);
  const int exponent = largest - Unit::fraction_bits + leading;
  const int missing = max(1 - Float32::bias - exponent, 0);  // digits below the smallest normal number's
  const uint64_t top = magnitude << (39 - leading);
  auto bits = static_cast<uint32_t>(top >> min(39 - Float32::fraction_bits + missing, 63));
  bits &= ~0u << (Float32::fraction_bits - Unit::kept_bits);
  if (bits == 0) return 0;
  bits += static_cast<uint32_t>(exponent + missing + Float32::bias - 1) << Float32::fraction_bits;
  if (exponent > Float32::bias) bits = Float32::infinity;
  return negative ? bits | Float32::sign : bits;
}

/// Whether an accumulator is infinite or NaN.
LOWPREC_INLINE bool hopper_special(uint32_t accumulator) {
  return (accumulator & Float32::infinity) == Float32::infinity;
}

/// What a step gives whose operands or accumulator are not all finite: NaN for a NaN, for 0 · inf and for inf - inf,
/// always the same one, or the infinity. 0 if all are finite after all.
template <class Unit>
LOWPREC_INLINE uint32_t hopper_special_step(const int32_t* a, int64_t a_stride, const int32_t* b, int64_t b_stride,
                                            uint32_t accumulator) {
  constexpr uint32_t nan = ~Float32::sign;
  const bool open = hopper_special(accumulator);
  bool invalid = open & ((accumulator & ~Float32::sign) != Float32::infinity);
  bool up = open & !(accumulator & Float32::sign), down = open & !up;
  for (int k = 0; k < Unit::step; ++k) {
    const int32_t x = a[k * a_stride], y = b[k * b_stride];
    const bool infinite = (x | y) & operand::infinite;
    const bool minus = (x ^ y) & operand::sign;
    invalid |= ((x | y) & operand::nan) != 0 || (infinite && (operand::is_zero(x) || operand::is_zero(y)));
    up |= infinite & !minus;
    down |= infinite & minus;
  }
  if (invalid || (up && down)) return nan;
  return up ? Float32::infinity : down ? Float32::infinity | Float32::sign : 0;
}

/// One step: operands k < Unit::step, which lie so far apart, and the accumulator's bits.
template <class Unit>
LOWPREC_INLINE uint32_t hopper_step(const int32_t* a, int64_t a_stride, const int32_t* b, int64_t b_stride,
                                    uint32_t accumulator) {
  const uint32_t special = hopper_special_step<Unit>(a, a_stride, b, b_stride, accumulator);
  if (special) return special;
  int largest = hopper_exponent(accumulator);
  for (int k = 0; k < Unit::step; ++k) {
    largest = max(largest, operand::exponent(a[k * a_stride]) + operand::exponent(b[k * b_stride]));
  }
  int32_t products = 0;
  for (int k = 0; k < Unit::step; ++k) {
    const int32_t x = a[k * a_stride], y = b[k * b_stride];
    products += hopper_product(operand::significand(x) * (1 << hopper_lift<Unit>), operand::significand(y),
                               largest - operand::exponent(x) - operand::exponent(y));
  }
  return hopper_result<Unit>(hopper_total<Unit>(products, accumulator, largest), largest);
}

}  // namespace lowprec
