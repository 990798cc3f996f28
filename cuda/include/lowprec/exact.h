// Sums in unbounded precision: a fixed-point number wide enough for every product of two numbers of a carrier.
//
// Source: Kulisch and Miranker, "Computer arithmetic in theory and practice", 1981.
#pragma once

#include <cstdint>

#include "lowprec/number.h"

namespace lowprec {

/// A sum of numbers, exact. Digits of 32 bits lie in 64-bit integers, signed, so that carries can wait for a while.
template <class C>
class ExactSum {
 public:
  LOWPREC_INLINE ExactSum() {
    for (int i = 0; i < kDigits; ++i) digit_[i] = 0;
  }

  template <class Word>
  LOWPREC_INLINE void add(const NumberIn<Word>& x) {
    nan_ |= x.nan;
    positive_infinity_ |= x.infinite & !x.negative;
    negative_infinity_ |= x.infinite & x.negative;
    any_positive_ |= !x.negative;
    any_negative_ |= x.negative;
    if (x.nan || x.infinite || x.significand == 0) return;
    const int position = x.exponent - kLowest;
    const int shift = position % 32;
    auto left = static_cast<uint128_t>(x.significand);
    // The digits of the shifted significand, one after another: its top ones need not fit the word once shifted.
    uint64_t carry = 0;
    for (int i = position / 32; left != 0 || carry != 0; ++i) {
      const uint64_t part = (static_cast<uint64_t>(left & kMask) << shift) + carry;
      digit_[i] += x.negative ? -static_cast<int64_t>(part & kMask) : static_cast<int64_t>(part & kMask);
      carry = part >> 32;
      left >>= 32;
    }
    if (++pending_ == kPatience) settle();
  }

  /// The sum, but for a last bit that stands for all below it. `down`: the sign of a sum of numbers that cancel.
  LOWPREC_INLINE WideNumber total(bool down) {
    settle();
    const bool negative = digit_[kDigits - 1] < 0;
    if (negative) {
      for (int i = 0; i < kDigits; ++i) digit_[i] = -digit_[i];
      settle();
    }
    WideNumber sum = leading();
    const bool zero_sign = any_positive_ & any_negative_ ? down : any_negative_;
    sum.infinite = positive_infinity_ | negative_infinity_;
    sum.negative = sum.infinite ? negative_infinity_ : sum.significand == 0 ? zero_sign : negative;
    sum.nan = nan_ | (positive_infinity_ & negative_infinity_);
    return sum;
  }

 private:
  // Exponents of the smallest product's last bit, and of one above the largest product's first; 2^63 terms at most.
  static constexpr int kLowest = 2 * (1 - C::bias - C::fraction_bits);
  static constexpr int kHighest = 2 * (C::bias + 1);
  static constexpr int kDigits = (kHighest - kLowest + 64) / 32 + 2;
  static constexpr uint64_t kMask = 0xFFFFFFFFu;
  static constexpr int kPatience = 1 << 30;

  /// Carry: every digit but the last, which has the sign, into [0, 2^32).
  LOWPREC_INLINE void settle() {
    int64_t carry = 0;
    for (int i = 0; i + 1 < kDigits; ++i) {
      const int64_t sum = digit_[i] + carry;
      digit_[i] = static_cast<int64_t>(static_cast<uint64_t>(sum) & kMask);
      carry = sum >> 32;
    }
    digit_[kDigits - 1] += carry;
    pending_ = 0;
  }

  /// The four leading digits of a magnitude, at least 96 bits of it.
  LOWPREC_INLINE WideNumber leading() const {
    int top = kDigits - 1;
    while (top > 3 && digit_[top] == 0) --top;
    uint128_t significand = 0;
    for (int i = top; i > top - 4; --i) significand = significand << 32 | static_cast<uint128_t>(digit_[i]);
    uint64_t below = static_cast<uint64_t>(significand & 1);  // the word's top bit stays free
    for (int i = 0; i < top - 3; ++i) below |= static_cast<uint64_t>(digit_[i]);
    significand = significand >> 1 | static_cast<uint128_t>(below != 0);
    return {significand, 32 * (top - 3) + kLowest + 1, false, false, false};
  }

  int64_t digit_[kDigits];
  int pending_ = 0;
  bool nan_ = false;
  bool positive_infinity_ = false;
  bool negative_infinity_ = false;
  bool any_positive_ = false;
  bool any_negative_ = false;
};

}  // namespace lowprec
