// LibTorch's stable ABI (2.11), as much of it as the kernels need. Only this file names its shims.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#ifdef USE_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace lowprec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Library = torch::stable::detail::StableLibrary;

using torch::stable::contiguous;
using torch::stable::parallel_for;

/// An uninitialised tensor of another dtype with x's shape and, where x is dense, its strides.
inline Tensor empty_like(const Tensor& x, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(std::optional<ScalarType>(dtype)),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

/// An uninitialised contiguous tensor on x's device.
inline Tensor empty(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  return torch::stable::new_empty(x, shape, dtype);
}

/// Values of codes in a dtype that holds them, by the op.
inline Tensor decode_codes(const Tensor& codes, const std::vector<int64_t>& format, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(codes), from(format), from(dtype)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("lowprec::decode", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

/// Copy every element of `source` into `target`, whatever the strides of either.
inline void copy(Tensor target, const Tensor& source) { torch::stable::copy_(target, source); }

/// What an operator gives, by its name and overload: one tensor.
template <class... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

/// The same bytes as elements of another dtype of that size.
inline Tensor view_as(const Tensor& x, ScalarType dtype) { return call("aten::view", "dtype", x, dtype); }

#ifdef USE_CUDA

using torch::stable::accelerator::DeviceGuard;

/// The stream on which torch puts the device's work at this point.
inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

/// Raise the error of a CUDA call or of the launch before it, if there is one.
inline void check_cuda(cudaError_t error) { STD_CUDA_CHECK(error); }

/// What a tensor's device has or can do.
inline int attribute(const Tensor& x, cudaDeviceAttr which) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, x.get_device_index()));
  return value;
}

#endif

}  // namespace lowprec
