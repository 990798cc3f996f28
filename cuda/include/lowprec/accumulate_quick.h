// One step of a sum by float32 instructions: on a GPU, where they can round in any direction and nothing flushes, the
// quick way of most formats. docs/kernels/accumulate.md proves each way; the tests hold them to accumulate.h bit for
// bit.
//
// Values are scaled by a power of two, so that the format's smallest normal value becomes float32's, 2^-126. Then the
// format's values are the float32 numbers whose last `drop` bits are zero, subnormal ones like normal ones, and
// rounding is one addition to the bits. Device code only, but for the constants.
#pragma once

#include <cstdint>

#include "lowprec/accumulate.h"
#include "lowprec/float_grid.h"

namespace lowprec {

/// The constants of a level's format and rounding on float32's bits.
struct QuickRound {
  bool usable;        // whether the quick ways give the level's results for numbers that are finite
  int mode;           // by its place in Python's `Rounding`; up in place of down
  bool nearest_even;  // with subnormals: it has the quickest ways
  bool random;
  int digits;           // significand bits p, the leading one included
  int scale;            // log2 of what values are multiplied by
  float sign;           // -1 where values are negated, which makes rounding down rounding up
  uint32_t half;        // half a spacing
  uint32_t mask;        // of the bits that go
  uint32_t unit;        // one spacing
  float largest;        // finite value
  uint32_t over;        // bits of what a sum beyond it becomes, where it is positive (after the negation)
  uint32_t under;       // and where it is negative
  bool saturates;       // no sum is ever infinite
  bool infinite_nan;    // whether infinity stands for NaN
  bool minus_zero;      // whether the format has -0
  uint32_t one, minus;  // 1 and -1, which the compiler does not know
  // What modes add before the last bits go: always, to negative numbers, where the last bit that stays is set.
  uint32_t always, negative, odd;
  bool gap;  // no subnormals: the bits up to which numbers go to zero
  uint32_t most_to_zero, most_to_minus_zero;

  QuickRound() = default;
  explicit QuickRound(const LevelSpec& level) {
    const Format& format = level.format;
    const Grid grid = Grid::of(format, Float32{});
    const bool down = level.rounding == 4;
    mode = down ? 3 : level.rounding;
    const bool saturate = level.saturate || format.specials == Specials::finite;
    const int drop = Float32::fraction_bits - grid.mantissa_bits;
    random = mode == 6;
    nearest_even = mode == 0 && format.subnormals;
    digits = grid.mantissa_bits + 1;
    usable = grid.within && !grid.skipped && drop >= 2 && drop <= Float32::fraction_bits &&
             format.max_code() >> grid.mantissa_bits < 255 && (!random || format.subnormals);
    if (!usable) return;
    scale = -grid.min_exponent;
    sign = down ? -1.0f : 1.0f;
    unit = 1u << drop;
    mask = unit - 1;
    half = unit / 2;
    one = 1;
    minus = 0u - 1;
    largest = as_float(format.max_code() << drop);
    const bool infinity = mode <= 1 || random;
    const uint32_t top = as_bits(largest);
    over = saturate || !(infinity || mode == 3) ? top : Float32::infinity;
    under = saturate || !infinity ? top : Float32::infinity;
    saturates = saturate;
    infinite_nan = !saturate && !format.has_infinity();
    minus_zero = format.has_negative_zero();
    always = mode == 0 ? half - 1 : mode == 1 ? half : mode == 3 || mode == 5 ? mask : 0;
    negative = mode == 3 ? 0u - mask : 0;
    odd = mode == 0 ? 1 : mode == 5 ? 0u - mask : 0;
    gap = !format.subnormals;
    constexpr uint32_t middle = 1u << (Float32::fraction_bits - 1), all = 2 * middle - 1;
    most_to_zero = mode == 0 ? middle : mode == 1 ? middle - 1 : mode == 2 ? all : 0;
    most_to_minus_zero = mode == 3 ? all : most_to_zero;
  }
};

/// Rounding to nearest, ties to even, of sums that are within range. Half a spacing more and cut off rounds to nearest;
/// what was a tie then has nothing to cut off, and goes to the even neighbour.
///
/// Sums are written as products with one: the pipe that multiplies has room where that of integer sums and logic, half
/// as wide as the rest, is full. A predicate guards one instruction where the compiler would take two.
struct RoundExact {
  uint32_t half, mask, not_unit, one, minus;

