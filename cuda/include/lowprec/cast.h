// One value cast: quantize (value to value), encode (value to code), decode (code to value), for host and device.
//
// All of it is integer arithmetic. Conditions choose between values that are both at hand, so that loops over a cast
// turn into vector code. The one branch is on `grid.regular`, the same for a whole call.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/format.h"
#include "lowprec/grid.h"
#include "lowprec/inline.h"
#include "lowprec/round.h"

namespace lowprec {

/// What casts tell of a number on the way: whether it rounded past the largest finite magnitude (NaNs do), and the
/// magnitude code that the grid would have there. This one does not listen.
struct NoTally {
  template <class Word>
  LOWPREC_INLINE void add(bool, Word) {}
};

/// Code to value, exactly, in a container that holds every finite value. Bits above the format's width are ignored.
template <class Code, class C>
class Decode {
 public:
  using Input = Code;
  using Output = typename C::Bits;
  static constexpr bool random = false;

  Grid grid;

  explicit LOWPREC_INLINE Decode(const Format& format)
      : grid(Grid::of(format, C{})),
        sign_code_(format.sign_code()),
        next_(format.has_infinity() ? C::infinity : C::quiet_nan),
        minus_zero_(format.has_negative_zero() ? C::sign : C::quiet_nan),
        first_signed_(format.has_negative_zero() ? 0 : 1) {
    // Here what matters is whether values, not inputs, are normal numbers of the container.
    grid.regular = grid.regular && grid.min_exponent >= grid.mantissa_bits;
  }

  template <class AnyTally>
  LOWPREC_INLINE Output operator()(Code code, uint32_t, AnyTally&) const {
    const uint32_t magnitude = code & (sign_code_ - 1);
    const Word special = magnitude == grid.max_code + 1 ? next_ : C::quiet_nan;
    Word bits = finite(magnitude);
    if (magnitude > grid.max_code) bits = special;
    return static_cast<Output>(with_sign(bits, code & sign_code_ ? C::sign : 0, magnitude == 0));
  }

 private:
  using Word = typename C::Word;

  LOWPREC_INLINE Word finite(uint32_t magnitude) const {
    const int exponent = max(static_cast<int>(magnitude >> grid.mantissa_bits) - 1, 0);
    const Word significand = magnitude - (static_cast<Word>(exponent) << grid.mantissa_bits);
    const auto x = normalise<C>(significand, exponent + grid.min_exponent, grid.mantissa_bits);
    return magnitude >> grid.gap == 0 ? 0 : write(grid, x);
  }

  LOWPREC_INLINE Word with_sign(Word bits, Word sign, bool zero) const {
    if (grid.regular) return bits | sign;
    if (bits >= first_signed_) bits |= sign;
    return zero & (sign != 0) ? minus_zero_ : bits;
  }

  uint32_t sign_code_;
  Word next_;          // what the code after the largest finite one means
  Word minus_zero_;    // what the code of -0 means
  Word first_signed_;  // the smallest magnitude that can be negative
};

/// Value to value of the format, by `Mode`, in a container that holds every finite one. NaN stays as it is.
template <class C, class Mode>
class Quantize {
 public:
  using Input = typename C::Bits;
  using Output = Input;
  static constexpr bool random = Mode::random;

  Grid grid;

  LOWPREC_INLINE Quantize(const Format& format, bool saturate)
      : grid(Grid::of(format, C{})), first_signed_(format.has_negative_zero() ? 0 : 1) {
    const Decode<uint32_t, C> decode(format);
    NoTally none;
    smallest_ = decode(1u << grid.gap, 0, none);
    largest_ = decode(grid.max_code, 0, none);
    const bool stays = format.overflow_code(saturate) == grid.max_code;
    overflow_ = stays ? largest_ : format.has_infinity() ? C::infinity : C::quiet_nan;
  }

