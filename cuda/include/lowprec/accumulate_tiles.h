// Matrix products under an accumulator by tiles in shared memory. Every output's terms are added in ascending order by
// one thread, whatever the tile.
//
// A first kernel lays the operands out as the second one reads them: float32, scaled as QuickRound asks for, in tiles
// of kTile rows (of a) or columns (of b) by kDepth terms, term by term; and it notes what decides which way a tile's
// terms can be added. Device code only, without torch.
#pragma once

#include <cstdint>

#include "lowprec/accumulate_kernel.h"
#include "lowprec/accumulate_quick.h"

namespace lowprec {

constexpr int kTile = 128;
constexpr int kDepth = 16;
constexpr int kTileThreads = 256;
constexpr int kTileSize = kTile * kDepth;

/// What is known of a tile's elements.
struct TileNotes {
  uint32_t largest;  // bits of the largest magnitude
  uint32_t digits;   // all their significands, or-ed: digits after the last one set are zero in each
  uint32_t odd;  // whether scaling is not exact, or an element not finite: the tile is not scaled then; 2 more where
                 // that holds for another tile of the warp
  uint32_t unused;
};

/// One operand in tiles.
struct Packed {
  float* tiles;
  TileNotes* notes;
  int64_t blocks;   // of kTile rows (or columns)
  int64_t depths;   // tiles along K
  int64_t batches;  // 1 if all batches share it

  LOWPREC_INLINE int64_t count() const { return batches * blocks * depths; }
  LOWPREC_INLINE int64_t tile(int64_t batch, int64_t block) const {
    return ((batches == 1 ? 0 : batch) * blocks + block) * depths;
  }
};

/// An operand's elements by (batch, line, term): lines are a's rows or b's columns.
struct Lines {
  Operand of;
  int64_t batch_stride, line_stride, term_stride;
  int64_t lines, terms;
  float scale;    // by which elements are multiplied
  float inverse;  // and by which they are brought back
  uint32_t past;  // bits of what is beyond the edges: together a's and b's make -0, which changes no sum

  /// Whether neighbouring terms lie closer than neighbouring lines.
  LOWPREC_DEVICE bool by_terms() const { return term_stride == 1 || (line_stride != 1 && term_stride < line_stride); }

  LOWPREC_DEVICE uint32_t read(int64_t batch, int64_t line, int64_t term) const {
    if (line >= lines || term >= terms) return past;
    return of.read<Float32>(batch * batch_stride + line * line_stride + term * term_stride);
  }
};

/// Which part of an operand a tile holds.
struct PackedAt {
  int64_t batch, block, depth;

  LOWPREC_DEVICE PackedAt(int64_t tile, const Packed& of)
      : batch(tile / of.depths / of.blocks), block(tile / of.depths % of.blocks), depth(tile % of.depths) {}
};

/// Digits of a float32's significand.
LOWPREC_DEVICE uint32_t significand(uint32_t bits) {
  constexpr uint32_t leading = 1u << Float32::fraction_bits;
  return (bits & (leading - 1)) | ((bits & Float32::infinity) != 0 ? leading : 0);
}

static __global__ void __launch_bounds__(kTileThreads) pack_kernel(const Lines from, const Packed to) {
  __shared__ uint32_t elements[kDepth][kTile + 1];
  __shared__ TileNotes notes;
  for (int64_t tile = blockIdx.x; tile < to.count(); tile += gridDim.x) {
    const PackedAt at(tile, to);
    const bool by_terms = from.by_terms();
    if (threadIdx.x == 0) notes = {};
    __syncthreads();
    TileNotes mine{};
    for (int i = threadIdx.x; i < kTileSize; i += kTileThreads) {
      const int term = by_terms ? i % kDepth : i / kTile, line = by_terms ? i / kDepth : i % kTile;
      const uint32_t bits = from.read(at.batch, at.block * kTile + line, at.depth * kDepth + term);
      const float scaled = as_float(bits) * from.scale;
      const uint32_t magnitude = as_bits(scaled) & ~Float32::sign;
      elements[term][line] = bits;
      mine.largest = magnitude > mine.largest ? magnitude : mine.largest;
      mine.digits |= significand(as_bits(scaled));
      mine.odd |= scaled * from.inverse != as_float(bits) || magnitude >= Float32::infinity;
    }
    atomicMax(&notes.largest, __reduce_max_sync(0xFFFFFFFFu, mine.largest));
    atomicOr(&notes.digits, __reduce_or_sync(0xFFFFFFFFu, mine.digits));
    atomicOr(&notes.odd, __reduce_or_sync(0xFFFFFFFFu, mine.odd));
    __syncthreads();
    const float scale = notes.odd ? 1.0f : from.scale;
    for (int i = threadIdx.x; i < kTileSize; i += kTileThreads) {
      to.tiles[tile * kTileSize + i] = as_float(elements[i / kTile][i % kTile]) * scale;
    }
    if (threadIdx.x == 0) to.notes[tile] = notes;
    __syncthreads();
  }
}

/// From what is known of the operands' tiles to the way in which their terms are added.
struct WayRules {
  int narrow;       // digits of products up to which rounding to float32 before makes no difference
  int narrow_near;  // the same where products are no larger than `near`
  float near;
  int rare;        // digits from which on ties are rare
  float reach;     // what sums may come to in a tile without ever passing the largest value
  float growth;    // by how much rounding may enlarge a sum in a tile
  float smallest;  // kDepth spacings of the smallest values

