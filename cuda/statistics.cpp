// The cast that gathers statistics, on the CPU: a row of 1024 elements at a time is cast and counted, and a page of 16
// rows added up, from the first-level cache and the second. Threads share out pages.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "lowprec/draws.h"
#include "lowprec/inline.h"
#include "lowprec/statistics_ops.h"

namespace lowprec {
namespace {

constexpr int64_t kGrain = 2;    // pages that are worth a thread
constexpr int64_t kColumn = 32;  // lanes whose sums stay in the first-level cache

/// What casting a row left behind, by element.
template <class C>
struct Notes {
  alignas(64) typename C::Word beyond[kLanes];
  alignas(64) uint16_t codes[kLanes];
};

template <class C, class Op, class AnyCoder>
LOWPREC_INLINE void cast_all(const Op op, AnyCoder coder, const typename C::Bits* x, typename C::Bits* out,
                             int64_t count, const uint32_t* words, Notes<C>& notes) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    out[i] = op(x[i], Op::random ? words[i] : 0, coder);
    notes.beyond[i] = coder.beyond;
    notes.codes[i] = static_cast<uint16_t>(coder.code_of(x[i]));
  }
}

/// Cast a row: one loop for regular grids and one for the others, each without the branch that tells them apart.
template <class C, class Op, class AnyCoder>
LOWPREC_CLONES void cast_row(Op op, AnyCoder coder, const typename C::Bits* x, typename C::Bits* out, int64_t count,
                             const uint32_t* words, Notes<C>* notes) {
  if (op.grid.regular) {
    op.grid.regular = true;
    return cast_all<C>(op, coder, x, out, count, words, *notes);
  }
  op.grid.regular = false;
  return cast_all<C>(op, coder, x, out, count, words, *notes);
}

/// Counts of a row or more; `amax` is the bits of a magnitude.
template <class C>
struct Counts {
  typename C::Word saturated = 0;
  typename C::Word flushed = 0;
  typename C::Word nan = 0;
  typename C::Word amax = 0;
};

template <class C>
LOWPREC_CLONES Counts<C> count_row(const typename C::Bits* x, const typename C::Bits* y, const typename C::Word* beyond,
                                   int64_t count) {
  using Word = typename C::Word;
  constexpr Word top = 8 * sizeof(Word) - 1;
  Word saturated = 0, flushed = 0, nans = 0, amax = 0;
  // A comparison is the top bit of a difference: GCC 12 makes no vector code of sums of conditions.
  for (int64_t i = 0; i < count; ++i) {
    const Word before = x[i] & (C::sign - 1);
    const Word after = y[i] & (C::sign - 1);
    const Word special = (C::infinity - 1 - before) >> top;
    saturated += beyond[i];                                   // NaNs too
    nans += (C::infinity - before) >> top;                    // above infinity
    flushed += ((after - 1) >> top) - ((before - 1) >> top);  // zeros, less those that were
    amax = std::max(amax, before & (special - 1));
  }
  return {saturated - nans, flushed, nans, amax};
}

/// The counts of a row whose cast left notes, and the codes in them.
template <class C>
LOWPREC_CLONES Counts<C> count_notes(const typename C::Bits* x, const uint32_t* notes, uint16_t* codes, int64_t count) {
  using Word = typename C::Word;
  constexpr Word top = 8 * sizeof(Word) - 1;
  Word nans = 0, amax = 0;
  uint32_t saturated = 0, flushed = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Word before = x[i] & (C::sign - 1);
    const Word special = (C::infinity - 1 - before) >> top;
    saturated += notes[i] >> 31;
    flushed += notes[i] >> 30 & 1;
    nans += (C::infinity - before) >> top;
    amax = std::max(amax, before & (special - 1));
    codes[i] = static_cast<uint16_t>(notes[i]);
  }
  return {saturated, flushed, nans, amax};
}

/// The sums of each lane, [terms][lanes].
struct LaneSums {
  alignas(64) double at[kTerms][kLanes] = {};

  double total(int term) {
    double* lanes = at[term];
    for (int left = kLanes / 2; left > 0; left /= 2) {
      for (int i = 0; i < left; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
    }
    return lanes[0];
  }
};

/// Add rows to their lanes, some lanes at a time.
template <class C>
LOWPREC_CLONES void add_rows(const typename C::Bits* x, const typename C::Bits* y, int64_t rows, LaneSums* sums) {
  for (int64_t column = 0; column < kLanes; column += kColumn) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto* before = x + row * kLanes + column;
      const auto* after = y + row * kLanes + column;
      for (int64_t i = 0; i < kColumn; ++i) {
        double terms[kTerms];
        terms_of<C>(before[i], after[i], terms);
        for (int term = 0; term < kTerms; ++term) sums->at[term][column + i] += terms[term];
      }
    }
  }
}

/// The sums of a page's elements, which need not fill its last row.
template <class C>
void add_page(const typename C::Bits* x, const typename C::Bits* y, int64_t count, double* totals) {
  LaneSums sums;
  const int64_t whole = count / kLanes * kLanes;
  add_rows<C>(x, y, count / kLanes, &sums);
  if (whole < count) {
    typename C::Bits before[kLanes] = {}, after[kLanes] = {};
    std::copy(x + whole, x + count, before);
    std::copy(y + whole, y + count, after);
    add_rows<C>(before, after, 1, &sums);
  }
  for (int term = 0; term < kTerms; ++term) totals[term] = sums.total(term);
}

