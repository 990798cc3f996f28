// The update of block-sparse weights for every dtype: one weight a thread, its terms one after the other.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/inline.h"
#include "lowprec/number.h"
#include "lowprec/sparse_update.h"

namespace lowprec {

/// What an element of memory is.
enum class PlainElement { float64, float32, bfloat16, float16, codes };

struct PlainCall {
  UpdatePair pair[kUpdatePairs];
  int pairs;
  int block;
  int64_t weights;
  const int* table;   // (input block, output block) of each weight
  const float* gate;  // or none
  void* out;
  void* sums;  // carried from launch to launch
  double beta;
  Layout layout[2];  // of codes
  PlainElement kind[2];
  PlainElement out_kind;
  bool begins;
  bool ends;
};

/// An element as Sum, which holds it.
template <class Sum>
LOWPREC_DEVICE Sum read_element(PlainElement kind, const void* data, int64_t at, const Layout& layout) {
  if (kind == PlainElement::float64) return static_cast<Sum>(static_cast<const double*>(data)[at]);
  if (kind == PlainElement::float32) return static_cast<Sum>(static_cast<const float*>(data)[at]);
  const bool codes = kind == PlainElement::codes;
  const uint32_t bits = codes ? static_cast<const uint8_t*>(data)[at] : static_cast<const uint16_t*>(data)[at];
  if (kind == PlainElement::bfloat16) return static_cast<Sum>(__uint_as_float(bits << 16));
  const Number number = (codes ? layout : Layout::of(Float16{})).read(bits);
  const double magnitude = number.infinite ? static_cast<double>(__int_as_float(0x7f800000))
                                           : scalbn(static_cast<double>(number.significand), number.exponent);
  if (number.nan) return static_cast<Sum>(__int_as_float(0x7fffffff));
  return static_cast<Sum>(number.negative ? -magnitude : magnitude);
}

LOWPREC_DEVICE void write_element(PlainElement kind, void* data, int64_t at, double value) {
  if (kind == PlainElement::float64) {
    static_cast<double*>(data)[at] = value;
  } else if (kind == PlainElement::float32) {
    static_cast<float*>(data)[at] = static_cast<float>(value);
  } else {
    const auto single = static_cast<float>(value);
    uint16_t bits;
    if (kind == PlainElement::float16) {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(single));
    } else {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(single));
    }
    static_cast<uint16_t*>(data)[at] = bits;
  }
}

template <class Sum>
__global__ void __launch_bounds__(kUpdateThreads) plain_update_kernel(const __grid_constant__ PlainCall call) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kUpdateThreads + threadIdx.x;
  const int64_t each = call.block * call.block, weight = element / each;
  if (weight >= call.weights) return;
  const int place = static_cast<int>(element % each);
  const int64_t row = static_cast<int64_t>(call.table[2 * weight]) * call.block + place / call.block;
  const int64_t column = static_cast<int64_t>(call.table[2 * weight + 1]) * call.block + place % call.block;
  auto* sums = static_cast<Sum*>(call.sums);
  Sum sum = call.begins ? Sum(0) : sums[element];
  for (int p = 0; p < call.pairs; ++p) {
    const UpdatePair& pair = call.pair[p];
    for (int64_t n = 0; n < pair.tokens; ++n) {
      const int64_t left = n * pair.x.token + row * pair.x.feature,
                    right = n * pair.dy.token + column * pair.dy.feature;
      sum = fma(read_element<Sum>(call.kind[0], pair.x.data, left, call.layout[0]),
                read_element<Sum>(call.kind[1], pair.dy.data, right, call.layout[1]), sum);
    }
  }
  if (!call.ends) {
    sums[element] = sum;
    return;
  }
  if (call.gate) {
    const Sum gate = call.gate[weight];
    sum = gate == 0 ? Sum(0) : gate * sum;
  }
  if (call.beta != 0) {
    sum = static_cast<Sum>(call.beta) * read_element<Sum>(call.out_kind, call.out, element, call.layout[0]) + sum;
  }
  write_element(call.out_kind, call.out, element, sum);
}

}  // namespace lowprec