  WayRules() = default;
  explicit WayRules(const QuickRound& to) {
    const int lowest = 1 - Float32::bias - (to.digits - 1);  // log2 of the smallest value
    double most = 1;
    for (int i = 0; i < kDepth; ++i) most *= 1 + 2.0 / (1 << to.digits);
    narrow = to.digits <= 11 ? to.digits : 0;
    narrow_near = 23 - to.digits;
    near = power_of_two(22 + lowest);
    rare = to.digits + 10;
    growth = static_cast<float>(most * 1.0001);
    reach = static_cast<float>(static_cast<double>(to.largest) / (most * 1.001));
    smallest = power_of_two(4 + lowest);
  }

  /// Whether sums stay in range; `most` is a bound of theirs, kept from tile to tile.
  template <class Measure>
  LOWPREC_DEVICE bool within(const TileNotes& a, const TileNotes& b, float& most, const Measure& measure) const {
    static_assert(kDepth == 16);
    const float products = __fmul_ru(as_float(a.largest), as_float(b.largest));
    const float more = __fmaf_ru(kDepth, products, smallest);
    bool is = __fadd_ru(most, more) <= reach;
    if (!is) {
      most = measure();
      is = __fadd_ru(most, more) <= reach;
    }
    most = __fmul_ru(__fadd_ru(most, more), growth);
    return is;
  }
};

/// Digits from the first to the last that any of a tile's elements has.
LOWPREC_DEVICE int digits_of(const TileNotes& notes) {
  return Float32::fraction_bits + 2 - __ffs(static_cast<int>(notes.digits | 1u << Float32::fraction_bits));
}

/// What a product is formed of.
struct Product {
  Packed a, b;
  float unscale_a, unscale_b;  // of elements; of sums both
  float scale_a, scale_b;
  int64_t batches, rows, columns, terms;
};

/// What elements are multiplied by for the first level's sake, and by what they and sums are brought back.
inline Product scaled_product(const QuickRound& to) {
  const int left = to.scale / 2, right = to.scale - left;
  Product product{};
  product.unscale_a = to.sign * power_of_two(-left), product.unscale_b = power_of_two(-right);
  product.scale_a = to.sign * power_of_two(left), product.scale_b = power_of_two(right);
  return product;
}

/// A thread's outputs: kSide rows and columns of a tile, in runs of kRun.
template <int kSide, int kRun = 4>
struct Share {
  static constexpr int rows = kSide, width = kSide;  // of a thread's outputs
  static constexpr int tile = 16 * kSide;
  static constexpr int outputs = kSide * kSide;
  using Sums = float[kSide][kSide];
  using Values = float[outputs];

  int row, column;       // of the first output in the tile
  int64_t first_output;  // of all of the product's
  int64_t columns;
  int64_t left_rows, left_columns;  // from the first output to the edge

  LOWPREC_DEVICE Share() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    row = (warp / 2 * 4 + lane / 8) * kRun;
    column = (warp % 2 * 8 + lane % 8) * kRun;
  }
  static LOWPREC_DEVICE int run(int i) { return i % kRun + i / kRun * 16 * kRun; }
  LOWPREC_DEVICE int64_t output(int i, int j) const { return first_output + run(i) * columns + run(j); }

  // Where the terms of rows and columns lie in a tile, and how far one term is from the next.
  static LOWPREC_DEVICE int row_at(int i) { return run(i); }
  static LOWPREC_DEVICE int column_at(int j) { return run(j); }
  static LOWPREC_DEVICE int threads() { return kTileThreads; }
  static LOWPREC_DEVICE int row_step() { return tile; }
  static LOWPREC_DEVICE int column_step() { return tile; }
};

/// Some of a tile's terms in shared memory, from those of a thread's first row and column on.
struct Terms {
  const TileNotes& a_notes;
  const TileNotes& b_notes;
  const float* a;
  const float* b;
  int64_t first;  // its number among all terms
  int count;
};

/// The values of one term at some lines, which lie in runs of four.
template <class At, int kLines>
LOWPREC_DEVICE void read_lines(const float* from, const At& at, float (&to)[kLines]) {
#pragma unroll
  for (int i = 0; i < kLines; i += 4) {
    const float4 run = *reinterpret_cast<const float4*>(from + at(i));
    to[i] = run.x, to[i + 1] = run.y, to[i + 2] = run.z, to[i + 3] = run.w;
  }
}

