// Leaves of sums by the model of Hopper's tensor cores as an operator: checks, the layout of operands, and the result.
#pragma once

#include <cstdint>
#include <utility>

#include "lowprec/hopper.h"
#include "lowprec/torch_stable.h"

namespace lowprec {

/// Where a matrix of a batch has its elements, and how they are laid out as operands: in panels of `width` lines (rows
/// of the left matrix, columns of the right one), one k after another, filled up with zeros to whole steps and panels.
struct Panels {
  int64_t batches, lines, terms;
  int64_t batch_stride, line_stride, term_stride;
  int64_t width, padded_terms;

  LOWPREC_INLINE int64_t count() const { return (lines + width - 1) / width; }
  LOWPREC_INLINE int64_t words() const { return batches * count() * padded_terms * width; }
  LOWPREC_INLINE int64_t first_word(int64_t batch, int64_t panel) const {
    return (batch * count() + panel) * padded_terms * width;
  }

  /// The operand that belongs at a place of the layout.
  template <class Unit, class C>
  LOWPREC_INLINE int32_t read(const typename C::Bits* x, int64_t word) const {
    const int64_t place = word % width, k = word / width % padded_terms;
    const int64_t panel = word / width / padded_terms;
    const int64_t line = panel % count() * width + place, batch = panel / count();
    if (line >= lines || k >= terms) return operand::zero;
    return operand::read<Unit, C>(x[batch * batch_stride + line * line_stride + k * term_stride]);
  }
};

/// The shape of a product, [batches, rows, columns, leaves] of `terms` each, of which the last may have fewer steps.
struct Leaves {
  Panels left, right;
  int64_t terms, count;

  template <class Unit>
  LOWPREC_INLINE int64_t steps(int64_t leaf) const {
    const int64_t left_over = left.padded_terms - leaf * terms;
    return (left_over < terms ? left_over : terms) / Unit::step;
  }
  LOWPREC_INLINE int64_t place(int64_t batch, int64_t row, int64_t column, int64_t leaf) const {
    return ((batch * left.lines + row) * right.lines + column) * count + leaf;
  }
};

template <class F>
void for_hopper(int64_t kind, F f) {
  if (kind == 3) return f(HopperFp8{});
  if (kind == 4) return f(HopperFp16{});
  STD_TORCH_CHECK(false, "kind must be 3 (hopper_fp8) or 4 (hopper_fp16), got ", kind);
}

template <class F>
void for_operand(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float8_e4m3fn:
      return f(Float8E4M3{});
    case ScalarType::Float8_e5m2:
      return f(Float8E5M2{});
    case ScalarType::Half:
      return f(Float16{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Float:
      return f(Float32{});
    default:
      STD_TORCH_CHECK(false, "operands must be float8_e4m3fn, float8_e5m2, float16, bfloat16 or float32");
  }
}

/// `Backend::pack<Unit, C>(x, panels, words)` lays out operands, `Backend::run<Unit>(a, b, leaves, out)` computes;
/// panels are of Backend::kLeftWidth rows and Backend::kRightWidth columns.
template <class Backend>
struct HopperOps {
  static Tensor hopper_leaves(const Tensor& a, const Tensor& b, int64_t kind, int64_t terms) {
    STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
                    "expected a [B, M, K] and b [B, K, N]");
    STD_TORCH_CHECK(a.device() == b.device(), "a and b must be on one device");
    Tensor out;
    for_hopper(kind, [&](auto unit) { out = run<decltype(unit)>(a, b, terms); });
    return out;
  }

 private:
  template <class Unit>
  static Tensor run(const Tensor& a, const Tensor& b, int64_t terms) {
    STD_TORCH_CHECK(terms >= 0 && terms % Unit::step == 0, "terms must be a multiple of ", Unit::step, ", got ", terms);
    const int64_t k = a.size(2), padded = (k + Unit::step - 1) / Unit::step * Unit::step;
    if (terms == 0) terms = padded;
    const Leaves leaves{{a.size(0), a.size(1), k, a.stride(0), a.stride(1), a.stride(2), Backend::kLeftWidth, padded},
                        {b.size(0), b.size(2), k, b.stride(0), b.stride(2), b.stride(1), Backend::kRightWidth, padded},
                        terms,
                        k == 0 ? 0 : (k + terms - 1) / terms};
    const Tensor out = empty(a, {a.size(0), a.size(1), b.size(2), leaves.count}, ScalarType::Float);
    if (out.numel() == 0) return out;
    Backend::template run<Unit>(pack<Unit>(a, leaves.left), pack<Unit>(b, leaves.right), leaves, out);
    return out;
  }

  template <class Unit>
  static Tensor pack(const Tensor& x, const Panels& panels) {
    const Tensor words = empty(x, {panels.words()}, ScalarType::Int);
    for_operand(x.scalar_type(),
                [&](auto container) { Backend::template pack<Unit, decltype(container)>(x, panels, words); });
    return words;
  }
};

/// Register the operator for a backend's device.
template <class Backend>
void register_hopper(Library& library) {
  library.impl("hopper_leaves", TORCH_BOX(&HopperOps<Backend>::hopper_leaves));
}

}  // namespace lowprec