/// What threads add up to: integers and a maximum, so their order does not matter.
class Total {
 public:
  template <class C>
  void add(const Counts<C>& counts) {
    saturated_ += static_cast<int64_t>(counts.saturated);
    flushed_ += static_cast<int64_t>(counts.flushed);
    nan_ += static_cast<int64_t>(counts.nan);
    const uint64_t amax = amax_bits<C>(counts.amax);
    for (uint64_t before = amax_; before < amax && !amax_.compare_exchange_weak(before, amax);) {
    }
  }

  void add_to(double* stats, int64_t elements) const {
    stats[kElements] += static_cast<double>(elements);
    stats[kSaturated] += static_cast<double>(saturated_);
    stats[kFlushed] += static_cast<double>(flushed_);
    stats[kNan] += static_cast<double>(nan_);
    stats[kAmax] = bit_cast<double>(std::max<uint64_t>(bit_cast<uint64_t>(stats[kAmax]), amax_));
  }

 private:
  std::atomic<int64_t> saturated_{0};
  std::atomic<int64_t> flushed_{0};
  std::atomic<int64_t> nan_{0};
  std::atomic<uint64_t> amax_{0};
};

/// Add the sums of pages to a vector of statistics, in the order of the header.
void add_pages(const std::vector<double>& pages, double* stats) {
  LaneSums sums;
  for (size_t i = 0; i < pages.size(); ++i) sums.at[i % kTerms][i / kTerms % kLanes] += pages[i];
  for (int term = 0; term < kTerms; ++term) stats[kSums + term] += sums.total(term);
}

/// A thread's histogram, added to the common one at the end.
class Histogram {
 public:
  Histogram(int64_t* codes, int64_t bins) : codes_(codes), bins_(codes ? bins : 0) {}

  void add(const uint16_t* codes, int64_t count) {
    if (!codes_) return;
    for (int64_t i = 0; i < count; ++i) ++bins_[codes[i]];
  }

  void finish() const {
    for (size_t i = 0; i < bins_.size(); ++i) {
      if (bins_[i]) std::atomic_ref<int64_t>(codes_[i]) += bins_[i];
    }
  }

 private:
  int64_t* codes_;
  std::vector<int64_t> bins_;
};

/// One pass over what a cast left behind, by pages.
template <class C>
void gather_pages(const typename C::Bits* x, const typename C::Bits* y, const uint32_t* notes, int64_t count,
                  const Gathered& to) {
  std::vector<double> pages(static_cast<size_t>(pages_of(count) * kTerms));
  Total total;
  parallel_for(0, pages_of(count), kGrain, [&](int64_t first, int64_t last) {
    Histogram histogram(to.codes, to.bins);
    alignas(64) uint16_t codes[kLanes];
    for (int64_t page = first; page < last; ++page) {
      const int64_t end = std::min((page + 1) * kPage, count);
      for (int64_t begin = page * kPage; begin < end; begin += kLanes) {
        const int64_t size = std::min<int64_t>(kLanes, end - begin);
        total.add(count_notes<C>(x + begin, notes + begin, codes, size));
        histogram.add(codes, size);
      }
      add_page<C>(x + page * kPage, y + page * kPage, end - page * kPage, &pages[page * kTerms]);
    }
    histogram.finish();
  });
  total.add_to(to.stats, count);
  add_pages(pages, to.stats);
}

struct Cpu {
  template <class C, class Mode>
  static void run(const Setting& setting, const Tensor& x, const Tensor& out, const Source& source,
                  const Gathered& gathered) {
    const Quantize<C, Mode> op(setting.format, setting.saturate);
    const Coder<C, Mode> coder(setting.format, setting.saturate);
    const Draws draws = Mode::random ? Draws(source) : Draws();
    elementwise(x, out, Mode::random, [&](const void* from, void* to, int64_t count) {
      cast_pages(op, coder, static_cast<const typename C::Bits*>(from), static_cast<typename C::Bits*>(to), count,
                 draws, gathered);
    });
  }

 private:
  template <class C, class Mode>
  static void cast_pages(const Quantize<C, Mode>& op, const Coder<C, Mode>& coder, const typename C::Bits* x,
                         typename C::Bits* out, int64_t count, const Draws& draws, const Gathered& gathered) {
    std::vector<double> pages(static_cast<size_t>(pages_of(count) * kTerms));
    Total total;
    parallel_for(0, pages_of(count), kGrain, [&](int64_t first, int64_t last) {
      Histogram histogram(gathered.codes, gathered.bins);
      Notes<C> notes;
      alignas(64) uint32_t words[Mode::random ? kLanes : 1];
      for (int64_t page = first; page < last; ++page) {
        const int64_t end = std::min((page + 1) * kPage, count);
        for (int64_t begin = page * kPage; begin < end; begin += kLanes) {
          const int64_t size = std::min<int64_t>(kLanes, end - begin);
          if (Mode::random) draw(draws, begin, size, words);
          cast_row<C>(op, coder, x + begin, out + begin, size, words, &notes);
          total.add(count_row<C>(x + begin, out + begin, notes.beyond, size));
          histogram.add(notes.codes, size);
        }
        add_page<C>(x + page * kPage, out + page * kPage, end - page * kPage, &pages[page * kTerms]);
      }
      histogram.finish();
    });
    total.add_to(gathered.stats, count);
    add_pages(pages, gathered.stats);
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_statistics<Cpu>(library); }

}  // namespace

void gather_on_cpu(const Tensor& x, const Tensor& results, const Tensor& notes, const Gathered& to) {
  for_container(x.scalar_type(), [&](auto container) {
    using C = decltype(container);
    using Bits = typename C::Bits;
    gather_pages<C>(static_cast<const Bits*>(x.const_data_ptr()), static_cast<const Bits*>(results.const_data_ptr()),
                    static_cast<const uint32_t*>(notes.const_data_ptr()), x.numel(), to);
  });
}

}  // namespace lowprec
