// What is written of sums: themselves, or their cast to a format, as values of a float dtype or as codes. Device code.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "lowprec/cast_kernel.h"
#include "lowprec/float_grid.h"
#include "lowprec/number.h"
#include "lowprec/quick.h"

namespace lowprec {

/// The random words of four neighbours, whichever is the first. Not inline: it would take most of a kernel's registers.
inline __device__ __noinline__ uint4 draw_neighbours(int bits, uint64_t seed, uint64_t offset, int64_t index) {
  const auto skip = static_cast<int>(index & 3);
  index -= skip;
  Words words = draw_four(bits, seed, offset, index);
#pragma unroll 1
  for (int i = 0; i < skip; ++i) {
    words = {{words.word[1], words.word[2], words.word[3], draw_one(bits, seed, offset, index + 4 + i)}};
  }
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

/// A cast of float32 sums.
struct SumCast {
  bool codes;
  bool quick;  // by floating-point additions, for numbers that are no NaN: in most formats
  bool plain;  // their shortest way: to nearest even, in formats that need nothing else
  bool own;    // to the dtype's own format: a conversion
  int rounding;
  FloatQuantize<NearestEven> quantize;
  FloatEncode<NearestEven> encode;
  Rounder round;
  Writer write;  // codes as bits of the dtype that values are written in
  DeviceDraws draws;

  SumCast(const Format& format, int64_t rounding, bool saturate, bool codes, const Layout& dtype,
          const DeviceDraws& draws)
      : codes(codes),
        rounding(static_cast<int>(rounding)),
        quantize(format, saturate),
        encode(format, saturate),
        round(Layout::of(format), rounding, saturate || format.specials == Specials::finite),
        write(round.to, dtype),
        draws(draws) {
    own = !codes && write.same && rounding == 0 && !saturate && format.specials == Specials::ieee;
    quick = own || (quantize.grid.usable && (codes || !quantize.makes_nan()));
    plain = quick && quantize.grid.plain && rounding == 0;
  }

  /// The bits of what is written of them: in float32, for values, to which `own` leaves the rounding.
  template <int kCount>
  LOWPREC_DEVICE void quickly(const float (&sums)[kCount], int64_t index, uint32_t (&bits)[kCount]) const {
    float rounded[kCount];
    if (own) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) bits[i] = as_bits(sums[i]);
    } else if (plain) {
      round_all<NearestEven, true>(sums, {}, rounded);
      finish_all<true>(sums, rounded, bits);
    } else {
      round_by_mode(sums, index, rounded);
      finish_all<false>(sums, rounded, bits);
    }
  }

  /// The bits of what is written, in any case.
  LOWPREC_DEVICE uint32_t slowly(float sum, int64_t index) const {
    const Number number = Layout::of(Float32{}).read(as_bits(sum));
    if (number.nan) return static_cast<uint32_t>(codes ? round.to.nan(number.negative) : write.to.nan_code);
    const uint32_t word = round.choice.random ? draw_one(draws.bits, draws.seed.read(), draws.offset.read(), index) : 0;
    const uint64_t code = round(number, word);
    return static_cast<uint32_t>(codes ? round.to.with_sign(code, number.negative) : write(code, number.negative));
  }

