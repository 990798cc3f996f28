// Sums and matrix products on CPUs with AVX-512.

#include "lowprec/accumulate_vectors.h"

#ifdef LOWPREC_VECTORS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c")

#include "lowprec/accumulate_avx512.h"
#include "lowprec/accumulate_panels.h"

namespace lowprec {

/// In float32 where its digits suffice, else in float64.
template <class C>
bool multiply_avx512(const AccumulatorSpec& spec, uint64_t seed, uint64_t offset, const Product<C>& x,
                     typename CarrierOf<C>::Bits* out) {
  if constexpr (!std::is_same_v<C, Float64>) {
    if (multiply_in<Floats>(spec, seed, offset, x, out)) return true;
  }
  return multiply_in<Doubles>(spec, seed, offset, x, out);
}

template bool multiply_avx512<Float64>(const AccumulatorSpec&, uint64_t, uint64_t, const Product<Float64>&,
                                       CarrierOf<Float64>::Bits*);
template bool multiply_avx512<Float32>(const AccumulatorSpec&, uint64_t, uint64_t, const Product<Float32>&,
                                       CarrierOf<Float32>::Bits*);
template bool multiply_avx512<Float16>(const AccumulatorSpec&, uint64_t, uint64_t, const Product<Float16>&,
                                       CarrierOf<Float16>::Bits*);
template bool multiply_avx512<BFloat16>(const AccumulatorSpec&, uint64_t, uint64_t, const Product<BFloat16>&,
                                        CarrierOf<BFloat16>::Bits*);

}  // namespace lowprec

#pragma GCC pop_options

#endif
