// Block-sparse products on CPUs with AVX-512.

#include "lowprec/accumulate_vectors.h"
#include "lowprec/sparse_cpu.h"

#ifdef LOWPREC_VECTORS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c")

#include "lowprec/accumulate_avx512.h"
#include "lowprec/sparse_cpu_octs.h"
#include "lowprec/sparse_cpu_panels.h"

namespace lowprec {

constexpr int kRows = 8;  // of a tile with two vectors in each: sixteen sums hide a multiply-add's latency

template <class C>
void multiply_sparse_avx512(const SparseProduct<C>& x) {
  SparseColumnsOf<C, std::conditional_t<std::is_same_v<C, Float64>, Doubles, Floats>, kRows>(x).run();
}

template <class C>
void update_sparse_avx512(const SparseUpdate<C>& x) {
  if constexpr (std::is_same_v<C, Float64>) {
    SparseUpdateOf<C, Doubles, kRows>(x).run();
  } else {
    x.block == Octs::lanes ? SparseUpdateOf<C, Octs, kRows>(x).run() : SparseUpdateOf<C, Floats, kRows>(x).run();
  }
}

template void multiply_sparse_avx512(const SparseProduct<Float64>&);
template void multiply_sparse_avx512(const SparseProduct<Float32>&);
template void multiply_sparse_avx512(const SparseProduct<Float16>&);
template void multiply_sparse_avx512(const SparseProduct<BFloat16>&);
template void update_sparse_avx512(const SparseUpdate<Float64>&);
template void update_sparse_avx512(const SparseUpdate<Float32>&);
template void update_sparse_avx512(const SparseUpdate<Float16>&);
template void update_sparse_avx512(const SparseUpdate<BFloat16>&);

}  // namespace lowprec

#pragma GCC pop_options

#endif
