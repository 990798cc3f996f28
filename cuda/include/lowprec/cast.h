// One value cast: quantize (value to value), encode (value to code), decode (code to value), for host and device.
//
// A container's bits and a format's code are both an exponent field above a fraction, so a cast is: take the bits apart,
// drop the digits that the format lacks, round, put together. The code of the rounded number, on the format's grid
// continued without bound, decides about overflow. All of it is integer arithmetic.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/format.h"
#include "lowprec/inline.h"
#include "lowprec/round.h"

namespace lowprec {

/// Where a format's values lie in a container: the constants of a cast, worked out once for each call.
///
/// Without a finite code of a normal number (e = 0, say) codes are plain multiples of one spacing. Then the top mantissa
/// bit serves as the exponent bit of a 1-1-(m-1) grid, on which the same codes mean the same values; so every grid here
/// has normal numbers, and the casts know no special case.
struct Grid {
  int mantissa_bits;
  int min_exponent;   // the smallest normal's exponent, as the container's field counts
  int max_exponent;   // the largest value's exponent above that
  int normal_drop;    // bits that the container has more than the format, in a normal number
  int gap;            // mantissa_bits where there are no subnormals, else 0
  uint32_t max_code;
  int depth;          // how far to normalise subnormal numbers of the container: 0 if its spacing there is no matter
  bool within;        // whether the container holds every finite value

  template <class C>
  static Grid of(const Format& format, C) {
    const bool plain = format.max_code() < 1u << format.mbits;
    Grid grid;
    grid.mantissa_bits = format.mbits - plain;
    grid.min_exponent = format.emin() - plain + C::bias;
    grid.max_exponent = static_cast<int>(format.max_code() >> grid.mantissa_bits) - 1;
    grid.normal_drop = C::fraction_bits - grid.mantissa_bits;
    grid.gap = format.subnormals ? 0 : grid.mantissa_bits;
    grid.max_code = format.max_code();
    grid.depth = grid.min_exponent < (format.subnormals ? 1 : 2) ? C::fraction_bits : 0;
    grid.within = grid.normal_drop >= 0 && grid.min_exponent - grid.mantissa_bits >= 1 - C::fraction_bits &&
                  grid.min_exponent + grid.max_exponent <= 2 * C::bias;
    return grid;
  }
};

/// A magnitude rounded to a grid, in spacings of the grid there: `multiple` of them, `lower` before the decision.
template <class Word>
struct Rounded {
  Word lower;
  Word multiple;
  Word shift;     // binary digits of a spacing in the magnitude's significand, as many as a shift can have
  uint32_t code;  // the magnitude code; some code above max_code for whatever lies above the largest value
};

/// Round a magnitude, normal unless its exponent is the container's smallest and the grid's depth 0.
template <class Mode, class Word>
LOWPREC_INLINE Rounded<Word> round_to(const Grid& grid, Magnitude<Word> x, bool negative, uint32_t word) {
  const int height = x.exponent - grid.min_exponent;
  const int skip = height < 0 ? grid.gap : 0;
  auto parts = split<Word>(x.significand, grid.normal_drop + max(-height, 0) + skip);
  // Heights above the largest value's all overflow: one of them stands for all, so that codes stay within a word.
  const uint32_t base = static_cast<uint32_t>(min(max(height, 0), grid.max_exponent + 1)) << grid.mantissa_bits;
  parts.odd = (base + parts.kept) & 1;
  parts.negative = negative;
  parts.word = word;
  const Word multiple = parts.kept + Mode::up(parts);
  return {parts.kept, multiple, parts.shift, base + (static_cast<uint32_t>(multiple) << skip)};
}

/// What a tally of casts counts; this one does not.
struct NoTally {
  LOWPREC_INLINE void add(bool, bool, bool) {}
};

/// Counts of inputs that rounded past the largest finite magnitude, of nonzero ones that became zero, and of NaNs.
struct Tally {
  uint32_t saturated = 0;
  uint32_t flushed = 0;
  uint32_t nan = 0;

  LOWPREC_INLINE void add(bool is_saturated, bool is_flushed, bool is_nan) {
    saturated += is_saturated;
    flushed += is_flushed;
    nan += is_nan;
  }
};

/// Code to value, exactly, in a container that holds every finite value.
template <class Code, class C>
class Decode {
 public:
  using Input = Code;
  using Output = typename C::Bits;
  static constexpr bool random = false;

  explicit Decode(const Format& format)
      : grid_(Grid::of(format, C{})),
        sign_code_(format.sign_code()),
        negative_zero_(format.has_negative_zero()),
        above_(format.has_infinity() ? C::infinity : C::quiet_nan) {}

  bool within() const { return grid_.within; }

  template <class Tally>
  LOWPREC_INLINE Output operator()(Code code, uint32_t, Tally&) const {
    const uint32_t magnitude = code & (sign_code_ - 1);
    const bool negative = code & sign_code_;
    Word bits = finite(magnitude);
    const Word special = magnitude == grid_.max_code + 1 ? above_ : C::quiet_nan;
    if (magnitude > grid_.max_code) bits = special;
    if (negative & (negative_zero_ | (bits != 0))) bits |= C::sign;
    if (!negative_zero_ & negative & (magnitude == 0)) bits = C::quiet_nan;
    return static_cast<Output>(bits);
  }

