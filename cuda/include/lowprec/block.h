// Block formats, for host and device: a block's scale from its amax, and the cast of one element under a scale.
//
// With a power-of-two scale 2^k an element is rounded to the element format with its exponents raised by k: all that
// depends on k is a few sums. With a scale of a float format the quotient of element and scale is made, as a float64
// that is odd where it is not exact, and that is rounded to the element format: since float64 has so many digits more,
// the result is that of rounding the exact quotient once, in every mode.
#pragma once

#include <cstdint>

#include "lowprec/cast.h"
#include "lowprec/container.h"
#include "lowprec/format.h"
#include "lowprec/grid.h"
#include "lowprec/inline.h"
#include "lowprec/round.h"
#include "lowprec/statistics.h"

namespace lowprec {

/// How a power-of-two scale follows from amax, in the order of Python's `RULES`.
enum class Rule : int { floor, ceil, nearest };

/// Elements in blocks that share a scale, after Python's `BlockFormat`.
struct BlockFormat {
  Format element;
  Rule rule;
  bool float_scale;   // the scale has a format of its own, else it is a power of two
  bool tensor_scale;  // and the tensor has one too
  Format scale;

  /// Whether codes are stored as two's complement.
  LOWPREC_INLINE constexpr bool twos_complement() const {
    return element.ebits == 0 && element.specials == Specials::fnuz;
  }
};

/// A rounding mode that is chosen at run time: in place of a random word it is given its number in Python's `Rounding`.
struct AnyMode {
  static constexpr bool random = false;
  template <class Word>
  static LOWPREC_INLINE Word addend(const Digits<Word>& x) {
    switch (x.word) {
      case 1:
        return NearestAway::addend(x);
      case 2:
        return TowardZero::addend(x);
      case 3:
        return Up::addend(x);
      case 4:
        return Down::addend(x);
      case 5:
        return ToOdd::addend(x);
      default:
        return NearestEven::addend(x);
    }
  }
};

/// Whether numbers of either sign go to infinity when they round past the largest finite magnitude.
struct Overflows {
  bool positive;
  bool negative;

  static Overflows of(int64_t rounding) {
    const bool nearest = rounding < 2 || rounding == 6;
    return {nearest || rounding == 3, nearest || rounding == 4};
  }
};

/// A positive number of up to 64 bits: significand · 2^exponent.
struct Scaled {
  uint64_t significand;
  int exponent;
};

/// The index of the leading one of a number below 2^53, and -1023 for 0, from its exact float64.
LOWPREC_INLINE int leading_bit(uint64_t n) { return static_cast<int>(float_bits(n) >> 52) - 1023; }

/// The same number with its leading one at `top`; 0 stays. The significand has at most 53 bits.
LOWPREC_INLINE Scaled normalised(Scaled x, int top) {
  const int up = x.significand ? top - leading_bit(x.significand) : 0;
  return {up < 0 ? x.significand >> -up : x.significand << up, x.exponent - up};
}

template <class C>
LOWPREC_INLINE Scaled unpack(typename C::Word magnitude) {
  const auto x = Magnitude<C>::read(magnitude);
  return {x.significand(), x.exponent + 1 - C::bias - C::fraction_bits};
}

/// The value of a finite magnitude code.
LOWPREC_INLINE Scaled unpack(const Format& format, uint32_t code) {
  const uint32_t field = code >> format.mbits;
  const uint32_t mantissa = code & ((1u << format.mbits) - 1);
  const uint64_t significand = field ? mantissa | (1u << format.mbits) : format.subnormals ? mantissa : 0;
  return {significand, (field ? static_cast<int>(field) : 1) - format.bias - format.mbits};
}

/// The bits of a float64 of that value, if it is within the normal numbers; beyond them, the nearest of those. A
/// significand has at most 53 bits. For what is rounded to formats that float32 holds this is as good as exact.
LOWPREC_INLINE uint64_t float64_bits(Scaled x) {
  if (x.significand == 0) return 0;
  const uint64_t bits = float_bits(x.significand);
  const int field = static_cast<int>(bits >> 52) + x.exponent;
  return (bits & ((1ull << 52) - 1)) | static_cast<uint64_t>(min(max(field, 1), 2046)) << 52;
}

/// x / y for y of at most 40 bits, with at least 34 bits, the last one set where more would follow.
LOWPREC_INLINE Scaled divide_long(Scaled x, Scaled y) {
  x = normalised(x, 52);
  y = normalised(y, 39);
  const uint64_t high = x.significand / y.significand;
  const uint64_t rest = (x.significand % y.significand) << 21;
  const uint64_t low = rest / y.significand;
  const uint64_t sticky = rest % y.significand != 0;
  return {((high << 21) + low) | sticky, x.exponent - y.exponent - 21};
}

/// The scale of elements: a normalised divisor of 31 bits, also as a float64, or 0.
struct Divisor {
  double value;
  uint64_t significand;
  int exponent;