template <int kSide>
LOWPREC_DEVICE void read_side(const float* from, float (&to)[kSide]) {
  read_lines(from, [](int i) { return Share<kSide>::run(i); }, to);
}

/// Add terms one after another to all sums, row by row.
template <class Row, class To>
LOWPREC_DEVICE void add_rows(const Row& row, const Terms& terms, const To& share, typename To::Sums& s) {
  const float* a = terms.a;
  const float* b = terms.b;
#pragma unroll 1
  for (int k = 0; k < terms.count; ++k, a += share.row_step(), b += share.column_step()) {
    float x[To::rows], y[To::width];
    read_lines(a, [](int i) { return To::row_at(i); }, x);
    read_lines(b, [](int j) { return To::column_at(j); }, y);
#pragma unroll
    for (int i = 0; i < To::rows; ++i) row(x[i], y, s[i]);
  }
}

/// The largest magnitude of a warp's sums.
template <int kRows, int kWidth>
LOWPREC_DEVICE float largest_of(const float (&s)[kRows][kWidth]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kRows * kWidth; ++i) largest = fmaxf(largest, fabsf(s[i / kWidth][i % kWidth]));
  return as_float(__reduce_max_sync(0xFFFFFFFFu, as_bits(largest)));
}

/// What a kernel's ways need besides: nothing.
struct NoState {
  LOWPREC_DEVICE explicit NoState(const SumWords&) {}
};

/// One rounding by the way that every level can take, of a sum or of a group's first input.
static __device__ __noinline__ float round_sum(const SumPlan<Float32>& plan, int level, bool first, float partial,
                                               const Term<Float32>& term, uint32_t word) {
  const SumRounder<Float32>& round = plan.level[level];
  return as_float(static_cast<uint32_t>(first ? round.first(term, word) : round.next(as_bits(partial), term, word)));
}

/// What sums are part of.
template <class To>
struct Context {
  const Product& of;
  const SumPlan<Float32>& plan;
  const Tree& tree;
  const SumWords& words;
  const To& share;
};

/// IEEE single precision.
template <class Shape = Share<8>>
struct SingleWays {
  static constexpr int blocks = 2;  // of a multiprocessor: what registers allow
  using State = NoState;
  using To = Shape;

  QuickRound to;

  LOWPREC_DEVICE bool add(const Terms& terms, const Context<To>& in, const State&, float&, typename To::Sums& s) const {
    add_rows(SingleWay<To::width>(), terms, in.share, s);
    return true;
  }
};

/// Nearest even. False where only the general way is right: operands that cannot be scaled, or are not finite.
template <class Shape = Share<8>>
struct NearestWays {
  static constexpr int blocks = 2;  // of a multiprocessor: what registers allow
  using State = NoState;
  using To = Shape;

  QuickRound to;
  WayRules rules;

  LOWPREC_DEVICE bool add(const Terms& terms, const Context<To>& in, const State&, float& most,
                          typename To::Sums& s) const {
    constexpr int width = To::width;
    const TileNotes &a = terms.a_notes, &b = terms.b_notes;
    if (a.odd | b.odd) return false;
    const int digits = digits_of(a) + digits_of(b);
    const bool near = __fmul_ru(as_float(a.largest), as_float(b.largest)) <= rules.near;
    if (!rules.within(a, b, most, [&] { return largest_of(s); })) {
      to.saturates ? add_rows(LimitedWay<width, true>(to), terms, in.share, s)
                   : add_rows(LimitedWay<width, false>(to), terms, in.share, s);
    } else if (digits <= rules.narrow || (digits <= rules.narrow_near && near)) {
      add_rows(NarrowWay<width>(to), terms, in.share, s);
    } else if (digits >= rules.rare) {
      add_rows(RareWay<width>(to), terms, in.share, s);
    } else {
      add_rows(ExactWay<width>(to), terms, in.share, s);
    }
    return true;
  }
};

/// The other deterministic modes, and formats without subnormals.
template <class Shape = Share<8>>
struct DirectedWays {
  static constexpr int blocks = 2;  // of a multiprocessor: what registers allow
  using State = NoState;
  using To = Shape;

  QuickRound to;
  WayRules rules;

  LOWPREC_DEVICE bool add(const Terms& terms, const Context<To>& in, const State&, float& most,
                          typename To::Sums& s) const {
    if (terms.a_notes.odd | terms.b_notes.odd) return false;
    const bool within = rules.within(terms.a_notes, terms.b_notes, most, [&] { return largest_of(s); });
    if (to.gap) {
      within ? add_rows(ModeWay<To::width, ModeAny, false>(to), terms, in.share, s)
             : add_rows(ModeWay<To::width, ModeAny, true>(to), terms, in.share, s);
    } else {
      within ? add_terms<false>(terms, in.share, s) : add_terms<true>(terms, in.share, s);
    }
    return true;
  }

