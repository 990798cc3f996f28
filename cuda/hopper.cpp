// The model of Hopper's tensor cores on the CPU: a row of the left matrix by a panel of columns, one column to a lane.

#include <algorithm>
#include <cstdint>

#include "lowprec/hopper_ops.h"

namespace lowprec {
namespace {

constexpr int64_t kLanes = 32;
constexpr int64_t kGrain = 1 << 16;  // multiplications that are worth a thread

/// One step of each lane, whose operands are all finite.
template <class Unit>
LOWPREC_INLINE void finite_step(const int32_t* a, const int32_t* b, uint32_t* accumulators) {
  int32_t largest[kLanes], products[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) largest[lane] = hopper_exponent(accumulators[lane]);
  for (int k = 0; k < Unit::step; ++k) {
    const int exponent = operand::exponent(a[k]);
    for (int lane = 0; lane < kLanes; ++lane) {
      largest[lane] = max(largest[lane], exponent + operand::exponent(b[k * kLanes + lane]));
    }
  }
  for (int k = 0; k < Unit::step; ++k) {
    const int exponent = operand::exponent(a[k]), left = operand::significand(a[k]) * (1 << hopper_lift<Unit>);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t right = b[k * kLanes + lane];
      const int distance = largest[lane] - exponent - operand::exponent(right);
      products[lane] += hopper_product(left, operand::significand(right), distance);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t before = accumulators[lane];
    const int64_t total = hopper_total<Unit>(products[lane], before, largest[lane]);
    const uint32_t after = hopper_result<Unit>(total, largest[lane]);
    accumulators[lane] = hopper_special(before) ? before : after;
  }
}

template <class Unit>
LOWPREC_CLONES void run_leaf(const int32_t* a, const int32_t* b, int64_t steps, uint32_t* accumulators) {
  for (int64_t step = 0; step < steps; ++step, a += Unit::step, b += Unit::step * kLanes) {
    int32_t seen = 0;
    for (int k = 0; k < Unit::step; ++k) seen |= a[k];
    for (int i = 0; i < Unit::step * kLanes; ++i) seen |= b[i];
    if (!(seen & operand::special)) {
      finite_step<Unit>(a, b, accumulators);
      continue;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      accumulators[lane] = hopper_step<Unit>(a, 1, b + lane, kLanes, accumulators[lane]);
    }
  }
}

struct Cpu {
  static constexpr int64_t kLeftWidth = 1, kRightWidth = kLanes;

  template <class Unit, class C>
  static void pack(const Tensor& x, const Panels& panels, const Tensor& words) {
    const auto* from = static_cast<const typename C::Bits*>(x.const_data_ptr());
    auto* to = static_cast<int32_t*>(words.mutable_data_ptr());
    parallel_for(0, panels.words(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = panels.read<Unit, C>(from, i);
    });
  }

  template <class Unit>
  static void run(const Tensor& a, const Tensor& b, const Leaves& leaves, const Tensor& out) {
    const auto* left = static_cast<const int32_t*>(a.const_data_ptr());
    const auto* right = static_cast<const int32_t*>(b.const_data_ptr());
    auto* to = static_cast<uint32_t*>(out.mutable_data_ptr());
    const int64_t rows = leaves.left.lines, tasks = leaves.left.batches * leaves.right.count() * rows;
    const int64_t grain = std::max<int64_t>(1, kGrain / (leaves.left.padded_terms * kLanes));
    parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        // Rows come one after another, so that a panel of columns stays in the cache.
        const int64_t row = task % rows, panel = task / rows % leaves.right.count();
        const int64_t batch = task / rows / leaves.right.count();
        run_row<Unit>(left + leaves.left.first_word(batch, row), right + leaves.right.first_word(batch, panel), leaves,
                      to, batch, row, panel * kLanes);
      }
    });
  }

 private:
  template <class Unit>
  static void run_row(const int32_t* a, const int32_t* b, const Leaves& leaves, uint32_t* to, int64_t batch,
                      int64_t row, int64_t column) {
    const int64_t lanes = std::min(kLanes, leaves.right.lines - column);
    for (int64_t leaf = 0; leaf < leaves.count; ++leaf) {
      uint32_t accumulators[kLanes] = {};
      const int64_t first = leaf * leaves.terms;
      run_leaf<Unit>(a + first, b + first * kLanes, leaves.steps<Unit>(leaf), accumulators);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        to[leaves.place(batch, row, column + lane, leaf)] = accumulators[lane];
      }
    }
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_hopper<Cpu>(library); }

}  // namespace
}  // namespace lowprec