  static LOWPREC_INLINE Divisor of(Scaled x) {
    const Scaled y = normalised(x, 30);
    return {static_cast<double>(static_cast<int64_t>(y.significand)), y.significand, y.exponent};
  }
};

/// x / y as a float64 with at least 52 digits, the last one set where more would follow.
LOWPREC_INLINE uint64_t divide(Scaled x, const Divisor& y) {
  x = normalised(x, 52);
  // Numbers from 2^51 to 2^53, whatever the machine does to smaller ones; the remainder puts the last digit right.
  const double quotient = static_cast<double>(static_cast<int64_t>(x.significand)) / y.value * 0x1p30;
  uint64_t q = static_cast<uint64_t>(static_cast<int64_t>(quotient));
  int64_t rest = static_cast<int64_t>((x.significand << 30) - q * y.significand);
  const auto whole = static_cast<int64_t>(y.significand);
  q += rest < 0 ? -1 : rest >= whole ? 1 : 0;
  rest += rest < 0 ? whole : rest >= whole ? -whole : 0;
  return float64_bits({q | (rest != 0), x.exponent - y.exponent - 30});
}

/// The bits, in a container, of a number of up to 63 bits, rounded to nearest even; infinity past the largest.
template <class C>
LOWPREC_INLINE typename C::Word round_into(Scaled x) {
  if (x.significand == 0) return 0;
  // The leading bit from the float64 of the upper part, which is exact.
  const int leading = x.significand >> 32 ? 32 + leading_bit(x.significand >> 32) : leading_bit(x.significand);
  const int spacing = max(leading + x.exponent - C::fraction_bits, 1 - C::bias - C::fraction_bits);
  const int dropped = spacing - x.exponent;
  uint64_t kept = 0;
  if (dropped <= 0) {
    kept = x.significand << -dropped;
  } else if (dropped < 64) {
    const uint64_t half = 1ull << (dropped - 1);
    const uint64_t rest = x.significand & (2 * half - 1);
    kept = x.significand >> dropped;
    kept += rest > half || (rest == half && (kept & 1));
  }
  const int field = spacing + C::bias + C::fraction_bits - 1;
  if (field > 2 * C::bias) return C::infinity;
  const uint64_t bits = kept + (static_cast<uint64_t>(field) << C::fraction_bits);
  return bits < C::infinity ? static_cast<typename C::Word>(bits) : C::infinity;
}

/// Two's complement from sign and magnitude, and back; the code of -0, which is NaN's, stays.
LOWPREC_INLINE uint32_t stored(uint32_t code, uint32_t sign, bool twos_complement) {
  return twos_complement & (code > sign) ? 3 * sign - code : code;
}

// The cast of one element to a format whose exponents are raised by k.

/// Value to value at one k. `regular` as in `Grid`.
template <class C, class Mode>
struct QuantizeAt {
  using Bits = typename C::Bits;
  using Word = typename C::Word;
  using Output = Bits;
  static constexpr bool random = Mode::random;

  Grid grid;
  Word first_signed;
  Word smallest;
  Word largest;
  Word positive;  // what becomes of numbers past the largest, by sign, and of infinities
  Word negative;
  Word infinite;

