// Rounding modes: one functor each, after the predicates of lowprec/rounding.py.
//
// `up` decides whether a number goes to its upper neighbour in magnitude; `overflows` whether a finite number past the
// largest finite magnitude goes to infinity where the cast does not saturate.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

/// A significand between two neighbours, kept and kept + 1 spacings of the format, and what else a mode may look at.
template <class Word>
struct Split {
  Word kept;
  Word below;     // distance from the lower neighbour
  Word above;     // distance to the upper one; the two are one spacing, 2^shift
  int dropped;    // binary digits of a spacing, at least 0; may exceed the width of Word
  Word shift;     // the same, but no more than Word can be shifted by; less than half a spacing is left then
  Word odd;       // 1 if the lower neighbour's code is odd, else 0
  bool negative;  // whether the number is below zero
  uint32_t word;  // a random word, in the top bits
};

/// Cut off the last bits of a significand that leaves the two top bits of its word free.
template <class Word>
LOWPREC_INLINE Split<Word> split(Word significand, int dropped) {
  const auto shift = static_cast<Word>(min(dropped, 8 * static_cast<int>(sizeof(Word)) - 2));
  const Word kept = significand >> shift;
  const Word below = significand - (kept << shift);
  const Word above = ((kept + 1) << shift) - significand;
  return {kept, below, above, dropped, shift, 0, false, 0};
}

/// The first 32 bits of the fraction of a spacing that is left.
template <class Word>
LOWPREC_INLINE uint32_t fraction(const Split<Word>& x) {
  const int last = 8 * static_cast<int>(sizeof(Word)) - 1;
  return static_cast<uint32_t>(x.dropped <= 32 ? x.below << min(32 - x.dropped, last)
                                               : x.below >> min(x.dropped - 32, last));
}

struct NearestEven {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE bool up(const Split<Word>& x) {
    return x.below + x.odd > x.above;
  }
  static LOWPREC_INLINE bool overflows(bool) { return true; }
};

struct NearestAway {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE bool up(const Split<Word>& x) {
    return x.below >= x.above;
  }
  static LOWPREC_INLINE bool overflows(bool) { return true; }
};

struct TowardZero {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE bool up(const Split<Word>&) {
    return false;
  }
  static LOWPREC_INLINE bool overflows(bool) { return false; }
};

struct Up {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE bool up(const Split<Word>& x) {
    return !x.negative & (x.below != 0);
  }
  static LOWPREC_INLINE bool overflows(bool negative) { return !negative; }
};

struct Down {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE bool up(const Split<Word>& x) {
    return x.negative & (x.below != 0);
  }
  static LOWPREC_INLINE bool overflows(bool negative) { return negative; }
};

struct ToOdd {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE bool up(const Split<Word>& x) {
    return (x.below & (x.odd - 1)) != 0;  // the mask is empty where the lower neighbour is odd
  }
  static LOWPREC_INLINE bool overflows(bool) { return false; }
};

/// Up when fraction + random word reaches one. The word stands in the top bits, so the fraction needs no truncation:
/// bits of it below the word's last one meet zeros and carry nothing.
struct Stochastic {
  static constexpr bool random = true;
  template <class Word>
  static LOWPREC_INLINE bool up(const Split<Word>& x) {
    return static_cast<uint32_t>(fraction(x) + x.word) < x.word;
  }
  static LOWPREC_INLINE bool overflows(bool) { return true; }
};

}  // namespace lowprec
