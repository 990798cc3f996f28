// Dense codes on CUDA: a thread casts a group of eight and moves its bytes.

#include <algorithm>
#include <cstdint>

#include "lowprec/cast_kernel.h"
#include "lowprec/launch.h"
#include "lowprec/packed_ops.h"

namespace lowprec {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 64;

/// A group's bytes, in accesses as wide as their places allow: 4-bit and 6-bit groups begin on even ones.
__device__ __forceinline__ void write_bytes(uint64_t dense, uint8_t* to, int bytes) {
  if (bytes == 4 && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(dense);
  } else if (bytes == 6 && reinterpret_cast<uintptr_t>(to) % 2 == 0) {
    for (int i = 0; i < 3; ++i) reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(dense >> (16 * i));
  } else {
    for (int i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(dense >> (8 * i));
  }
}

__device__ __forceinline__ uint64_t read_bytes(const uint8_t* from, int bytes) {
  if (bytes == 4 && reinterpret_cast<uintptr_t>(from) % 4 == 0) return *reinterpret_cast<const uint32_t*>(from);
  uint64_t dense = 0;
  if (bytes == 6 && reinterpret_cast<uintptr_t>(from) % 2 == 0) {
    for (int i = 0; i < 3; ++i) dense |= static_cast<uint64_t>(reinterpret_cast<const uint16_t*>(from)[i]) << (16 * i);
  } else {
    for (int i = 0; i < bytes; ++i) dense |= static_cast<uint64_t>(from[i]) << (8 * i);
  }
  return dense;
}

template <class Op>
__device__ __forceinline__ Outputs<Op> cast(const Ways<Op>& ways, const Inputs<Op>& inputs,
                                            const ChunkWords<Op>& draws) {
  Outputs<Op> outputs;
  if constexpr (Quick<Op>::exists) {
    if (ways.quick.usable) {
      ways.quick.plain ? ways.quick.template apply<true>(inputs, draws, outputs)
                       : ways.quick.template apply<false>(inputs, draws, outputs);
      return outputs;
    }
  }
  NoTally none;
#pragma unroll
  for (int i = 0; i < chunk_width<Op>; ++i) outputs.at[i] = ways.op(inputs.at[i], draws.at[i], none);
  return outputs;
}

/// Whether a group is a whole one that lies where chunks may.
template <class Op, class AnyChunk>
__device__ __forceinline__ bool in_chunks(const Group& group, const void* at) {
  return group.codes == kGroup && group.code % chunk_width<Op> == 0 &&
         reinterpret_cast<uintptr_t>(at) % alignof(AnyChunk) == 0;
}

template <class Op>
__global__ void __launch_bounds__(kThreads) pack_kernel(const Ways<Op> ways, const typename Op::Input* x, uint8_t* out,
                                                        const Rows rows, const DeviceDraws draws) {
  constexpr int width = chunk_width<Op>;
  const Draw<Op> draw(draws);
  NoTally none;
  const int64_t groups = rows.count * rows.groups();
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < groups;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const Group group(rows, i);
    const auto* from = x + group.code;
    uint64_t dense = 0;
    if (in_chunks<Op, Inputs<Op>>(group, from)) {
      uint32_t codes[2];
#pragma unroll
      for (int j = 0; j < kGroup; j += width) {
        const auto inputs = *reinterpret_cast<const Inputs<Op>*>(from + j);
        const Outputs<Op> outputs = cast<Op>(ways, inputs, draw.chunk((group.code + j) / width));
#pragma unroll
        for (int k = 0; k < width; k += 4) codes[(j + k) / 4] = outputs.word(k / 4);
      }
      dense = join(codes, rows.bits);
    } else {
#pragma unroll 1
      for (int j = 0; j < group.codes; ++j) {
        const uint64_t code = ways.op(from[j], draw.one(group.code + j), none);
        dense |= (code & ((1u << rows.bits) - 1)) << (j * rows.bits);
      }
    }
    write_bytes(dense, out + group.byte, group.bytes);
  }
}

/// A thread writes one chunk, so that a warp's stores lie side by side; threads that share a group each read its bytes.
template <class Op>
constexpr int kShares = kGroup / chunk_width<Op>;

template <class Op>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const Ways<Op> ways, const uint8_t* x, typename Op::Output* out, const Rows rows) {
  constexpr int width = chunk_width<Op>;
  NoTally none;
  const int64_t shares = rows.count * rows.groups() * kShares<Op>;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < shares;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const Group group(rows, i / kShares<Op>);
    const int first = static_cast<int>(i % kShares<Op>) * width;
    auto* to = out + group.code + first;
    const uint64_t dense = read_bytes(x + group.byte, group.bytes) >> (first * rows.bits);
    if (in_chunks<Op, Outputs<Op>>(group, to)) {
      uint32_t codes[2];
      split(dense, rows.bits, codes);
      Inputs<Op> inputs;
#pragma unroll
      for (int k = 0; k < width; k += 4) inputs.word(k / 4) = codes[k / 4];
      *reinterpret_cast<Outputs<Op>*>(to) = cast<Op>(ways, inputs, {});
    } else {
#pragma unroll 1
      for (int j = 0; j < width && first + j < group.codes; ++j) {
        const auto code = static_cast<uint8_t>(dense >> (j * rows.bits)) & ((1u << rows.bits) - 1);
        to[j] = ways.op(static_cast<uint8_t>(code), 0, none);
      }
    }
  }
}

int grid_size(int64_t groups, int device) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return static_cast<int>(std::min((groups + kThreads - 1) / kThreads, multiprocessors * kBlocksPerMultiprocessor));
}

struct Cuda {
  template <class Op>
  static void pack(const Setting& setting, const Tensor& x, const Tensor& out, const Source& source, const Rows& rows) {
    const DeviceDraws draws = device_draws(x, source);
    const DeviceGuard guard(x.get_device_index());
    pack_kernel<Op><<<grid_size(rows.count * rows.groups(), x.get_device_index()), kThreads, 0, current_stream(x)>>>(
        Ways<Op>(setting.format, setting.saturate), static_cast<const typename Op::Input*>(x.const_data_ptr()),
        static_cast<uint8_t*>(out.mutable_data_ptr()), rows, draws);
    check_cuda(cudaGetLastError());
  }

  template <class Op>
  static void unpack(const Setting& setting, const Tensor& x, const Tensor& out, const Rows& rows) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t shares = rows.count * rows.groups() * kShares<Op>;
    unpack_kernel<Op><<<grid_size(shares, x.get_device_index()), kThreads, 0, current_stream(x)>>>(
        Ways<Op>(setting.format, setting.saturate), static_cast<const uint8_t*>(x.const_data_ptr()),
        static_cast<typename Op::Output*>(out.mutable_data_ptr()), rows);
    check_cuda(cudaGetLastError());
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { register_packed<Cuda>(library); }

}  // namespace
}  // namespace lowprec