 private:
  template <bool kLimited>
  LOWPREC_DEVICE void add_terms(const Terms& terms, const To& share, typename To::Sums& s) const {
    switch (to.mode) {
      case 1:
        return add_rows(ModeWay<To::width, ModeNearestAway, kLimited>(to), terms, share, s);
      case 2:
        return add_rows(ModeWay<To::width, ModeTowardZero, kLimited>(to), terms, share, s);
      case 3:
        return add_rows(ModeWay<To::width, ModeUp, kLimited>(to), terms, share, s);
      default:
        return add_rows(ModeWay<To::width, ModeToOdd, kLimited>(to), terms, share, s);
    }
  }
};

/// Random words by a key schedule in registers, of a whole group at a time.
struct WordState {
  static constexpr int rounds = 10;
  uint32_t key[rounds][2];
  uint32_t third, fourth;  // words of the counter
  int64_t roundings;

  LOWPREC_DEVICE explicit WordState(const SumWords& words)
      : third(low_half(words.offset)), fourth(high_half(words.offset)), roundings(words.roundings) {
    key[0][0] = low_half(words.seed), key[0][1] = high_half(words.seed);
#pragma unroll
    for (int i = 1; i < rounds; ++i) key[i][0] = key[i - 1][0] + 0x9E3779B9u, key[i][1] = key[i - 1][1] + 0xBB67AE85u;
#pragma unroll
    for (int i = 0; i < 2 * rounds; ++i) asm("" : "+r"(key[i / 2][i % 2]));  // not to be worked out again and again
  }

  /// What groups have in common whose numbers differ in the low word alone: of the two rounds before that word is in
  /// all of the counter.
  struct Common {
    uint32_t second, third, fourth, key;
  };

  LOWPREC_DEVICE Common common(uint32_t group_high) const {
    const uint64_t of_third = multiply(third, second_factor);
    const uint64_t of_first = multiply(high_half(of_third) ^ group_high ^ key[0][0], first_factor);
    return {low_half(of_third) ^ key[1][0], high_half(of_first) ^ key[1][1], low_half(of_first), fourth ^ key[0][1]};
  }

  /// As philox(seed, offset, group).
  LOWPREC_DEVICE Words draw(uint32_t group_low, const Common& same) const {
    const uint64_t begin = multiply(group_low, first_factor);
    const uint64_t next = multiply(high_half(begin) ^ same.key, second_factor);
    uint32_t c0 = high_half(next) ^ same.second, c1 = low_half(next), c2 = low_half(begin) ^ same.third,
             c3 = same.fourth;
#pragma unroll
    for (int i = 2; i < rounds; ++i) {
      const uint64_t first = multiply(c0, first_factor), second = multiply(c2, second_factor);
      c0 = high_half(second) ^ c1 ^ key[i][0];
      c1 = low_half(second);
      c2 = high_half(first) ^ c3 ^ key[i][1];
      c3 = low_half(first);
    }
    return {{c0, c1, c2, c3}};
  }

 private:
  static constexpr uint32_t first_factor = 0xD2511F53u, second_factor = 0xCD9E8D57u;
};

/// Stochastic rounding of sums, four terms of an output at a time.
///
/// A sum rounded toward zero has the first digits of the fraction. A word with as many digits goes up or not by their
/// sum, whatever the rest of both, unless all digits of that are ones: then `settle` decides.
struct RandomWays {
  static constexpr int side = 4;
  static constexpr int blocks = 2;
  static constexpr int group = 4;
  static constexpr int at_once = 4;  // outputs, since every draw and every sum waits for the one before
  using State = WordState;
  using To = Share<side>;

  /// Terms of one output, with the words of their roundings.
  struct Step {
    float a, b;
    uint32_t word;
  };
  struct Steps {
    Step at[group];
  };

  QuickRound to;
  WayRules rules;
  int shift;  // to a word's digits that count with those to be cut off

  RandomWays(const QuickRound& to, const WayRules& rules)
      : to(to), rules(rules), shift(32 - Float32::fraction_bits + to.digits - 1) {}

  LOWPREC_DEVICE bool add(const Terms& terms, const Context<To>& in, const State& words, float& most,
                          To::Sums& s) const {
    if (terms.a_notes.odd | terms.b_notes.odd) return false;
    rules.within(terms.a_notes, terms.b_notes, most, [&] { return largest_of(s); })
        ? add_groups<false>(terms, in, words, s)
        : add_groups<true>(terms, in, words, s);
    return true;
  }

