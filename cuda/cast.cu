// Casts on CUDA: each thread takes 16 bytes at a time, from as many places of the tensor as the grid is long.

#include <algorithm>
#include <cstdint>

#include "lowprec/cast_ops.h"
#include "lowprec/inline.h"
#include "lowprec/philox.h"

namespace lowprec {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocksPerMultiprocessor = 32;  // four times what runs at once, so that no multiprocessor ends early

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

/// The chunk at `from`, of which `left` elements exist; zeros stand for the others.
template <int kWidth, class T>
__device__ Chunk<T, kWidth> load(const T* from, int64_t left, bool aligned) {
  if (aligned && left >= kWidth) return *reinterpret_cast<const Chunk<T, kWidth>*>(from);
  Chunk<T, kWidth> chunk;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) chunk.at[i] = i < left ? from[i] : T{0};
  return chunk;
}

template <int kWidth, class T>
__device__ void store(T* to, const Chunk<T, kWidth>& chunk, int64_t left, bool aligned) {
  if (aligned && left >= kWidth) {
    *reinterpret_cast<Chunk<T, kWidth>*>(to) = chunk;
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (i < left) to[i] = chunk.at[i];
  }
}

__device__ void add_up(NoTally, int64_t*, int64_t) {}

/// Add the tallies of a block to the counts. Integers, so the order of blocks does not matter.
__device__ void add_up(Tally tally, int64_t* counts, int64_t elements) {
  __shared__ uint32_t sums[3];
  if (threadIdx.x < 3) sums[threadIdx.x] = 0;
  __syncthreads();
  constexpr uint32_t everyone = 0xffffffff;
  const uint32_t warp[] = {__reduce_add_sync(everyone, tally.saturated), __reduce_add_sync(everyone, tally.flushed),
                           __reduce_add_sync(everyone, tally.nan)};
  if (threadIdx.x % warpSize == 0) {
    for (int i = 0; i < 3; ++i) atomicAdd(&sums[i], warp[i]);
  }
  __syncthreads();
  auto* totals = reinterpret_cast<unsigned long long*>(counts);
  if (threadIdx.x < 3) atomicAdd(&totals[1 + threadIdx.x], sums[threadIdx.x]);
  if (blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(&totals[0], static_cast<unsigned long long>(elements));
}

/// x and out may be the same array: each thread reads a chunk before it writes it, and no other one touches it.
template <class AnyTally, class Op>
__global__ void __launch_bounds__(kThreads)
    cast_kernel(const Op op, const typename Op::Input* x, typename Op::Output* out, int64_t count, bool aligned,
                const DeviceDraws draws, int64_t* counts) {
  constexpr int width = chunk_width<Op>;
  const uint64_t seed = Op::random ? draws.seed.read() : 0;
  const uint64_t offset = Op::random ? draws.offset.read() : 0;
  AnyTally tally;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * width;
  for (int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * width; begin < count;
       begin += stride) {
    const auto input = load<width>(x + begin, count - begin, aligned);
    Chunk<typename Op::Output, width> result;
#pragma unroll
    for (int i = 0; i < width; i += 4) {
      const Words words = Op::random ? draw_four(draws.bits, seed, offset, begin + i) : Words{};
#pragma unroll
      for (int j = 0; j < 4; ++j) result.at[i + j] = op(input.at[i + j], words.word[j], tally);
    }
    store(out + begin, result, count - begin, aligned);
  }
  add_up(tally, counts, count);
}

template <class T, int kWidth>
bool is_aligned(const void* array) {
  return reinterpret_cast<uintptr_t>(array) % alignof(Chunk<T, kWidth>) == 0;
}

/// Blocks enough for the elements, and no more than keep the device busy.
int grid_size(int64_t chunks, int device) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return static_cast<int>(std::min((chunks + kThreads - 1) / kThreads, multiprocessors * kBlocksPerMultiprocessor));
}

void check_word_place(const Tensor& x, const MaybeTensor& word) {
  STD_TORCH_CHECK(!word || word->is_cpu() || word->device() == x.device(),
                  "seed and offset must be on the CPU or on the device of x");
}

struct Cuda {
  template <class AnyTally, class Op>
  static void run(const Op& op, const Tensor& x, const Tensor& out, const Source& source, int64_t* counts) {
    check_word_place(x, source.seed);
    check_word_place(x, source.offset);
    const DeviceGuard guard(x.get_device_index());
    const DeviceDraws draws{DeviceWord(source.seed), DeviceWord(source.offset), source.bits};
    elementwise(x, out, Op::random, [&](const void* from, void* to, int64_t count) {
      using Input = typename Op::Input;
      using Output = typename Op::Output;
      constexpr int width = chunk_width<Op>;
      const bool aligned = is_aligned<Input, width>(from) && is_aligned<Output, width>(to);
      const int blocks = grid_size((count + width - 1) / width, x.get_device_index());
      cast_kernel<AnyTally><<<blocks, kThreads, 0, current_stream(x)>>>(
          op, static_cast<const Input*>(from), static_cast<Output*>(to), count, aligned, draws, counts);
      check_cuda(cudaGetLastError());
    });
  }
};

using Ops = CastOps<Cuda>;

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) {
  library.impl("quantize", TORCH_BOX(&Ops::quantize));
  library.impl("quantize_out", TORCH_BOX(&Ops::quantize_out));
  library.impl("quantize_count", TORCH_BOX(&Ops::quantize_count));
  library.impl("encode", TORCH_BOX(&Ops::encode));
  library.impl("encode_out", TORCH_BOX(&Ops::encode_out));
  library.impl("decode", TORCH_BOX(&Ops::decode));
  library.impl("decode_out", TORCH_BOX(&Ops::decode_out));
}

}  // namespace
}  // namespace lowprec
