// Sums as trees of partial sums (numerics.md, section 5): which inputs a level adds, and the one rounding of each sum.
//
// Integers only. A partial sum is held as the bits of a carrier, float32 or float64, which holds every value of every
// level's format.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lowprec/exact.h"
#include "lowprec/number.h"
#include "lowprec/philox.h"

namespace lowprec {

constexpr int kMaxLevels = 16;  // of an accumulator
constexpr int kMaxStages = 64;  // levels, the last one as often as it runs: more than any tensor needs

/// The lowest level of a sum, in the order of Python's `LEAVES`.
enum class Leaf : int { terms, exact, tensor_core, hopper_fp8, hopper_fp16 };

/// One level, as its eight integers say it.
struct LevelSpec {
  int64_t fan_in;  // inputs of a group; 0: all that is left
  Format format;
  int rounding;
  bool saturate;
};

/// Whether a level rounds as the device's own arithmetic of an IEEE 754 format does.
inline bool is_ieee(const LevelSpec& level, int ebits, int mbits) {
  const Format& format = level.format;
  return format.ebits == ebits && format.mbits == mbits && format.bias == (1 << (ebits - 1)) - 1 && format.subnormals &&
         format.specials == Specials::ieee && level.rounding == 0 && !level.saturate;
}

inline bool is_single(const LevelSpec& level) { return is_ieee(level, 8, 23); }

/// An accumulator, as the integers of an op say it.
struct AccumulatorSpec {
  Leaf leaf;
  int64_t terms;  // of a leaf; 0: all
  bool has_product;
  Format product;
  int levels;
  LevelSpec level[kMaxLevels];

  bool is_random() const {
    for (int i = 0; i < levels; ++i) {
      if (level[i].rounding == 6) return true;
    }
    return false;
  }
};

/// One run of a level: the last level has one for each time that it repeats.
struct Stage {
  int level;
  int64_t fan_in;  // inputs of a group, above 0
  int64_t inputs;
  int64_t first;  // number of its first rounding among all of an output's
};

/// The stages that so many inputs pass, from the leaves up. No inputs pass none.
struct Tree {
  int stages = 0;
  int64_t roundings = 0;
  Stage stage[kMaxStages];

  Tree() = default;
  LOWPREC_INLINE Tree(const AccumulatorSpec& spec, int64_t inputs) {
    for (int level = 0; inputs > 0 && stages < kMaxStages; ++stages) {
      const int64_t fan_in = spec.level[level].fan_in ? spec.level[level].fan_in : inputs;
      stage[stages] = {level, fan_in, inputs, roundings};
      roundings += inputs;
      inputs = (inputs - 1) / fan_in + 1;
      const bool last = level + 1 == spec.levels;
      if (last && inputs == 1) inputs = 0;
      level += !last;
    }
  }
};

/// The random word of an output's n-th rounding.
struct SumWords {
  uint64_t seed;
  uint64_t offset;
  int64_t roundings;  // of each output

  LOWPREC_INLINE uint32_t operator()(int64_t output, int64_t n) const {
    const auto index = static_cast<uint64_t>(output * roundings + n);
    return select(philox(seed, offset, index / 4), static_cast<int>(index % 4));
  }
};

/// Words of this width hold an exact product of two numbers of the carrier, and a sum well enough to round it.
template <class C>
using WordOf = std::conditional_t<(C::fraction_bits > 23), uint128_t, uint64_t>;

/// What is to be added: an input as a number, exact.
template <class C>
using Term = NumberIn<WordOf<C>>;

template <class C>
LOWPREC_INLINE Number read_number(uint64_t bits) {
  return Layout::of(C{}).read(bits);
}

template <class C>
LOWPREC_INLINE Term<C> term_of(uint64_t bits) {
  return widen<WordOf<C>>(read_number<C>(bits));
}

/// Rounds exact sums to values of one format, once.
template <class C>
struct SumRounder {
  Rounder round;
  Writer write;
  bool random;
  bool down;  // the mode under which numbers that cancel leave -0

  SumRounder() : SumRounder(Format{8, 23, 127, Specials::ieee, true}, 0, false) {}
  SumRounder(const Format& format, int rounding, bool saturate)
      : round(Layout::of(format), rounding, saturate || format.specials == Specials::finite),
        write(round.to, Layout::of(C{})),
        random(round.choice.random),
        down(rounding == 4) {}

  /// The first input of a group.
  template <class Word>
  LOWPREC_INLINE uint64_t first(const NumberIn<Word>& term, uint32_t word) const {
    if (term.nan) return C::quiet_nan;
    return write(round(term, word), term.negative);
  }

  /// The sum of a partial sum and the next input.
  LOWPREC_INLINE uint64_t next(uint64_t sum, const Term<C>& term, uint32_t word) const {
    return first(add(term_of<C>(sum), term, down), word);
  }
};

/// Terms of a matrix product: exact, or rounded first.
template <class C>
struct Products {
  bool rounds;
  Rounder round;