 private:
  template <bool kLimited>
  LOWPREC_DEVICE void add_groups(const Terms& terms, const Context<To>& in, const State& words, To::Sums& s) const {
    int k = 0;
    if ((words.roundings | terms.first) % group == 0) {
#pragma unroll 1
      for (; k + group <= terms.count; k += group) {
        if (!add_group<kLimited>(terms, k, in, words, s)) add_each(terms, k, group, in, s);
      }
    }
    add_each(terms, k, terms.count - k, in, s);
  }

  /// Add the terms of one group. False where the groups of a thread's outputs in one row differ in their high words.
  template <bool kLimited>
  LOWPREC_DEVICE bool add_group(const Terms& terms, int k, const Context<To>& in, const State& words,
                                To::Sums& s) const {
    const auto apart = static_cast<uint32_t>(words.roundings / group);
    uint64_t first[side];
    bool carries = false;
#pragma unroll
    for (int i = 0; i < side; ++i) {
      first[i] = static_cast<uint64_t>(in.share.output(i, 0) * words.roundings + terms.first + k) / group;
      carries |= low_half(first[i]) > low_half(first[i]) + side * apart;
    }
    if (__any_sync(0xFFFFFFFFu, carries) || words.roundings / group > 1 << 28) return false;

    float x[group][side], y[group][side];
#pragma unroll
    for (int t = 0; t < group; ++t) {
      read_side(terms.a + (k + t) * To::tile, x[t]);
      read_side(terms.b + (k + t) * To::tile, y[t]);
    }
#pragma unroll
    for (int i = 0; i < side; ++i) {
      const auto same = words.common(high_half(first[i]));
#pragma unroll
      for (int j = 0; j < side; j += at_once) {
        Steps steps[at_once];
        float sum[at_once];
        bool doubt[at_once] = {}, any = false;
#pragma unroll
        for (int n = 0; n < at_once; ++n) {
          const Words drawn = words.draw(low_half(first[i]) + (j + n) * apart, same);
          sum[n] = s[i][j + n];
#pragma unroll
          for (int t = 0; t < group; ++t) {
            steps[n].at[t] = {x[t][i], y[t][j + n], drawn.word[t]};
            sum[n] = step<kLimited>(steps[n].at[t], sum[n], doubt[n]);
          }
          any |= doubt[n];
        }
        if (any) [[unlikely]] {
#pragma unroll
          for (int n = 0; n < at_once; ++n) {
            if (doubt[n]) sum[n] = settle_all(to, in, s[i][j + n], steps[n]);
          }
        }
#pragma unroll
        for (int n = 0; n < at_once; ++n) s[i][j + n] = sum[n];
      }
    }
    return true;
  }

  /// Without whole groups every rounding draws for itself.
  LOWPREC_DEVICE void add_each(const Terms& terms, int k, int count, const Context<To>& in, To::Sums& s) const {
#pragma unroll 1
    for (int end = k + count; k < end; ++k) {
      float x[side], y[side];
      read_side(terms.a + k * To::tile, x);
      read_side(terms.b + k * To::tile, y);
#pragma unroll
      for (int at = 0; at < To::outputs; ++at) {
        const int i = at / side, j = at % side;
        s[i][j] = settle_one(to, in, s[i][j], x[i], y[j], in.share.output(i, j), terms.first + k);
      }
    }
  }

  template <bool kLimited>
  LOWPREC_DEVICE float step(const Step& by, float s, bool& doubt) const {
    // One more than the sum, so that what the doubt is about is whether nothing is left to cut off.
    const uint32_t carried = (by.word >> shift) + as_bits(__fmaf_rz(by.a, by.b, s)) + 1;
    const uint32_t rest = carried & to.mask;
    doubt |= rest == 0;
    const float rounded = as_float(carried - rest);
    return kLimited && fabsf(rounded) > to.largest ? as_float((carried & Float32::sign) | to.over) : rounded;
  }

  static __device__ __noinline__ float settle_all(const QuickRound& to, const Context<To>& in, float s,
                                                  const Steps steps) {
#pragma unroll 1
    for (int t = 0; t < group; ++t) s = settle(to, in, s, steps.at[t]);
    return s;
  }

  static __device__ __noinline__ float settle_one(const QuickRound& to, const Context<To>& in, float s, float a,
                                                  float b, int64_t output, int64_t n) {
    return settle(to, in, s, {a, b, in.words(output, n)});
  }

