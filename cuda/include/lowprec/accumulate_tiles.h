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
  uint32_t odd;      // whether scaling is not exact, or an element not finite: the tile is not scaled then
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

  LOWPREC_DEVICE uint32_t read(int64_t batch, int64_t line, int64_t term) const {
    if (line >= lines || term >= terms) return 0;
    return of.read<Float32>(batch * batch_stride + line * line_stride + term * term_stride);
  }
};

/// Digits of a float32's significand.
LOWPREC_DEVICE uint32_t significand(uint32_t bits) {
  constexpr uint32_t leading = 1u << Float32::fraction_bits;
  return (bits & (leading - 1)) | ((bits & Float32::infinity) != 0 ? leading : 0);
}

__global__ void __launch_bounds__(kTileThreads) pack_kernel(const Lines from, const Packed to) {
  __shared__ uint32_t elements[kDepth][kTile + 1];
  __shared__ TileNotes notes;
  for (int64_t tile = blockIdx.x; tile < to.count(); tile += gridDim.x) {
    const int64_t depth = tile % to.depths, block = tile / to.depths % to.blocks, batch = tile / to.depths / to.blocks;
    const bool by_terms = from.term_stride == 1 || (from.line_stride != 1 && from.term_stride < from.line_stride);
    if (threadIdx.x == 0) notes = {};
    __syncthreads();
    TileNotes mine{};
    for (int i = threadIdx.x; i < kTileSize; i += kTileThreads) {
      const int term = by_terms ? i % kDepth : i / kTile, line = by_terms ? i / kDepth : i % kTile;
      const uint32_t bits = from.read(batch, block * kTile + line, depth * kDepth + term);
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

/// A thread's outputs: rows and columns of a tile, in runs of four.
template <int kSide>
struct Share {
  static constexpr int tile = 16 * kSide;
  static constexpr int outputs = kSide * kSide;
  using Sums = float[kSide][kSide];

  int row, column;       // of the first output in the tile
  int64_t first_output;  // of all of the product's
  int64_t columns;

  LOWPREC_DEVICE Share() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    row = (warp / 2 * 4 + lane / 8) * 4;
    column = (warp % 2 * 8 + lane % 8) * 4;
  }
  static LOWPREC_DEVICE int run(int i) { return i % 4 + i / 4 * 64; }
  LOWPREC_DEVICE int64_t output(int i, int j) const { return first_output + run(i) * columns + run(j); }
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

template <int kSide>
LOWPREC_DEVICE void read_side(const float* from, float (&to)[kSide]) {
#pragma unroll
  for (int i = 0; i < kSide; i += 4) {
    const float4 run = *reinterpret_cast<const float4*>(from + Share<kSide>::run(i));
    to[i] = run.x, to[i + 1] = run.y, to[i + 2] = run.z, to[i + 3] = run.w;
  }
}

/// Add terms one after another to all sums, row by row.
template <class Row, int kSide>
LOWPREC_DEVICE void add_rows(const Row& row, const Terms& terms, float (&s)[kSide][kSide]) {
  const float* a = terms.a;
  const float* b = terms.b;
#pragma unroll 1
  for (int k = 0; k < terms.count; ++k, a += Share<kSide>::tile, b += Share<kSide>::tile) {
    float x[kSide], y[kSide];
    read_side(a, x);
    read_side(b, y);
#pragma unroll
    for (int i = 0; i < kSide; ++i) row(x[i], y, s[i]);
  }
}

/// The largest magnitude of a warp's sums.
template <int kSide>
LOWPREC_DEVICE float largest_of(const float (&s)[kSide][kSide]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kSide * kSide; ++i) largest = fmaxf(largest, fabsf(s[i / kSide][i % kSide]));
  return as_float(__reduce_max_sync(0xFFFFFFFFu, as_bits(largest)));
}

/// What a kernel's ways need besides: nothing.
struct NoState {
  template <class Ways>
  LOWPREC_DEVICE explicit NoState(const Ways&) {}
};

/// IEEE single precision.
struct SingleWays {
  static constexpr int side = 8;
  using State = NoState;
  using To = Share<side>;

  QuickRound to;

  LOWPREC_DEVICE bool add(const Terms& terms, const To&, const State&, float&, To::Sums& s) const {
    add_rows(SingleWay<side>(), terms, s);
    return true;
  }
};

/// Nearest even. False where only the general way is right: operands that cannot be scaled, or are not finite.
struct NearestWays {
  static constexpr int side = 8;
  using State = NoState;
  using To = Share<side>;

  QuickRound to;
  WayRules rules;

  LOWPREC_DEVICE bool add(const Terms& terms, const To&, const State&, float& most, To::Sums& s) const {
    const TileNotes &a = terms.a_notes, &b = terms.b_notes;
    if (a.odd | b.odd) return false;
    const int digits = digits_of(a) + digits_of(b);
    const bool near = __fmul_ru(as_float(a.largest), as_float(b.largest)) <= rules.near;
    if (!rules.within(a, b, most, [&] { return largest_of(s); })) {
      to.saturates ? add_rows(LimitedWay<side, true>(to), terms, s) : add_rows(LimitedWay<side, false>(to), terms, s);
    } else if (digits <= rules.narrow || (digits <= rules.narrow_near && near)) {
      add_rows(NarrowWay<side>(to), terms, s);
    } else if (digits >= rules.rare) {
      add_rows(RareWay<side>(to), terms, s);
    } else {
      add_rows(ExactWay<side>(to), terms, s);
    }
    return true;
  }
};

/// The other deterministic modes, and formats without subnormals.
struct DirectedWays {
  static constexpr int side = 8;
  using State = NoState;
  using To = Share<side>;

  QuickRound to;
  WayRules rules;

  LOWPREC_DEVICE bool add(const Terms& terms, const To&, const State&, float& most, To::Sums& s) const {
    if (terms.a_notes.odd | terms.b_notes.odd) return false;
    const bool within = rules.within(terms.a_notes, terms.b_notes, most, [&] { return largest_of(s); });
    within&& to.mask == to.small_mask ? add_rows(DirectedWay<side>(to), terms, s)
                                      : add_rows(AnyWay<side>(to), terms, s);
    return true;
  }
};

/// One rounding by the way that every level can take, of a sum or of a group's first input.
static __device__ __noinline__ float round_sum(const SumPlan<Float32>& plan, int level, bool first, float partial,
                                               const Term<Float32>& term, uint32_t word) {
  const SumRounder<Float32>& round = plan.level[level];
  return as_float(static_cast<uint32_t>(first ? round.first(term, word) : round.next(as_bits(partial), term, word)));
}

/// How the levels above the first one add, and where they can do it quickly.
struct Upper {
  bool single;  // in IEEE single precision
  bool quick;   // deterministic, on the first level's scale
  QuickRound to;
};
constexpr int kUpper = 3;  // stages above the first

struct Tower {
  Upper level[kUpper];
};

/// The sums of all stages but the first, and how far each stage is. They are in memory, apart from what is in
/// registers.
template <int kOutputs>
struct UpperSums {
  float partial[kUpper][kOutputs];
  int64_t taken[kUpper];  // inputs of the present group
  int64_t done[kUpper];   // all inputs so far

  LOWPREC_DEVICE UpperSums() {
    for (int i = 0; i < kUpper; ++i) taken[i] = done[i] = 0;
  }
};

/// A thread's outputs while their terms come.
template <class Ways>
class TileSums {
 public:
  static constexpr int side = Ways::side;
  using To = Share<side>;
  using Sums = typename To::Sums;

  LOWPREC_DEVICE TileSums(const Product& of, const Ways& ways, const SumPlan<Float32>& plan, const Tower& tower,
                          const SumWords& words, const To& share, UpperSums<To::outputs>& upper)
      : of_(of), ways_(ways), plan_(plan), tower_(tower), words_(words), share_(share), upper_(upper), state_(ways) {
    begin();
  }

  /// Add terms in order.
  LOWPREC_DEVICE void add(Terms terms) {
    const int64_t fan_in = plan_.tree.stage[0].fan_in;
    int left = terms.count;
    while (left > 0) {
      terms.count = fan_in - added_ < left ? static_cast<int>(fan_in - added_) : left;
      if (!ways_.add(terms, share_, state_, most_, s_)) add_any(terms);
      added_ += terms.count;
      left -= terms.count;
      terms.a += terms.count * To::tile;
      terms.b += terms.count * To::tile;
      terms.first += terms.count;
      if (added_ == fan_in && plan_.tree.stages > 1) rise();
    }
  }

  LOWPREC_DEVICE void write(float* out, int rows, int columns) {
    if (plan_.tree.stages > 1) return write_upper(out, rows, columns);
#pragma unroll
    for (int i = 0; i < side; ++i) {
#pragma unroll
      for (int j = 0; j < side; ++j) {
        if (To::run(i) < rows && To::run(j) < columns) out[share_.output(i, j)] = value(i, j);
      }
    }
  }

 private:
  LOWPREC_DEVICE void begin() {
#pragma unroll
    for (int i = 0; i < To::outputs; ++i) s_[i / side][i % side] = -0.0f;  // what leaves any first term as it is
    nan_ = 0;
    added_ = 0;
    most_ = 0;
  }

  /// A sum of the first stage as it is.
  LOWPREC_DEVICE float value(int i, int j) const {
    const float s = s_[i][j];
    if ((nan_ >> (i * side + j) & 1) || (ways_.to.infinite_nan && fabsf(s) == as_float(Float32::infinity))) {
      return as_float(Float32::quiet_nan);
    }
    return s == 0 && !ways_.to.minus_zero ? 0.0f : s * of_.unscale_a * of_.unscale_b;
  }

  LOWPREC_DEVICE void read_values(float (&values)[To::outputs]) const {
#pragma unroll
    for (int i = 0; i < To::outputs; ++i) values[i] = value(i / side, i % side);
  }

  /// By the way that is always right. The sums are in memory meanwhile, so that the code is there but once.
  LOWPREC_DEVICE void add_any(const Terms& terms) {
    float values[To::outputs];
    read_values(values);
    const float left = terms.a_notes.odd ? 1.0f : of_.unscale_a, right = terms.b_notes.odd ? 1.0f : of_.unscale_b;
#pragma unroll 1
    for (int k = 0; k < terms.count; ++k) {
#pragma unroll 1
      for (int at = 0; at < To::outputs; ++at) {
        const int i = at / side, j = at % side;
        const float x = terms.a[k * To::tile + To::run(i)] * left, y = terms.b[k * To::tile + To::run(j)] * right;
        const Term<Float32> term = plan_.products(as_bits(x), as_bits(y));
        const uint32_t word = plan_.level[0].random ? words_(share_.output(i, j), terms.first + k) : 0;
        values[at] = round_sum(plan_, 0, added_ + k == 0, values[at], term, word);
      }
    }
    nan_ = 0;
#pragma unroll
    for (int i = 0; i < To::outputs; ++i) {
      if (values[i] != values[i]) nan_ |= uint64_t{1} << i;
      s_[i / side][i % side] = values[i] != values[i] ? 0.0f : values[i] * of_.scale_a * of_.scale_b;
    }
    most_ = as_float(Float32::infinity);
  }

  /// A group of the first stage is complete: its sums are inputs of the second, and so on.
  LOWPREC_DEVICE void rise() {
    float values[To::outputs];
    read_values(values);
    begin();
    rise_to(0, values);
  }

  LOWPREC_DEVICE void rise_to(int i, float (&values)[To::outputs]) {
    for (;; ++i) {
      const Stage& stage = plan_.tree.stage[i + 1];
      add_upper(i, stage, values);
      ++upper_.done[i];
      if (++upper_.taken[i] < stage.fan_in || i + 2 == plan_.tree.stages) return;
      upper_.taken[i] = 0;
#pragma unroll 1
      for (int at = 0; at < To::outputs; ++at) values[at] = upper_.partial[i][at];
    }
  }

  LOWPREC_DEVICE void add_upper(int i, const Stage& stage, const float (&values)[To::outputs]) {
    const Upper& upper = tower_.level[i];
    const bool first = upper_.taken[i] == 0;
#pragma unroll 1
    for (int at = 0; at < To::outputs; ++at) {
      const float x = values[at], partial = upper_.partial[i][at];
      float sum;
      if (upper.single) {
        sum = first ? x : __fadd_rn(partial, x);
      } else if (upper.quick && fabsf(x) < as_float(Float32::infinity) &&
                 (first || fabsf(partial) < as_float(Float32::infinity))) {
        sum = quick(upper.to, first ? -0.0f : partial, x);
      } else {
        const uint32_t word = plan_.level[stage.level].random
                                  ? words_(share_.output(at / side, at % side), stage.first + upper_.done[i])
                                  : 0;
        sum = round_sum(plan_, stage.level, first, partial, term_of<Float32>(as_bits(x)), word);
      }
      upper_.partial[i][at] = sum;
    }
  }

  LOWPREC_DEVICE float quick(const QuickRound& to, float partial, float x) const {
    const float s = partial * of_.scale_a * of_.scale_b, t = x * of_.scale_a * of_.scale_b;
    const float sum = AnyWay<side>(to)(sum_to_odd(1.0f, t, s));
    if (to.infinite_nan && fabsf(sum) == as_float(Float32::infinity)) return as_float(Float32::quiet_nan);
    return sum == 0 && !to.minus_zero ? 0.0f : sum * of_.unscale_a * of_.unscale_b;
  }

  LOWPREC_DEVICE void write_upper(float* out, int rows, int columns) {
    if (added_ > 0) rise();
    const int top = plan_.tree.stages - 2;
    for (int i = 0; i < top; ++i) {
      if (upper_.taken[i] == 0) continue;
      upper_.taken[i] = 0;
      float values[To::outputs];
#pragma unroll 1
      for (int at = 0; at < To::outputs; ++at) values[at] = upper_.partial[i][at];
      rise_to(i + 1, values);
    }
#pragma unroll 1
    for (int at = 0; at < To::outputs; ++at) {
      const int i = at / side, j = at % side;
      if (To::run(i) < rows && To::run(j) < columns) out[share_.output(i, j)] = upper_.partial[top][at];
    }
  }

  const Product& of_;
  const Ways& ways_;
  const SumPlan<Float32>& plan_;
  const Tower& tower_;
  const SumWords& words_;
  const To& share_;
  UpperSums<To::outputs>& upper_;
  typename Ways::State state_;
  Sums s_;         // of the first stage, scaled
  uint64_t nan_;   // which of them are NaN
  float most_;     // a bound of theirs
  int64_t added_;  // terms of the present group
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
    const int64_t within = index % (rows * columns), band = within / (8 * columns),
                  height = min(rows - band * 8, int64_t{8});
    batch = index / (rows * columns);
    down = band * 8 + within % (8 * columns) % height;
    across = within % (8 * columns) / height;
  }

 private:
  static LOWPREC_DEVICE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
};

template <int kWidth>
LOWPREC_INLINE int64_t tiles_of(int64_t lines) {
  return (lines + kWidth - 1) / kWidth;
}

template <class Ways>
__global__ void __launch_bounds__(kTileThreads, 2)
    tiles_kernel(const __grid_constant__ Product of, const __grid_constant__ Ways ways,
                 const __grid_constant__ SumPlan<Float32> plan, const __grid_constant__ Tower tower,
                 const SumDraws draws, float* out) {
  constexpr int width = Share<Ways::side>::tile, parts = kTile / width;
  __shared__ alignas(16) float tiles[2][2][kDepth * width];
  const TileAt at(blockIdx.x, tiles_of<width>(of.rows), tiles_of<width>(of.columns));
  const int64_t left = of.a.tile(at.batch, at.down / parts), right = of.b.tile(at.batch, at.across / parts);
  const float* a = of.a.tiles + left * kTileSize + at.down % parts * width;
  const float* b = of.b.tiles + right * kTileSize + at.across % parts * width;

  Share<Ways::side> share;
  const int64_t row = at.down * width + share.row, column = at.across * width + share.column;
  share.first_output = (at.batch * of.rows + row) * of.columns + column;
  share.columns = of.columns;
  const SumWords words = draws.read(plan.tree.roundings);
  UpperSums<Share<Ways::side>::outputs> upper;
  TileSums<Ways> outputs(of, ways, plan, tower, words, share, upper);

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
    outputs.add({of.a.notes[left + depth], of.b.notes[right + depth], tiles[depth % 2][0] + share.row,
                 tiles[depth % 2][1] + share.column, first, count});
  }
  const auto left_of = [](int64_t all, int64_t from) {
    return static_cast<int>(all - from < kTile ? all - from : kTile);
  };
  outputs.write(out, left_of(of.rows, row), left_of(of.columns, column));
}

