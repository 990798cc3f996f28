// Block-sparse products on CPUs with AVX2.

#include "lowprec/accumulate_vectors.h"
#include "lowprec/sparse_cpu.h"

#ifdef LOWPREC_VECTORS

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "lowprec/accumulate_avx2.h"
#include "lowprec/sparse_cpu_octs.h"
#include "lowprec/sparse_cpu_panels.h"

namespace lowprec {

constexpr int kRows = 4;  // of a tile with two vectors in each: sixteen registers hold no more rows of a block

template <class C>
using VectorOf = std::conditional_t<std::is_same_v<C, Float64>, Quads, Octs>;

template <class C>
void multiply_sparse_avx2(const SparseProduct<C>& x) {
  SparseColumnsOf<C, VectorOf<C>, kRows>(x).run();
}

template <class C>
void update_sparse_avx2(const SparseUpdate<C>& x) {
  SparseUpdateOf<C, VectorOf<C>, kRows>(x).run();
}

template void multiply_sparse_avx2(const SparseProduct<Float64>&);
template void multiply_sparse_avx2(const SparseProduct<Float32>&);
template void multiply_sparse_avx2(const SparseProduct<Float16>&);
template void multiply_sparse_avx2(const SparseProduct<BFloat16>&);
template void update_sparse_avx2(const SparseUpdate<Float64>&);
template void update_sparse_avx2(const SparseUpdate<Float32>&);
template void update_sparse_avx2(const SparseUpdate<Float16>&);
template void update_sparse_avx2(const SparseUpdate<BFloat16>&);

}  // namespace lowprec

#pragma GCC pop_options

#endif
