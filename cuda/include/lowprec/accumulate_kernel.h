// The kernel of sums and matrix products on CUDA that every accumulator can take: a thread walks one output's tree, by
// the scalar functions that the CPU uses. Device code only, without torch.
#pragma once

#include <cstdint>

#include "lowprec/accumulate.h"
#include "lowprec/cast_kernel.h"
#include "lowprec/convert.h"

namespace lowprec {

/// Dtypes of operands; they are carried in float32, but for float64.
enum class Element : int { float64, float32, float16, bfloat16 };

/// A tensor of up to three dimensions as its elements' places.
struct Operand {
  const void* data = nullptr;
  Element element = Element::float32;
  int64_t stride[3] = {};  // of batches, rows, columns

  /// The bits of an element as those of the carrier.
  template <class C>
  LOWPREC_DEVICE typename C::Bits read(int64_t place) const {
    if constexpr (C::fraction_bits > Float32::fraction_bits) {
      return static_cast<const uint64_t*>(data)[place];
    } else {
      if (element == Element::float32) return static_cast<const uint32_t*>(data)[place];
      const uint16_t bits = static_cast<const uint16_t*>(data)[place];
      return element == Element::float16 ? widen<Float16, Float32>(bits) : widen<BFloat16, Float32>(bits);
    }
  }
};

/// The operands of a product: of shapes [batches, rows, terms] and [batches, terms, columns]. Or the rows of a sum, a
/// product with ones of one column, where b has no data.
struct Operands {
  Operand a;
  Operand b;
  int64_t batches;
  int64_t rows;
  int64_t columns;
  int64_t terms;

  LOWPREC_INLINE int64_t outputs() const { return batches * rows * columns; }
};

/// What the words of stochastic rounding are drawn from.
struct SumDraws {
  DeviceWord seed;
  DeviceWord offset;

  LOWPREC_DEVICE SumWords read(int64_t roundings) const {
    return {static_cast<uint64_t>(seed.read()), static_cast<uint64_t>(offset.read()), roundings};
  }
};

constexpr int kSumThreads = 128;

template <class C>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ SumPlan<C> plan, const Operands of,
                                                          const SumDraws draws, typename C::Bits* out) {
  const SumWords words = draws.read(plan.tree.roundings);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSumThreads;
  for (int64_t o = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; o < of.outputs(); o += threads) {
    const int64_t column = o % of.columns, row = o / of.columns % of.rows, batch = o / of.columns / of.rows;
    const int64_t left = batch * of.a.stride[0] + row * of.a.stride[1];
    const int64_t right = batch * of.b.stride[0] + column * of.b.stride[2];
    out[o] = static_cast<typename C::Bits>(plan.sum(words, o, of.terms, [&](int64_t k) {
      const uint64_t x = of.a.template read<C>(left + k * of.a.stride[2]);
      if (!of.b.data) return term_of<C>(x);
      return plan.products(x, of.b.template read<C>(right + k * of.b.stride[1]));
    }));
  }
}

}  // namespace lowprec