/// Which of the kernels adds the terms.
enum class Kernel { none, single, nearest, directed };

LOWPREC_INLINE bool is_single(const LevelSpec& level) {
  const Format& format = level.format;
  return format.ebits == 8 && format.mbits == 23 && format.bias == Float32::bias && format.subnormals &&
         format.specials == Specials::ieee && level.rounding == 0 && !level.saturate;
}

/// A product by tiles, planned on the host: whether it can be, what memory it takes besides, and its launches.
class TilePlan {
 public:
  TilePlan(const AccumulatorSpec& spec, const Operands& of, const SumDraws& draws)
      : plan_(spec, of.terms, 0, 0), draws_(draws), to_(spec.level[0]), of_(of) {
    const LevelSpec& first = spec.level[0];
    kernel_ = is_single(first)            ? Kernel::single
              : !to_.usable || to_.random ? Kernel::none
              : to_.nearest_even          ? Kernel::nearest
                                          : Kernel::directed;
    if (spec.leaf != Leaf::terms || spec.has_product || plan_.tree.stages > 1 + kUpper || of.terms == 0 || !of.b.data ||
        of.a.element == Element::float64) {
      kernel_ = Kernel::none;
    }
    if (kernel_ == Kernel::none) return;
    if (kernel_ == Kernel::single) to_ = as_they_are();
    for (int i = 1; i < plan_.tree.stages; ++i) tower_.level[i - 1] = upper(spec.level[plan_.tree.stage[i].level]);
    set_product();
    if (blocks() > kMostBlocks) kernel_ = Kernel::none;
  }