  static LOWPREC_DEVICE float settle(const QuickRound& to, const Context<To>& in, float s, const Step& by) {
    const uint32_t carried = __umulhi(by.word, to.unit) + as_bits(__fmaf_rz(by.a, by.b, s));
    float sum = as_float(carried & ~to.mask);
    if ((~carried & to.mask) == 0 && __fmaf_rd(by.a, by.b, s) != __fmaf_ru(by.a, by.b, s)) {
      const Product& of = in.of;
      const Term<Float32> term = in.plan.products(as_bits(by.a * of.unscale_a), as_bits(by.b * of.unscale_b));
      sum = round_sum(in.plan, 0, false, s * of.unscale_a * of.unscale_b, term, by.word);
      if (sum != sum) sum = as_float(Float32::infinity | (as_bits(s) & Float32::sign));  // in its place meanwhile
      sum = sum * of.scale_a * of.scale_b;
    }
    return fabsf(sum) > to.largest ? as_float((as_bits(sum) & Float32::sign) | to.over) : sum;
  }
};

/// How the levels above the first one add, and where they can do it quickly.
struct Upper {
  bool single;  // in IEEE single precision
  bool quick;   // deterministic, on the first level's scale
  QuickRound to;
};
constexpr int kUpper = 3;  // stages above the first

struct Tower {
  Upper level[kUpper];
  bool single;  // one stage above the first, in IEEE single precision
};

inline Upper upper_of(const LevelSpec& level, const QuickRound& first) {
  Upper upper{is_single(level), false, QuickRound(level)};
  upper.quick = first.usable && upper.to.usable && !upper.to.random && upper.to.scale == first.scale &&
                upper.to.sign > 0 && first.sign > 0;
  return upper;
}

/// The stages above the first one, which adds by `first`.
inline Tower tower_of(const AccumulatorSpec& spec, const Tree& tree, const QuickRound& first) {
  Tower tower{};
  for (int i = 1; i < tree.stages; ++i) tower.level[i - 1] = upper_of(spec.level[tree.stage[i].level], first);
  tower.single = tree.stages == 2 && tower.level[0].single;
  return tower;
}

/// A first level with nothing to scale or to mend.
inline QuickRound as_they_are() {
  QuickRound to{};
  to.sign = 1;
  to.minus_zero = true;
  return to;
}

/// The sums of all threads in single precision above the first stage, in shared memory.
template <class To>
LOWPREC_DEVICE float* single_sums() {
  extern __shared__ float sums[];
  return sums + threadIdx.x;
}

template <class To>
constexpr int kSingleBytes = kTileThreads * To::outputs * static_cast<int>(sizeof(float));

/// The sums of all stages but the first, and how far each stage is. They are in memory, apart from what is in
/// registers.
template <class To>
class UpperSums {
 public:
  static constexpr int count = To::outputs;
  using Values = typename To::Values;

  LOWPREC_DEVICE UpperSums(const Context<To>& in, const Tower& tower) : in_(in), tower_(tower) {
    for (int i = 0; i < kUpper; ++i) taken_[i] = done_[i] = 0;
  }

  LOWPREC_DEVICE bool single() const { return tower_.single; }

  /// Whether a group of the first stage is the first one.
  LOWPREC_DEVICE bool begins() { return done_[0]++ == 0; }

  /// Add the sum of a group of the first stage where `single`.
  LOWPREC_DEVICE void add_single(int at, float value, bool first) const {
    float& sum = single_sums<To>()[at * To::threads()];
    sum = first ? value : __fadd_rn(sum, value);
  }

  /// Add inputs to the stage i above the first one, and what that completes to the stages above.
  LOWPREC_DEVICE void add(int i, Values& values) {
    for (;; ++i) {
      const Stage& stage = in_.tree.stage[i + 1];
      add_to(i, stage, values);
      ++done_[i];
      if (++taken_[i] < stage.fan_in || i + 2 == in_.tree.stages) return;
      taken_[i] = 0;
      read(i, values);
    }
  }

  /// The results, after groups that are short have ended.
  LOWPREC_DEVICE void finish(Values& values) {
    if (tower_.single) {
#pragma unroll
      for (int at = 0; at < count; ++at) values[at] = single_sums<To>()[at * To::threads()];
      return;
    }
    const int top = in_.tree.stages - 2;
    for (int i = 0; i < top; ++i) {
      if (taken_[i] == 0) continue;
      taken_[i] = 0;
      read(i, values);
      add(i + 1, values);
    }
    read(top, values);
  }

 private:
  LOWPREC_DEVICE void read(int i, Values& values) const {
#pragma unroll 1
    for (int at = 0; at < count; ++at) values[at] = partial_[i][at];
  }

  LOWPREC_DEVICE void add_to(int i, const Stage& stage, const Values& values) {
    const Upper& upper = tower_.level[i];
    const bool first = taken_[i] == 0;
#pragma unroll 1
    for (int at = 0; at < count; ++at) {
      const float x = values[at], partial = partial_[i][at];
      if (upper.single) {
        partial_[i][at] = first ? x : __fadd_rn(partial, x);
      } else if (upper.quick && fabsf(x) < as_float(Float32::infinity) &&
                 (first || fabsf(partial) < as_float(Float32::infinity))) {
        partial_[i][at] = quick(upper.to, first ? -0.0f : partial, x);
      } else {
        const uint32_t word = in_.plan.level[stage.level].random
                                  ? in_.words(in_.share.output(at / To::width, at % To::width), stage.first + done_[i])
                                  : 0;
        partial_[i][at] = round_sum(in_.plan, stage.level, first, partial, term_of<Float32>(as_bits(x)), word);
      }
    }
  }