  LOWPREC_INLINE Output operator()(Bits x, uint32_t word) const {
    const Word magnitude = x & (C::sign - 1);
    const bool minus = x & C::sign;
    const auto from = read<C>(grid, magnitude);
    const auto to = round_to<Mode, Word>(grid, from, 0, minus, word);
    const Word position = to.position + Magnitude<C>::origin(to.exponent);
    Word bits = write<C>(grid, {position, from.exponent});
    const Word small = to.position != 0 ? smallest : 0;
    if (to.lower == 0) bits = small;
    Word large = minus ? negative : positive;
    if (magnitude == C::infinity) large = infinite;
    if (bits > largest) bits = large;
    const Word sign = x & C::sign;
    const Word keeps = grid.regular || bits >= first_signed ? sign : 0;
    return magnitude > C::infinity ? x : static_cast<Output>(bits | keeps);
  }
};

/// Value to code at one k.
template <class C, class Mode, class Code>
struct EncodeAt {
  using Bits = typename C::Bits;
  using Output = Code;
  static constexpr bool random = Mode::random;
  using Word = std::conditional_t<(sizeof(Bits) > 4 || sizeof(Code) > 2), uint64_t, uint32_t>;

  Grid grid;
  uint32_t sign;
  uint32_t first_signed;
  uint32_t positive;
  uint32_t negative;
  uint32_t infinite;
  uint32_t nan;
  uint32_t nan_sign;
  bool twos_complement;

  /// The code of a magnitude, which may be past the largest finite one.
  LOWPREC_INLINE Word rounded_code(Bits x, uint32_t word) const {
    const auto from = read<C>(grid, static_cast<typename C::Word>(x & (C::sign - 1)));
    return round_to<Mode, Word>(grid, from, 0, x & C::sign, word).code;
  }

  LOWPREC_INLINE uint32_t code(Bits x, uint32_t word) const {
    const auto magnitude = static_cast<typename C::Word>(x & (C::sign - 1));
    const bool minus = x & C::sign;
    const Word rounded = rounded_code(x, word);
    uint32_t large = minus ? negative : positive;
    if (magnitude == C::infinity) large = infinite;
    uint32_t code = static_cast<uint32_t>(rounded);
    if (rounded > grid.max_code) code = large;
    const uint32_t signs = minus ? sign : 0;
    code |= grid.regular || code >= first_signed ? signs : 0;
    return magnitude > C::infinity ? nan | (signs & nan_sign) : code;
  }

  LOWPREC_INLINE Output operator()(Bits x, uint32_t word) const {
    return static_cast<Output>(stored(code(x, word), sign, twos_complement));
  }
};

/// The note of an element that `at`, an `EncodeAt`, makes a code of; `flushable` unless it is zero, infinite or NaN.
template <class At>
LOWPREC_INLINE uint32_t note_of(const At& at, typename At::Bits x, bool nan, bool flushable, uint32_t word) {
  const uint32_t code = at.code(x, word);
  const bool beyond = !nan & (at.rounded_code(x, word) > at.grid.max_code);
  const bool flushed = flushable & !beyond & ((code & (at.sign - 1)) == 0);
  return (code & kNoteCode) | (flushed ? kNoteFlushed : 0u) | (beyond ? kNoteSaturated : 0u);
}

/// Value to note at one k.
template <class C, class Mode>
struct NoteAt : EncodeAt<C, Mode, uint32_t> {
  LOWPREC_INLINE uint32_t operator()(typename C::Bits x, uint32_t word) const {
    const auto magnitude = static_cast<typename C::Word>(x & (C::sign - 1));
    const bool flushable = (magnitude != 0) & (magnitude < C::infinity);
    return note_of<EncodeAt<C, Mode, uint32_t>>(*this, x, magnitude > C::infinity, flushable, word);
  }
};

/// The grid of the elements at the least exponent that a container allows, and the way from there to others.
template <class C>
struct GridFrom {
  Grid base;
  int low;

  bool plain;  // whether the grid is regular at exponents where the container's numbers are all normal

  GridFrom(const Format& element, int low)
      : base(Grid::of(lower(element, low), C{})), low(low), plain(element.subnormals && element.has_negative_zero()) {}

