// Sums and matrix products under an accumulator, as operators: checks, results, and the choice of a kernel. A backend
// runs it: one for CPU, one for CUDA.
//
// Python has checked every argument and said what is wrong with it. The checks here are a second fence.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lowprec/accumulate.h"
#include "lowprec/cast_ops.h"
#include "lowprec/dispatch.h"
#include "lowprec/torch_stable.h"

namespace lowprec {

/// The container in which sums of a dtype are carried.
template <class C>
using CarrierOf = std::conditional_t<std::is_same_v<C, Float64>, Float64, Float32>;

inline ScalarType carrier_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// Fields of Python's `Accumulator`: leaf, terms, whether there is a product format, its five, eight for each level.
inline AccumulatorSpec read_accumulator(const Ints& fields) {
  constexpr int64_t head = 8, each = 8;
  const auto count = static_cast<int64_t>(fields.size());
  STD_TORCH_CHECK(count >= head + each && count % each == 0 && count <= head + each * kMaxLevels,
                  "accumulator must have 8 fields and 8 for each of up to 16 levels, got ", count);
  STD_TORCH_CHECK(fields[0] >= 0 && fields[0] <= static_cast<int>(Leaf::hopper_fp16) && fields[1] >= 0,
                  "accumulator has no such leaf");
  AccumulatorSpec spec{};
  spec.leaf = static_cast<Leaf>(fields[0]);
  spec.terms = fields[1];
  spec.has_product = fields[2] != 0;
  if (spec.has_product) spec.product = read_format(Ints(fields.begin() + 3, fields.begin() + head));
  spec.levels = static_cast<int>(count / each) - 1;
  for (int i = 0; i < spec.levels; ++i) {
    const auto field = fields.begin() + head + each * i;
    spec.level[i] = {field[0], read_format(Ints(field + 1, field + 6)), static_cast<int>(field[6]), field[7] != 0};
    STD_TORCH_CHECK(field[0] >= 0 && field[6] >= 0 && field[6] <= 6, "accumulator has no such level");
  }
  STD_TORCH_CHECK(spec.level[spec.levels - 1].fan_in != 1, "the accumulator's last level must add two values or more");
  STD_TORCH_CHECK(spec.leaf != Leaf::exact || (spec.levels == 1 && spec.level[0].fan_in == 0 && spec.terms == 0),
                  "an exact sum takes one level and all terms");
  return spec;
}

/// The carrier must hold what every level and the products round to.
template <class C>
void check_within(const AccumulatorSpec& spec, C carrier) {
  if (spec.has_product) check_within(spec.product, carrier);
  for (int i = 0; i < spec.levels; ++i) check_within(spec.level[i].format, carrier);
}

/// The operators of lowprec/_ops.py. `Backend::accumulate<C>(spec, x, out, source)` sums the rows of x [O, K], and
/// `Backend::matmul<C>(spec, a, b, out, source)` multiplies a [B, M, K] and b [B, K, N]: any strides, elements of the
/// container C, a contiguous result of its carrier that has elements.
template <class Backend>
struct AccumulateOps {
  static Tensor accumulate(const Tensor& x, const Ints& fields, const MaybeTensor& seed, const MaybeTensor& offset) {
    STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
    const AccumulatorSpec spec = read_accumulator(fields);
    STD_TORCH_CHECK(spec.leaf == Leaf::terms || spec.leaf == Leaf::exact, "no products, so no tensor cores");
    const Source source(seed, offset, 32);
    Tensor out = empty(x, {x.size(0)}, carrier_dtype(x.scalar_type()));
    for_container(x.scalar_type(), [&](auto container) {
      using C = decltype(container);
      check_within(spec, CarrierOf<C>{});
      if (out.numel() > 0) Backend::template accumulate<C>(spec, x, out, source);
    });
    return out;
  }

  static Tensor matmul(const Tensor& a, const Tensor& b, const Ints& fields, const MaybeTensor& seed,
                       const MaybeTensor& offset) {
    STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
                    "a and b must have shapes [B, M, K] and [B, K, N]");
    STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "a and b must have one dtype");
    check_same_place(a, b);
    const AccumulatorSpec spec = read_accumulator(fields);
    STD_TORCH_CHECK(spec.leaf == Leaf::terms || spec.leaf == Leaf::exact, "other leaves have operators of their own");
    const Source source(seed, offset, 32);
    Tensor out = empty(a, {a.size(0), a.size(1), b.size(2)}, carrier_dtype(a.scalar_type()));
    for_container(a.scalar_type(), [&](auto container) {
      using C = decltype(container);
      check_within(spec, CarrierOf<C>{});
      if (out.numel() > 0) Backend::template matmul<C>(spec, a, b, out, source);
    });
    return out;
  }
};

/// Register the operators for a backend's device.
template <class Backend>
void register_accumulate(Library& library) {
  using Ops = AccumulateOps<Backend>;
  library.impl("accumulate", TORCH_BOX(&Ops::accumulate));
  library.impl("matmul", TORCH_BOX(&Ops::matmul));
}

}  // namespace lowprec
