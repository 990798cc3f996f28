// Strides: how an elementwise kernel, which knows only arrays, serves tensors of any layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "lowprec/torch_stable.h"

namespace lowprec {

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin(), b.sizes().end());
}

/// (stride, size) of the dimensions that have one.
inline std::vector<std::pair<int64_t, int64_t>> extents(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> extents;
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    if (x.size(dim) != 1) extents.emplace_back(x.stride(dim), x.size(dim));
  }
  return extents;
}

/// Whether the elements fill a block of memory, each place once, in some order of the dimensions.
inline bool dense(const Tensor& x) {
  auto ascending = extents(x);
  std::sort(ascending.begin(), ascending.end());
  int64_t filled = 1;
  return std::all_of(ascending.begin(), ascending.end(), [&](auto extent) {
    const bool next = extent.first == filled;
    filled *= extent.second;
    return next;
  });
}

/// Call kernel(source, target, count) on arrays that hold x and `out`, element for element in the same order; with
/// `logical`, in row-major order. Tensors that cannot be walked like that go through contiguous copies.
template <class Kernel>
void elementwise(const Tensor& x, const Tensor& out, bool logical, Kernel kernel) {
  if (x.numel() == 0) return;
  const bool walkable = extents(x) == extents(out) && (logical ? x.is_contiguous() : dense(x));
  const Tensor source = walkable ? x : contiguous(x);
  const Tensor target = walkable || out.is_contiguous() ? out : empty_like(source, out.scalar_type());
  kernel(source.const_data_ptr(), target.mutable_data_ptr(), x.numel());
  if (target.get() != out.get()) copy(out, target);
}

}  // namespace lowprec