  LOWPREC_INLINE Grid at(int k) const {
    Grid grid = base;
    grid.min_exponent += k - low;
    grid.regular = plain && grid.min_exponent >= 0;
    return grid;
  }

 private:
  static Format lower(Format format, int by) {
    format.bias -= by;
    return format;
  }
};

template <class C, class Mode>
class BlockQuantize {
 public:
  using At = QuantizeAt<C, Mode>;

  BlockQuantize(const BlockFormat& format, int low, bool saturate, Overflows overflows)
      : from_(format.element, low), first_signed_(format.element.has_negative_zero() ? 0 : 1) {
    const Format& element = format.element;
    smallest_ = place(1u << from_.base.gap);
    largest_ = place(element.max_code());
    const bool stays = element.overflow_code(saturate) == element.max_code();
    special_ = element.has_infinity() ? C::infinity : C::quiet_nan;
    positive_ = !stays && overflows.positive;
    negative_ = !stays && overflows.negative;
    infinite_ = !stays;
  }

  LOWPREC_INLINE At at(int k) const {
    const auto bits = [&](const Magnitude<C>& x) {
      const int move = k - from_.low;
      return denormalise<C>({x.bits + Magnitude<C>::origin(move), x.exponent + move});
    };
    const auto largest = bits(largest_);
    return {from_.at(k),
            first_signed_,
            bits(smallest_),
            largest,
            positive_ ? special_ : largest,
            negative_ ? special_ : largest,
            infinite_ ? special_ : largest};
  }

 private:
  using Word = typename C::Word;

  /// A code's value at the least exponent.
  Magnitude<C> place(uint32_t code) const {
    const Grid& grid = from_.base;
    const int exponent = max(static_cast<int>(code >> grid.mantissa_bits) - 1, 0);
    const Word significand = code - (static_cast<Word>(exponent) << grid.mantissa_bits);
    return normalise<C>(significand, exponent + grid.min_exponent, grid.mantissa_bits);
  }

  GridFrom<C> from_;
  Word first_signed_;
  Magnitude<C> smallest_;
  Magnitude<C> largest_;
  Word special_;
  bool positive_;
  bool negative_;
  bool infinite_;
};

template <class C, class Mode, class Code>
class BlockEncode {
 public:
  using At = EncodeAt<C, Mode, Code>;

  BlockEncode(const BlockFormat& format, int low, bool saturate, Overflows overflows) : from_(format.element, low) {
    const Format& element = format.element;
    const uint32_t past = element.overflow_code(saturate);
    const uint32_t largest = element.max_code();
    fixed_ = {from_.base,
              element.sign_code(),
              element.has_negative_zero() ? 0u : 1u,
              overflows.positive ? past : largest,
              overflows.negative ? past : largest,
              past,
              element.nan_code(),
              element.specials == Specials::finite ? 0 : element.sign_code(),
              format.twos_complement()};
  }

  LOWPREC_INLINE At at(int k) const {
    At op = fixed_;
    op.grid = from_.at(k);
    return op;
  }

 private:
  GridFrom<C> from_;
  At fixed_;
};

/// Values to notes for statistics.
template <class C, class Mode>
class BlockNote : public BlockEncode<C, Mode, uint32_t> {
 public:
  using At = NoteAt<C, Mode>;
  using BlockEncode<C, Mode, uint32_t>::BlockEncode;

  LOWPREC_INLINE At at(int k) const { return {BlockEncode<C, Mode, uint32_t>::at(k)}; }
};

// Scales.

/// What a block's scale follows from.
template <class C>
struct Peak {
  typename C::Word amax = 0;  // the largest finite magnitude
  typename C::Word infinite = 0;
  typename C::Word nan = 0;

  LOWPREC_INLINE void add(typename C::Word magnitude) {
    const typename C::Word finite = magnitude < C::infinity ? magnitude : 0;
    amax = amax > finite ? amax : finite;
    infinite |= magnitude == C::infinity;
    nan |= magnitude > C::infinity;
  }

