// Casts on CUDA: the choice of a grid for the kernel of cast_kernel.h, and what it reads on the device.

#include <algorithm>
#include <cstdint>

#include "lowprec/cast_kernel.h"
#include "lowprec/cast_ops.h"
#include "lowprec/launch.h"

namespace lowprec {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 32;  // several times what it holds, so that none ends early

/// Blocks enough for so many threads, and no more than keep the device busy.
int grid_size(int64_t threads, int device) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return static_cast<int>(std::min((threads + kThreads - 1) / kThreads, multiprocessors * kBlocksPerMultiprocessor));
}

struct Cuda {
  template <class Op>
  static void run(const Setting& setting, const Tensor& x, const Tensor& out, const Source& source) {
    const DeviceDraws draws = device_draws(x, source);
    const Ways<Op> ways(setting.format, setting.saturate);
    const DeviceGuard guard(x.get_device_index());
    elementwise(x, out, Op::random, [&](const void* from, void* to, int64_t count) {
      const int64_t chunks = whole_chunks<Op>(from, to, count, source.place);
      const int64_t threads = chunks ? (chunks + kChunksAtOnce<Op> - 1) / kChunksAtOnce<Op> : count;
      cast_kernel<Op><<<grid_size(threads, x.get_device_index()), kThreads, 0, current_stream(x)>>>(
          ways, setting, static_cast<const typename Op::Input*>(from), static_cast<typename Op::Output*>(to), count,
          chunks, draws);
      check_cuda(cudaGetLastError());
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { register_casts<Cuda>(library); }

}  // namespace
}  // namespace lowprec
