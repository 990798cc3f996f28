// Casts on CUDA: the choice of a grid for the kernel of cast_kernel.h, and what it reads on the device.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "lowprec/cast_kernel.h"
#include "lowprec/cast_ops.h"
#include "lowprec/launch.h"

namespace lowprec {
namespace {

/// Blocks enough for so many threads, each of which works once where that is little work. Where it is more, or begins
/// with making the op, several times what the device holds at once: so many that none ends early.
int grid_size(int64_t threads, bool heavy, int device) {
  constexpr int64_t each = 32;
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int64_t most = heavy ? multiprocessors * each : std::numeric_limits<int>::max();
  return static_cast<int>(std::min((threads + kThreads - 1) / kThreads, most));
}

/// Whether a cast takes more instructions than memory leaves time for: the general way, and draws for 16-bit numbers.
template <class Op>
bool is_heavy(const Ways<Op>& ways, const Setting& setting) {
  if constexpr (Quick<Op>::exists) {
    return !ways.quick.usable || setting.shift || (Op::random && sizeof(typename Op::Input) < 4);
  } else {
    return true;
  }
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
      const int blocks = grid_size(threads, is_heavy(ways, setting), x.get_device_index());
      cast_kernel<Op>
          <<<blocks, kThreads, 0, current_stream(x)>>>(ways, setting, static_cast<const typename Op::Input*>(from),
                                                       static_cast<typename Op::Output*>(to), count, chunks, draws);
      check_cuda(cudaGetLastError());
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { register_casts<Cuda>(library); }

}  // namespace
}  // namespace lowprec
