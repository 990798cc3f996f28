// Activation functions in float64, from additions, subtractions, products, quotients and integer work on exponents, in
// one fixed order: IEEE 754 then gives the same bits on every machine, which no library's exp does.
//
// Magnitudes below 2^-1000 count as zeros of their sign, in what comes in and in what goes out. So no operand is
// subnormal, and a machine that flushes those computes the same.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/inline.h"

namespace lowprec {

/// In the order of Python's `ACTIVATIONS`.
enum class Activation : int { none, relu, relu2, sigmoid, tanh, silu, gelu };

namespace math {

LOWPREC_INLINE uint64_t bits_of(double x) { return bit_cast<uint64_t>(x); }
LOWPREC_INLINE double magnitude(double x) { return bit_cast<double>(bits_of(x) & ~Float64::sign); }
LOWPREC_INLINE bool is_negative(double x) { return (bits_of(x) & Float64::sign) != 0; }

/// 2^k as bits, for exponents of normal numbers.
LOWPREC_INLINE constexpr uint64_t power_bits(int k) {
  return static_cast<uint64_t>(static_cast<int64_t>(k) + Float64::bias) << Float64::fraction_bits;
}

/// x, or a zero of its sign where |x| < 2^-1000.
LOWPREC_INLINE double without_tiny(double x) {
  const uint64_t sign = bits_of(x) & Float64::sign;
  return bit_cast<double>((bits_of(x) ^ sign) < power_bits(-1000) ? sign : bits_of(x));
}

LOWPREC_INLINE constexpr double factorial(int n) {
  double product = 1.0;
  for (int i = 2; i <= n; ++i) product *= i;
  return product;
}

/// 1/n! + r/(n+1)! + ... + r^(13-n)/13!, from the last term on.
template <int n>
LOWPREC_INLINE double series(double r) {
  constexpr double first = 1.0 / factorial(n);
  if constexpr (n < 13) {
    return series<n + 1>(r) * r + first;
  } else {
    return first;
  }
}

/// e^t = 2^power · (1 + fraction), fraction within 2^-0.5 - 1 .. 2^0.5 - 1 and precise even where it is tiny.
struct Exponential {
  double fraction;
  int power;
};

/// For -700 <= t <= 0.
LOWPREC_INLINE Exponential exponential(double t) {
  constexpr double integers = 0x1.8p52;  // numbers this large have no digits after the point
  const double shifted = t * 0x1.71547652b82fep+0 + integers;
  const double power = shifted - integers;
  // ln 2 in two parts, the first so short that its products with the power are exact.
  const double r = (t - power * 0x1.62e42fee00000p-1) - power * 0x1.a39ef35793c76p-33;
  return {r + (r * r) * series<2>(r), static_cast<int>(static_cast<uint32_t>(bits_of(shifted)))};
}

/// e^-a for a >= 0; 0 from a > 693 on.
LOWPREC_INLINE double exp_negative(double a) {
  const auto e = exponential(-(a > 693.0 ? 693.0 : a));
  const uint64_t bits = bits_of(1.0 + e.fraction) + (static_cast<uint64_t>(static_cast<int64_t>(e.power)) << 52);
  return bit_cast<double>(a > 693.0 ? 0 : bits);
}

LOWPREC_INLINE double sigmoid(double t) {
  const double e = exp_negative(magnitude(t));
  return (is_negative(t) ? e : 1.0) / (1.0 + e);
}

/// From e^-2|t| - 1, which keeps its digits where t is small.
LOWPREC_INLINE double tanh(double t) {
  const double a = magnitude(t);
  const auto e = exponential(-2.0 * (a > 32.0 ? 32.0 : a));
  const double power = bit_cast<double>(power_bits(e.power));
  const double below_one = e.fraction * power + (power - 1.0);
  const double result = -below_one / (2.0 + below_one);
  return bit_cast<double>((bits_of(result) & ~Float64::sign) | (bits_of(t) & Float64::sign));
}

/// t · share, where share is sigmoid of something: -0 where that is zero, also for t = -infinity.
LOWPREC_INLINE double gated(double t, double share) {
  return bit_cast<double>(share == 0.0 ? Float64::sign : bits_of(without_tiny(t * share)));
}

/// 2 · sqrt(2/pi) · (t + 0.044715 · t^3), whose sigmoid is (1 + tanh of half of it) / 2.
LOWPREC_INLINE double gelu_argument(double t) { return t * (0x1.9884533d43651p+0 + 0x1.2444f2a4d8b4bp-4 * (t * t)); }

}  // namespace math

/// The activation of a number that is neither tiny nor NaN.
template <Activation kind>
LOWPREC_INLINE double activate(double t) {
  const double positive = math::is_negative(t) ? 0.0 : t;
  switch (kind) {
    case Activation::relu:
      return positive;
    case Activation::relu2:
      return math::without_tiny(positive * positive);
    case Activation::sigmoid:
      return math::sigmoid(t);
    case Activation::tanh:
      return math::tanh(t);
    case Activation::silu:
      return math::gated(t, math::sigmoid(t));
    case Activation::gelu:
      return math::gated(t, math::sigmoid(math::gelu_argument(t)));
    default:
      return t;
  }
}

}  // namespace lowprec
