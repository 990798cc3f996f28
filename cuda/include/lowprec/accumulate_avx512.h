// The vectors of AVX-512: their fused multiply-add rounds in a direction that the instruction names.
//
// To be included where the compiler's target has them, after everything else.
#pragma once

#include "lowprec/accumulate_vectors.h"

#ifdef LOWPREC_VECTORS

namespace lowprec {
namespace {

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
  LOWPREC_INLINE void philox(__m512i group, __m512i* row) const {
    const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53), multiplier1 = _mm512_set1_epi64(0xCD9E8D57);
    __m512i c0 = group, c1 = _mm512_srli_epi64(group, 32), c2 = offset_[0], c3 = offset_[1];
#pragma GCC unroll 10
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

/// Cuts the last digits off sixteen float32 numbers, to nearest even.
class Cut16 {
 public:
  explicit Cut16(int digits)
      : half_(_mm512_set1_epi32((1 << (digits - 1)) - 1)),
        odd_(_mm512_set1_epi32(1 << digits)),
        kept_(_mm512_set1_epi32(-(1 << digits))),
        shift_(_mm_cvtsi32_si128(digits)) {}
  LOWPREC_INLINE __m512 operator()(__m512 x) const {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_srl_epi32(_mm512_and_si512(bits, odd_), shift_);
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(half_, odd));
    return _mm512_castsi512_ps(_mm512_and_si512(sum, kept_));
  }

 private:
  __m512i half_;
  __m512i odd_;
  __m512i kept_;
  __m128i shift_;
};

/// Sixteen sums in float32.
struct Floats {
  using Container = Float32;
  using Scalar = float;
  using Vector = __m512;
  using Mask = __mmask16;
  using Draw = Draw8;
  using Cut = Cut16;
  static constexpr int lanes = 16;
  static constexpr int rows = 4;  // of a tile
  static constexpr int vectors = 2;
  static constexpr bool directed = true;  // whether sums can be rounded in any direction
  static constexpr bool native = true;    // whether this is the type that sums are carried in

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
  /// s + a · b rounded to odd: of both neighbours that one whose last digit is odd. An exact sum is its own neighbour
  /// on either side, but for the zero of numbers that cancel, which is positive.
  static Vector to_odd(Vector a, Vector b, Vector s) {
    const Vector low = fma<kDown>(a, b, s), high = fma<kUp>(a, b, s);
    return blend(odd(low), high, low);
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
  static Mask either(Mask a, Mask b) { return a | b; }
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
  using Draw = Draw8;
  static constexpr int lanes = 8;
  static constexpr int rows = 4;
  static constexpr int vectors = 2;
  static constexpr bool directed = true;
  static constexpr bool native = false;

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
  /// s + a · b rounded to odd: of both neighbours that one whose last digit is odd. An exact sum is its own neighbour
  /// on either side, but for the zero of numbers that cancel, which is positive.
  static Vector to_odd(Vector a, Vector b, Vector s) {
    const Vector low = fma<kDown>(a, b, s), high = fma<kUp>(a, b, s);
    return blend(odd(low), high, low);
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
  static Mask either(Mask a, Mask b) { return a | b; }
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

}  // namespace
}  // namespace lowprec

#endif