  LOWPREC_INLINE void merge(const Peak& other) {
    amax = amax > other.amax ? amax : other.amax;
    infinite |= other.infinite;
    nan |= other.nan;
  }
};

/// The exponent k of a block's power-of-two scale. Its code is k + 127.
template <class C>
class PowerScale {
 public:
  using Word = typename C::Word;
  using Scale = int;
  static constexpr uint32_t nan = 255;

  explicit PowerScale(const BlockFormat& format)
      : low(max(shift_within(format.element, C{}, -127), -127)),
        high(min(shift_within(format.element, C{}, 127), 127)) {
    const Format& element = format.element;
    const Scaled largest = normalised(unpack(element, element.max_code()), 52);
    const int significant = element.mbits + 1 - max(element.emin() - element.emax(), 0);
    // The least 53-bit significand with which the exponent is one more.
    const uint64_t carries = format.rule == Rule::ceil      ? largest.significand + 1
                             : format.rule == Rule::nearest ? (1ull << 53) - (1ull << (52 - significant))
                                                            : 1ull << 53;
    constexpr int digits = 52 - C::fraction_bits;
    const uint64_t fraction = (carries - (1ull << 52) + (1ull << digits) - 1) >> digits;
    carry_ = static_cast<Word>((1ull << C::fraction_bits) - fraction);
    drop_ = C::bias + element.emax();
  }

  /// From the largest finite magnitude of a block, and whether it holds an infinity.
  LOWPREC_INLINE Scale of(Word amax, bool infinite) const {
    const auto read = Magnitude<C>::read(amax);
    const auto x = normalise<C>(read.significand(), read.exponent, C::fraction_bits);
    using Signed = std::make_signed_t<Word>;
    const int k = static_cast<int>(static_cast<Signed>(x.bits + carry_) >> C::fraction_bits) - drop_;
    const int none = infinite ? high : low;
    return amax == 0 ? none : min(max(k, low), high);
  }

  LOWPREC_INLINE static uint32_t code(Scale k) { return static_cast<uint32_t>(k + 127); }

  int low;
  int high;

 private:
  Word carry_;
  int drop_;
};

/// A block's scale in a float format: its code, and together with the tensor's scale the divisor of its elements.
struct Ratio {
  uint32_t code;
  Scaled value;
  Divisor divisor;
};

/// The scale of a float format: amax / (largest element · the tensor's scale), rounded to nearest even.
template <class C>
class RatioScale {
 public:
  using Word = typename C::Word;
  using Scale = Ratio;

  explicit RatioScale(const BlockFormat& format)
      : nan(format.scale.nan_code()),
        scale_(format.scale),
        largest_(unpack(format.element, format.element.max_code())),
        whole_(format.tensor_scale),
        round_({format.scale, Rule::floor, false, false, {}}, 0, true, Overflows::of(0)) {}

  /// The tensor's scale, as the bits of a float32.
  LOWPREC_INLINE void take(uint32_t tensor_scale) {
    tensor_ = whole_ ? unpack<Float32>(tensor_scale & (Float32::sign - 1)) : Scaled{1, 0};
  }

  LOWPREC_INLINE Scale of(Word amax, bool infinite) const {
    uint32_t code = 0;
    if (amax == 0) {
      code = infinite ? scale_.max_code() : 0;
    } else if (tensor_.significand != 0) {
      const Scaled by{largest_.significand * tensor_.significand, largest_.exponent + tensor_.exponent};
      code = round_.at(0).code(float64_bits(divide_long(unpack<C>(amax), by)), 0);
    }
    const Scaled block = unpack(scale_, code);
    const Scaled value{block.significand * tensor_.significand, block.exponent + tensor_.exponent};
    return {code, value, Divisor::of(value)};
  }

  LOWPREC_INLINE static uint32_t code(const Scale& scale) { return scale.code; }
  LOWPREC_INLINE const Format& format() const { return scale_; }

  uint32_t nan;