  LOWPREC_DEVICE explicit RoundExact(const QuickRound& to)
      : half(to.half), mask(to.mask), not_unit(~to.unit), one(to.one), minus(to.minus) {}

  /// Of a sum's bits, below which there are others where `below` and `above` differ.
  LOWPREC_DEVICE uint32_t operator()(uint32_t bits, uint32_t below, uint32_t above) const {
    const uint32_t sum = bits * one + half;
    const uint32_t rest = sum & mask;
    uint32_t rounded = rest * minus + sum;
    asm("{ .reg .pred more; .reg .b32 any; setp.ne.u32 more, 0, 0;"
        "  lop3.or.b32 any|more, %1, %2, %3, 0xF6, more; @!more and.b32 %0, %0, %4; }"
        : "+r"(rounded)
        : "r"(rest), "r"(below), "r"(above), "r"(not_unit));
    return rounded;
  }

  /// The same where there are none, or make no difference.
  LOWPREC_DEVICE uint32_t operator()(uint32_t bits) const {
    const uint32_t sum = bits * one + half;
    const uint32_t rest = sum & mask;
    uint32_t rounded = rest * minus + sum;
    asm("{ .reg .pred tie; setp.eq.u32 tie, %1, 0; @tie and.b32 %0, %0, %2; }"
        : "+r"(rounded)
        : "r"(rest), "r"(not_unit));
    return rounded;
  }
};

/// Sums to one more term: s = round(a · b + s) for a row of outputs. Each way says which sums it is right for.

/// Nearest even where one float32 rounding before makes no difference.
template <int kWidth>
struct NarrowWay {
  RoundExact round;
  LOWPREC_DEVICE explicit NarrowWay(const QuickRound& to) : round(to) {}
  LOWPREC_DEVICE void operator()(float a, const float (&b)[kWidth], float (&s)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) s[j] = as_float(round(as_bits(__fmaf_rn(a, b[j], s[j]))));
  }
};

/// Nearest even of any sums in range. Rounded toward zero, a sum has the bits that decide, and whether there are more
/// is whether rounding down and up differ.
template <int kWidth>
struct ExactWay {
  RoundExact round;
  LOWPREC_DEVICE explicit ExactWay(const QuickRound& to) : round(to) {}
  LOWPREC_DEVICE void operator()(float a, const float (&b)[kWidth], float (&s)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const uint32_t cut = as_bits(__fmaf_rz(a, b[j], s[j]));
      const uint32_t below = as_bits(__fmaf_rd(a, b[j], s[j]));
      const uint32_t above = as_bits(__fmaf_ru(a, b[j], s[j]));
      s[j] = as_float(round(cut, below, above));
    }
  }
};

/// The same, quicker where float32 sums rarely lie halfway between two values of the format: those that do not are
/// rounded right, and the others take the way above.
template <int kWidth>
struct RareWay {
  ExactWay<kWidth> exact;
  LOWPREC_DEVICE explicit RareWay(const QuickRound& to) : exact(to) {}

