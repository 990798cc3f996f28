// One step of many sums at once, one in each lane of a vector: the exact s + a · b, rounded once, by float arithmetic.
// docs/kernels/accumulate-cpu.md says why the bits are those of accumulate.h.
//
// To be included where the compiler's target has the vectors V, after everything else.
#pragma once

#include "lowprec/accumulate_vectors.h"

#ifdef LOWPREC_VECTORS

namespace lowprec {
namespace {

/// What a level's rounding may leave out.
enum class Kind {
  plain,      // subnormals, -0, and overflow to the largest value
  overflows,  // subnormals and -0
  any,
};

/// How a level rounds.
enum class Path {
  none,      // not by vectors
  native,    // float32's own rounding
  bits,      // float32's bits, of which the last are cut off
  spacings,  // by adding a large number
};

/// A level's format as numbers of the vectors' type.
template <class V>
struct Target {
  using Scalar = typename V::Scalar;

  Path path = Path::none;
  Kind kind;
  bool random;
  int dropped;        // digits that float32 has more
  Scalar least;       // the smallest normal value
  Scalar below;       // the power of two whose spacing is that of numbers below it
  Scalar large;       // times a number's power of two: a number whose last digit counts the spacings there
  Scalar half;        // times it: half a spacing
  Scalar largest;     // finite value
  Scalar limit[2];    // what positive and negative magnitudes are clamped to before they are rounded
  Scalar infinite;    // a magnitude that becomes special, rounded or not
  Scalar special;     // what is past the largest value
  Scalar start;       // what leaves the first input of a group as it is
  Scalar minus_zero;  // what turns -0 into +0, if the format lacks it, by being added

  Target() = default;
  /// `wide`: whether the terms are those of a wider dtype's, so that no product of theirs can leave the vectors' range.
  Target(const LevelSpec& level, bool wide);

 private:
  void set_start(const LevelSpec& level) {
    random = level.rounding == 6;
    start = level.rounding == 4 ? Scalar(0) : -Scalar(0);
  }
};

/// The path of an IEEE format with float32's exponents among float32's numbers.
LOWPREC_INLINE Path path_of_bits(const LevelSpec& level) {
  const Format& format = level.format;
  const bool alike = format.ebits == 8 && format.bias == 127 && format.specials == Specials::ieee && format.subnormals;
  if (!alike || level.saturate) return Path::none;
  const bool known = level.rounding == 0 || (level.rounding >= 2 && level.rounding <= 4);
  if (format.mbits == 23) return known ? Path::native : Path::none;
  return level.rounding == 0 && format.mbits <= 21 ? Path::bits : Path::none;
}

/// 2^exponent as a normal number.
template <class V>
typename V::Scalar power_of_two(int exponent) {
  using C = typename V::Container;
  return bit_cast<typename V::Scalar>(static_cast<typename C::Bits>(exponent + C::bias) << C::fraction_bits);
}

template <class V>
Target<V>::Target(const LevelSpec& level, bool wide) {
  using C = typename V::Container;
  const Format& format = level.format;
  set_start(level);
  if (V::native) path = path_of_bits(level);
  dropped = Float32::fraction_bits - format.mbits;
  if (path != Path::none) return;
  const Layout layout = Layout::of(format);
  const int digits = layout.mantissa_bits, least_exponent = layout.min_exponent;
  const bool overflows = format.overflow_code(level.saturate) != format.max_code();
  const auto value = [&](uint64_t code) {
    const auto x = normalise<52>(layout.read(code));
    return bit_cast<double>(x.significand - (uint64_t{1} << 52) + (static_cast<uint64_t>(x.exponent + 1023) << 52));
  };
  // The value after the largest, which need not be one of the format.
  const int next_field = static_cast<int>((layout.max_code + 1) >> digits) - 1;
  const int top = next_field + least_exponent;
  const int shift = random ? C::fraction_bits - 32 - digits : C::fraction_bits - digits;
  const int lowest = least_exponent - digits - (random ? 32 : 2);
  const bool known = V::directed ? !random || !V::native : level.rounding == 0;
  const bool fits = known && digits >= 1 && shift >= (random ? 1 : 2) && least_exponent > -C::bias &&
                    (wide || lowest >= 1 - C::bias - C::fraction_bits) && top + shift + 1 <= C::bias &&
                    least_exponent + layout.gap + shift + 1 <= C::bias && least_exponent - 1 - digits > -C::bias;
  if (!fits) return;
  path = Path::spacings;
  kind = !format.subnormals || !format.has_negative_zero() ? Kind::any : overflows ? Kind::overflows : Kind::plain;
  least = power_of_two<V>(least_exponent);
  below = power_of_two<V>(least_exponent + layout.gap);
  large = power_of_two<V>(shift) * Scalar(random ? 1 : 1.5);
  half = power_of_two<V>(-1 - digits);
  largest = static_cast<Scalar>(value(layout.max_code));
  const uint64_t next_mantissa = (layout.max_code + 1) & ((uint64_t{1} << digits) - 1);
  const Scalar next = power_of_two<V>(top) * (1 + static_cast<Scalar>(next_mantissa) * power_of_two<V>(-digits));
  const Choice choice = Choice::of(level.rounding);
  for (int negative = 0; negative < 2; ++negative) {
    limit[negative] = overflows && choice.overflows(negative) ? next : largest;
  }
  const Scalar infinity = bit_cast<Scalar>(C::infinity), nan = bit_cast<Scalar>(C::quiet_nan);
  infinite = overflows ? infinity : nan;
  special = format.has_infinity() ? infinity : nan;
  minus_zero = format.has_negative_zero() ? -Scalar(0) : Scalar(0);
}

/// Its constants, each in every lane.
template <class V>
struct Splat {
  using Vector = typename V::Vector;
  Vector least, below, large, half, largest, limit[2], infinite, special, minus_zero;

