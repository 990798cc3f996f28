// The fused casts as operators: checks, results, and the choice of a kernel. A backend runs it: one for CPU, one for
// CUDA.
#pragma once

#include <cstdint>
#include <optional>

#include "lowprec/cast_ops.h"
#include "lowprec/fused.h"

namespace lowprec {

inline Layout layout_of(ScalarType dtype) {
  Layout layout{};
  for_container(dtype, [&](auto container) { layout = Layout::of(container); });
  return layout;
}

inline int bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
    case ScalarType::UInt32:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::UInt16:
      return 2;
    default:
      return 1;
  }
}

/// An array of unsigned integers of 1, 2, 4 or 8 bytes: codes, or the bits of floats.
struct Array {
  void* data = nullptr;
  int bytes = 0;

  Array() = default;
  explicit Array(const Tensor& x) : data(const_cast<void*>(x.const_data_ptr())), bytes(bytes_of(x.scalar_type())) {}
};

/// A number, or one for each index of a dimension: floats of any dtype, read as float64.
struct Vector {
  const void* data = nullptr;
  int bytes = 0;
  int64_t step = 0;  // 0 for a number
  Writer widen{Layout::of(Float64{}), Layout::of(Float64{})};
  double value = 0;  // without data

  Vector() = default;
  explicit Vector(const Tensor& x)
      : data(x.const_data_ptr()),
        bytes(bytes_of(x.scalar_type())),
        step(x.dim()),
        widen(layout_of(x.scalar_type()), Layout::of(Float64{})) {}

  LOWPREC_INLINE double at(int64_t i) const {
    if (!data) return value;
    const int64_t place = i * step;
    const uint64_t bits = bytes == 8   ? static_cast<const uint64_t*>(data)[place]
                          : bytes == 4 ? static_cast<const uint32_t*>(data)[place]
                                       : static_cast<const uint16_t*>(data)[place];
    const uint64_t magnitude = bits & (widen.from.sign_code - 1);
    const bool nan = magnitude > widen.from.max_code + 1;
    return bit_cast<double>(nan ? Float64::quiet_nan : widen(magnitude, (bits & widen.from.sign_code) != 0));
  }
};

/// Scale and bias, and which of their elements belong to an element of x.
struct Affine {
  Vector scale;
  Vector bias;
  int64_t inner = 1;  // elements of x in a row that share one
  int64_t count = 1;

  LOWPREC_INLINE bool varies() const { return scale.step + bias.step > 0; }
  LOWPREC_INLINE int64_t channel(int64_t i) const { return i / inner % count; }
};

inline void check_vector(const Tensor& x, const MaybeTensor& vector, int64_t dim) {
  if (!vector) return;
  STD_TORCH_CHECK(vector->dim() == 0 || (vector->dim() == 1 && x.dim() > 0 && vector->size(0) == x.size(dim)),
                  "scale and bias must have no dimension, or one as long as that of x");
  STD_TORCH_CHECK(vector->device() == x.device() || (vector->is_cpu() && vector->dim() == 0),
                  "scale and bias must be on the device of x");
}

inline MaybeTensor contiguous_or_none(const MaybeTensor& x) { return x ? MaybeTensor(contiguous(*x)) : x; }

/// What a cast rounds to: a format, or all of the dtype of its result.
struct Target {
  std::optional<Format> format;
  int64_t rounding;
  bool saturate;
};

template <class Backend>
struct FusedOps {
  static void cast_transpose(const Tensor& x, const Ints& format, int64_t rounding, bool saturate,
                             const MaybeTensor& seed, const MaybeTensor& offset, int64_t random_bits,
                             const MaybeTensor& rows, const MaybeTensor& columns) {
    STD_TORCH_CHECK(x.dim() >= 2, "x must have at least 2 dimensions");
    const Format to = read_format(format);
    check_transpose_out(x, to, rows, false);
    check_transpose_out(x, to, columns, true);
    const Source source(seed, offset, random_bits);
    if (x.numel() == 0 || (!rows && !columns)) return;
    Backend::transpose(contiguous(x), to, rounding, saturate, source, rows, columns);
  }