 private:
  using Word = typename C::Word;

  LOWPREC_INLINE Word finite(uint32_t magnitude) const {
    const auto x = unpack<Word>(magnitude, grid_.mantissa_bits);
    const Magnitude<Word> aligned = {x.significand << grid_.normal_drop, x.exponent - 1 + grid_.min_exponent};
    const auto normal = normalise<C>(aligned, C::fraction_bits);
    const bool zero = magnitude >> grid_.gap == 0;
    return zero ? 0 : pack(denormalise<C>(normal, C::fraction_bits), C::fraction_bits);
  }

  Grid grid_;
  uint32_t sign_code_;
  bool negative_zero_;
  Word above_;  // what the code after the largest finite one means
};

/// Value to the nearest value of the format, by `Mode`, in a container that holds every finite one. NaN stays as it is.
template <class C, class Mode>
class Quantize {
 public:
  using Input = typename C::Bits;
  using Output = Input;
  static constexpr bool random = Mode::random;

  Quantize(const Format& format, bool saturate)
      : grid_(Grid::of(format, C{})), negative_zero_(format.has_negative_zero()) {
    const Decode<uint32_t, C> decode(format);
    NoTally none;
    smallest_ = decode(1u << grid_.gap, 0, none);
    largest_ = decode(grid_.max_code, 0, none);
    const bool stays = format.overflow_code(saturate) == grid_.max_code;
    overflow_ = stays ? largest_ : format.has_infinity() ? C::infinity : C::quiet_nan;
  }

  bool within() const { return grid_.within; }

  template <class Tally>
  LOWPREC_INLINE Output operator()(Input x, uint32_t word, Tally& tally) const {
    const Word magnitude = x & (C::sign - 1);
    const bool negative = x & C::sign;
    const auto parts = normalise<C>(unpack<Word>(magnitude, C::fraction_bits), grid_.depth);
    const auto rounded = round_to<Mode>(grid_, parts, negative, word);

    const Magnitude<Word> result = {rounded.multiple << rounded.shift, parts.exponent};
    Word bits = pack(denormalise<C>(result, grid_.depth), C::fraction_bits);
    // Between zero and the smallest value the significand says nothing: the exponent may be far below that value's.
    const Word small = rounded.multiple != 0 ? smallest_ : 0;
    if (rounded.lower == 0) bits = small;
    const Word large = Mode::overflows(negative) | (magnitude == C::infinity) ? overflow_ : largest_;
    const bool beyond = rounded.code > grid_.max_code;
    if (beyond) bits = large;
    const bool nan = magnitude > C::infinity;
    tally.add(beyond & !nan, (bits == 0) & (magnitude != 0), nan);
    if (negative & (negative_zero_ | (bits != 0))) bits |= C::sign;
    return nan ? x : static_cast<Output>(bits);
  }

 private:
  using Word = typename C::Word;

  Grid grid_;
  bool negative_zero_;
  Word smallest_;  // nonzero
  Word largest_;   // finite
  Word overflow_;
};

/// Value to code, for any format; the code of NaN is the format's own.
template <class C, class Mode, class Code>
class Encode {
 public:
  using Input = typename C::Bits;
  using Output = Code;
  static constexpr bool random = Mode::random;

  Encode(const Format& format, bool saturate)
      : grid_(Grid::of(format, C{})),
        lift_(max(-grid_.normal_drop, 0)),
        overflow_(format.overflow_code(saturate)),
        nan_(format.nan_code()),
        sign_(format.sign_code()),
        nan_sign_(format.specials == Specials::finite ? 0 : format.sign_code()),
        negative_zero_(format.has_negative_zero()) {
    grid_.normal_drop += lift_;
  }

  template <class Tally>
  LOWPREC_INLINE Output operator()(Input x, uint32_t word, Tally&) const {
    const auto magnitude = static_cast<typename C::Word>(x & (C::sign - 1));
    const bool negative = x & C::sign;
    const auto parts = normalise<C>(unpack(magnitude, C::fraction_bits), grid_.depth);
    const Magnitude<Word> lifted = {static_cast<Word>(parts.significand) << lift_, parts.exponent};
    uint32_t code = round_to<Mode>(grid_, lifted, negative, word).code;

    const uint32_t limit = Mode::overflows(negative) ? overflow_ : grid_.max_code;
    if (code > grid_.max_code) code = limit;
    if (magnitude == C::infinity) code = overflow_;
    const bool nan = magnitude > C::infinity;
    if (nan) code = nan_;
    const uint32_t sign = nan ? nan_sign_ : sign_;
    if (negative & (negative_zero_ | (code != 0))) code |= sign;
    return static_cast<Output>(code);
  }

 private:
  // Wide enough for the significands of either side with two bits to spare.
  using Word = std::conditional_t<(sizeof(Input) > 4 || sizeof(Code) > 2), uint64_t, uint32_t>;

  Grid grid_;
  int lift_;  // bits that the format has more than the container
  uint32_t overflow_;
  uint32_t nan_;
  uint32_t sign_;
  uint32_t nan_sign_;
  bool negative_zero_;
};

}  // namespace lowprec
