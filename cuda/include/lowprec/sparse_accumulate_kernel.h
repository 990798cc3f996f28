// The kernel of block-sparse products under an accumulator that every accumulator can take: a thread walks one output's
// tree, by the scalar functions of accumulate.h. Device code only, without torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lowprec/accumulate_kernel.h"
#include "lowprec/hopper.h"
#include "lowprec/sparse_accumulate.h"

namespace lowprec {

/// The levels of an accumulator on the device, where the number of an output's terms is known.
struct Levels {
  AccumulatorSpec spec;
  SumDraws draws;
  bool random;
};

/// Roundings of the output that has most terms, the same in all threads of a block.
template <class Bits>
LOWPREC_DEVICE int64_t most_roundings(const AccumulatorSpec& spec, const SparseSums<Bits>& of) {
  __shared__ unsigned long long most;
  if (threadIdx.x == 0) most = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (int i = threadIdx.x; i < of.columns(); i += blockDim.x) {
    const auto terms = static_cast<unsigned long long>(of.terms_of_column(i));
    mine = terms > mine ? terms : mine;
  }
  atomicMax(&most, mine);
  __syncthreads();
  return Tree(spec, leaves_of(spec, static_cast<int64_t>(most))).roundings;
}

template <class Bits>
LOWPREC_DEVICE SumWords words_of(const Levels& levels, const SparseSums<Bits>& of) {
  return levels.random ? levels.draws.read(most_roundings(levels.spec, of)) : SumWords{};
}

/// The value of a leaf by the model of Hopper's tensor cores, the n-th of so many terms.
template <class Unit, class Terms>
LOWPREC_DEVICE uint32_t hopper_leaf(const Terms& terms, int64_t size, int64_t n) {
  const int64_t end = size == 0 || (n + 1) * size > terms.count() ? terms.count() : (n + 1) * size;
  uint32_t accumulator = 0;
#pragma unroll 1
  for (int64_t first = n * size; first < end; first += Unit::step) {
    int32_t a[Unit::step], b[Unit::step];
#pragma unroll 1
    for (int k = 0; k < Unit::step; ++k) {
      a[k] = b[k] = operand::zero;
      if (first + k >= end) continue;
      const auto factors = terms(first + k);
      a[k] = static_cast<int32_t>(factors.a), b[k] = static_cast<int32_t>(factors.b);
    }
    accumulator = hopper_step<Unit>(a, 1, b, 1, accumulator);
  }
  return accumulator;
}

/// What the lowest level adds: terms, or leaves.
template <class C, class Terms>
LOWPREC_DEVICE Term<C> value_at(const SumPlan<C>& plan, const Terms& terms, int64_t size, int64_t n) {
  if constexpr (std::is_same_v<C, Float32>) {
    if (plan.leaf == Leaf::hopper_fp8) return term_of<C>(hopper_leaf<HopperFp8>(terms, size, n));
    if (plan.leaf == Leaf::hopper_fp16) return term_of<C>(hopper_leaf<HopperFp16>(terms, size, n));
  }
  const auto factors = terms(n);
  return plan.products(factors.a, factors.b);
}

/// A dtype's own numbers.
template <class C>
using NumberOf = std::conditional_t<std::is_same_v<C, Float64>, double, float>;

template <class C>
__global__ void __launch_bounds__(kSumThreads)
    sum_blocks_kernel(const __grid_constant__ SumPlan<C> plan, const __grid_constant__ Levels levels,
                      const __grid_constant__ SparseSums<typename C::Bits> of, typename C::Bits* out) {
  const SumWords words = words_of(levels, of);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSumThreads;
  for (int64_t o = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; o < of.outputs(); o += threads) {
    const auto terms = of.terms(o);
    const int64_t size = levels.spec.terms, leaves = leaves_of(levels.spec, terms.count());
    const Tree tree(levels.spec, leaves);
    const int64_t count = plan.leaf == Leaf::exact ? terms.count() : leaves;
    const uint64_t bits = plan.sum(tree, words, o, count, [&](int64_t n) { return value_at<C>(plan, terms, size, n); });
    const auto sum = bit_cast<NumberOf<C>>(static_cast<typename C::Bits>(bits));
    out[o] = bit_cast<typename C::Bits>(of.close(o, sum));
  }
}

}  // namespace lowprec
