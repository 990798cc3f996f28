// `adapt` as an operator: checks, and the choice of a kernel. A backend runs it: one for CPU, one for CUDA.
//
// Python has checked every argument and said what is wrong with it. The checks here are a second fence.
#pragma once

#include <cstdint>
#include <optional>

#include "lowprec/adapt.h"
#include "lowprec/dispatch.h"
#include "lowprec/elementwise.h"
#include "lowprec/torch_stable.h"

namespace lowprec {

/// The operator of lowprec/_ops.py. `Backend::run<C>(rule, x, count, state, used)` measures the array x where that is
/// due, and updates the state.
template <class Backend>
Tensor adapt(const Tensor& x, const Tensor& state, int64_t bias, int64_t emax, int64_t pad, std::optional<double> stdv,
             int64_t frequency, int64_t history) {
  STD_TORCH_CHECK(bias >= 0 && bias <= static_cast<int64_t>(Bias::sampled), "unknown kind of bias ", bias);
  STD_TORCH_CHECK(frequency >= 1 && history >= 0, "frequency must be at least 1 and history at least 0");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Long && state.is_contiguous() && state.dim() == 1 &&
                      state.numel() >= kHistory + history,
                  "state must be a contiguous int64 vector of ", kHistory + history, " numbers or more");
  STD_TORCH_CHECK(x.device() == state.device(), "x and state must be on one device");
  const Adaptation rule{static_cast<Bias>(bias), emax, pad, frequency, history, stdv.has_value(), stdv.value_or(0)};
  const Tensor used = torch::stable::new_empty(state, {kUsed}, ScalarType::Long);
  // Sums run over the elements in the order of memory where they fill it, else in row-major order.
  const Tensor source = rule.bias == Bias::fixed || dense(x) ? x : contiguous(x);
  for_container(x.scalar_type(), [&](auto container) {
    using C = decltype(container);
    Backend::template run<C>(rule, source, static_cast<int64_t*>(state.mutable_data_ptr()),
                             static_cast<int64_t*>(used.mutable_data_ptr()));
  });
  return used;
}

}  // namespace lowprec