  explicit Products(const AccumulatorSpec& spec)
      : rounds(spec.has_product), round(Layout::of(spec.has_product ? spec.product : kAny), 0, true) {}

  LOWPREC_INLINE Term<C> operator()(uint64_t a, uint64_t b) const {
    const Term<C> exact = multiply<WordOf<C>>(read_number<C>(a), read_number<C>(b));
    if (!rounds || exact.nan) return exact;
    return widen<WordOf<C>>(round.to.read(round.to.with_sign(round(exact, 0), exact.negative)));
  }

 private:
  static constexpr Format kAny{8, 23, 127, Specials::ieee, true};
};

/// One output's walk through a tree: a partial sum for each stage. Terms come in order; `Round` is called with a level,
/// a partial sum or none, an input, and the number of the rounding, and returns the new partial sum.
template <class C>
class Walk {
 public:
  LOWPREC_INLINE explicit Walk(const Tree& tree) : tree_(tree) {
    for (int i = 0; i < tree.stages; ++i) done_[i] = taken_[i] = 0;
  }

  /// Add a term, and every partial sum that it completes to the stage above.
  template <class Round>
  LOWPREC_INLINE void add(Term<C> term, const Round& round) {
    rise(0, term, round);
  }

  /// The result: groups that are short end here.
  template <class Round>
  LOWPREC_INLINE uint64_t finish(const Round& round) {
    if (tree_.stages == 0) return 0;
    for (int i = 0; i + 1 < tree_.stages; ++i) {
      if (taken_[i] == 0) continue;
      taken_[i] = 0;
      rise(i + 1, term_of<C>(partial_[i]), round);
    }
    return partial_[tree_.stages - 1];
  }

 private:
  template <class Round>
  LOWPREC_INLINE void rise(int i, Term<C> term, const Round& round) {
    for (;; ++i) {
      const Stage& stage = tree_.stage[i];
      partial_[i] = round(stage.level, taken_[i] == 0, partial_[i], term, stage.first + done_[i]++);
      if (++taken_[i] < stage.fan_in || i + 1 == tree_.stages) return;
      taken_[i] = 0;
      term = term_of<C>(partial_[i]);
    }
  }

  const Tree& tree_;
  uint64_t partial_[kMaxStages];
  int64_t done_[kMaxStages];   // inputs that a stage had
  int64_t taken_[kMaxStages];  // those of its present group
};

/// Everything that the sums of one call share.
template <class C>
struct SumPlan {
  Leaf leaf;
  Tree tree;
  Products<C> products;
  SumRounder<C> level[kMaxLevels];
  SumWords words;

  SumPlan(const AccumulatorSpec& spec, int64_t terms, uint64_t seed, uint64_t offset)
      : leaf(spec.leaf),
        tree(spec, spec.leaf == Leaf::exact ? terms > 0 : terms),
        products(spec),
        words{seed, offset, tree.roundings} {
    for (int i = 0; i < spec.levels; ++i) {
      level[i] = SumRounder<C>(spec.level[i].format, spec.level[i].rounding, spec.level[i].saturate);
    }
  }

  /// The bits of one output; `term(k)` is its k-th term of `count`.
  template <class TermAt>
  LOWPREC_INLINE uint64_t sum(int64_t output, int64_t count, const TermAt& term) const {
    return sum(words, output, count, term);
  }

  /// The same by words that are known only where the sum is formed.
  template <class TermAt>
  LOWPREC_INLINE uint64_t sum(const SumWords& words, int64_t output, int64_t count, const TermAt& term) const {
    return sum(tree, words, output, count, term);
  }

  /// The same by a tree of its own: sums of one call may differ in how many terms they have.
  template <class TermAt>
  LOWPREC_INLINE uint64_t sum(const Tree& tree, const SumWords& words, int64_t output, int64_t count,
                              const TermAt& term) const {
    if (leaf == Leaf::exact) return exact_sum(words, output, count, term);
    Walk<C> walk(tree);
    const auto round = [&](int i, bool first, uint64_t partial, const Term<C>& input, int64_t n) {
      const uint32_t draw = level[i].random ? words(output, n) : 0;
      return first ? level[i].first(input, draw) : level[i].next(partial, input, draw);
    };
    for (int64_t k = 0; k < count; ++k) walk.add(term(k), round);
    return walk.finish(round);
  }

 private:
  template <class TermAt>
  LOWPREC_INLINE uint64_t exact_sum(const SumWords& words, int64_t output, int64_t count, const TermAt& term) const {
    if (count == 0) return 0;
    ExactSum<C> sum;
    for (int64_t k = 0; k < count; ++k) sum.add(term(k));
    return level[0].first(sum.total(level[0].down), level[0].random ? words(output, 0) : 0);
  }
};

}  // namespace lowprec