  /// Whether there is a tie in any thread of the warp.
  LOWPREC_DEVICE bool round_row(float a, const float (&b)[kWidth], const float (&s)[kWidth],
                                float (&rounded)[kWidth]) const {
    static_assert(kWidth == 8);
    uint32_t tie;
#define LOWPREC_STEP(n, clear, b, s)                                                               \
  "fma.rn.f32 x, %9, " b ", " s "; mov.b32 y, x; mad.lo.u32 y, y, %28, %10; lop3.and.b32 r|" clear \
  ", y, %11, 0, 0xC0, " clear "; mad.lo.u32 v" n ", r, %29, y;"
    asm("{ .reg .pred even, odd; .reg .f32 x; .reg .b32 y, r, v<8>; setp.eq.u32 even, 0, 0; setp.eq.u32 odd, 0, 0;"
        LOWPREC_STEP("0", "even", "%12", "%20")
        LOWPREC_STEP("1", "odd", "%13", "%21")
        LOWPREC_STEP("2", "even", "%14", "%22")
        LOWPREC_STEP("3", "odd", "%15", "%23")
        LOWPREC_STEP("4", "even", "%16", "%24")
        LOWPREC_STEP("5", "odd", "%17", "%25")
        LOWPREC_STEP("6", "even", "%18", "%26")
        LOWPREC_STEP("7", "odd", "%19", "%27")
        "mov.b32 %0, v0; mov.b32 %1, v1; mov.b32 %2, v2; mov.b32 %3, v3; mov.b32 %4, v4; mov.b32 %5, v5; mov.b32 %6, v6; mov.b32 %7, v7;"
        "and.pred even, even, odd; vote.sync.all.pred even, even, -1; selp.u32 %8, 0, 1, even; }"
        : "=f"(rounded[0]), "=f"(rounded[1]), "=f"(rounded[2]), "=f"(rounded[3]), "=f"(rounded[4]), "=f"(rounded[5]), "=f"(rounded[6]), "=f"(rounded[7]), "=r"(tie)
        : "f"(a), "r"(exact.round.half), "r"(exact.round.mask), "f"(b[0]), "f"(b[1]), "f"(b[2]), "f"(b[3]), "f"(b[4]), "f"(b[5]), "f"(b[6]), "f"(b[7]), "f"(s[0]), "f"(s[1]), "f"(s[2]), "f"(s[3]), "f"(s[4]), "f"(s[5]), "f"(s[6]), "f"(s[7]), "r"(exact.round.one), "r"(exact.round.minus));
#undef LOWPREC_STEP
    return tie;
  }
  LOWPREC_DEVICE void operator()(float a, const float (&b)[kWidth], float (&s)[kWidth]) const {
    float rounded[kWidth];
    if (round_row(a, b, s, rounded)) [[unlikely]]
      return exact(a, b, s);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) s[j] = rounded[j];
  }
};

/// Nearest even of any sums at all.
template <int kWidth, bool kSaturate>
struct LimitedWay {
  ExactWay<kWidth> exact;
  float largest;
  uint32_t over;
  LOWPREC_DEVICE explicit LimitedWay(const QuickRound& to) : exact(to), largest(to.largest), over(to.over) {}
  LOWPREC_DEVICE void operator()(float a, const float (&b)[kWidth], float (&s)[kWidth]) const {
    exact(a, b, s);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) s[j] = kSaturate ? saturated(s[j]) : overflown(s[j]);
  }

 private:
  LOWPREC_DEVICE float saturated(float x) const {
#if __CUDA_ARCH__ >= 860
    asm("min.xorsign.abs.f32 %0, %0, %1;" : "+f"(x) : "f"(largest));
    return x;
#else
    return copysignf(fminf(fabsf(x), largest), x);
#endif
  }
  LOWPREC_DEVICE float overflown(float x) const {
    asm("{ .reg .pred past; .reg .f32 size; abs.f32 size, %0; setp.gt.f32 past, size, %1;"
        "  .reg .b32 bits; mov.b32 bits, %0; @past lop3.b32 bits, bits, 0x80000000, %2, 0xEA; mov.b32 %0, bits; }"
        : "+f"(x)
        : "f"(largest), "r"(over));
    return x;
  }
};

/// What a sum past the largest value becomes. Infinite ones are so already: no sum of finite numbers here is.
LOWPREC_DEVICE uint32_t limited(const QuickRound& to, uint32_t bits) {
  const uint32_t sign = bits & Float32::sign, size = bits ^ sign;
  const uint32_t past = sign | (sign ? to.under : to.over);
  return (size > as_bits(to.largest)) & (size != Float32::infinity || to.saturates) ? past : bits;
}