  bool usable() const { return kernel_ != Kernel::none; }

  int64_t workspace() const { return bytes(product_.a) + bytes(product_.b); }

  /// `memory` of the workspace's size is free again when all has run.
  void launch(void* memory, float* out, cudaStream_t stream) {
    place(product_.a, memory);
    place(product_.b, static_cast<char*>(memory) + bytes(product_.a));
    pack(of_.a, of_.a.stride[1], of_.a.stride[2], of_.rows, product_.scale_a, product_.unscale_a, product_.a, stream);
    pack(of_.b, of_.b.stride[2], of_.b.stride[1], of_.columns, product_.scale_b, product_.unscale_b, product_.b,
         stream);
    const WayRules rules = kernel_ == Kernel::single ? WayRules{} : WayRules(to_);
    switch (kernel_) {
      case Kernel::single:
        return run(SingleWays{to_}, out, stream);
      case Kernel::nearest:
        return run(NearestWays{to_, rules}, out, stream);
      case Kernel::directed:
        return run(DirectedWays{to_, rules}, out, stream);
      default:
        return;
    }
  }

 private:
  static constexpr int64_t kMostBlocks = 0x7FFFFFFF;

  /// Nothing to scale or to mend.
  static QuickRound as_they_are() {
    QuickRound to{};
    to.sign = 1;
    to.minus_zero = true;
    return to;
  }

