// Codes of up to 8 bits as operands of tensor cores: four in a word become two pairs of bfloat16 or float16.
//
// A code's magnitude, shifted so that its exponent field lies in the exponent field of the 16-bit dtype, is that
// dtype's number for the value times a power of two; one multiplication, exact since the dtype holds the value, takes
// that away again. Subnormal codes need nothing of their own: they are subnormal there, too. What is not finite is put
// right after that by integers. Formats that need more are decoded before a kernel begins.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lowprec/container.h"
#include "lowprec/format.h"
#include "lowprec/inline.h"

namespace lowprec {

/// Whether bfloat16, or float16, holds every finite value of a format.
template <class C>
LOWPREC_INLINE constexpr bool holds(const Format& format) {
  const int last = format.emin() - format.mbits;  // digit of the smallest numbers
  return format.mbits <= C::fraction_bits && format.emax() <= C::bias && last >= 1 - C::bias - C::fraction_bits;
}

namespace codes {

constexpr uint32_t both = 0x00010001u;  // of a pair
constexpr uint32_t signs = 0x80008000u;

/// 2^exponent as the bits of a normal or subnormal number of C, in both halves.
template <class C>
LOWPREC_INLINE constexpr uint32_t power_of_two(int exponent) {
  const int field = exponent + C::bias;
  return (field > 0 ? static_cast<uint32_t>(field) << C::fraction_bits : 1u << (C::fraction_bits - 1 + field)) * both;
}

#ifdef __CUDACC__

/// x · y of both halves. Adding -0 changes nothing: bfloat16 has no multiplication of its own before sm_90.
template <bool kHalf>
LOWPREC_DEVICE uint32_t multiply(uint32_t x, uint32_t y) {
  uint32_t result;
  if constexpr (kHalf) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(signs));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(signs));
  }
  return result;
}

/// Two codes of e4m3fn, the first in the lower byte, as float16.
LOWPREC_DEVICE uint32_t e4m3_to_half(uint16_t codes) {
  uint32_t result = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(codes));
#else
  (void)codes;
#endif
  return result;
}

/// Two, each in the upper byte of its half.
LOWPREC_DEVICE uint32_t e4m3_to_half(uint32_t pair) {
  return e4m3_to_half(static_cast<uint16_t>(__byte_perm(pair, 0, 0x4431)));
}

#endif

}  // namespace codes

/// Reads codes of one format as bfloat16, or as float16: plain data, made on the host, taken by kernels. The dtype must
/// hold the format.
template <bool kHalf>
struct CodeReader {
  uint32_t down = 0;            // shift of a magnitude that lies below bit 15
  uint32_t digits = 0;          // mask of the shifted magnitude
  uint32_t scale = 0;           // power of two that is left
  uint32_t special = 0;         // 2^15 less the first magnitude that is not finite
  uint32_t payload = 0;         // mask of its digits that stay: those by which IEEE 754 tells NaN from infinity
  uint32_t set = 0;             // and the bits that come
  uint8_t up = 0;               // shift that brings a code's sign to the top of its byte
  bool is_simple = false;       // one multiplication makes all finite values: else nothing is read but `up`
  bool has_special = false;     // magnitudes
  bool is_own_e4m3 = false;     // e4m3fn with its own bias, which devices convert
  bool is_float16_top = false;  // the upper byte of the float16, for e5m2

  CodeReader() = default;

  explicit CodeReader(const Format& format) : up(static_cast<uint8_t>(8 - format.bits())) {
    using C = std::conditional_t<kHalf, Float16, BFloat16>;
    const int power = C::bias - format.bias;
    if ((kHalf && !reaches_half(format)) || power > C::bias) return;
    is_simple = format.has_negative_zero() && format.subnormals;
    fill<C>(format, power);
    const bool fn = format.specials == Specials::fn, ieee = format.specials == Specials::ieee;
    is_own_e4m3 = kHalf && format.ebits == 4 && format.mbits == 3 && fn && format.subnormals && format.bias == 7;
    is_float16_top = kHalf && format.ebits == 5 && format.mbits == 2 && ieee && format.subnormals && format.bias == 15;
  }

  /// Whether all codes are finite values that one multiplication makes.
  LOWPREC_INLINE bool is_plain() const { return is_simple && !has_special; }

#ifdef __CUDACC__

  /// Two codes of a plain format, in the upper bytes of their halves.
  LOWPREC_DEVICE uint32_t plain_pair(uint32_t codes) const {
    return codes::multiply<kHalf>((codes >> down & digits) | (codes & codes::signs), scale);
  }

  /// Two codes of a simple one.
  LOWPREC_DEVICE uint32_t pair(uint32_t codes) const {
    const uint32_t result = plain_pair(codes);
    if (!has_special) return result;
    const uint32_t sign = codes & codes::signs, magnitude = codes >> down & digits;
    const uint32_t found = everywhere((magnitude + special) & codes::signs);
    return (result & ~found) | ((sign | (magnitude & payload) | set) & found);
  }

 private:
  /// The top bit of each half, in all its bits.
  static LOWPREC_DEVICE uint32_t everywhere(uint32_t tops) { return tops | (tops - (tops >> 15)); }

#endif

 private:
  /// Whether float16's exponent field takes a format's: the numbers in it must not meet float16's own infinity.
  static bool reaches_half(const Format& format) {
    return format.ebits <= Float16::exponent_bits && format.max_code() >> format.mbits < 31 && format.bias >= 0 &&
           format.bias <= Float16::bias + 24;
  }

  template <class C>
  void fill(const Format& format, int power) {
    using codes::both;
    down = static_cast<uint32_t>(C::exponent_bits - format.ebits);
    const auto place = [&](uint32_t code) { return code << (16 - format.bits()) >> down; };
    digits = place(format.top_code()) * both;
    scale = codes::power_of_two<C>(power);
    has_special = format.max_code() < format.top_code();
    special = (0x8000u - place(format.max_code() + 1)) * both;
    payload = format.specials == Specials::ieee ? ((1u << C::fraction_bits) - 1) * both : 0;
    set = static_cast<uint32_t>(format.has_infinity() ? C::infinity : C::sign - 1) * both;
  }
};

}  // namespace lowprec