  explicit Splat(const Target<V>& x)
      : least(V::splat(x.least)),
        below(V::splat(x.below)),
        large(V::splat(x.large)),
        half(V::splat(x.half)),
        largest(V::splat(x.largest)),
        limit{V::splat(x.limit[0]), V::splat(x.limit[1])},
        infinite(V::splat(x.infinite)),
        special(V::splat(x.special)),
        minus_zero(V::splat(x.minus_zero)) {}
};

/// How a mode takes a sum: `exact` is a · b + s as far as the mode must know it, `spacings` the rounding of a magnitude
/// to a whole number of spacings on top of power · large.
template <class V, class Mode>
struct Way;

template <class V>
struct Way<V, NearestEven> {
  using Vector = typename V::Vector;
  static Vector exact(Vector a, Vector b, Vector s) { return V::to_odd(a, b, s); }
  static Vector spacings(const Splat<V>& to, Vector power, Vector x, Vector, const uint32_t*) {
    return V::template fma<kNearest>(power, to.large, x);
  }
};

/// Half a spacing more, then down: rounding down twice is rounding down once to the coarser grid.
template <class V>
struct Way<V, NearestAway> {
  using Vector = typename V::Vector;
  static Vector exact(Vector a, Vector b, Vector s) { return V::template fma<kZero>(a, b, s); }
  static Vector spacings(const Splat<V>& to, Vector power, Vector x, Vector, const uint32_t*) {
    return V::template fma<kZero>(power, to.large, V::template fma<kZero>(power, to.half, x));
  }
};

template <class V>
struct Way<V, TowardZero> {
  using Vector = typename V::Vector;
  static Vector exact(Vector a, Vector b, Vector s) { return V::template fma<kZero>(a, b, s); }
  static Vector spacings(const Splat<V>& to, Vector power, Vector x, Vector, const uint32_t*) {
    return V::template fma<kZero>(power, to.large, x);
  }
};

template <class V, int kDirection>
struct Directed {
  using Vector = typename V::Vector;
  static Vector exact(Vector a, Vector b, Vector s) { return V::template fma<kDirection>(a, b, s); }
  static Vector spacings(const Splat<V>& to, Vector power, Vector x, Vector sign, const uint32_t*) {
    return V::template fma<kDirection>(power, to.large, V::copy_sign(x, sign));
  }
};

template <class V>
struct Way<V, Up> : Directed<V, kUp> {};

template <class V>
struct Way<V, Down> : Directed<V, kDown> {};

template <class V>
struct Way<V, ToOdd> {
  using Vector = typename V::Vector;
  static Vector exact(Vector a, Vector b, Vector s) { return V::to_odd(a, b, s); }
  static Vector spacings(const Splat<V>& to, Vector power, Vector x, Vector, const uint32_t*) {
    const Vector sum = V::template fma<kZero>(power, to.large, x);
    return V::set_last(sum, V::different(V::template fnma<kNearest>(power, to.large, sum), x));
  }
};

/// The last 32 digits of the sum are the fraction's first.
template <class V>
struct Way<V, Stochastic> {
  using Vector = typename V::Vector;
  static Vector exact(Vector a, Vector b, Vector s) { return V::template fma<kZero>(a, b, s); }
  static Vector spacings(const Splat<V>& to, Vector power, Vector x, Vector sign, const uint32_t* words) {
    const Vector sum = V::add_words(V::template fma<kZero>(power, to.large, x), words);
    return V::blend(V::different(sign, sign), sum, sign);  // a NaN's digits may have carried
  }
};

/// A sum as a value of the format. NaN stays: of a NaN and a number, `min` gives the second operand.
template <class V, class Mode, Kind kKind>
LOWPREC_INLINE typename V::Vector rounded(const Splat<V>& to, typename V::Vector x, const uint32_t* words) {
  using Vector = typename V::Vector;
  const Vector magnitude = V::abs(x);
  const Vector limit = kKind == Kind::any ? V::blend(V::negative(x), to.limit[0], to.limit[1]) : to.limit[0];
  const Vector clamped = V::min(limit, magnitude);
  const Vector own = V::exponent(clamped);
  const Vector power = kKind == Kind::any ? V::blend(V::less(own, to.least), own, to.below) : V::max(own, to.least);
  const Vector sum = Way<V, Mode>::spacings(to, power, clamped, x, words);
  Vector result = V::template fnma<kNearest>(power, to.large, sum);
  if (kKind == Kind::overflows) result = V::blend(V::less(to.largest, result), result, to.special);
  if (kKind == Kind::any) {
    const auto special = V::either(V::less(to.largest, V::abs(result)), V::equal(magnitude, to.infinite));
    result = V::blend(special, V::abs(result), to.special);
  }
  result = V::copy_sign(result, x);
  return kKind == Kind::any ? V::add(result, to.minus_zero) : result;
}

/// One step of a sum: s + a · b, exact before it is rounded.
template <class V, class Mode, Kind kKind>
class Step {
 public:
  using Vector = typename V::Vector;
  explicit Step(const Target<V>& target) : to_(target) {}
  LOWPREC_INLINE Vector operator()(Vector a, Vector b, Vector s, const uint32_t* words) const {
    return rounded<V, Mode, kKind>(to_, Way<V, Mode>::exact(a, b, s), words);
  }

