// What is written of sums: themselves, or their cast to a format, as values of a float dtype or as codes. Device code.
#pragma once

#include <cstdint>

#include "lowprec/cast_kernel.h"
#include "lowprec/float_grid.h"
#include "lowprec/number.h"

namespace lowprec {

/// A cast of float32 sums.
struct SumCast {
  bool codes;
  bool quick;  // by floating-point additions: to nearest even, in most formats
  FloatQuantize<NearestEven> quantize;
  FloatEncode<NearestEven> encode;
  Rounder round;
  Writer write;  // codes as bits of the dtype that values are written in
  DeviceDraws draws;

  SumCast(const Format& format, int64_t rounding, bool saturate, bool codes, const Layout& dtype,
          const DeviceDraws& draws)
      : codes(codes),
        quick(false),
        quantize(format, saturate),
        encode(format, saturate),
        round(Layout::of(format), rounding, saturate || format.specials == Specials::finite),
        write(round.to, dtype),
        draws(draws) {
    quick = rounding == 0 && quantize.grid.usable && !quantize.makes_nan();
  }

  /// The bits of what is written: for a number that is no NaN, where it is `quick`; in float32, for values.
  LOWPREC_DEVICE uint32_t quickly(float sum) const {
    return codes ? encode.apply<false>(sum, 0) : as_bits(quantize.apply<false>(sum, 0));
  }

  /// The bits of what is written, in any case.
  LOWPREC_DEVICE uint32_t slowly(float sum, int64_t index) const {
    const Number number = Layout::of(Float32{}).read(as_bits(sum));
    if (number.nan) return static_cast<uint32_t>(codes ? round.to.nan(number.negative) : write.to.nan_code);
    const uint32_t word = round.choice.random ? draw_one(draws.bits, draws.seed.read(), draws.offset.read(), index) : 0;
    const uint64_t code = round(number, word);
    return static_cast<uint32_t>(codes ? round.to.with_sign(code, number.negative) : write(code, number.negative));
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

LOWPREC_DEVICE uint32_t half_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

/// The bits of a sum in the form that it is written in.
LOWPREC_DEVICE uint32_t output_bits(const Output& out, float sum, int64_t index) {
  if (!out.cast) return as_bits(sum);
  if (!out.how.quick || sum != sum) return out.how.slowly(sum, index);
  const uint32_t bits = out.how.quickly(sum);
  if (out.how.codes || out.bytes == 4) return bits;
  return out.half ? half_bits(as_float(bits)) : bits >> 16;
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
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = output_bits(out, sums[i], index + i);
  if (count < 4 || index % 4) {
    for (int i = 0; i < count; ++i) store_element(out, index + i, bits[i]);
  } else if (out.bytes == 4) {
    static_cast<uint4*>(out.data)[index / 4] = {bits[0], bits[1], bits[2], bits[3]};
  } else if (out.bytes == 2) {
    static_cast<uint2*>(out.data)[index / 4] = {(bits[0] & 0xFFFF) | bits[1] << 16, (bits[2] & 0xFFFF) | bits[3] << 16};
  } else {
    static_cast<uint32_t*>(out.data)[index / 4] =
        (bits[0] & 0xFF) | (bits[1] & 0xFF) << 8 | (bits[2] & 0xFF) << 16 | bits[3] << 24;
  }
}

}  // namespace lowprec
