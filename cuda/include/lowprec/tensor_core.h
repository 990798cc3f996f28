// Matrix products whose leaves are a tensor core's own sums of some terms: what the kernels share. Device code, without
// torch. docs/kernels/tensor_core.md says why each step is exact.
#pragma once

#include <cstdint>

#include "lowprec/accumulate.h"
#include "lowprec/cast_kernel.h"
#include "lowprec/float_grid.h"
#include "lowprec/format.h"
#include "lowprec/inline.h"
#include "lowprec/tensor_core_output.h"

namespace lowprec {

/// A batch of products [rows, depth] · [depth, columns], in steps of what one instruction takes of the depth.
struct ProductShape {
  int64_t batch;
  int64_t rows;
  int64_t columns;
  int leaves;
  int leaf_steps;  // of each leaf but the last
  int steps;       // of all leaves

  LOWPREC_INLINE int steps_of(int leaf) const { return min(leaf_steps, steps - leaf * leaf_steps); }

  LOWPREC_INLINE int64_t index(int64_t matrix, int64_t row, int64_t column) const {
    return (matrix * rows + row) * columns + column;
  }
};

/// Which outputs a thread of a warpgroup holds of a tile of 64 rows and 128 columns: pairs of neighbours, eight rows
/// apart, then eight columns.
class Fragment {
 public:
  LOWPREC_DEVICE Fragment(const ProductShape& shape, int64_t matrix, int64_t row, int64_t column)
      : first_(shape.index(matrix, row, column)),
        below_(8 * shape.columns),
        rows_(shape.rows - row),
        columns_(static_cast<int>(shape.columns - column < kTile ? shape.columns - column : kTile)) {}

  /// Of its i-th output, the index in the result; -1 for one beyond the matrix.
  LOWPREC_DEVICE int64_t index(int i) const {
    const int row = i / 2 % 2, column = 8 * (i / 4) + i % 2;
    return 8 * row < rows_ && column < columns_ ? first_ + row * below_ + column : -1;
  }

 private:
  static constexpr int kTile = 128;

  int64_t first_;
  int64_t below_;  // from an output to the one eight rows below
  int64_t rows_;   // left from its own on
  int columns_;
};

// What becomes of leaves, of N outputs a thread. `add` takes the `n`-th leaf of each; `last`: whether no leaf follows.
// `value` is what a sum has come to. `met_special`: whether a sum must be formed again by `AnySum`, since it met what
// this one cannot do.

struct PlainSetting {};

/// In float32 as it is.
template <int N>
class PlainSum {
 public:
  using Setting = PlainSetting;

  LOWPREC_DEVICE explicit PlainSum(const Setting&) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum_[i] = -0.0f;  // which leaves a first leaf of -0 as it is
  }

  template <class Where>
  LOWPREC_DEVICE void add(const float (&leaf)[N], int, bool, const Where&) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum_[i] = __fadd_rn(sum_[i], leaf[i]);
  }

  LOWPREC_DEVICE float value(int i) const { return sum_[i]; }
  LOWPREC_DEVICE bool met_special() const { return false; }

 private:
  float sum_[N];
};

/// What becomes of sums beyond the largest value: that, infinities, or either as the setting says.
enum class Overflow { saturates, overflows, either };

/// Whether a format's smallest normal value is float32's: then float32's own subnormal numbers end where the format's
/// do.
enum class Smallest { any, float32 };

/// The float32 constants of rounding to nearest even in a format of m mantissa bits.
struct RoundedSetting {
  bool usable;
  bool minus_zero;
  bool saturate;
  Smallest smallest;
  uint32_t exponents = Float32::infinity;  // a mask, unknown to the compiler: an instruction takes one constant alone
  float up;                                // 2^(23 - m)
  float down;                              // its inverse
  float least;                             // 1.5 · 2^emin
  float largest;                           // finite value · down

  RoundedSetting() = default;
  RoundedSetting(const Format& format, bool saturates) {
    saturate = saturates || format.specials == Specials::finite;
    const Layout layout = Layout::of(format);
    const Number number = layout.read(layout.max_code);
    const int emax = floor_log2(number.significand) + number.exponent;
    const int digits = layout.mantissa_bits;
    usable = digits >= 1 && digits <= 20 && layout.gap == 0 && layout.min_exponent >= 1 - Float32::bias &&
             layout.min_exponent < Float32::bias && emax <= Float32::bias;
    if (!usable) return;
    minus_zero = layout.has_negative_zero;
    smallest = layout.min_exponent == 1 - Float32::bias ? Smallest::float32 : Smallest::any;
    up = power_of_two(Float32::fraction_bits - digits);
    down = power_of_two(digits - Float32::fraction_bits);
    least = 1.5f * power_of_two(layout.min_exponent);
    // Below 2^24, so exact in steps that each are.
    largest = static_cast<float>(number.significand);
    int exponent = number.exponent + digits - Float32::fraction_bits;
    for (; exponent < -100; exponent += 100) largest *= power_of_two(-100);
    for (; exponent > 100; exponent -= 100) largest *= power_of_two(100);
    largest *= power_of_two(exponent);
  }
};

