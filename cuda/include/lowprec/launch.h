// What launching a kernel takes: words of its arguments that are read when it runs.
#pragma once

#include <cstdint>

#include "lowprec/cast_kernel.h"
#include "lowprec/cast_ops.h"

namespace lowprec {

/// A seed or an offset. From the CPU it is read at the launch.
inline DeviceWord device_word(const Tensor& x, const MaybeTensor& word) {
  if (!word) return {};
  STD_TORCH_CHECK(word->is_cpu() || word->device() == x.device(),
                  "seed and offset must be on the CPU or on the device of x");
  const auto* at = static_cast<const int64_t*>(word->const_data_ptr());
  return word->is_cpu() ? DeviceWord{nullptr, *at} : DeviceWord{at, 0};
}

inline DeviceDraws device_draws(const Tensor& x, const Source& source) {
  return {device_word(x, source.seed), device_word(x, source.offset), source.bits, source.place};
}

}  // namespace lowprec