/// A mode for which one float32 sum, rounded in the right direction, decides. `kLimited`: of any sums, not only those
/// in range.
template <int kWidth, class Mode, bool kLimited>
struct ModeWay {
  QuickRound to;
  LOWPREC_DEVICE explicit ModeWay(const QuickRound& to) : to(to) {}
  LOWPREC_DEVICE void operator()(float a, const float (&b)[kWidth], float (&s)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const uint32_t rounded = Mode::round(to, a, b[j], s[j]);
      s[j] = as_float(kLimited ? limited(to, rounded) : rounded);
    }
  }
};

/// Cutting off twice is cutting off once.
struct ModeTowardZero {
  static LOWPREC_DEVICE uint32_t round(const QuickRound& to, float a, float b, float s) {
    return as_bits(__fmaf_rz(a, b, s)) & ~to.mask;
  }
};

/// Whether half a spacing is reached is to be seen in what rounding toward zero leaves.
struct ModeNearestAway {
  static LOWPREC_DEVICE uint32_t round(const QuickRound& to, float a, float b, float s) {
    return (as_bits(__fmaf_rz(a, b, s)) * to.one + to.half) & ~to.mask;
  }
};

/// Rounding up twice is rounding up once.
struct ModeUp {
  static LOWPREC_DEVICE uint32_t round(const QuickRound& to, float a, float b, float s) {
    const uint32_t sum = as_bits(__fmaf_ru(a, b, s));
    const uint32_t minus = static_cast<uint32_t>(static_cast<int32_t>(sum) >> 31);
    return ((~minus & to.mask) * to.one + sum) & ~to.mask;
  }
};

/// A sum rounded to odd: its last bit also stands for all that lies below.
LOWPREC_DEVICE uint32_t sum_to_odd(float a, float b, float s) {
  const uint32_t below = as_bits(__fmaf_rd(a, b, s));
  const uint32_t above = as_bits(__fmaf_ru(a, b, s));
  return below & 1 ? below : above;
}

struct ModeToOdd {
  static LOWPREC_DEVICE uint32_t round(const QuickRound& to, float a, float b, float s) {
    const uint32_t sum = sum_to_odd(a, b, s);
    return (sum & to.mask) != 0 ? (sum & ~to.mask) | to.unit : sum;
  }
};

/// Every deterministic mode of formats with or without subnormals.
struct ModeAny {
  static LOWPREC_DEVICE uint32_t round(const QuickRound& to, float a, float b, float s) {
    return round(to, sum_to_odd(a, b, s));
  }

  static LOWPREC_DEVICE uint32_t round(const QuickRound& to, uint32_t sum) {
    const uint32_t minus = static_cast<uint32_t>(static_cast<int32_t>(sum) >> 31);
    const uint32_t carried = sum + to.always + (minus & to.negative) + ((sum & to.unit) != 0 ? to.odd : 0);
    return to.gap ? close(to, sum, carried & ~to.mask) : carried & ~to.mask;
  }

 private:
  /// Without subnormals there is nothing between zero and the smallest normal value.
  static LOWPREC_DEVICE uint32_t close(const QuickRound& to, uint32_t sum, uint32_t rounded) {
    constexpr uint32_t smallest = 1u << Float32::fraction_bits;
    const uint32_t sign = sum & Float32::sign, size = sum ^ sign;
    const uint32_t closed = sign | (size > (sign ? to.most_to_minus_zero : to.most_to_zero) ? smallest : 0);
    return size < smallest ? closed : rounded;
  }
};

/// IEEE single precision, for which there is an instruction.
template <int kWidth>
struct SingleWay {
  LOWPREC_DEVICE void operator()(float a, const float (&b)[kWidth], float (&s)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) s[j] = __fmaf_rn(a, b[j], s[j]);
  }
};

}  // namespace lowprec
