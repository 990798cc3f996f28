// The quick way of the fused casts on a GPU: nearest even, from dtypes that float32 holds, into formats that
// floating-point addition rounds to (float_grid.h). Device code only.
//
// float32 stands in for a real number by rounding to odd: an inexact result's last bit is set, so that rounding it
// again to two bits less or more than that rounds the real number (Boldo and Melquiond 2008).
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "lowprec/activation.h"
#include "lowprec/float_grid.h"
#include "lowprec/fused_ops.h"
#include "lowprec/inline.h"
#include "lowprec/quick.h"

namespace lowprec {

LOWPREC_DEVICE float to_odd(double x) {
  const float cut = __double2float_rz(x);
  return as_float(as_bits(cut) | static_cast<uint32_t>(static_cast<double>(cut) != x));
}

/// Of the two neighbours of an inexact sum one is odd. An exact zero is +0, as nearest even has it.
LOWPREC_DEVICE float sum_to_odd(float a, float b) {
  const float low = __fadd_rd(a, b), high = __fadd_ru(a, b);
  return low == high || (as_bits(high) & 1) ? high : low;
}

/// What elements are, as far as the quick way knows them.
enum class Kind : int { other, float32, bfloat16, float16, codes };

inline Kind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Kind::float32;
    case ScalarType::BFloat16:
      return Kind::bfloat16;
    case ScalarType::Half:
      return Kind::float16;
    default:
      return Kind::other;
  }
}

/// Reads elements as float32, exactly.
struct FloatReader {
  Kind kind = Kind::other;
  FloatDecode decode;

  /// False for the code of anything but a finite value.
  LOWPREC_DEVICE bool read(uint64_t bits, float& x) const {
    const auto narrow = static_cast<uint16_t>(bits);
    switch (kind) {
      case Kind::float32:
        x = as_float(static_cast<uint32_t>(bits));
        return true;
      case Kind::bfloat16:
        x = to_float(BFloat16{}, narrow);
        return true;
      case Kind::float16:
        x = to_float(Float16{}, narrow);
        return true;
      default:
        x = decode.apply<false>(narrow);
        return decode.finite(narrow);
    }
  }
};

inline FloatReader reader_of(const Tensor& x, const std::optional<Format>& codes) {
  FloatReader reader;
  reader.kind = kind_of(x.scalar_type());
  if (!codes) return reader;
  reader.decode = FloatDecode(*codes);
  reader.kind = reader.decode.usable ? Kind::codes : Kind::other;
  return reader;
}

/// Rounds a float32 that stands in for a number, none of them NaN, to values in a dtype, or to codes.
struct FloatWriter {
  Kind kind = Kind::other;
  bool own = false;  // the dtype's own format
  FloatQuantize<NearestEven> quantize;
  FloatEncode<NearestEven> encode;

  LOWPREC_DEVICE uint64_t write(float x) const {
    if (kind == Kind::codes) return encode.apply<false>(x, 0);
    if (!own) x = quantize.apply<false>(x, 0);
    switch (kind) {
      case Kind::float16:
        return __half_as_ushort(__float2half_rn(x));
      case Kind::bfloat16:
        return own ? (as_bits(x) + 0x7fff + (as_bits(x) >> 16 & 1)) >> 16 : as_bits(x) >> 16;
      default:
        return as_bits(x);
    }
  }
};

inline FloatWriter writer_of(const Tensor& out, const std::optional<Format>& format, bool codes, int64_t rounding,
                             bool saturate) {
  FloatWriter writer;
  if (rounding != 0) return writer;
  writer.kind = codes ? Kind::codes : kind_of(out.scalar_type());
  writer.own = !format;
  if (!format) return saturate ? FloatWriter{} : writer;
  writer.quantize = {*format, saturate};
  writer.encode = {*format, saturate};
  const bool usable = codes ? writer.encode.grid.usable && format->bits() <= 16 : writer.quantize.grid.usable;
  const bool loses_nan = writer.kind == Kind::float16 && writer.quantize.makes_nan();
  return usable && !loses_nan ? writer : FloatWriter{};
}

/// Sums.
struct QuickSums {
  FloatReader y;
  FloatReader x;
  FloatWriter out;

  bool usable() const { return y.kind != Kind::other && x.kind != Kind::other && out.kind != Kind::other; }

  /// False, with no result, for a sum that is NaN or a term that is not served.
  LOWPREC_DEVICE bool apply(uint64_t y_bits, uint64_t x_bits, uint64_t& sum) const {
    float a, b;
    y.read(y_bits, a);
    const bool served = x.read(x_bits, b);
    if (!served || !(a + b == a + b)) return false;
    // float32's own nearest sum is its instruction; elsewhere the sum stands in for the exact one.
    sum = out.own && out.kind == Kind::float32 ? as_bits(a + b) : out.write(sum_to_odd(a, b));
    return true;
  }
};

/// Activations.
struct QuickActivations {
  FloatReader x;
  FloatWriter out;

  bool usable() const { return x.kind != Kind::other && out.kind != Kind::other; }

  template <Activation kind>
  LOWPREC_DEVICE bool apply(const Activate& op, uint64_t bits, double scale, double bias, uint64_t& result) const {
    float number;
    x.read(bits, number);
    if (!(number == number)) return false;
    if constexpr (kind == Activation::none || kind == Activation::relu) {
      if (!op.scaled && !op.biased) {
        result = out.write(kind == Activation::relu && as_bits(number) >> 31 ? 0.0f : number);
        return true;
      }
    }
    double t = number;  // never so small as to count as zero
    if (op.scaled) t = math::without_tiny(t * math::without_tiny(scale));
    if (op.biased) t = math::without_tiny(t + math::without_tiny(bias));
    if (!(t == t)) return false;
    result = out.write(to_odd(lowprec::activate<kind>(t)));
    return true;
  }
};

/// An element of a scale or bias; a NaN may change its bits.
LOWPREC_DEVICE double read_double(const Vector& vector, int64_t i) {
  if (!vector.data) return vector.value;
  const int64_t place = i * vector.step;
  if (vector.bytes == 8) return static_cast<const double*>(vector.data)[place];
  if (vector.bytes == 4) return static_cast<const float*>(vector.data)[place];
  const uint16_t bits = static_cast<const uint16_t*>(vector.data)[place];
  return vector.widen.from.mantissa_bits == BFloat16::fraction_bits ? to_float(BFloat16{}, bits)
                                                                    : to_float(Float16{}, bits);
}

}  // namespace lowprec