 private:
  Format scale_;
  Scaled largest_;
  bool whole_;
  BlockEncode<Float64, NearestEven, uint8_t> round_;
  Scaled tensor_{1, 0};
};

/// The bits of the tensor's scale, a float32: amax / (largest element · largest scale), rounded to nearest even.
class TensorScale {
 public:
  explicit TensorScale(const BlockFormat& format)
      : round_({{8, 23, 127, Specials::ieee, true}, Rule::floor, false, false, {}}, 0, true, Overflows::of(0)) {
    const Scaled element = unpack(format.element, format.element.max_code());
    const Scaled scale = unpack(format.scale, format.scale.max_code());
    largest_ = {element.significand * scale.significand, element.exponent + scale.exponent};
  }

  /// A tensor without finite nonzero numbers, but with infinities, counts as holding the container's largest number.
  template <class C>
  LOWPREC_INLINE uint32_t of(typename C::Word amax, bool infinite, C) const {
    if (amax == 0 && infinite) amax = C::infinity - 1;
    return round_.at(0).code(float64_bits(divide_long(unpack<C>(amax), largest_)), 0);
  }

 private:
  BlockEncode<Float64, NearestEven, uint32_t> round_;
  Scaled largest_;
};

// Scale and cast together: what kernels are made of.

/// Casts under power-of-two scales; `Cast` is a `BlockQuantize` or a `BlockEncode`.
template <class C, class Cast>
struct PowerBlocks {
  using Container = C;
  using At = typename Cast::At;
  using Output = typename At::Output;
  using Scale = int;

  BlockFormat format;
  bool saturate;
  PowerScale<C> scales;
  Cast cast;

  PowerBlocks(const BlockFormat& format, bool saturate, int64_t rounding)
      : format(format),
        saturate(saturate),
        scales(format),
        cast(format, scales.low, saturate, Overflows::of(rounding)) {}

  LOWPREC_INLINE void take(uint32_t) {}
  LOWPREC_INLINE uint32_t nan() const { return PowerScale<C>::nan; }
  LOWPREC_INLINE At at(Scale k) const { return cast.at(k); }
};

/// Marks a cast to values, where else there is the type of codes.
struct Values {};

/// Marks a cast to notes for statistics.
struct Notes {};

/// The cast of an element under a scale of a float format, to `Values`, to `Notes` or to codes of a type.
template <class C, class Mode, class Target>
struct RatioAt {
  using Bits = typename C::Bits;
  static constexpr bool values = std::is_same_v<Target, Values>;
  static constexpr bool notes = std::is_same_v<Target, Notes>;
  using Output = std::conditional_t<values, Bits, std::conditional_t<notes, uint32_t, Target>>;
  static constexpr bool random = Mode::random;

  EncodeAt<Float64, Mode, uint32_t> encode;
  Format element;
  Ratio scale;
  struct {
    bool regular = false;  // loops that tell regular grids apart find none here
  } grid;

  /// The element over its scale, as the bits of a float64 that is odd where it is not exact.
  LOWPREC_INLINE uint64_t quotient(Bits x, typename C::Word magnitude) const {
    const uint64_t sign = x & C::sign ? Float64::sign : 0;
    if (magnitude > C::infinity) return Float64::quiet_nan | sign;
    if (scale.value.significand == 0) return 0;
    if (magnitude == C::infinity) return Float64::infinity | sign;
    return divide(unpack<C>(magnitude), scale.divisor) | sign;
  }

  LOWPREC_INLINE Output operator()(Bits x, uint32_t word) const {
    const auto magnitude = static_cast<typename C::Word>(x & (C::sign - 1));
    const uint64_t over = quotient(x, magnitude);
    if constexpr (notes) {
      const bool flushable = (magnitude != 0) & (magnitude < C::infinity);
      return note_of(encode, over, magnitude > C::infinity, flushable, word);
    }
    const uint32_t found = encode.code(over, word);
    if constexpr (values) {
      return magnitude > C::infinity ? x : value(found, x & C::sign);
    } else {
      return static_cast<Output>(stored(found, encode.sign, encode.twos_complement));
    }
  }

