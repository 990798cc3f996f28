// Where a format's values lie among a container's bits, and rounding to them.
//
// Both are an exponent field above a fraction. So a container's bits, counted from those of the format's smallest
// normal number, are a format's code followed by digits that the format lacks. Numbers below that count from their own
// exponent and lack as many digits more as it is lower.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/format.h"
#include "lowprec/inline.h"
#include "lowprec/round.h"

namespace lowprec {

/// The constants of a format in a container, worked out once for each call. Exponents are counted as in `Magnitude`.
///
/// Without a finite code of a normal number (e = 0, say) codes are plain multiples of one spacing. Then the top
/// mantissa bit serves as the exponent bit of a 1-1-(m-1) grid, on which the same codes mean the same values; so every
/// grid has normal numbers, and casts know no special case.
struct Grid {
  int mantissa_bits;
  int min_exponent;  // of the smallest normal number
  int normal_drop;   // digits that the container has more than the format, in a normal number
  int gap;           // mantissa_bits where there are no subnormals, else 0
  bool regular;      // no gap, nothing skipped, -0 exists, and the container has subnormal numbers only where the
                     // format has some: so in most formats, which take a shorter way
  uint32_t max_code;
  uint64_t skipped;  // codes below those that numbers of the container can round to
  uint32_t one = 1;  // unknown to the compiler: GCC 12 makes no vector code of a 64-bit constant that is shifted
  bool within;       // whether the container holds every finite value

  template <class C>
  static LOWPREC_INLINE Grid of(const Format& format, C) {
    const bool plain = format.max_code() < 1u << format.mbits;
    Grid grid;
    grid.mantissa_bits = format.mbits - plain;
    grid.min_exponent = format.emin() - plain + C::bias - 1;
    grid.normal_drop = C::fraction_bits - grid.mantissa_bits;
    grid.gap = format.subnormals ? 0 : grid.mantissa_bits;
    grid.max_code = format.max_code();
    const int max_exponent = grid.min_exponent + static_cast<int>(grid.max_code >> grid.mantissa_bits) - 1;
    grid.within = grid.normal_drop >= 0 && grid.min_exponent - grid.mantissa_bits >= -C::fraction_bits &&
                  max_exponent < 2 * C::bias;
    grid.skip_unreachable(-C::fraction_bits - 2);
    grid.regular = grid.min_exponent >= 0 && format.subnormals && format.has_negative_zero();
    return grid;
  }

 private:
  /// Count from no lower than the container reaches, so that positions stay within a word. An even number of binades is
  /// left out: which codes are odd does not change, not even without mantissa bits.
  LOWPREC_INLINE void skip_unreachable(int lowest) {
    const int binades = max(lowest - min_exponent, 0) / 2 * 2;
    min_exponent += binades;
    skipped = static_cast<uint64_t>(binades) << mantissa_bits;
  }
};

/// A shift of a format's exponents, clamped to those with which the container holds every finite value.
template <class C>
LOWPREC_INLINE int shift_within(const Format& format, C, int64_t shift) {
  const int low = 1 - C::bias - C::fraction_bits - (format.emin() - format.mbits);
  const int high = C::bias - format.emax();
  return static_cast<int>(shift < low ? low : shift > high ? high : shift);
}

/// A container's magnitude as a grid needs it: normalised, where that may make a difference.
template <class C>
LOWPREC_INLINE Magnitude<C> read(const Grid& grid, typename C::Word bits) {
  const auto x = Magnitude<C>::read(bits);
  return grid.regular ? x : normalise<C>(x.significand(), x.exponent, C::fraction_bits);
}

/// And back to its bits.
template <class C>
LOWPREC_INLINE typename C::Word write(const Grid& grid, Magnitude<C> x) {
  return grid.regular ? x.bits : denormalise(x);
}

/// Digits dropped below the smallest normal number on top of what its distance makes: without subnormals it is one
/// spacing above zero.
LOWPREC_INLINE int gap_below(const Grid& grid, int exponent) {
  return !grid.regular && exponent < grid.min_exponent ? grid.gap : 0;
}

/// A magnitude rounded to a grid.
template <class Word>
struct Rounded {
  Word lower;     // code of the lower neighbour
  Word code;      // code of the result, which may be above max_code
  Word position;  // of the result, on the container's scale
  int exponent;   // from which position counts
};

/// Round a magnitude to a grid; `lift` is how many digits the format has more than the container.
template <class Mode, class Word, class C>
LOWPREC_INLINE Rounded<Word> round_to(const Grid& grid, Magnitude<C> x, int lift, bool negative, uint32_t word) {
  const int exponent = min(x.exponent, grid.min_exponent);
  const Word position = static_cast<Word>(x.bits - Magnitude<C>::origin(exponent)) << lift;
  const int gap = gap_below(grid, exponent);
  const int count = grid.normal_drop + lift + grid.min_exponent - exponent + gap;
  const auto shift = static_cast<Word>(min(count, most_digits<Word>));
  const Word unit = static_cast<Word>(grid.one) << shift;
  const Word kept = position >> shift;
  const Digits<Word> dropped{position & (unit - 1), count, unit, kept & 1, negative, word};
  const Word sum = position + Mode::addend(dropped);
  return {kept, (sum >> shift) << gap, sum & ~(unit - 1), exponent};
}

}  // namespace lowprec
