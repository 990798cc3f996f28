// Rounding modes: one functor each, after the predicates of lowprec/rounding.py.
//
// Rounding is one addition: `addend` is what to add to a number before its last digits are cut off, so that the carry
// does what the mode says. `overflows` is whether a finite number past the largest finite magnitude goes to infinity
// where the cast does not saturate.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

/// The last digits of a number, which are to go, and what else a mode may look at.
template <class Word>
struct Digits {
  Word rest;      // the digits, less than unit
  int count;      // how many they are, which may be more than Word has
  Word unit;      // one spacing of what is kept: 2^count, if Word can be shifted so far
  Word odd;       // the last digit of what is kept
  bool negative;  // whether the number is below zero
  uint32_t word;  // a random word, in the top bits
};

/// The most digits that a word is shifted by, with room for a carry: a number that loses more is all rest, and less
/// than half a unit.
template <class Word>
constexpr int most_digits = 8 * static_cast<int>(sizeof(Word)) - 2;

/// The first 32 bits of rest / 2^count.
template <class Word>
LOWPREC_INLINE uint32_t fraction(const Digits<Word>& x) {
  constexpr int last = 8 * static_cast<int>(sizeof(Word)) - 1;
  const Word left = x.rest << min(max(32 - x.count, 0), last);
  const Word right = x.rest >> min(max(x.count - 32, 0), last);
  return static_cast<uint32_t>(x.count <= 32 ? left : right);
}

struct NearestEven {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE Word addend(const Digits<Word>& x) {
    return (x.unit - 1 + x.odd) >> 1;
  }
  static LOWPREC_INLINE bool overflows(bool) { return true; }
};

struct NearestAway {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE Word addend(const Digits<Word>& x) {
    return x.unit >> 1;
  }
  static LOWPREC_INLINE bool overflows(bool) { return true; }
};

struct TowardZero {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE Word addend(const Digits<Word>&) {
    return 0;
  }
  static LOWPREC_INLINE bool overflows(bool) { return false; }
};

struct Up {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE Word addend(const Digits<Word>& x) {
    return x.negative ? 0 : x.unit - 1;
  }
  static LOWPREC_INLINE bool overflows(bool negative) { return !negative; }
};

struct Down {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE Word addend(const Digits<Word>& x) {
    return x.negative ? x.unit - 1 : 0;
  }
  static LOWPREC_INLINE bool overflows(bool negative) { return negative; }
};

struct ToOdd {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE Word addend(const Digits<Word>& x) {
    return (x.unit - 1) & (x.odd - 1);  // nothing where the lower neighbour is odd
  }
  static LOWPREC_INLINE bool overflows(bool) { return false; }
};

/// A whole spacing when fraction + random word reaches one. The word stands in the top bits, so the fraction needs no
/// truncation: what bits it has below the word's last one meet zeros and carry nothing.
struct Stochastic {
  static constexpr bool random = true;
  template <class Word>
  static LOWPREC_INLINE Word addend(const Digits<Word>& x) {
    const bool carry = static_cast<uint32_t>(fraction(x) + x.word) < x.word;
    return carry ? x.unit : 0;
  }
  static LOWPREC_INLINE bool overflows(bool) { return true; }
};

}  // namespace lowprec
