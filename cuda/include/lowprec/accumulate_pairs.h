// Pairwise sums of matrix products by tiles: sums of two, of two of those, and so on. Every output's tree stands on the
// terms of whole tiles, one partial sum of each, which is in registers; the partial sums above it are in memory, where
// the number of tiles so far says which there are. Device code only, without torch.
#pragma once

#include <cstdint>

#include "lowprec/accumulate_tiles.h"

namespace lowprec {

constexpr int kPairLevels = 20;  // of partial sums of tiles: for fewer than 2^kPairLevels tiles

/// s = round(x + s) for a row of sums. Each way says which it is right for.

/// Sums in range, of formats whose sums float32 may round before.
template <int kWidth>
struct NarrowPairs {
  NarrowWay<kWidth> way;
  LOWPREC_DEVICE explicit NarrowPairs(const QuickRound& to) : way(to) {}
  LOWPREC_DEVICE void operator()(const float (&x)[kWidth], float (&s)[kWidth]) const { way(1.0f, x, s); }
};

/// Any sums at all, infinite and NaN among them.
template <int kWidth>
struct LimitedPairs {
  LimitedWay<kWidth, false> way;  // what it puts in place of larger sums is the largest value where that saturates
  LOWPREC_DEVICE explicit LimitedPairs(const QuickRound& to) : way(to) {}
  LOWPREC_DEVICE void operator()(const float (&x)[kWidth], float (&s)[kWidth]) const {
    float sum[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] = __fadd_rn(x[j], s[j]);
    way(1.0f, x, s);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) s[j] = sum[j] != sum[j] ? sum[j] : s[j];
  }
};

/// IEEE single precision.
template <int kWidth>
struct SinglePairs {
  LOWPREC_DEVICE void operator()(const float (&x)[kWidth], float (&s)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) s[j] = __fadd_rn(x[j], s[j]);
  }
};

template <class Pair, int kSide>
LOWPREC_DEVICE void add_pairs(const Pair& pair, const float (&x)[kSide][kSide], float (&s)[kSide][kSide]) {
#pragma unroll
  for (int i = 0; i < kSide; ++i) pair(x[i], s[i]);
}

/// The sums of two terms.
template <class Row, int kSide>
LOWPREC_DEVICE void sum_two(const Row& row, const float* a, const float* b, float (&s)[kSide][kSide]) {
#pragma unroll
  for (int i = 0; i < kSide * kSide; ++i) s[i / kSide][i % kSide] = -0.0f;  // what leaves any first term as it is
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float x[kSide], y[kSide];
    read_side(a + k * Share<kSide>::tile, x);
    read_side(b + k * Share<kSide>::tile, y);
#pragma unroll
    for (int i = 0; i < kSide; ++i) row(x[i], y, s[i]);
  }
}

/// The sums of a tile's terms. Those past the last one are -0.
template <class Row, class Pair, int kSide>
LOWPREC_DEVICE void sum_tile(const Row& row, const Pair& pair, const Terms& terms, float (&s)[kSide][kSide]) {
  static_assert(kDepth == 16);
  constexpr int step = 4 * Share<kSide>::tile;
  float two[kSide][kSide], four[kSide][kSide], eight[kSide][kSide];
  const float* a = terms.a;
  const float* b = terms.b;
#pragma unroll 1
  for (int i = 0; i < kDepth / 4; ++i, a += step, b += step) {
    sum_two(row, a, b, two);
    sum_two(row, a + step / 2, b + step / 2, s);
    add_pairs(pair, two, s);
#pragma unroll
    for (int at = 0; at < kSide * kSide && i % 2 == 0; ++at) four[at / kSide][at % kSide] = s[at / kSide][at % kSide];
    if (i % 2 == 0) continue;
    add_pairs(pair, four, s);
#pragma unroll
    for (int at = 0; at < kSide * kSide && i == 1; ++at) eight[at / kSide][at % kSide] = s[at / kSide][at % kSide];
  }
  add_pairs(pair, eight, s);
}

/// Nearest even, and IEEE single precision.
struct PairWays {
  static constexpr int side = 4;
  static constexpr int blocks = 2;  // of a multiprocessor: what registers allow
  using To = Share<side>;

  QuickRound to;
  WayRules rules;
  bool single;

  /// The sums of a tile's terms. False where only the general way is right.
  LOWPREC_DEVICE bool sum(const Terms& terms, To::Sums& s) const {
    const TileNotes &a = terms.a_notes, &b = terms.b_notes;
    if (single) {
      sum_tile(SingleWay<side>(), SinglePairs<side>(), terms, s);
      return true;
    }
    if (a.odd | b.odd) return false;
    const int digits = digits_of(a) + digits_of(b);
    const bool near = __fmul_ru(as_float(a.largest), as_float(b.largest)) <= rules.near;
    float most = 0;
    if (rules.narrow == 0 || !rules.within(a, b, most, [] { return 0.0f; })) {
      sum_tile(LimitedWay<side, false>(to), LimitedPairs<side>(to), terms, s);
    } else if (digits <= rules.narrow || (digits <= rules.narrow_near && near)) {
      sum_tile(NarrowWay<side>(to), NarrowPairs<side>(to), terms, s);
    } else {
      sum_tile(ExactWay<side>(to), NarrowPairs<side>(to), terms, s);
    }
    return true;
  }

