// Casts on CUDA: each thread takes 16 bytes at a time, from as many places of the tensor as the grid is long.

#include <algorithm>
#include <cstdint>

#include "lowprec/cast_ops.h"
#include "lowprec/inline.h"
#include "lowprec/philox.h"

namespace lowprec {
namespace {

constexpr int kThreads = 256;
// Blocks that a multiprocessor is to hold at once: the registers that this leaves a thread are those that it needs.
template <class Op>
constexpr int kBlocksAtOnce = Op::random ? 5 : 6;
constexpr int64_t kBlocksPerMultiprocessor = 32;  // several times what it holds, so that none ends early

/// A 64-bit word that the kernel reads when it runs, where the tensor is on the device: a replayed graph sees its new
/// value. From the CPU it is read at the launch.
class DeviceWord {
 public:
  explicit DeviceWord(const MaybeTensor& word) {
    if (!word) return;
    const auto* at = static_cast<const int64_t*>(word->const_data_ptr());
    if (word->is_cuda()) {
      pointer_ = at;
    } else {
      value_ = static_cast<uint64_t>(*at);
    }
  }

  __device__ uint64_t read() const { return pointer_ ? static_cast<uint64_t>(*pointer_) : value_; }

 private:
  const int64_t* pointer_ = nullptr;
  uint64_t value_ = 0;
};

struct DeviceDraws {
  DeviceWord seed;
  DeviceWord offset;
  int bits;
};

/// Elements that move together, in accesses of up to 16 bytes.
template <class T, int kWidth>
struct alignas(std::min<size_t>(sizeof(T) * kWidth, 16)) Chunk {
  T at[kWidth];
};

/// How many elements a thread takes at a time: 16 bytes of the wider side, and no fewer than share a random counter.
template <class Op>
constexpr int chunk_width = std::max<int>(16 / std::max(sizeof(typename Op::Input), sizeof(typename Op::Output)), 4);

/// The draws of the four elements from `index` on, or of one.
struct Draw {
  uint64_t seed;
  uint64_t offset;
  int bits;

  __device__ explicit Draw(const DeviceDraws& from)
      : seed(from.seed.read()), offset(from.offset.read()), bits(from.bits) {}
  __device__ Words four(int64_t index) const { return draw_four(bits, seed, offset, index); }
  __device__ uint32_t one(int64_t index) const { return select(four(index - index % 4), static_cast<int>(index % 4)); }
};

/// The first `chunks` chunks, then what elements are left one by one: x and out may be the same array, since each
/// thread reads a place before it writes there, and no other one touches it.
template <class Op>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Op>)
    cast_kernel(const Op op, const typename Op::Input* x, typename Op::Output* out, int64_t count, int64_t chunks,
                const DeviceDraws draws) {
  using Inputs = Chunk<typename Op::Input, chunk_width<Op>>;
  using Outputs = Chunk<typename Op::Output, chunk_width<Op>>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const Draw draw(draws);
  NoTally none;

  for (int64_t chunk = thread; chunk < chunks; chunk += threads) {
    const Inputs inputs = reinterpret_cast<const Inputs*>(x)[chunk];
    Outputs outputs;
#pragma unroll
    for (int i = 0; i < chunk_width<Op>; i += 4) {
      const Words words = Op::random ? draw.four(chunk * chunk_width<Op> + i) : Words{};
#pragma unroll
      for (int j = 0; j < 4; ++j) outputs.at[i + j] = op(inputs.at[i + j], words.word[j], none);
    }
    reinterpret_cast<Outputs*>(out)[chunk] = outputs;
  }
#pragma unroll 1
  for (int64_t i = chunks * chunk_width<Op> + thread; i < count; i += threads) {
    out[i] = op(x[i], Op::random ? draw.one(i) : 0, none);
  }
}

/// How many whole chunks there are; none unless both arrays begin where chunks may.
template <class Op>
int64_t whole_chunks(const void* x, const void* out, int64_t count) {
  const auto aligned = [](const void* array, size_t to) { return reinterpret_cast<uintptr_t>(array) % to == 0; };
  const bool usable = aligned(x, alignof(Chunk<typename Op::Input, chunk_width<Op>>)) &&
                      aligned(out, alignof(Chunk<typename Op::Output, chunk_width<Op>>));
  return usable ? count / chunk_width<Op> : 0;
}

/// Blocks enough for so many steps, and no more than keep the device busy.
int grid_size(int64_t steps, int device) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return static_cast<int>(std::min((steps + kThreads - 1) / kThreads, multiprocessors * kBlocksPerMultiprocessor));
}

void check_word_place(const Tensor& x, const MaybeTensor& word) {
  STD_TORCH_CHECK(!word || word->is_cpu() || word->device() == x.device(),
                  "seed and offset must be on the CPU or on the device of x");
}

struct Cuda {
  template <class Op>
  static void run(const Op& op, const Tensor& x, const Tensor& out, const Source& source) {
    check_word_place(x, source.seed);
    check_word_place(x, source.offset);
    STD_TORCH_CHECK(!source.place.width, "a shard's draws are not compiled yet");
    const DeviceGuard guard(x.get_device_index());
    const DeviceDraws draws{DeviceWord(source.seed), DeviceWord(source.offset), source.bits};
    elementwise(x, out, Op::random, [&](const void* from, void* to, int64_t count) {
      const int64_t chunks = whole_chunks<Op>(from, to, count);
      const int blocks = grid_size(chunks ? chunks : count, x.get_device_index());
      cast_kernel<<<blocks, kThreads, 0, current_stream(x)>>>(op, static_cast<const typename Op::Input*>(from),
                                                              static_cast<typename Op::Output*>(to), count, chunks,
                                                              draws);
      check_cuda(cudaGetLastError());
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { register_casts<Cuda>(library); }

}  // namespace
}  // namespace lowprec