  Upper upper(const LevelSpec& level) const {
    Upper upper{is_single(level), false, QuickRound(level)};
    upper.quick = kernel_ != Kernel::single && upper.to.usable && !upper.to.random && upper.to.scale == to_.scale &&
                  upper.to.sign > 0 && to_.sign > 0;
    return upper;
  }

  void set_product() {
    const int left = to_.scale / 2, right = to_.scale - left;
    product_ = {packed(of_.a, of_.rows),
                packed(of_.b, of_.columns),
                to_.sign * power_of_two(-left),
                power_of_two(-right),
                to_.sign * power_of_two(left),
                power_of_two(right),
                of_.batches,
                of_.rows,
                of_.columns,
                of_.terms};
  }

  Packed packed(const Operand& operand, int64_t lines) const {
    const int64_t batches = operand.stride[0] == 0 ? 1 : of_.batches;
    return {nullptr, nullptr, tiles_of<kTile>(lines), tiles_of<kDepth>(of_.terms), batches};
  }

  static int64_t bytes(const Packed& packed) {
    return packed.count() * static_cast<int64_t>(kTileSize * sizeof(float) + sizeof(TileNotes));
  }

  static void place(Packed& packed, void* memory) {
    packed.tiles = static_cast<float*>(memory);
    packed.notes = reinterpret_cast<TileNotes*>(packed.tiles + packed.count() * kTileSize);
  }

  void pack(const Operand& operand, int64_t line_stride, int64_t term_stride, int64_t lines, float scale, float inverse,
            const Packed& to, cudaStream_t stream) const {
    const Lines from{operand, operand.stride[0], line_stride, term_stride, lines, of_.terms, scale, inverse};
    const int64_t blocks = to.count() < kMostBlocks ? to.count() : kMostBlocks;
    pack_kernel<<<static_cast<unsigned>(blocks), kTileThreads, 0, stream>>>(from, to);
  }

  int64_t blocks() const {
    const int side = 128;
    return of_.batches * ((of_.rows + side - 1) / side) * ((of_.columns + side - 1) / side);
  }

  template <class Ways>
  void run(const Ways& ways, float* out, cudaStream_t stream) const {
    tiles_kernel<<<static_cast<unsigned>(blocks()), kTileThreads, 0, stream>>>(product_, ways, plan_, tower_, draws_,
                                                                               out);
  }

  SumPlan<Float32> plan_;
  Tower tower_{};
  SumDraws draws_;
  QuickRound to_;
  Operands of_;
  Kernel kernel_;
  Product product_;
};

}  // namespace lowprec
