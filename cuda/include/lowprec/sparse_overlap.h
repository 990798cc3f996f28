// Kernels that begin as those before them end, and one that clears flags meanwhile. Without torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

/// Let the kernel after this one take its place as soon as every thread block of this one has begun.
LOWPREC_DEVICE void start_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Wait for all that the kernel before this one writes.
LOWPREC_DEVICE void await_dependence() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Flags of shares are cleared by a kernel during which the product begins, where a device can do that.
static __global__ void clear_flags_kernel(uint32_t* flags, int count) {
  start_dependents();
  for (int i = threadIdx.x; i < count; i += blockDim.x) flags[i] = 0;
}

/// A kernel of which thread blocks may start while those of the one before end, where a device can do that.
template <class Call, class... Rest>
cudaError_t launch_after(void (*kernel)(Call, Rest...), unsigned grid, int threads, int memory, bool early,
                         cudaStream_t stream, const Call& call, Rest... rest) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = memory;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, call, rest...);
}

}  // namespace lowprec
