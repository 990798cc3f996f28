// The operands of a block-sparse product under an accumulator, brought into the one form that its kernel reads: values
// of a carrier from any dtype or from codes, weights times their gates. Device code only, without torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lowprec/accumulate_kernel.h"
#include "lowprec/cast.h"
#include "lowprec/convert.h"
#include "lowprec/hopper.h"

namespace lowprec {

/// What an element becomes.
enum class Form : int { carrier, half, bfloat, hopper_fp8, hopper_fp16 };

/// The dtype of values, which gates are rounded to and in which they multiply; `e4m3` and `e5m2` stay codes, and have
/// no gates.
enum class ValueKind : int { float64, float32, float16, bfloat16, e4m3, e5m2 };

/// A matrix of elements, and what to make of them.
template <class C>
struct Preparation {
  Operand from;  // strides of rows and columns are its last two
  bool codes;
  Decode<uint8_t, C> decode;
  ValueKind values;
  Form form;
  Gates gates;  // of rows
  int64_t rows;
  int64_t columns;
  int64_t pitch;  // from row to row of the result
};

LOWPREC_DEVICE float round_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

LOWPREC_DEVICE float round_to_bfloat(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return as_float(static_cast<uint32_t>(bits) << 16);
}

LOWPREC_DEVICE float round_to_values(ValueKind kind, float x) {
  return kind == ValueKind::float16 ? round_to_half(x) : kind == ValueKind::bfloat16 ? round_to_bfloat(x) : x;
}

/// A weight times its gate: the exact product, rounded once. That of 16-bit values is exact in float32, or, of the
/// smallest, in all digits that decide.
template <class C>
LOWPREC_DEVICE typename C::Bits multiply_by_gate(ValueKind kind, typename C::Bits x, float gate) {
  if constexpr (std::is_same_v<C, Float64>) {
    return bit_cast<uint64_t>(__dmul_rn(bit_cast<double>(x), static_cast<double>(gate)));
  } else {
    return as_bits(round_to_values(kind, __fmul_rn(as_float(x), round_to_values(kind, gate))));
  }
}

/// An operand of the model of Hopper's tensor cores, to which its own dtype matters.
template <class Unit>
LOWPREC_DEVICE int32_t hopper_operand(ValueKind kind, uint32_t bits) {
  switch (kind) {
    case ValueKind::e4m3:
      return operand::read<Unit, Float8E4M3>(static_cast<uint8_t>(bits));
    case ValueKind::e5m2:
      return operand::read<Unit, Float8E5M2>(static_cast<uint8_t>(bits));
    case ValueKind::float16:
      return operand::read<Unit, Float16>(narrow<Float32, Float16>(bits));
    case ValueKind::bfloat16:
      return operand::read<Unit, BFloat16>(narrow<Float32, BFloat16>(bits));
    default:
      return operand::read<Unit, Float32>(bits);
  }
}

template <class To, class C>
LOWPREC_DEVICE To formed(const Preparation<C>& how, typename C::Bits bits) {
  if constexpr (sizeof(To) == 2) {
    return how.form == Form::half ? narrow<Float32, Float16>(bits) : narrow<Float32, BFloat16>(bits);
  } else if constexpr (sizeof(To) == 4) {
    if (how.form == Form::hopper_fp8) return static_cast<To>(hopper_operand<HopperFp8>(how.values, bits));
    if (how.form == Form::hopper_fp16) return static_cast<To>(hopper_operand<HopperFp16>(how.values, bits));
    return bits;
  } else {
    return bits;
  }
}

constexpr int kPrepareWidth = 64, kPrepareHeight = 4;

template <class C, class To>
__global__ void __launch_bounds__(kPrepareWidth* kPrepareHeight)
    prepare_kernel(const __grid_constant__ Preparation<C> how, To* out) {
  __shared__ typename C::Bits decoded[256];
  if (how.codes) {
    NoTally none;
    const auto code = static_cast<uint8_t>(threadIdx.y * kPrepareWidth + threadIdx.x);
    const bool native = how.values == ValueKind::e4m3 || how.values == ValueKind::e5m2;
    decoded[code] = native ? code : how.decode(code, 0, none);
    __syncthreads();
  }
  const int64_t width = static_cast<int64_t>(gridDim.x) * kPrepareWidth;
  const int64_t height = static_cast<int64_t>(gridDim.y) * kPrepareHeight;
  for (int64_t row = blockIdx.y * int64_t{kPrepareHeight} + threadIdx.y; row < how.rows; row += height) {
    const bool closed = how.gates.closed(static_cast<int32_t>(row));
    for (int64_t column = blockIdx.x * int64_t{kPrepareWidth} + threadIdx.x; column < how.columns; column += width) {
      const int64_t place = row * how.from.stride[1] + column * how.from.stride[2];
      typename C::Bits bits = 0;
      if (!closed) {
        bits =
            how.codes ? decoded[static_cast<const uint8_t*>(how.from.data)[place]] : how.from.template read<C>(place);
        if (how.gates.gate) bits = multiply_by_gate<C>(how.values, bits, how.gates.gate[row]);
      }
      out[row * how.pitch + column] = formed<To>(how, bits);
    }
  }
}

}  // namespace lowprec
