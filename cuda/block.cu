// Casts to and from block formats on CUDA: the choice of a kernel of block_kernel.h and of its grid.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lowprec/block_kernel.h"
#include "lowprec/block_ops.h"
#include "lowprec/launch.h"

namespace lowprec {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 32;  // several times what it holds, so that none ends early
constexpr int64_t kLarge = 4096;                  // elements of a block that are worth a whole thread block
constexpr int64_t kPiece = 4096;                  // of a block that is the whole tensor

/// Thread blocks enough for so many threads, and no more than keep the device busy.
int grid_size(int64_t threads, int device) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int64_t wanted = std::max<int64_t>((threads + kThreads - 1) / kThreads, 1);
  return static_cast<int>(std::min(wanted, multiprocessors * kBlocksPerMultiprocessor));
}

TileGrid grid_of(const Tiles& tiles) {
  return {tiles.rows,
          tiles.columns,
          tiles.height,
          tiles.width,
          tiles.down(),
          tiles.across(),
          tiles.batch * tiles.down() * tiles.across()};
}

/// The peak of a contiguous tensor, in memory that lives as long as the tensor which holds it.
template <class C>
Tensor peak_of(C, const Tensor& x) {
  Tensor memory = empty(x, std::vector<int64_t>{sizeof(GatheredPeak)}, ScalarType::Byte);
  auto* out = static_cast<GatheredPeak*>(memory.mutable_data_ptr());
  const cudaStream_t stream = current_stream(x);
  check_cuda(cudaMemsetAsync(out, 0, sizeof(GatheredPeak), stream));
  if (x.numel() > 0) {
    const auto* data = static_cast<const typename C::Bits*>(x.const_data_ptr());
    const bool aligned = reinterpret_cast<uintptr_t>(data) % alignof(Access<C>) == 0;
    const int64_t accesses = aligned ? x.numel() * sizeof(typename C::Bits) / sizeof(Access<C>) : 0;
    const int64_t threads = aligned ? (accesses + 3) / 4 : x.numel();
    peak_kernel<C><<<grid_size(threads, x.get_device_index()), kThreads, 0, stream>>>(data, accesses, x.numel(), out);
    check_cuda(cudaGetLastError());
  }
  return memory;
}

/// log2 of a power of two.
int shift_of(int64_t n) {
  int shift = 0;
  while (n >> shift > 1) ++shift;
  return shift;
}

/// How many threads walk a block together: about as many as it is wide.
int lanes_of(const Tiles& tiles) {
  if (tiles.width >= kWarp) return tiles.width * tiles.height >= kLarge ? kThreads : kWarp;
  int lanes = 1;
  while (lanes < tiles.width) lanes *= 2;
  return lanes;
}

template <class Blocks>
void run_tiles(const Blocks& blocks, const BlockArrays<Blocks>& arrays, const TileGrid& grid, int lanes,
               const Tensor& x, const DeviceDraws& draws, int64_t mode) {
  tiles_kernel<<<grid_size(grid.count * lanes, x.get_device_index()), kThreads, 0, current_stream(x)>>>(
      blocks, arrays, grid, lanes, draws, static_cast<uint32_t>(mode));
  check_cuda(cudaGetLastError());
}

/// Whether blocks are runs of whole threads along contiguous rows.
template <class Blocks>
bool in_rows(const BlockArrays<Blocks>& arrays, const Tiles& tiles) {
  const auto aligned = [](const void* array, size_t to) { return reinterpret_cast<uintptr_t>(array) % to == 0; };
  const int64_t lanes = tiles.width / kRun<Blocks>;
  return !tiles.whole() && tiles.height == 1 && tiles.width % kRun<Blocks> == 0 && tiles.columns % tiles.width == 0 &&
         lanes >= 1 && lanes <= kWarp && (lanes & (lanes - 1)) == 0 && aligned(arrays.x, alignof(RunIn<Blocks>)) &&
         aligned(arrays.out, alignof(RunOut<Blocks>));
}

