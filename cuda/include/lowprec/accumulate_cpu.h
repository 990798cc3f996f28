// Matrix products under any accumulator on the CPU: by vectors where those serve it, else by integers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lowprec/accumulate.h"
#include "lowprec/accumulate_ops.h"
#include "lowprec/accumulate_vectors.h"
#include "lowprec/convert.h"
#include "lowprec/operands.h"

namespace lowprec {

/// The bits of an input as those of its carrier; a NaN as the quiet one.
template <class C>
class Widen {
 public:
  LOWPREC_INLINE uint64_t operator()(typename C::Bits bits) const {
    if constexpr (std::is_same_v<C, CarrierOf<C>>) {
      return bits;
    } else {
      const Number x = from_.read(bits);
      return x.nan ? Float32::quiet_nan : write_(bits & (C::sign - 1), x.negative);
    }
  }

 private:
  Layout from_ = Layout::of(C{});
  Writer write_{from_, Layout::of(CarrierOf<C>{})};
};

/// Every output by itself, whatever the accumulator: no float arithmetic.
template <class C>
void multiply_each(const AccumulatorSpec& spec, uint64_t seed, uint64_t offset, const Product<C>& x,
                   typename CarrierOf<C>::Bits* out) {
  using Carrier = CarrierOf<C>;
  constexpr int64_t grain = 4096;  // roundings that are worth a thread
  const Widen<C> widen;
  const SumPlan<Carrier> plan(spec, x.terms, seed, offset);
  const SumWords words{seed, offset, std::max(x.roundings, plan.words.roundings)};
  const int64_t outputs = x.batch * x.rows * x.columns;
  parallel_for(0, outputs, std::max<int64_t>(grain / std::max<int64_t>(x.terms, 1), 1), [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t row = i / x.columns % x.rows, column = i % x.columns;
      const Product<C> one = x.at(i / x.columns / x.rows);
      const auto* left = one.left.data + row * one.left.stride;
      const auto* right = one.right.data + column * one.right.stride;
      const int64_t output = one.output(row, column);
      const uint64_t bits = plan.sum(words, output, x.terms, [&](int64_t k) {
        return plan.products(widen(left[k * x.left.step]), widen(right[k * x.right.step]));
      });
      out[output] = static_cast<typename Carrier::Bits>(bits);
    }
  });
}

/// The product by vectors; false if there are none that serve the accumulator.
template <class C>
bool multiply_by_vectors([[maybe_unused]] const AccumulatorSpec& spec, [[maybe_unused]] uint64_t seed,
                         [[maybe_unused]] uint64_t offset, [[maybe_unused]] const Product<C>& x,
                         [[maybe_unused]] typename CarrierOf<C>::Bits* out) {
#ifdef LOWPREC_VECTORS
  switch (vectors()) {
    case Vectors::avx512:
      return multiply_avx512(spec, seed, offset, x, out);
    case Vectors::avx2:
      return multiply_avx2(spec, seed, offset, x, out);
    default:
      return false;
  }
#else
  return false;
#endif
}

/// All outputs of a product.
template <class C>
void multiply_any(const AccumulatorSpec& spec, uint64_t seed, uint64_t offset, const Product<C>& x,
                  typename CarrierOf<C>::Bits* out) {
  if (!multiply_by_vectors(spec, seed, offset, x, out)) multiply_each(spec, seed, offset, x, out);
}

}  // namespace lowprec