  LOWPREC_DEVICE float quick(const QuickRound& to, float partial, float x) const {
    const Product& of = in_.of;
    const float s = partial * of.scale_a * of.scale_b, t = x * of.scale_a * of.scale_b;
    const float sum = as_float(limited(to, ModeAny::round(to, 1.0f, t, s)));
    if (to.infinite_nan && fabsf(sum) == as_float(Float32::infinity)) return as_float(Float32::quiet_nan);
    return sum == 0 && !to.minus_zero ? 0.0f : sum * of.unscale_a * of.unscale_b;
  }

  const Context<To>& in_;
  const Tower& tower_;
  float partial_[kUpper][count];
  int64_t taken_[kUpper];  // inputs of the present group
  int64_t done_[kUpper];   // all inputs so far
};

/// A thread's outputs while their terms come.
template <class Ways>
class TileSums {
 public:
  using To = typename Ways::To;
  static constexpr int width = To::width;
  using Values = typename To::Values;

  LOWPREC_DEVICE TileSums(const Ways& ways, const Context<To>& in, UpperSums<To>& upper)
      : ways_(ways), in_(in), upper_(upper), state_(in.words) {
    begin();
  }

  /// Add terms in order.
  LOWPREC_DEVICE void add(Terms terms) {
    const Tree& tree = in_.tree;
    int left = terms.count;
    while (left > 0) {
      const int64_t free = tree.stage[0].fan_in - added_;
      terms.count = free < left ? static_cast<int>(free) : left;
      if (!ways_.add(terms, in_, state_, most_, s_)) add_any(terms);
      added_ += terms.count;
      left -= terms.count;
      terms.a += terms.count * in_.share.row_step();
      terms.b += terms.count * in_.share.column_step();
      terms.first += terms.count;
      if (free == terms.count && tree.stages > 1) rise();
    }
  }

  LOWPREC_DEVICE void finish(Values& values) {
    if (in_.tree.stages == 1) return read(values);
    if (added_ > 0) rise();
    upper_.finish(values);
  }

 private:
  LOWPREC_DEVICE void begin() {
#pragma unroll
    for (int i = 0; i < To::outputs; ++i) s_[i / width][i % width] = -0.0f;  // what leaves any first term as it is
    nan_ = 0;
    added_ = 0;
    most_ = 0;
  }

  /// A sum as it is.
  LOWPREC_DEVICE float value(int i, int j) const {
    const float s = s_[i][j];
    if ((nan_ >> (i * width + j) & 1) || (ways_.to.infinite_nan && fabsf(s) == as_float(Float32::infinity))) {
      return as_float(Float32::quiet_nan);
    }
    return s == 0 && !ways_.to.minus_zero ? 0.0f : s * in_.of.unscale_a * in_.of.unscale_b;
  }

  LOWPREC_DEVICE void read(Values& values) const {
#pragma unroll
    for (int i = 0; i < To::outputs; ++i) values[i] = value(i / width, i % width);
  }

  /// By the way that is always right. The sums are in memory meanwhile, so that the code is there but once.
  LOWPREC_DEVICE void add_any(const Terms& terms) {
    const Product& of = in_.of;
    Values values;
    read(values);
    const float left = terms.a_notes.odd & 1 ? 1.0f : of.unscale_a;
    const float right = terms.b_notes.odd & 1 ? 1.0f : of.unscale_b;
#pragma unroll 1
    for (int k = 0; k < terms.count; ++k) {
#pragma unroll 1
      for (int at = 0; at < To::outputs; ++at) {
        const int i = at / width, j = at % width;
        const float x = terms.a[k * in_.share.row_step() + To::row_at(i)] * left;
        const float y = terms.b[k * in_.share.column_step() + To::column_at(j)] * right;
        const Term<Float32> term = in_.plan.products(as_bits(x), as_bits(y));
        const uint32_t word = in_.plan.level[0].random ? in_.words(in_.share.output(i, j), terms.first + k) : 0;
        values[at] = round_sum(in_.plan, 0, added_ + k == 0, values[at], term, word);
      }
    }
    nan_ = 0;
#pragma unroll
    for (int i = 0; i < To::outputs; ++i) {
      if (values[i] != values[i]) nan_ |= uint64_t{1} << i;
      s_[i / width][i % width] = values[i] != values[i] ? 0.0f : values[i] * of.scale_a * of.scale_b;
    }
    most_ = as_float(Float32::infinity);
  }