  /// s = round(x + s) for any sums.
  LOWPREC_DEVICE void add(const To::Sums& x, To::Sums& s) const {
    single ? add_pairs(SinglePairs<side>(), x, s) : add_pairs(LimitedPairs<side>(to), x, s);
  }
};

/// A scaled sum as it is.
LOWPREC_DEVICE float unscaled(const QuickRound& to, const Product& of, float s) {
  if (to.infinite_nan && fabsf(s) == as_float(Float32::infinity)) return as_float(Float32::quiet_nan);
  return s == 0 && !to.minus_zero ? 0.0f : s * of.unscale_a * of.unscale_b;
}

/// A thread's outputs while their tiles of terms come.
template <>
class TileSums<PairWays> {
 public:
  static constexpr int side = PairWays::side;
  using To = Share<side>;
  using Values = typename To::Values;

  LOWPREC_DEVICE TileSums(const PairWays& ways, const Context<To>& in, const UpperSums<To>&) : ways_(ways), in_(in) {}

  /// Add a tile's terms.
  LOWPREC_DEVICE void add(const Terms& terms) {
    To::Sums s;
    if (!ways_.sum(terms, s)) sum_any(terms, s);
    int i = 0;
#pragma unroll 1
    for (; tiles_ >> i & 1; ++i) add_partial(i, s);
    write(s, partial_[i]);
    ++tiles_;
  }

  /// The results, after pairs of one have ended.
  LOWPREC_DEVICE void finish(Values& values) const {
    To::Sums s;
    int i = __ffs(static_cast<int>(tiles_)) - 1;
    read(partial_[i], s);
#pragma unroll 1
    for (++i; tiles_ >> i; ++i) {
      if (tiles_ >> i & 1) add_partial(i, s);
    }
#pragma unroll
    for (int at = 0; at < To::outputs; ++at) values[at] = unscaled(ways_.to, in_.of, s[at / side][at % side]);
  }

 private:
  static LOWPREC_DEVICE void read(const float4 (&from)[side], To::Sums& s) {
#pragma unroll
    for (int i = 0; i < side; ++i) s[i][0] = from[i].x, s[i][1] = from[i].y, s[i][2] = from[i].z, s[i][3] = from[i].w;
  }

  static LOWPREC_DEVICE void write(const To::Sums& s, float4 (&to)[side]) {
#pragma unroll
    for (int i = 0; i < side; ++i) to[i] = make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
  }

  LOWPREC_DEVICE void add_partial(int i, To::Sums& s) const {
    To::Sums x;
    read(partial_[i], x);
    ways_.add(x, s);
  }

  /// By the way that is always right. The sums are in memory meanwhile, so that the code is there but once.
  LOWPREC_DEVICE void sum_any(const Terms& terms, To::Sums& s) const {
    Values values;
#pragma unroll 1
    for (int at = 0; at < To::outputs; ++at) values[at] = sum_any(terms, at);
#pragma unroll
    for (int at = 0; at < To::outputs; ++at) s[at / side][at % side] = values[at] * in_.of.scale_a * in_.of.scale_b;
  }

  LOWPREC_DEVICE float sum_any(const Terms& terms, int at) const {
    const float left = terms.a_notes.odd ? 1.0f : in_.of.unscale_a, right = terms.b_notes.odd ? 1.0f : in_.of.unscale_b;
    const float* a = terms.a + at / side;
    const float* b = terms.b + at % side;
    float partial[5];  // of 2^i terms
#pragma unroll 1
    for (int k = 0; k < terms.count; ++k) {
      const Term<Float32> term = in_.plan.products(as_bits(a[k * To::tile] * left), as_bits(b[k * To::tile] * right));
      float sum = round_sum(in_.plan, 0, k % 2 == 0, partial[0], term, 0);
      int i = k % 2;
#pragma unroll 1
      for (; k >> i & 1; ++i) sum = add_any(partial[i], sum);
      partial[i] = sum;
    }
    int i = __ffs(terms.count) - 1;
    float sum = partial[i];
#pragma unroll 1
    for (++i; terms.count >> i; ++i) {
      if (terms.count >> i & 1) sum = add_any(partial[i], sum);
    }
    return sum;
  }

  LOWPREC_DEVICE float add_any(float x, float s) const {
    return round_sum(in_.plan, 0, false, x, term_of<Float32>(as_bits(s)), 0);
  }

  const PairWays& ways_;
  const Context<To>& in_;
  float4 partial_[kPairLevels][side];  // scaled sums of 2^i tiles, where tiles_ has that bit
  uint32_t tiles_ = 0;
};

}  // namespace lowprec
