// The vectors of AVX2. No instruction names a direction, so sums go by float64, whose error can be computed.
//
// To be included where the compiler's target has them, after everything else.
#pragma once

#include "lowprec/accumulate_vectors.h"

#ifdef LOWPREC_VECTORS

namespace lowprec {
namespace {

/// In modes to nearest nothing is drawn.
struct NoDraw {
  NoDraw(uint64_t, uint64_t) {}
  void operator()(const uint64_t*, int64_t, int64_t, uint32_t*, int64_t) const {}
};

/// Four sums in float64, of products that float64 holds.
struct Quads {
  using Container = Float64;
  using Scalar = double;
  using Vector = __m256d;
  using Mask = __m256d;
  using Draw = NoDraw;
  static constexpr int lanes = 4;
  static constexpr int rows = 4;
  static constexpr int vectors = 1;
  static constexpr bool directed = false;
  static constexpr bool native = false;

  static Vector load(const double* x) { return _mm256_load_pd(x); }
  static void store(double* x, Vector value) { _mm256_store_pd(x, value); }
  static Vector splat(double x) { return _mm256_set1_pd(x); }
  /// Four elements of a tensor, exact.
  template <class C>
  static Vector read(const typename C::Bits* x) {
    if constexpr (std::is_same_v<C, Float64>) {
      return _mm256_loadu_pd(reinterpret_cast<const double*>(x));
    } else if constexpr (std::is_same_v<C, Float32>) {
      return _mm256_cvtps_pd(_mm_loadu_ps(reinterpret_cast<const float*>(x)));
    } else {
      const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
      if constexpr (std::is_same_v<C, Float16>) return _mm256_cvtps_pd(_mm_cvtph_ps(half));
      return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16)));
    }
  }
  /// Rows become columns.
  static void transpose(Vector (&x)[lanes]) {
    const Vector a = _mm256_unpacklo_pd(x[0], x[1]), b = _mm256_unpackhi_pd(x[0], x[1]);
    const Vector c = _mm256_unpacklo_pd(x[2], x[3]), d = _mm256_unpackhi_pd(x[2], x[3]);
    x[0] = _mm256_permute2f128_pd(a, c, 0x20);
    x[1] = _mm256_permute2f128_pd(b, d, 0x20);
    x[2] = _mm256_permute2f128_pd(a, c, 0x31);
    x[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
  template <int>
  static Vector fma(Vector a, Vector b, Vector c) {
    return _mm256_fmadd_pd(a, b, c);
  }
  template <int>
  static Vector fnma(Vector a, Vector b, Vector c) {
    return _mm256_fnmadd_pd(a, b, c);
  }
  /// s + a · b rounded to odd: a sum to nearest whose error is known, cut off toward zero, with a last digit for what
  /// that drops. (Knuth's TwoSum; Boldo and Melquiond 2008.)
  static Vector to_odd(Vector a, Vector b, Vector s) {
    const Vector product = _mm256_mul_pd(a, b);
    const Vector sum = _mm256_add_pd(product, s);
    const Vector other = _mm256_sub_pd(sum, product);
    const Vector error = _mm256_add_pd(_mm256_sub_pd(product, _mm256_sub_pd(sum, other)), _mm256_sub_pd(s, other));
    const __m256i inexact = _mm256_castpd_si256(_mm256_cmp_pd(error, _mm256_setzero_pd(), _CMP_NEQ_OQ));
    const __m256i opposite = _mm256_srli_epi64(_mm256_castpd_si256(_mm256_xor_pd(error, sum)), 63);
    const __m256i one = _mm256_srli_epi64(inexact, 63);
    const __m256i cut = _mm256_sub_epi64(_mm256_castpd_si256(sum), _mm256_and_si256(opposite, one));
    return _mm256_castsi256_pd(_mm256_or_si256(cut, one));
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_pd(a, b); }
  static Vector abs(Vector x) { return _mm256_andnot_pd(splat(-0.0), x); }
  static Vector min(Vector a, Vector b) { return _mm256_min_pd(a, b); }
  static Vector max(Vector a, Vector b) { return _mm256_max_pd(a, b); }
  static Vector exponent(Vector x) { return _mm256_and_pd(x, splat(bit_cast<double>(Float64::infinity))); }
  static Vector copy_sign(Vector x, Vector sign) { return _mm256_or_pd(abs(x), _mm256_and_pd(sign, splat(-0.0))); }
  static Mask either(Mask a, Mask b) { return _mm256_or_pd(a, b); }
  static Mask negative(Vector x) { return x; }  // a mask's sign is what counts
  static Mask less(Vector a, Vector b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
  static Mask equal(Vector a, Vector b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
  static Vector blend(Mask mask, Vector no, Vector yes) { return _mm256_blendv_pd(no, yes, mask); }
};

}  // namespace
}  // namespace lowprec

#endif