  template <class AnyTally>
  LOWPREC_INLINE Output operator()(Input x, uint32_t word, AnyTally& tally) const {
    const Word magnitude = x & (C::sign - 1);
    const bool negative = x & C::sign;
    const auto from = read<C>(grid, magnitude);
    const auto to = round_to<Mode, Word>(grid, from, 0, negative, word);

    const Word position = to.position + Magnitude<C>::origin(to.exponent);
    Word bits = write<C>(grid, {position, from.exponent});
    // Next to zero the position says nothing: its exponent may be far below that of the smallest value.
    const Word small = to.position != 0 ? smallest_ : 0;
    if (to.lower == 0) bits = small;
    const bool infinite = Mode::overflows(negative) | (magnitude == C::infinity);
    const Word large = infinite ? overflow_ : largest_;
    const bool beyond = bits > largest_;
    if (beyond) bits = large;
    const bool nan = magnitude > C::infinity;
    tally.add(beyond, to.code);
    return nan ? x : static_cast<Output>(with_sign(bits, x & C::sign));
  }

 private:
  using Word = typename C::Word;

  LOWPREC_INLINE Word with_sign(Word bits, Word sign) const {
    if (grid.regular) return bits | sign;
    return bits >= first_signed_ ? bits | sign : bits;
  }

  Word first_signed_;  // the smallest magnitude that can be negative
  Word smallest_;      // nonzero
  Word largest_;       // finite
  Word overflow_;
};

/// Value to code, for any format; the code of NaN is the format's own.
template <class C, class Mode, class Code>
class Encode {
 public:
  using Input = typename C::Bits;
  using Output = Code;
  static constexpr bool random = Mode::random;

  Grid grid;

  LOWPREC_INLINE Encode(const Format& format, bool saturate)
      : grid(Grid::of(format, C{})),
        lift_(max(-grid.normal_drop, 0)),
        overflow_(format.overflow_code(saturate)),
        nan_(format.nan_code()),
        sign_(format.sign_code()),
        nan_sign_(format.specials == Specials::finite ? 0 : format.sign_code()),
        first_signed_(format.has_negative_zero() ? 0 : 1) {
    grid.regular = grid.regular && grid.within;
  }

  template <class AnyTally>
  LOWPREC_INLINE Output operator()(Input x, uint32_t word, AnyTally&) const {
    const auto magnitude = static_cast<typename C::Word>(x & (C::sign - 1));
    const bool negative = x & C::sign;
    const auto from = read<C>(grid, magnitude);
    Word code = from_bottom(round_to<Mode, Word>(grid, from, lift_, negative, word).code, magnitude == 0);

    const bool infinite = Mode::overflows(negative) | (magnitude == C::infinity);
    const uint32_t large = infinite ? overflow_ : grid.max_code;
    if (beyond(code, magnitude == C::infinity)) code = large;
    const uint32_t sign = negative ? sign_ : 0;
    code = with_sign(code, sign);
    const bool nan = magnitude > C::infinity;
    return static_cast<Output>(nan ? nan_ | (sign & nan_sign_) : code);
  }

 private:
  // Wide enough for the positions of either side.
  using Word = std::conditional_t<(sizeof(Input) > 4 || sizeof(Code) > 2), uint64_t, uint32_t>;

  /// The code as it counts from zero, from where the grid counts.
  LOWPREC_INLINE Word from_bottom(Word code, bool zero) const {
    if (grid.regular) return code;
    return zero ? code : code + static_cast<Word>(grid.skipped);
  }

  /// An infinity's own bits lie beyond the format's values only where the container holds all of these.
  LOWPREC_INLINE bool beyond(Word code, bool infinity) const {
    if (grid.regular) return code > grid.max_code;
    return (code > grid.max_code) | infinity;
  }

  LOWPREC_INLINE Word with_sign(Word code, uint32_t sign) const {
    if (grid.regular) return code | sign;
    return code >= first_signed_ ? code | sign : code;
  }

  int lift_;  // digits that the format has more than the container
  uint32_t overflow_;
  uint32_t nan_;
  uint32_t sign_;
  uint32_t nan_sign_;
  uint32_t first_signed_;  // the smallest magnitude code that can be negative
};

/// What makes an op: a format, how it overflows, and a shift of its exponents on a device, if there is one.
struct Setting {
  Format format;
  bool saturate = true;
  const int64_t* shift = nullptr;

  template <class Op>
  LOWPREC_INLINE Op make() const {
    if constexpr (std::is_constructible_v<Op, Format, bool>) {
      return Op(format, saturate);
    } else if constexpr (std::is_constructible_v<Op, Format>) {
      return Op(format);
    } else {
      return Op();
    }
  }
};

}  // namespace lowprec
