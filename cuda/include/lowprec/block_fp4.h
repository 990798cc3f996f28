// NVFP4's quick way, for host and device: E2M1 elements under E4M3 scales and a tensor's scale, to nearest even.
//
// Thresholds of elements are their midpoints times the scale: 28 bits times 3, exact in float64. The scale's own
// quotient is multiplied out in float64, and taken unless it is so near a midpoint that its last digits might matter.
#pragma once

#include <cstdint>

#include "lowprec/block.h"
#include "lowprec/container.h"
#include "lowprec/inline.h"

namespace lowprec {

LOWPREC_INLINE bool is_e2m1(const Format& f) {
  return f.ebits == 2 && f.mbits == 1 && f.bias == 1 && f.specials == Specials::finite && f.subnormals;
}

LOWPREC_INLINE bool is_e4m3(const Format& f) {
  return f.ebits == 4 && f.mbits == 3 && f.bias == 7 && f.specials == Specials::fn && f.subnormals;
}

/// The codes of scales under one tensor scale.
struct FourBitScale {
  double tensor;
  double inverse;  // of the tensor's scale times the largest element

  /// From the bits of the tensor's scale; unless it is a normal number nothing is quick.
  explicit LOWPREC_INLINE FourBitScale(uint32_t bits) {
    const bool normal = bits >= 1u << Float32::fraction_bits && bits < Float32::infinity;
    tensor = normal ? bit_cast<double>((static_cast<uint64_t>(bits) << 29) + (uint64_t{1023 - 127} << 52)) : 0.0;
    inverse = normal ? 1.0 / (tensor * 6.0) : 0.0;
  }

  /// The code for a block's largest magnitude, or 0 where the quick way does not serve: also where it is subnormal.
  LOWPREC_INLINE uint32_t code(double amax) const {
    const uint64_t bits = bit_cast<uint64_t>(amax * inverse);
    constexpr uint64_t least = uint64_t{1023 - 6} << 52, most = (uint64_t{1023 + 8} << 52) + (uint64_t{13} << 48);
    constexpr uint64_t half = uint64_t{1} << 48, margin = 1 << 16;
    const uint64_t rest = bits & (2 * half - 1);
    const bool near = rest - (half - margin) < 2 * margin;
    const bool serves = bits >= least && bits < most && !near;
    return serves ? static_cast<uint32_t>((bits + half) >> 49) - ((1023 - 7) << 3) : 0;
  }

  /// The divisor of elements under a code from `code`.
  LOWPREC_INLINE double divisor(uint32_t code) const {
    return bit_cast<double>((static_cast<uint64_t>(code) << 49) + (uint64_t{1023 - 7} << 52)) * tensor;
  }
};

/// The elements under one divisor: the largest float32 magnitudes that are still below each code, and the values.
template <class C>
struct FourBitBlock {
  using Bits = typename C::Bits;

  uint32_t below[7];
  uint32_t values[8];

  /// Whether all thresholds and values are normal numbers.
  static LOWPREC_INLINE bool serves(double divisor) {
    return bit_cast<uint64_t>(divisor) >= static_cast<uint64_t>(1023 + 3 - C::bias) << 52;
  }

  explicit LOWPREC_INLINE FourBitBlock(double divisor) {
    constexpr double midpoints[] = {0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0};
    for (int i = 0; i < 7; ++i) {
      // The midpoint itself goes to the even one of its neighbours, i and i + 1.
      const uint64_t bits = bit_cast<uint64_t>(midpoints[i] * divisor) - static_cast<uint64_t>(i % 2);
      below[i] = static_cast<uint32_t>((bits >> 29) - (uint64_t{1023 - 127} << 23));
    }
    constexpr uint32_t one = 1u << C::fraction_bits;
    const uint32_t whole = nearest(divisor), half = nearest(divisor * 1.5);
    const uint32_t all[] = {0, whole - one, whole, half, whole + one, half + one, whole + 2 * one, half + 2 * one};
    for (int i = 0; i < 8; ++i) values[i] = all[i] < C::infinity ? all[i] : C::infinity;
  }

  /// The code, or else the value's bits, of a float32 magnitude.
  template <bool kCodes>
  LOWPREC_INLINE uint32_t find(uint32_t magnitude) const {
    uint32_t found = kCodes ? 0 : values[0];
    for (int i = 0; i < 7; ++i) {
      const uint32_t next = kCodes ? static_cast<uint32_t>(i + 1) : values[i + 1];
      found = magnitude > below[i] ? next : found;
    }
    return found;
  }

 private:
  /// The bits, in the container, of a number that is normal there or too large.
  static LOWPREC_INLINE uint32_t nearest(double x) {
    constexpr int dropped = 52 - C::fraction_bits;
    const uint64_t bits = bit_cast<uint64_t>(x);
    const uint64_t up = (uint64_t{1} << (dropped - 1)) - 1 + (bits >> dropped & 1);
    return static_cast<uint32_t>(((bits + up) >> dropped) -
                                 (static_cast<uint64_t>(1023 - C::bias) << C::fraction_bits));
  }
};

}  // namespace lowprec
