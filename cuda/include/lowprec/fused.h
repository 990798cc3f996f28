// The fused casts of one element: what happens to a number, as the code of its dtype, before it is rounded.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lowprec/activation.h"
#include "lowprec/number.h"

namespace lowprec {

/// y + x, exact before its one rounding: the bits of y and a code of x to the bits of the new y.
struct Accumulate {
  Layout y;
  Layout x;
  Rounder round;
  Writer write;
  bool down;  // the rounding under which a sum that is zero is -0

  LOWPREC_INLINE uint64_t operator()(uint64_t y_bits, uint64_t x_code, uint32_t word) const {
    const Number old = y.read(y_bits);
    const Number sum = add(old, x.read(x_code), down);
    const uint64_t code = round(sum, word);
    // A zero sum's sign is not that of a number that was rounded to zero: it is decided already.
    const uint64_t bits = write(code, sum.negative);
    return old.nan ? y_bits : sum.nan ? y.nan_code : bits;
  }
};

/// Rounds act(scale · x + bias), computed in float64, to a value of x's dtype or to a code.
struct Activate {
  Layout x;
  Layout wide;  // float64
  Writer widen;
  Rounder round;
  Writer write;
  bool codes;
  bool scaled;
  bool biased;

  /// The number in front of the activation. Without scale, bias and activation it passes as it is.
  LOWPREC_INLINE double argument(uint64_t x_bits, double scale, double bias, bool plain) const {
    const Number number = x.read(x_bits);
    const uint64_t magnitude = x_bits & (x.sign_code - 1);
    double t = bit_cast<double>(number.nan ? Float64::quiet_nan : widen(magnitude, number.negative));
    if (!plain || scaled || biased) t = math::without_tiny(t);
    if (scaled) t = math::without_tiny(t * math::without_tiny(scale));
    if (biased) t = math::without_tiny(t + math::without_tiny(bias));
    return t;
  }

  /// A NaN that came stays, bit for bit; one that arose is the positive quiet one.
  LOWPREC_INLINE uint64_t finish(uint64_t x_bits, double result, uint32_t word) const {
    const Number number = wide.read(math::bits_of(result));
    const uint64_t code = round(number, word);
    const bool came = (x_bits & (x.sign_code - 1)) > x.max_code + 1;
    const bool negative = (x_bits & x.sign_code) != 0;
    const uint64_t nan = codes ? round.to.nan(came & negative) : came ? x_bits : x.nan_code;
    const uint64_t rounded = codes ? round.to.with_sign(code, number.negative) : write(code, number.negative);
    return number.nan ? nan : rounded;
  }

  template <Activation kind>
  LOWPREC_INLINE uint64_t apply(uint64_t x_bits, double scale, double bias, uint32_t word) const {
    const bool plain = kind == Activation::none || kind == Activation::relu;
    const double t = argument(x_bits, scale, bias, plain);
    // Work on exponents may make a number of a NaN.
    return finish(x_bits, t != t ? t : activate<kind>(t), word);
  }
};

/// Call f with an activation as a constant.
template <class F>
void for_activation(Activation kind, F f) {
  switch (kind) {
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu2:
      return f(std::integral_constant<Activation, Activation::relu2>{});
    case Activation::sigmoid:
      return f(std::integral_constant<Activation, Activation::sigmoid>{});
    case Activation::tanh:
      return f(std::integral_constant<Activation, Activation::tanh>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    default:
      return f(std::integral_constant<Activation, Activation::none>{});
  }
}

}  // namespace lowprec
