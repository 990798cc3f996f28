// The measurement of biases on the CPU: a page of 16384 elements at a time, shared out among torch's threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "lowprec/adapt_ops.h"
#include "lowprec/inline.h"
#include "lowprec/statistics.h"

namespace lowprec {
namespace {

constexpr int64_t kGrain = 4;  // pages that are worth a thread

/// The largest finite magnitude of an array, as its bits.
template <class C>
LOWPREC_CLONES typename C::Word largest(const typename C::Bits* x, int64_t count) {
  typename C::Word amax = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<typename C::Word>(x[i] & (C::sign - 1));
    const typename C::Word finite = magnitude < C::infinity ? magnitude : 0;
    amax = amax > finite ? amax : finite;
  }
  return amax;
}

/// Finite elements, Σ|x| and Σx².
struct Sums {
  double count = 0;
  double absolute = 0;
  double squares = 0;
};

/// Add up lanes pairwise, neighbours first.
double add_lanes(double (&lanes)[kLanes]) {
  for (int left = kLanes / 2; left > 0; left /= 2) {
    for (int i = 0; i < left; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  }
  return lanes[0];
}

template <class C>
LOWPREC_CLONES Sums sums_of_page(const typename C::Bits* x, int64_t count) {
  double absolute[kLanes] = {}, squares[kLanes] = {};
  int64_t finite = 0;
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - begin); ++i) {
      double terms[kTerms];
      terms_of<C>(x[begin + i], x[begin + i], terms);
      absolute[i] += terms[kAbsolute];
      squares[i] += terms[kSquares];
      finite += (x[begin + i] & (C::sign - 1)) < C::infinity;
    }
  }
  return {static_cast<double>(finite), add_lanes(absolute), add_lanes(squares)};
}

Sums sums_of_pages(const std::vector<Sums>& pages) {
  double absolute[kLanes] = {}, squares[kLanes] = {}, count = 0;
  for (size_t i = 0; i < pages.size(); ++i) {
    count += pages[i].count;
    absolute[i % kLanes] += pages[i].absolute;
    squares[i % kLanes] += pages[i].squares;
  }
  return {count, add_lanes(absolute), add_lanes(squares)};
}

struct Cpu {
  template <class C>
  static void run(const Adaptation& rule, const Tensor& x, int64_t* state, int64_t* used) {
    const auto* data = static_cast<const typename C::Bits*>(x.const_data_ptr());
    const bool due = measures(rule, state) && x.numel() > 0;
    update(rule, due ? measure<C>(rule, data, x.numel()) : kNothing, state, used);
  }

 private:
  template <class C>
  static int64_t measure(const Adaptation& rule, const typename C::Bits* x, int64_t count) {
    std::atomic<uint64_t> amax{0};
    std::vector<Sums> pages(rule.by_deviation ? pages_of(count) : 0);
    parallel_for(0, pages_of(count), kGrain, [&](int64_t first, int64_t last) {
      const int64_t size = std::min(last * kPage, count) - first * kPage;
      const uint64_t found = amax_bits<C>(largest<C>(x + first * kPage, size));
      for (uint64_t before = amax; before < found && !amax.compare_exchange_weak(before, found);) {
      }
      for (int64_t page = first; rule.by_deviation && page < last; ++page) {
        pages[page] = sums_of_page<C>(x + page * kPage, std::min(kPage, count - page * kPage));
      }
    });
    if (!rule.by_deviation) return exponent_of(amax);
    const Sums sums = sums_of_pages(pages);
    return exponent_by_deviation(rule.stdv, sums.count, sums.absolute, sums.squares, amax);
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { library.impl("adapt", TORCH_BOX(&adapt<Cpu>)); }

}  // namespace
}  // namespace lowprec