 private:
  LOWPREC_INLINE Output value(uint32_t code, typename C::Word x_sign) const {
    const uint32_t magnitude = code & (encode.sign - 1);
    if (code == encode.sign && encode.first_signed) return static_cast<Output>(C::quiet_nan | x_sign);
    const typename C::Word sign = code & encode.sign ? C::sign : 0;
    if (magnitude > encode.grid.max_code) {
      return static_cast<Output>((element.has_infinity() ? C::infinity : C::quiet_nan) | x_sign);
    }
    const Scaled x = unpack(element, magnitude);
    return static_cast<Output>(
        round_into<C>({x.significand * scale.value.significand, x.exponent + scale.value.exponent}) | sign);
  }
};

template <class C, class Mode, class Target>
struct RatioBlocks {
  using Container = C;
  using At = RatioAt<C, Mode, Target>;
  using Output = typename At::Output;
  using Scale = Ratio;

  RatioScale<C> scales;
  BlockEncode<Float64, Mode, uint32_t> cast;
  Format element;

  RatioBlocks(const BlockFormat& format, bool saturate, int64_t rounding)
      : scales(format), cast(format, 0, saturate, Overflows::of(rounding)), element(format.element) {}

  LOWPREC_INLINE void take(uint32_t tensor_scale) { scales.take(tensor_scale); }
  LOWPREC_INLINE uint32_t nan() const { return scales.nan; }
  LOWPREC_INLINE At at(const Scale& scale) const { return {cast.at(0), element, scale, {}}; }
};

/// Codes under scales to values: the exact product, rounded once to nearest even.
template <class Code, class C>
struct DecodeBlock {
  using Input = Code;
  using Output = typename C::Bits;

  BlockFormat format;
  Scaled tensor{1, 0};
  bool tensor_negative = false;
  bool tensor_nan = false;

  explicit DecodeBlock(const BlockFormat& format) : format(format) {}

  /// The tensor's scale, as the bits of a float32.
  LOWPREC_INLINE void take(uint32_t tensor_scale) {
    if (!format.tensor_scale) return;
    const uint32_t magnitude = tensor_scale & (Float32::sign - 1);
    tensor = unpack<Float32>(magnitude);
    tensor_negative = tensor_scale & Float32::sign;
    tensor_nan = magnitude >= Float32::infinity;
  }

  struct Scale {
    Scaled value;
    bool negative;
    bool nan;
  };

  LOWPREC_INLINE Scale scale(uint32_t code) const {
    if (!format.float_scale) return {{1, static_cast<int>(code) - 127}, false, code == 255};
    const Format& scale = format.scale;
    const uint32_t magnitude = code & (scale.sign_code() - 1);
    const bool nan = magnitude > scale.max_code() || (!scale.has_negative_zero() && code == scale.sign_code());
    const Scaled x = unpack(scale, magnitude > scale.max_code() ? 0 : magnitude);
    return {{x.significand * tensor.significand, x.exponent + tensor.exponent},
            static_cast<bool>(code & scale.sign_code()) != tensor_negative,
            nan || tensor_nan};
  }

  LOWPREC_INLINE Output operator()(Code stored_code, const Scale& scale) const {
    const Format& element = format.element;
    const uint32_t sign_code = element.sign_code();
    const uint32_t code = stored(stored_code & (2 * sign_code - 1), sign_code, format.twos_complement());
    const uint32_t magnitude = code & (sign_code - 1);
    const bool minus = (code & sign_code) != 0;
    if (scale.nan || (!element.has_negative_zero() && code == sign_code)) return static_cast<Output>(C::quiet_nan);
    const typename C::Word sign = minus != scale.negative ? C::sign : 0;
    if (magnitude > element.max_code()) {
      const bool infinite = element.has_infinity() && magnitude == element.max_code() + 1;
      return static_cast<Output>((infinite && scale.value.significand ? C::infinity : C::quiet_nan) | sign);
    }
    const Scaled x = unpack(element, magnitude);
    const auto bits = round_into<C>({x.significand * scale.value.significand, x.exponent + scale.value.exponent});
    const bool keeps = minus && (magnitude || element.has_negative_zero());
    return static_cast<Output>(bits | (keeps != scale.negative ? C::sign : 0));
  }
};

}  // namespace lowprec