struct Cuda {
  static void gather(const Tensor& x, const Tensor& results, const Tensor& notes, const Gathered& to) {
    gather_on_cuda(x, results, notes, to);
  }

  template <class Blocks>
  static void cast(const Blocks& blocks, const Tensor& x, const Tensor& out, uint8_t* scales, const Tiles& tiles,
                   const Source& source, int64_t mode, const uint32_t* tensor_scale) {
    using C = typename Blocks::Container;
    const DeviceDraws draws = device_draws(x, source);
    const DeviceGuard guard(x.get_device_index());
    BlockArrays<Blocks> arrays{static_cast<const typename C::Bits*>(x.const_data_ptr()),
                               static_cast<typename Blocks::Output*>(out.mutable_data_ptr()), scales, tensor_scale,
                               nullptr};
    if (tiles.whole()) {
      const Tensor peak = peak_of(C{}, x);
      arrays.peak = static_cast<const GatheredPeak*>(peak.const_data_ptr());
      TileGrid grid = grid_of(tiles);
      grid.width = kPiece;
      grid.across = grid.count = std::max<int64_t>((tiles.columns + kPiece - 1) / kPiece, 1);
      return run_tiles(blocks, arrays, grid, kThreads, x, draws, mode);
    }
    if (x.numel() == 0) return;
    if constexpr (QuickOf<Blocks>::exists) {
      if (in_rows(arrays, tiles)) {
        const int64_t runs = x.numel() / kRun<Blocks>;
        rows_kernel<<<grid_size(runs, x.get_device_index()), kThreads, 0, current_stream(x)>>>(
            blocks, QuickOf<Blocks>(blocks), arrays, runs, shift_of(tiles.width / kRun<Blocks>), draws,
            static_cast<uint32_t>(mode));
        return check_cuda(cudaGetLastError());
      }
    }
    if constexpr (four_bit<Blocks>) {
      if (tensor_scale && is_e2m1(blocks.element) && is_e4m3(blocks.scales.format()) && in_rows(arrays, tiles)) {
        const int64_t runs = x.numel() / kRun<Blocks>;
        four_bit_kernel<<<grid_size(runs, x.get_device_index()), kThreads, 0, current_stream(x)>>>(
            blocks, arrays, runs, shift_of(tiles.width / kRun<Blocks>));
        return check_cuda(cudaGetLastError());
      }
    }
    run_tiles(blocks, arrays, grid_of(tiles), lanes_of(tiles), x, draws, mode);
  }

  template <class C>
  static void tensor_scale(const TensorScale& op, C container, const Tensor& x, const Tensor& out) {
    const DeviceGuard guard(x.get_device_index());
    const Tensor peak = peak_of(container, x);
    tensor_scale_kernel<C><<<1, 1, 0, current_stream(x)>>>(op, static_cast<const GatheredPeak*>(peak.const_data_ptr()),
                                                           static_cast<uint32_t*>(out.mutable_data_ptr()));
    check_cuda(cudaGetLastError());
  }

  template <class Op>
  static void decode(const Op& op, const Tensor& codes, const Tensor& scales, const uint32_t* tensor_scale,
                     const Tensor& out, const Tiles& tiles) {
    const DeviceGuard guard(codes.get_device_index());
    decode_kernel<<<grid_size(codes.numel(), codes.get_device_index()), kThreads, 0, current_stream(codes)>>>(
        op, static_cast<const typename Op::Input*>(codes.const_data_ptr()),
        static_cast<const uint8_t*>(scales.const_data_ptr()), tensor_scale,
        static_cast<typename Op::Output*>(out.mutable_data_ptr()), grid_of(tiles), codes.numel());
    check_cuda(cudaGetLastError());
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { register_blocks<Cuda>(library); }

}  // namespace
}  // namespace lowprec
