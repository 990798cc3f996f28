// From what an op is given at run time to the types that kernels are compiled for.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/round.h"
#include "lowprec/torch_stable.h"

namespace lowprec {

/// Call f with the container of a dtype.
template <class F>
void for_container(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(Float64{});
    case ScalarType::Float:
      return f(Float32{});
    case ScalarType::Half:
      return f(Float16{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16");
  }
}

/// Call f with a value of the integer type of a codes' dtype.
template <class F>
void for_code(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Byte:
      return f(uint8_t{});
    case ScalarType::UInt16:
      return f(uint16_t{});
    case ScalarType::UInt32:
      return f(uint32_t{});
    default:
      STD_TORCH_CHECK(false, "expected uint8, uint16 or uint32 codes");
  }
}

/// Call f with the functor of a rounding mode, in the order of Python's `Rounding`.
template <class F>
void for_rounding(int64_t mode, F f) {
  switch (mode) {
    case 0:
      return f(NearestEven{});
    case 1:
      return f(NearestAway{});
    case 2:
      return f(TowardZero{});
    case 3:
      return f(Up{});
    case 4:
      return f(Down{});
    case 5:
      return f(ToOdd{});
    case 6:
      return f(Stochastic{});
    default:
      STD_TORCH_CHECK(false, "unknown rounding mode ", mode);
  }
}

}  // namespace lowprec
