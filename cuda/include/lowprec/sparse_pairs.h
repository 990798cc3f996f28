// Codes as operands of mma.sync, decoded two at a time in the registers that it takes them from. Device code.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lowprec/sparse_codes.h"

namespace lowprec {

/// What decoding takes, so that the loops over pairs have no branches: into bfloat16 or float16, of a format all of
/// whose codes are finite values, or `special` ones, or those with an instruction or a byte of their own; or only the
/// digits in either one's places: numbers that lack a power of two. Codes are of 8 bits or, if that is not known,
/// raised to the tops of their bytes.
enum class Decoding : int {
  none,
  bfloat16,
  whole_bfloat16,
  special_bfloat16,
  float16,
  e4m3_float16,
  e5m2_float16,
  digits,
  short_digits
};

LOWPREC_INLINE constexpr bool is_half(Decoding way) {
  return static_cast<int>(way) >= static_cast<int>(Decoding::float16);
}

struct PairDecode {
  Decoding way = Decoding::none;
  uint32_t down = 0;    // where digits go, if nothing else is done: shift
  uint32_t digits = 0;  // and mask
  CodeReader<false> wide;
  CodeReader<true> half;

  PairDecode() = default;

  /// Nothing, if the format needs more: then its codes are decoded before.
  PairDecode(const Format& format, bool to_half) : wide(format), half(format) {
    if (to_half) {
      if (half.is_float16_top) way = Decoding::e5m2_float16;
      if (half.is_own_e4m3) way = Decoding::e4m3_float16;
      if (half.is_plain()) way = Decoding::float16;
    } else if (wide.is_simple) {
      way = wide.has_special ? Decoding::special_bfloat16 : Decoding::bfloat16;
    }
  }

  /// Take the digits alone, in the places of bfloat16 or float16.
  void take_digits(const Format& format, bool to_half) {
    way = format.bits() == 8 ? Decoding::digits : Decoding::short_digits;
    down = to_half ? half.down : wide.down;
    digits = to_half ? half.digits : wide.digits;
  }
};

/// Two codes, in the upper bytes of a word's halves, shifted to their tops.
template <Decoding kWay>
LOWPREC_DEVICE uint32_t decode_pair(const PairDecode& by, uint32_t codes) {
  if constexpr (kWay == Decoding::e5m2_float16) return codes & 0xff00ff00u;
  if constexpr (kWay == Decoding::digits || kWay == Decoding::short_digits) {
    return (codes >> by.down & by.digits) | (codes & codes::signs);
  }
#if __CUDA_ARCH__ >= 890
  if constexpr (kWay == Decoding::e4m3_float16) return codes::e4m3_to_half(codes);
#endif
  CodeReader<is_half(kWay)> reader;
  if constexpr (is_half(kWay)) {
    reader = by.half;
  } else {
    reader = by.wide;
  }
  reader.has_special = kWay == Decoding::special_bfloat16 || kWay == Decoding::e4m3_float16;
  return reader.pair(codes);
}

/// Codes shifted to the tops of their bytes, those that may be shorter.
template <Decoding kWay>
LOWPREC_DEVICE uint32_t raised(const PairDecode& by, uint32_t word) {
  constexpr bool whole = kWay == Decoding::e4m3_float16 || kWay == Decoding::e5m2_float16 || kWay == Decoding::digits ||
                         kWay == Decoding::whole_bfloat16;
  return whole ? word : word << (is_half(kWay) ? by.half.up : by.wide.up);
}

/// Four codes, the first in the lowest byte.
template <Decoding kWay>
LOWPREC_DEVICE uint2 decode_word(const PairDecode& by, uint32_t word) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (kWay == Decoding::e4m3_float16) {
    return {codes::e4m3_to_half(static_cast<uint16_t>(word)), codes::e4m3_to_half(static_cast<uint16_t>(word >> 16))};
  }
#endif
  word = raised<kWay>(by, word);
  return {decode_pair<kWay>(by, __byte_perm(word, 0, 0x1404)), decode_pair<kWay>(by, __byte_perm(word, 0, 0x3424))};
}

/// The codes of two rows and columns: those in the first column, and those in the second.
template <Decoding kWay>
LOWPREC_DEVICE uint2 decode_columns(const PairDecode& by, uint32_t word) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (kWay == Decoding::e4m3_float16) {
    return {codes::e4m3_to_half(static_cast<uint16_t>(__byte_perm(word, 0, 0x4420))),
            codes::e4m3_to_half(static_cast<uint16_t>(__byte_perm(word, 0, 0x4431)))};
  }
#endif
  if constexpr (kWay == Decoding::e5m2_float16) return {__byte_perm(word, 0, 0x2404), word & 0xff00ff00u};
  word = raised<kWay>(by, word);
  return {decode_pair<kWay>(by, word << 8), decode_pair<kWay>(by, word)};
}

/// Call f with how codes are decoded, as a constant.
template <class F>
LOWPREC_DEVICE void for_decoding(Decoding way, F f) {
  switch (way) {
    case Decoding::bfloat16:
      return f.template operator()<Decoding::bfloat16>();
    case Decoding::special_bfloat16:
      return f.template operator()<Decoding::special_bfloat16>();
    case Decoding::float16:
      return f.template operator()<Decoding::float16>();
    case Decoding::e4m3_float16:
      return f.template operator()<Decoding::e4m3_float16>();
    case Decoding::e5m2_float16:
      return f.template operator()<Decoding::e5m2_float16>();
    default:
      return f.template operator()<Decoding::none>();
  }
}

/// The same for the ways in which codes meet codes, those of x or of w. Digits of w are float16's; where those of x are
/// bfloat16's, w comes as bfloat16.
template <bool kOfW, class F>
LOWPREC_DEVICE void for_code_decoding(Decoding way, F f) {
  if (way == Decoding::e4m3_float16) return f.template operator()<Decoding::e4m3_float16>();
  if (way == Decoding::e5m2_float16) return f.template operator()<Decoding::e5m2_float16>();
  if constexpr (kOfW) {
    if (way == Decoding::whole_bfloat16) return f.template operator()<Decoding::whole_bfloat16>();
    if (way == Decoding::bfloat16) return f.template operator()<Decoding::bfloat16>();
  }
  if (way == Decoding::digits) return f.template operator()<Decoding::digits>();
  f.template operator()<Decoding::short_digits>();
}

}  // namespace lowprec
