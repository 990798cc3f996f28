// Sums of many outputs at once: one in each lane of AVX-512's vectors, whose fused multiply-add rounds in a direction
// that the instruction names. docs/kernels/accumulate-cpu.md says why the bits are those of accumulate.h.
#pragma once

#include "lowprec/inline.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LOWPREC_AVX512 1
#endif

#ifdef LOWPREC_AVX512

// GCC 12 warns of its own header's undefined operands (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "lowprec/accumulate.h"
#include "lowprec/dispatch.h"
#include "lowprec/grid.h"
#include "lowprec/round.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,f16c")

namespace lowprec {
namespace avx512 {
namespace {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
constexpr int kZero = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;

/// Sixteen sums in float32.
struct Floats {
  using Container = Float32;
  using Scalar = float;
  using Vector = __m512;
  using Mask = __mmask16;
  static constexpr int lanes = 16;

  static Vector load(const float* x) { return _mm512_load_ps(x); }
  /// Sixteen elements of a tensor, exact.
  template <class C>
  static Vector read(const typename C::Bits* x) {
    if constexpr (std::is_same_v<C, Float32>) return _mm512_loadu_ps(x);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    if constexpr (std::is_same_v<C, Float16>) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  /// Rows become columns.
  static void transpose(Vector (&x)[lanes]) {
    Vector pairs[lanes], fours[lanes];
    for (int i = 0; i < lanes; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < lanes; i += 4) {
      for (int j = 0; j < 2; ++j) {
        const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + j + 2]);
        fours[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        fours[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    }
    for (int i = 0; i < 4; ++i) {
      const Vector even = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0x88);
      const Vector odd = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0xDD);
      const Vector more_even = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0x88);
      const Vector more_odd = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0xDD);
      x[i] = _mm512_shuffle_f32x4(even, more_even, 0x88);
      x[4 + i] = _mm512_shuffle_f32x4(odd, more_odd, 0x88);
      x[8 + i] = _mm512_shuffle_f32x4(even, more_even, 0xDD);
      x[12 + i] = _mm512_shuffle_f32x4(odd, more_odd, 0xDD);
    }
  }
  static void store(float* x, Vector value) { _mm512_store_ps(x, value); }
  static Vector splat(float x) { return _mm512_set1_ps(x); }
  template <int kDirection>
  static Vector fma(Vector a, Vector b, Vector c) {
    return _mm512_fmadd_round_ps(a, b, c, kDirection);
  }
  template <int kDirection>
  static Vector fnma(Vector a, Vector b, Vector c) {
    return _mm512_fnmadd_round_ps(a, b, c, kDirection);
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector abs(Vector x) { return _mm512_abs_ps(x); }
  static Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Vector exponent(Vector x) { return _mm512_and_ps(x, splat(as_float(Float32::infinity))); }
  static Vector copy_sign(Vector x, Vector sign) { return bits(x, sign, splat(-0.0f)); }
  static Mask odd(Vector x) { return _mm512_test_epi32_mask(_mm512_castps_si512(x), _mm512_set1_epi32(1)); }
  static Mask negative(Vector x) { return _mm512_movepi32_mask(_mm512_castps_si512(x)); }
  static Mask less(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask equal(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Mask different(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
  static Vector blend(Mask mask, Vector no, Vector yes) { return _mm512_mask_blend_ps(mask, no, yes); }
  static Vector set_last(Vector x, Mask mask) {
    const __m512i n = _mm512_castps_si512(x);
    return _mm512_castsi512_ps(_mm512_mask_or_epi32(n, mask, n, _mm512_set1_epi32(1)));
  }

 private:
  static float as_float(uint32_t bits) { return bit_cast<float>(bits); }
  /// Those of `b` where `mask` is set, else those of `a`.
  static Vector bits(Vector a, Vector b, Vector mask) {
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(mask), _mm512_castps_si512(a), _mm512_castps_si512(b), 0xAC));
  }
};

/// Eight sums in float64.
struct Doubles {
  using Container = Float64;
  using Scalar = double;
  using Vector = __m512d;
  using Mask = __mmask8;
  static constexpr int lanes = 8;

  static Vector load(const double* x) { return _mm512_load_pd(x); }
  /// Eight elements of a tensor, exact.
  template <class C>
  static Vector read(const typename C::Bits* x) {
    if constexpr (std::is_same_v<C, Float64>) return _mm512_loadu_pd(x);
    if constexpr (std::is_same_v<C, Float32>)
      return _mm512_cvtps_pd(_mm256_loadu_ps(reinterpret_cast<const float*>(x)));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    if constexpr (std::is_same_v<C, Float16>) return _mm512_cvtps_pd(_mm256_cvtph_ps(half));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
  }
  /// Rows become columns.
  static void transpose(Vector (&x)[lanes]) {
    Vector pairs[lanes];
    for (int i = 0; i < lanes; i += 2) {
      pairs[i] = _mm512_unpacklo_pd(x[i], x[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_pd(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      const Vector even = _mm512_shuffle_f64x2(pairs[i], pairs[2 + i], 0x88);
      const Vector odd = _mm512_shuffle_f64x2(pairs[i], pairs[2 + i], 0xDD);
      const Vector more_even = _mm512_shuffle_f64x2(pairs[4 + i], pairs[6 + i], 0x88);
      const Vector more_odd = _mm512_shuffle_f64x2(pairs[4 + i], pairs[6 + i], 0xDD);
      x[i] = _mm512_shuffle_f64x2(even, more_even, 0x88);
      x[2 + i] = _mm512_shuffle_f64x2(odd, more_odd, 0x88);
      x[4 + i] = _mm512_shuffle_f64x2(even, more_even, 0xDD);
      x[6 + i] = _mm512_shuffle_f64x2(odd, more_odd, 0xDD);
    }
  }
  static void store(double* x, Vector value) { _mm512_store_pd(x, value); }
  static Vector splat(double x) { return _mm512_set1_pd(x); }
  template <int kDirection>
  static Vector fma(Vector a, Vector b, Vector c) {
    return _mm512_fmadd_round_pd(a, b, c, kDirection);
  }
  template <int kDirection>
  static Vector fnma(Vector a, Vector b, Vector c) {
    return _mm512_fnmadd_round_pd(a, b, c, kDirection);
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_pd(a, b); }
  static Vector abs(Vector x) { return _mm512_abs_pd(x); }
  static Vector min(Vector a, Vector b) { return _mm512_min_pd(a, b); }
  static Vector max(Vector a, Vector b) { return _mm512_max_pd(a, b); }
  static Vector exponent(Vector x) { return _mm512_and_pd(x, splat(bit_cast<double>(Float64::infinity))); }
  static Vector copy_sign(Vector x, Vector sign) { return bits(x, sign, splat(-0.0)); }
  static Mask odd(Vector x) { return _mm512_test_epi64_mask(_mm512_castpd_si512(x), _mm512_set1_epi64(1)); }
  static Mask negative(Vector x) { return _mm512_movepi64_mask(_mm512_castpd_si512(x)); }
  static Mask less(Vector a, Vector b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  static Mask equal(Vector a, Vector b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
  static Mask different(Vector a, Vector b) { return _mm512_cmp_pd_mask(a, b, _CMP_NEQ_UQ); }
  static Vector blend(Mask mask, Vector no, Vector yes) { return _mm512_mask_blend_pd(mask, no, yes); }
  static Vector set_last(Vector x, Mask mask) {
    const __m512i n = _mm512_castpd_si512(x);
    return _mm512_castsi512_pd(_mm512_mask_or_epi64(n, mask, n, _mm512_set1_epi64(1)));
  }
  /// Add a random word each to 32 binary digits at the end, and cut those off.
  static Vector add_words(Vector x, const uint32_t* words) {
    const __m512i draws = _mm512_cvtepu32_epi64(_mm256_load_si256(reinterpret_cast<const __m256i*>(words)));
    const __m512i sum = _mm512_add_epi64(_mm512_castpd_si512(x), draws);
    return _mm512_castsi512_pd(_mm512_and_si512(sum, _mm512_set1_epi64(-0x100000000)));
  }

 private:
  static Vector bits(Vector a, Vector b, Vector mask) {
    return _mm512_castsi512_pd(
        _mm512_ternarylogic_epi64(_mm512_castpd_si512(mask), _mm512_castpd_si512(a), _mm512_castpd_si512(b), 0xAC));
  }
};

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
  if constexpr (std::is_same_v<V, Floats>) path = path_of_bits(level);
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
  const bool fits = digits >= 1 && shift >= (random ? 1 : 2) && least_exponent > -C::bias &&
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

/// Rounded to odd: of both neighbours that one whose last digit is odd. An exact sum is its own neighbour on either
/// side, but for the zero of numbers that cancel, which is positive.
template <class V>
typename V::Vector to_odd(typename V::Vector a, typename V::Vector b, typename V::Vector s) {
  const auto low = V::template fma<kDown>(a, b, s);
  const auto high = V::template fma<kUp>(a, b, s);
  return V::blend(V::odd(low), high, low);
}

template <class V>
struct Way<V, NearestEven> {
  using Vector = typename V::Vector;
  static Vector exact(Vector a, Vector b, Vector s) { return to_odd<V>(a, b, s); }
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
  static Vector exact(Vector a, Vector b, Vector s) { return to_odd<V>(a, b, s); }
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
    const auto special = V::less(to.largest, V::abs(result)) | V::equal(magnitude, to.infinite);
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
template <int kDirection>
class NativeStep {
 public:
  explicit NativeStep(const Target<Floats>&) {}
  LOWPREC_INLINE __m512 operator()(__m512 a, __m512 b, __m512 s, const uint32_t*) const {
    return Floats::fma<kDirection>(a, b, s);
  }
};

/// In a format with float32's exponents: its codes are float32's, cut off. To nearest even.
class BitsStep {
 public:
  explicit BitsStep(const Target<Floats>& target)
      : half_(_mm512_set1_epi32((1 << (target.dropped - 1)) - 1)),
        odd_(_mm512_set1_epi32(1 << target.dropped)),
        kept_(_mm512_set1_epi32(-(1 << target.dropped))),
        shift_(_mm_cvtsi32_si128(target.dropped)) {}
  LOWPREC_INLINE __m512 operator()(__m512 a, __m512 b, __m512 s, const uint32_t*) const {
    const __m512 exact = to_odd<Floats>(a, b, s);
    const __m512i bits = _mm512_castps_si512(exact);
    const __m512i odd = _mm512_srl_epi32(_mm512_and_si512(bits, odd_), shift_);
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(half_, odd));
    const __m512 rounded = _mm512_castsi512_ps(_mm512_and_si512(sum, kept_));
    return Floats::blend(Floats::different(exact, exact), rounded, exact);  // a NaN's digits may have carried
  }

 private:
  __m512i half_;
  __m512i odd_;
  __m512i kept_;
  __m128i shift_;
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

/// The kernels of a level: for tiles of four rows by two vectors, and for eight vectors in a row.
template <class V>
struct Kernels {
  Kernel<V> tile;
  Kernel<V> row;

  static Kernels of(const Target<V>& target, int rounding) {
    if constexpr (std::is_same_v<V, Floats>) {
      if (target.path == Path::bits) return of<BitsStep>();
      if (target.path == Path::native) {
        return rounding == 0   ? of<NativeStep<kNearest>>()
               : rounding == 2 ? of<NativeStep<kZero>>()
               : rounding == 3 ? of<NativeStep<kUp>>()
                               : of<NativeStep<kDown>>();
      }
    }
    return of_spacings(target.kind, rounding);
  }

 private:
  static Kernels of_spacings(Kind kind, int rounding) {
    Kernels kernels{};
    for_rounding(rounding, [&](auto mode) {
      using Mode = decltype(mode);
      constexpr bool common = std::is_same_v<Mode, NearestEven> || Mode::random;
      if constexpr (Mode::random && std::is_same_v<V, Floats>) {
        return;  // float32 has too few digits
      } else if constexpr (!common) {
        kernels = of<Step<V, Mode, Kind::any>>();
      } else {
        kernels = kind == Kind::plain       ? of<Step<V, Mode, Kind::plain>>()
                  : kind == Kind::overflows ? of<Step<V, Mode, Kind::overflows>>()
                                            : of<Step<V, Mode, Kind::any>>();
      }
    });
    return kernels;
  }

  template <class AnyStep>
  static Kernels of() {
    return {&add_terms<V, AnyStep, 4, 2>, &add_terms<V, AnyStep, 1, 8>};
  }
};

/// Random words of eight outputs: those of roundings [n, n + count) of which `index` is the first one's, each output in
/// a 64-bit lane; row k of theirs is words + k · pitch. Philox is that of philox.h.
class Draw8 {
 public:
  Draw8(uint64_t seed, uint64_t offset) {
    for (int round = 0; round < 10; ++round) {
      key_[round][0] = _mm512_set1_epi64(low_half(seed) + static_cast<uint32_t>(round) * 0x9E3779B9u);
      key_[round][1] = _mm512_set1_epi64(high_half(seed) + static_cast<uint32_t>(round) * 0xBB67AE85u);
    }
    offset_[0] = _mm512_set1_epi64(low_half(offset));
    offset_[1] = _mm512_set1_epi64(high_half(offset));
  }

  void operator()(const uint64_t* index, int64_t n, int64_t count, uint32_t* words, int64_t pitch) const {
    const __m512i first = _mm512_add_epi64(_mm512_load_si512(index), _mm512_set1_epi64(n));
    const __m512i skip = _mm512_and_si512(first, _mm512_set1_epi64(3));  // words of the first group
    const __mmask8 skips[4] = {0, _mm512_cmpeq_epi64_mask(skip, _mm512_set1_epi64(1)),
                               _mm512_cmpeq_epi64_mask(skip, _mm512_set1_epi64(2)),
                               _mm512_cmpeq_epi64_mask(skip, _mm512_set1_epi64(3))};
    __m512i group = _mm512_srli_epi64(first, 2);
    __m512i row[8];
    philox(group, row);
    for (int64_t k = 0; k < count; k += 4) {
      if (count > 1) {
        group = _mm512_add_epi64(group, _mm512_set1_epi64(1));
        philox(group, row + 4);
      } else {
        std::fill(row + 4, row + 8, row[0]);  // out of reach of a single word
      }
      for (int i = 0; i < 4 && k + i < count; ++i) {
        __m512i word = row[i];
        for (int by = 1; by < 4; ++by) word = _mm512_mask_mov_epi64(word, skips[by], row[i + by]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(words + (k + i) * pitch), _mm512_cvtepi64_epi32(word));
      }
      std::copy(row + 4, row + 8, row);
    }
  }

 private:
  /// The words are the low halves of the lanes.
  void philox(__m512i group, __m512i* row) const {
    const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53), multiplier1 = _mm512_set1_epi64(0xCD9E8D57);
    __m512i c0 = group, c1 = _mm512_srli_epi64(group, 32), c2 = offset_[0], c3 = offset_[1];
    for (int round = 0; round < 10; ++round) {
      const __m512i first = _mm512_mul_epu32(c0, multiplier0), second = _mm512_mul_epu32(c2, multiplier1);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(second, 32), c1, key_[round][0], 0x96);
      c1 = second;
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(first, 32), c3, key_[round][1], 0x96);
      c3 = first;
    }
    row[0] = c0;
    row[1] = c1;
    row[2] = c2;
    row[3] = c3;
  }

  __m512i key_[10][2];
  __m512i offset_[2];
};

}  // namespace
}  // namespace avx512
}  // namespace lowprec

#pragma GCC pop_options

#endif