 private:
  template <class Mode, bool kPlain, int kCount>
  LOWPREC_DEVICE void round_all(const float (&sums)[kCount], const uint4& words, float (&rounded)[kCount]) const {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kCount; ++i) rounded[i] = round_magnitude<Mode, kPlain>(quantize.grid, sums[i], word[i]);
  }

  template <int kCount>
  LOWPREC_DEVICE void round_by_mode(const float (&sums)[kCount], int64_t index, float (&rounded)[kCount]) const {
    static_assert(kCount == 1 || kCount == 4);
    if (round.choice.random) {
      const uint4 words = draw_neighbours(draws.bits, draws.seed.read(), draws.offset.read(), index);
      return round_all<Stochastic, false>(sums, words, rounded);
    }
    switch (rounding) {
      case 0:
        return round_all<NearestEven, false>(sums, {}, rounded);
      case 1:
        return round_all<NearestAway, false>(sums, {}, rounded);
      case 2:
        return round_all<TowardZero, false>(sums, {}, rounded);
      case 3:
        return round_all<Up, false>(sums, {}, rounded);
      case 4:
        return round_all<Down, false>(sums, {}, rounded);
      default:
        return round_all<ToOdd, false>(sums, {}, rounded);
    }
  }

  template <bool kPlain, int kCount>
  LOWPREC_DEVICE void finish_all(const float (&sums)[kCount], const float (&rounded)[kCount],
                                 uint32_t (&bits)[kCount]) const {
    if (codes) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) bits[i] = encode.finish<kPlain>(sums[i], rounded[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) bits[i] = as_bits(quantize.finish<kPlain>(sums[i], rounded[i]));
    }
  }
};

/// Where sums go, and in what form.
struct Output {
  void* data;  // null: nowhere
  int bytes;   // of an element
  bool half;   // whether elements of two bytes are float16 values, and not bfloat16 ones
  bool cast;
  SumCast how;
};

/// The way that is left for NaN, and for a few formats. Not inline: it would take most of a kernel's registers.
static __device__ __noinline__ uint32_t cast_slowly(const SumCast& how, float sum, int64_t index) {
  return how.slowly(sum, index);
}

/// Bits of a float32 value that is no NaN, or of a code, as an element.
LOWPREC_DEVICE uint32_t element_bits(const Output& out, uint32_t bits) {
  if (out.how.codes || out.bytes == 4) return bits;
  return out.half ? __half_as_ushort(__float2half_rn(as_float(bits))) : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

/// The bits of a sum in the form that it is written in.
LOWPREC_DEVICE uint32_t output_bits(const Output& out, float sum, int64_t index) {
  if (!out.cast) return as_bits(sum);
  if (!out.how.quick || sum != sum) return cast_slowly(out.how, sum, index);
  const float sums[1] = {sum};
  uint32_t bits[1];
  out.how.quickly(sums, index, bits);
  return element_bits(out, bits[0]);
}

/// And of four neighbours.
LOWPREC_DEVICE void output_bits(const Output& out, const float (&sums)[4], int64_t index, uint32_t (&bits)[4]) {
  if (!out.cast) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = as_bits(sums[i]);
  } else if (out.how.quick && all_numbers<4>(sums)) {
    out.how.quickly(sums, index, bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = element_bits(out, bits[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = cast_slowly(out.how, sums[i], index + i);
  }
}

LOWPREC_DEVICE void store_element(const Output& out, int64_t index, uint32_t bits) {
  if (out.bytes == 4) {
    static_cast<uint32_t*>(out.data)[index] = bits;
  } else if (out.bytes == 2) {
    static_cast<uint16_t*>(out.data)[index] = static_cast<uint16_t>(bits);
  } else {
    static_cast<uint8_t*>(out.data)[index] = static_cast<uint8_t>(bits);
  }
}

/// Write so many of four neighbours.
LOWPREC_DEVICE void store_four(const Output& out, int64_t index, const float (&sums)[4], int count) {
  uint32_t bits[4];
  output_bits(out, sums, index, bits);
  if (count < 4 || index % 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) store_element(out, index + i, bits[i]);
    }
  } else if (out.bytes == 4) {
    static_cast<uint4*>(out.data)[index / 4] = {bits[0], bits[1], bits[2], bits[3]};
  } else if (out.bytes == 2) {
    static_cast<uint2*>(out.data)[index / 4] = {__byte_perm(bits[0], bits[1], 0x5410),
                                                __byte_perm(bits[2], bits[3], 0x5410)};
  } else {
    static_cast<uint32_t*>(out.data)[index / 4] =
        __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
  }
}

}  // namespace lowprec