 private:
  Splat<V> to_;
};

/// In float32 itself, by a mode that the instruction knows.
template <class V, int kDirection>
class NativeStep {
 public:
  using Vector = typename V::Vector;
  explicit NativeStep(const Target<V>&) {}
  LOWPREC_INLINE Vector operator()(Vector a, Vector b, Vector s, const uint32_t*) const {
    return V::template fma<kDirection>(a, b, s);
  }
};

/// In a format with float32's exponents: its codes are float32's, cut off. To nearest even.
template <class V>
class BitsStep {
 public:
  using Vector = typename V::Vector;
  explicit BitsStep(const Target<V>& target) : cut_(target.dropped) {}
  LOWPREC_INLINE Vector operator()(Vector a, Vector b, Vector s, const uint32_t*) const {
    const Vector exact = V::to_odd(a, b, s);
    return V::blend(V::different(exact, exact), cut_(exact), exact);  // a NaN's digits may have carried
  }

 private:
  typename V::Cut cut_;
};

/// `count` steps of a tile of kRows rows by kVectors vectors. a: [count][kRows], or in a single row [count][kVectors]
/// [lanes]; b: [count][kVectors][lanes]; `words` and sums: [kRows][kVectors][lanes], the words for each step.
template <class V, class AnyStep, int kRows, int kVectors>
void add_terms(const Target<V>& target, const typename V::Scalar* a, const typename V::Scalar* b, int64_t count,
               const uint32_t* words, typename V::Scalar* sums) {
  using Vector = typename V::Vector;
  constexpr int width = kVectors * V::lanes;
  constexpr bool paired = kRows == 1;
  const AnyStep step(target);
  Vector sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sum[i][j] = V::load(sums + i * width + j * V::lanes);
  }
  for (int64_t k = 0; k < count; ++k) {
    Vector y[kVectors];
    for (int j = 0; j < kVectors; ++j) y[j] = V::load(b + k * width + j * V::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector x = V::splat(a[paired ? 0 : k * kRows + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        const uint32_t* draws = words + ((k * kRows + i) * kVectors + j) * V::lanes;
        sum[i][j] = step(paired ? V::load(a + k * width + j * V::lanes) : x, y[j], sum[i][j], draws);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) V::store(sums + i * width + j * V::lanes, sum[i][j]);
  }
}

template <class V>
using Kernel = void (*)(const Target<V>&, const typename V::Scalar*, const typename V::Scalar*, int64_t,
                        const uint32_t*, typename V::Scalar*);

/// The kernels of a level: for tiles of several rows, and for as many vectors in a single one.
template <class V>
struct Kernels {
  Kernel<V> tile;
  Kernel<V> row;

  static Kernels of(const Target<V>& target, int rounding) {
    if constexpr (V::native) {
      if (target.path == Path::bits) return of<BitsStep<V>>();
      if (target.path == Path::native) {
        return rounding == 0   ? of<NativeStep<V, kNearest>>()
               : rounding == 2 ? of<NativeStep<V, kZero>>()
               : rounding == 3 ? of<NativeStep<V, kUp>>()
                               : of<NativeStep<V, kDown>>();
      }
    }
    return of_spacings(target.kind, rounding);
  }

 private:
  static Kernels of_spacings(Kind kind, int rounding) {
    if constexpr (V::directed) {
      switch (rounding) {
        case 1:
          return of<Step<V, NearestAway, Kind::any>>();
        case 2:
          return of<Step<V, TowardZero, Kind::any>>();
        case 3:
          return of<Step<V, Up, Kind::any>>();
        case 4:
          return of<Step<V, Down, Kind::any>>();
        case 5:
          return of<Step<V, ToOdd, Kind::any>>();
        case 6:
          if constexpr (!V::native) return of_kind<Stochastic>(kind);
      }
    }
    return of_kind<NearestEven>(kind);
  }

  template <class Mode>
  static Kernels of_kind(Kind kind) {
    return kind == Kind::plain       ? of<Step<V, Mode, Kind::plain>>()
           : kind == Kind::overflows ? of<Step<V, Mode, Kind::overflows>>()
                                     : of<Step<V, Mode, Kind::any>>();
  }

  template <class AnyStep>
  static Kernels of() {
    return {&add_terms<V, AnyStep, V::rows, V::vectors>, &add_terms<V, AnyStep, 1, V::rows * V::vectors>};
  }
};

}  // namespace
}  // namespace lowprec

#endif