  static Tensor activate(const Tensor& x, const Ints& format, int64_t rounding, bool saturate, const MaybeTensor& seed,
                         const MaybeTensor& offset, int64_t random_bits, int64_t activation, const MaybeTensor& scale,
                         const MaybeTensor& bias, int64_t dim, bool codes) {
    const Format to = read_format(format);
    const int64_t along = dim < 0 ? dim + x.dim() : dim;
    STD_TORCH_CHECK(x.dim() == 0 || (along >= 0 && along < x.dim()), "no such dimension: ", dim);
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int>(Activation::gelu), "no such activation");
    STD_TORCH_CHECK(rounding >= 0 && rounding <= 6, "unknown rounding mode ", rounding);
    check_vector(x, scale, along);
    check_vector(x, bias, along);
    const Source source(seed, offset, random_bits);
    for_container(x.scalar_type(), [&](auto container) {
      if (!codes) check_within(to, container);
    });
    const Tensor from = contiguous(x);
    Tensor out = empty_like(from, codes ? code_dtype(to) : x.scalar_type());
    if (x.numel() == 0) return out;
    const Layout own = layout_of(x.scalar_type()), target = Layout::of(to), wide = Layout::of(Float64{});
    const Rounder round(target, rounding, saturate || to.specials == Specials::finite);
    const Activate op{own, wide, {own, wide}, round, {target, own}, codes, scale.has_value(), bias.has_value()};
    const MaybeTensor scales = contiguous_or_none(scale), biases = contiguous_or_none(bias);
    Affine affine{Backend::vector(scales), Backend::vector(biases)};
    if (x.dim()) {
      for (int64_t i = along + 1; i < x.dim(); ++i) affine.inner *= x.size(i);
      affine.count = x.size(along);
    }
    Backend::activate(op, static_cast<Activation>(activation), from, out, affine, source,
                      Target{to, rounding, saturate});
    return out;
  }

  static void accumulate(const Tensor& y, const Tensor& x, const Ints& format, const Ints& x_format, int64_t rounding,
                         bool saturate, const MaybeTensor& seed, const MaybeTensor& offset, int64_t random_bits) {
    STD_TORCH_CHECK(same_shape(x, y), "x and y must have one shape");
    STD_TORCH_CHECK(rounding >= 0 && rounding <= 6, "unknown rounding mode ", rounding);
    check_same_place(x, y);
    const Source source(seed, offset, random_bits);
    const Layout own = layout_of(y.scalar_type());
    const bool whole = format.empty();
    if (!whole) {
      for_container(y.scalar_type(), [&](auto container) { check_within(read_format(format), container); });
    }
    const Layout to = whole ? own : Layout::of(read_format(format));
    STD_TORCH_CHECK(rounding != 6 || to.mantissa_bits <= 27, "stochastic sums: too many mantissa bits");
    const bool finite = !whole && read_format(format).specials == Specials::finite;
    const Accumulate op{own, terms(x, x_format), {to, rounding, saturate || finite}, {to, own}, rounding == 4};
    if (y.numel() == 0) return;
    const Tensor sums = contiguous(y);
    Target target{std::nullopt, rounding, saturate};
    if (!whole) target.format = read_format(format);
    Backend::accumulate(op, sums, contiguous(x), source, target, codes_format(x_format));
    if (sums.get() != y.get()) copy(y, sums);
  }

 private:
  static std::optional<Format> codes_format(const Ints& fields) {
    return fields.empty() ? std::nullopt : std::optional<Format>(read_format(fields));
  }

  static Layout terms(const Tensor& x, const Ints& x_format) {
    if (x_format.empty()) return layout_of(x.scalar_type());
    const Format format = read_format(x_format);
    STD_TORCH_CHECK(x.scalar_type() == code_dtype(format), "the codes have another dtype than the format's");
    return Layout::of(format);
  }

  static void check_transpose_out(const Tensor& x, const Format& format, const MaybeTensor& out, bool transposed) {
    if (!out) return;
    check_same_place(x, *out);
    const int64_t n = x.dim();
    bool fits = out->dim() == n && out->is_contiguous();
    for (int64_t i = 0; fits && i < n; ++i) {
      const int64_t from = transposed && i >= n - 2 ? 2 * n - 3 - i : i;
      fits = out->size(i) == x.size(from);
    }
    STD_TORCH_CHECK(fits, "a result must be contiguous, of x's shape or of its transpose's");
    const bool values = out->scalar_type() == x.scalar_type();
    STD_TORCH_CHECK(values || out->scalar_type() == code_dtype(format), "a result has another dtype");
    for_container(x.scalar_type(), [&](auto container) {
      if (values) check_within(format, container);
    });
  }
};

/// Register the operators for a backend's device.
template <class Backend>
void register_fused(Library& library) {
  using Ops = FusedOps<Backend>;
  library.impl("cast_transpose", TORCH_BOX(&Ops::cast_transpose));
  library.impl("activate", TORCH_BOX(&Ops::activate));
  library.impl("accumulate_", TORCH_BOX(&Ops::accumulate));
}

}  // namespace lowprec
