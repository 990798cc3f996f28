// The quick way of a cast that gathers statistics on a GPU, for four neighbouring elements as float32. Device code
// only.
#pragma once

#include <cstdint>

#include "lowprec/float_grid.h"
#include "lowprec/grid.h"
#include "lowprec/inline.h"

namespace lowprec {

/// Rounds finite numbers by floating-point addition, and tells which passed the largest magnitude. For formats that
/// have subnormals and -0. `usable` is whether it serves the format.
template <class Mode>
class QuickRounder {
 public:
  bool usable;

  QuickRounder() = default;
  LOWPREC_INLINE QuickRounder(const Format& format, bool saturate) : grid_(format, saturate) {
    usable = grid_.usable && format.subnormals && grid_.minus_zero;
    if (!usable) return;
    const Grid grid = Grid::of(format, Float32{});
    grid_.limit = FloatGrid::value(grid, grid.max_code + 1);  // what overflows is seen, then saturates
    saturates_ = format.overflow_code(saturate) == format.max_code();
    // As a float32 of this scale a value has its code at the top of its bits.
    scale_ = power_of_two(1 - static_cast<int>(grid_.least >> Float32::fraction_bits));
    drop_ = Float32::fraction_bits - grid.mantissa_bits;
    sign_drop_ = 32 - format.bits();
    sign_ = format.sign_code();
  }

  /// False where one is infinite or NaN, or would become it: these are for the general way. `amax` is max |x|.
  LOWPREC_DEVICE bool round(const float (&x)[4], const uint32_t* words, float (&y)[4], bool (&beyond)[4],
                            float& amax) const {
    amax = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
    const bool numbers = (x[0] < x[1] || x[0] >= x[1]) && (x[2] < x[3] || x[2] >= x[3]);
    if (!numbers || amax == as_float(Float32::infinity)) return false;
    bool any = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float rounded = round_magnitude<Mode, true>(grid_, x[j], words[j]);
      beyond[j] = rounded > grid_.largest;
      any |= beyond[j];
      y[j] = as_float(as_bits(fminf(rounded, grid_.largest)) | (as_bits(x[j]) & Float32::sign));
    }
    return saturates_ || !any;
  }

  /// The code of what a number became.
  LOWPREC_DEVICE uint32_t code_of(float y) const {
    return (as_bits(fabsf(y) * scale_) >> drop_) | ((as_bits(y) >> sign_drop_) & sign_);
  }

 private:
  FloatGrid grid_;
  bool saturates_;
  float scale_;
  int drop_;
  int sign_drop_;
  uint32_t sign_;
};

}  // namespace lowprec
