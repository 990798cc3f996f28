// Sums and matrix products on CPUs with AVX2.

#include "lowprec/accumulate_vectors.h"

#ifdef LOWPREC_VECTORS

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "lowprec/accumulate_avx2.h"
#include "lowprec/accumulate_panels.h"

namespace lowprec {

template <class C>
bool multiply_avx2(const AccumulatorSpec& spec, uint64_t seed, uint64_t offset, const Product<C>& x,
                   typename CarrierOf<C>::Bits* out) {
  if constexpr (std::is_same_v<C, Float64>) {
    return false;  // their products are not exact in float64
  } else {
    return multiply_in<Quads>(spec, seed, offset, x, out);
  }
}

template bool multiply_avx2<Float64>(const AccumulatorSpec&, uint64_t, uint64_t, const Product<Float64>&,
                                     CarrierOf<Float64>::Bits*);
template bool multiply_avx2<Float32>(const AccumulatorSpec&, uint64_t, uint64_t, const Product<Float32>&,
                                     CarrierOf<Float32>::Bits*);
template bool multiply_avx2<Float16>(const AccumulatorSpec&, uint64_t, uint64_t, const Product<Float16>&,
                                     CarrierOf<Float16>::Bits*);
template bool multiply_avx2<BFloat16>(const AccumulatorSpec&, uint64_t, uint64_t, const Product<BFloat16>&,
                                      CarrierOf<BFloat16>::Bits*);

}  // namespace lowprec

#pragma GCC pop_options

#endif
