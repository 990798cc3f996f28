// Eight numbers in float32, for block-sparse products by AVX2, and by AVX-512 where blocks are that narrow.
//
// To be included where the compiler's target has them, after everything else.
#pragma once

#include "lowprec/accumulate_vectors.h"

#ifdef LOWPREC_VECTORS

namespace lowprec {
namespace {

struct Octs {
  using Scalar = float;
  using Vector = __m256;
  static constexpr int lanes = 8;

  static Vector load(const float* x) { return _mm256_load_ps(x); }
  static void store(float* x, Vector value) { _mm256_store_ps(x, value); }
  static Vector splat(float x) { return _mm256_set1_ps(x); }
  /// Eight elements of a tensor, exact.
  template <class C>
  static Vector read(const typename C::Bits* x) {
    if constexpr (std::is_same_v<C, Float32>) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(x));
    } else {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
      if constexpr (std::is_same_v<C, Float16>) return _mm256_cvtph_ps(half);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
  }
  /// Rows become columns.
  static void transpose(Vector (&x)[lanes]) {
    Vector fours[lanes];
    for (int i = 0; i < lanes; i += 4) {
      for (int j = 0; j < 4; j += 2) {
        const Vector low = j ? _mm256_unpackhi_ps(x[i], x[i + 1]) : _mm256_unpacklo_ps(x[i], x[i + 1]);
        const Vector high = j ? _mm256_unpackhi_ps(x[i + 2], x[i + 3]) : _mm256_unpacklo_ps(x[i + 2], x[i + 3]);
        fours[i + j] = _mm256_shuffle_ps(low, high, 0x44);
        fours[i + j + 1] = _mm256_shuffle_ps(low, high, 0xEE);
      }
    }
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
      x[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
  }
  template <int>
  static Vector fma(Vector a, Vector b, Vector c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
};

}  // namespace
}  // namespace lowprec

#endif