/// |x| no larger than a positive limit, with x's sign. NaN stays.
LOWPREC_DEVICE float clamp_magnitude(float x, float limit) {
#if __CUDA_ARCH__ >= 860
  float result;
  asm("min.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(limit));
  return result;
#else
  return fabsf(x) > limit ? copysignf(limit, x) : x;
#endif
}

/// In a format, to nearest even: the exact sum of two float32 rounded once. Sums are held scaled by `down`, so that the
/// number that a sum is rounded by adding has the sum's own exponent.
template <int N, Overflow kOverflow, Smallest kSmallest = Smallest::any>
class RoundedSum {
 public:
  using Setting = RoundedSetting;

  LOWPREC_DEVICE explicit RoundedSum(const Setting& setting) : set_(setting) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum_[i] = -0.0f;
  }

  template <class Where>
  LOWPREC_DEVICE void add(const float (&leaf)[N], int, bool last, const Where&) {
    if (last) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum_[i] = step<true>(sum_[i], leaf[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) sum_[i] = step<false>(sum_[i], leaf[i]);
    }
  }

  LOWPREC_DEVICE float value(int i) const { return sum_[i] * set_.up; }

  LOWPREC_DEVICE bool met_special() const {
    bool found = over_;
#pragma unroll
    for (int i = 0; i < N; ++i) found |= sum_[i] != sum_[i];
    return found;
  }

 private:
  /// Both float32 neighbours of the exact sum are rounded; where they differ, the odd result is right. The sign of a
  /// zero matters at the end alone.
  template <bool kLast>
  LOWPREC_DEVICE float step(float sum, float leaf) {
    const float low = __fmaf_rd(sum, set_.up, leaf);
    const float high = __fmaf_ru(sum, set_.up, leaf);
    const float own = as_float((as_bits(low) & set_.exponents) | 0x00400000u);  // 1.5 · 2^exponent
    const float large = kSmallest == Smallest::any ? fmaxf(own, set_.least) : own;
    const uint32_t a = as_bits(__fmaf_rn(low, set_.down, large));
    const uint32_t b = as_bits(__fmaf_rn(high, set_.down, large));
    float rounded = __fadd_rn(as_float(a | ((a ^ b) & 1u)), -large);
    if (kOverflow == Overflow::saturates || (kOverflow == Overflow::either && set_.saturate)) {
      rounded = clamp_magnitude(rounded, set_.largest);
    } else {
      over_ |= fabsf(rounded) > set_.largest;
    }
    if (kLast && (set_.minus_zero || rounded != 0)) {
      rounded = as_float((as_bits(rounded) & ~Float32::sign) | (as_bits(high) & Float32::sign));
    }
    return rounded;
  }

  Setting set_;
  float sum_[N];
  bool over_ = false;
};

/// What sums in any format and mode take.
struct AnySetting {
  SumRounder<Float32> round;
  DeviceWord seed;
  DeviceWord offset;
  int64_t roundings;  // of each output
};

/// In any format and mode, by integers.
template <int N>
class AnySum {
 public:
  using Setting = AnySetting;

  LOWPREC_DEVICE explicit AnySum(const Setting& setting)
      : set_(setting),
        words_{static_cast<uint64_t>(setting.seed.read()), static_cast<uint64_t>(setting.offset.read()),
               setting.roundings} {}

  template <class Where>
  LOWPREC_DEVICE void add(const float (&leaf)[N], int n, bool, const Where& where) {
    uint32_t terms[N];
#pragma unroll
    for (int i = 0; i < N; ++i) terms[i] = as_bits(leaf[i]);
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
      const Term<Float32> term = term_of<Float32>(terms[i]);
      const uint32_t word = set_.round.random ? words_(where.index(i), n) : 0;
      sum_[i] = static_cast<uint32_t>(n ? set_.round.next(sum_[i], term, word) : set_.round.first(term, word));
    }
  }

  LOWPREC_DEVICE float value(int i) const { return as_float(sum_[i]); }
  LOWPREC_DEVICE bool met_special() const { return false; }

 private:
  const Setting& set_;
  SumWords words_;
  uint32_t sum_[N];
};

/// Where leaves go that are not added up.
struct LeafSetting {
  float* out;  // those of an output side by side
  int leaves;
};

/// No sums.
template <int N>
class LeafValues {
 public:
  using Setting = LeafSetting;

  LOWPREC_DEVICE explicit LeafValues(const Setting& setting) : set_(setting) {}

  template <class Where>
  LOWPREC_DEVICE void add(const float (&leaf)[N], int n, bool, const Where& where) {
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = leaf[i];
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
      const int64_t index = where.index(i);
      if (index >= 0) set_.out[index * set_.leaves + n] = values[i];
    }
  }

  LOWPREC_DEVICE float value(int) const { return 0; }
  LOWPREC_DEVICE bool met_special() const { return false; }

 private:
  const Setting& set_;
};

}  // namespace lowprec