  /// A group is complete: its sums are inputs of the stage above.
  LOWPREC_DEVICE void rise() {
    if (upper_.single()) {
      const bool first = upper_.begins();
#pragma unroll
      for (int at = 0; at < To::outputs; ++at) upper_.add_single(at, value(at / width, at % width), first);
    } else {
      Values values;
      read(values);
      upper_.add(0, values);
    }
    begin();
  }

  const Ways& ways_;
  const Context<To>& in_;
  UpperSums<To>& upper_;
  typename Ways::State state_;
  typename To::Sums s_;  // scaled
  uint64_t nan_;         // which of them are NaN
  float most_;           // a bound of theirs
  int64_t added_;        // terms of the present group
};

LOWPREC_DEVICE void copy_16_bytes(void* to, const void* from) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from));
}

/// Some columns of a packed tile.
template <int kColumns>
LOWPREC_DEVICE void copy_tile(float* to, const float* from) {
#pragma unroll
  for (int i = 0; i < kDepth * kColumns / 4 / kTileThreads; ++i) {
    const int at = (i * kTileThreads + threadIdx.x) * 4;
    copy_16_bytes(to + at, from + at / kColumns * kTile + at % kColumns);
  }
}

/// Where a block's tile lies. Bands of eight rows of tiles: what neighbours read stays in the cache.
struct TileAt {
  int64_t batch, down, across;

  LOWPREC_DEVICE TileAt(int64_t index, int64_t rows, int64_t columns) {
    constexpr int64_t most = 8;
    const int64_t within = index % (rows * columns), band = within / (most * columns), first = band * most;
    const int64_t height = rows - first < most ? rows - first : most;
    batch = index / (rows * columns);
    down = first + within % (most * columns) % height;
    across = within % (most * columns) / height;
  }
};

template <int kWidth>
LOWPREC_INLINE int64_t tiles_of(int64_t lines) {
  return (lines + kWidth - 1) / kWidth;
}

/// A thread's place in a block's tile.
template <class To>
LOWPREC_DEVICE To share_of(const Product& of, const TileAt& at) {
  To share;
  share.left_rows = of.rows - at.down * share.tile - share.row;
  share.left_columns = of.columns - at.across * share.tile - share.column;
  share.columns = of.columns;
  share.first_output =
      (at.batch * of.rows + at.down * share.tile + share.row) * of.columns + at.across * share.tile + share.column;
  return share;
}

template <class To>
LOWPREC_DEVICE void write_values(const To& share, const typename To::Values& values, float* out) {
#pragma unroll
  for (int at = 0; at < To::outputs; ++at) {
    const int i = at / To::width, j = at % To::width;
    if (share.run(i) < share.left_rows && share.run(j) < share.left_columns) out[share.output(i, j)] = values[at];
  }
}

template <class Ways>
__global__ void __launch_bounds__(kTileThreads, Ways::blocks)
    tiles_kernel(const __grid_constant__ Product of, const __grid_constant__ Ways ways,
                 const __grid_constant__ SumPlan<Float32> plan, const __grid_constant__ Tower tower,
                 const SumDraws draws, float* out) {
  using To = typename Ways::To;
  constexpr int width = To::tile, parts = kTile / width;
  __shared__ alignas(16) float tiles[2][2][kDepth * width];
  const TileAt at(blockIdx.x, tiles_of<width>(of.rows), tiles_of<width>(of.columns));
  const int64_t left = of.a.tile(at.batch, at.down / parts), right = of.b.tile(at.batch, at.across / parts);
  const float* a = of.a.tiles + left * kTileSize + at.down % parts * width;
  const float* b = of.b.tiles + right * kTileSize + at.across % parts * width;

  const To share = share_of<To>(of, at);
  const SumWords words = draws.read(plan.tree.roundings);
  const Context<To> in{of, plan, plan.tree, words, share};
  UpperSums<To> upper(in, tower);
  TileSums<Ways> sums(ways, in, upper);

  const auto fetch = [&](int64_t depth) {
    copy_tile<width>(tiles[depth % 2][0], a + depth * kTileSize);
    copy_tile<width>(tiles[depth % 2][1], b + depth * kTileSize);
    asm volatile("cp.async.commit_group;");
  };
  fetch(0);
  for (int64_t depth = 0; depth < of.a.depths; ++depth) {
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    if (depth + 1 < of.a.depths) fetch(depth + 1);
    const int64_t first = depth * kDepth;
    const int count = of.terms - first < kDepth ? static_cast<int>(of.terms - first) : kDepth;
    sums.add({of.a.notes[left + depth], of.b.notes[right + depth], tiles[depth % 2][0] + share.row,
              tiles[depth % 2][1] + share.column, first, count});
  }
  typename To::Values values;
  sums.finish(values);
  write_values(share, values, out);
}

}  // namespace lowprec
