// The quick way of a cast that gathers statistics on a GPU, for four neighbouring elements as float32. Device code
// only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lowprec/float_grid.h"
#include "lowprec/grid.h"
#include "lowprec/inline.h"

namespace lowprec {

/// The larger of two numbers; NaN if one is.
LOWPREC_DEVICE float max_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
#else
  return a < b || b != b ? b : a;
#endif
}

LOWPREC_DEVICE bool any_zero(const float (&x)[4]) {
  return fminf(fminf(fabsf(x[0]), fabsf(x[1])), fminf(fabsf(x[2]), fabsf(x[3]))) == 0;
}

/// Rounds finite numbers by floating-point addition, and tells which passed the largest magnitude. For formats that
/// have subnormals and -0. `usable` is whether it serves the format.
template <class Mode>
class QuickRounder {
 public:
  /// Whether a float32 holds the error of every number that goes this way, exactly. Rounded to a neighbour that is no
  /// further from x than zero is, the error is at most |x| and a multiple of x's last digit, or is -x; so it is where x
  /// saturates, as long as its last digit is worth no more than that of the largest magnitude.
  static constexpr bool exact_error =
      std::is_same_v<Mode, NearestEven> || std::is_same_v<Mode, NearestAway> || std::is_same_v<Mode, TowardZero>;

  bool usable;
  float bound;  // of the magnitudes that can go this way; NaN cannot

  QuickRounder() = default;
  LOWPREC_INLINE QuickRounder(const Format& format, bool saturate) : grid_(format, saturate) {
    usable = grid_.usable && format.subnormals && grid_.minus_zero;
    if (!usable) return;
    const Grid grid = Grid::of(format, Float32{});
    grid_.limit = FloatGrid::value(grid, grid.max_code + 1);  // what overflows is seen, then saturates
    const bool saturates = format.overflow_code(saturate) == format.max_code();
    const int top = static_cast<int>(as_bits(grid_.largest) >> Float32::fraction_bits) - Float32::bias;
    const int past = top + Float32::fraction_bits + 1 - grid.mantissa_bits;
    bound = !saturates                             ? grid_.largest
            : exact_error && past <= Float32::bias ? power_of_two(past)
                                                   : as_float(Float32::infinity);
    // As a float32 of this scale a value has its code at the top of its bits.
    scale_ = power_of_two(1 - static_cast<int>(grid_.least >> Float32::fraction_bits));
    drop_ = Float32::fraction_bits - grid.mantissa_bits;
    sign_drop_ = 32 - format.bits();
    sign_ = format.sign_code();
  }

  /// Round numbers no larger than `amax`, which is below `bound`; `saturated` counts those past the largest magnitude.
  LOWPREC_DEVICE void round(const float (&x)[4], const uint32_t* words, float (&y)[4], float amax,
                            uint32_t& saturated) const {
    float rounded[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      rounded[j] = round_magnitude<Mode, true>(grid_, x[j], words[j]);
      y[j] = as_float(as_bits(fminf(rounded[j], grid_.largest)) | (as_bits(x[j]) & Float32::sign));
    }
    if (amax <= grid_.largest) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) saturated += rounded[j] > grid_.largest;
  }

  /// The code of what a number became.
  LOWPREC_DEVICE uint32_t code_of(float y) const {
    return (as_bits(fabsf(y) * scale_) >> drop_) | ((as_bits(y) >> sign_drop_) & sign_);
  }

 private:
  FloatGrid grid_;
  float scale_;
  int drop_;
  int sign_drop_;
  uint32_t sign_;
};

}  // namespace lowprec
