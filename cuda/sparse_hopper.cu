// Block-sparse products of many tokens on Hopper: operands described to the tensor memory accelerator, and the launch.

#include "lowprec/sparse_hopper.h"

#include "lowprec/sparse_hopper_kernel.h"
#include "lowprec/tensor_core_launch.h"

namespace lowprec {
namespace {

struct Maps {
  CUtensorMap x;
  CUtensorMap w;
};

/// Boxes of 64 features by 64 tokens, and blocks of weights.
cudaError_t describe(const SparseHopperCall& call, Maps& maps) {
  const Operands kind = call.half ? Operands::fp16 : Operands::bf16;
  const int64_t tokens = call.out.tokens, features = call.x_features, rows = call.out.first ? features : tokens;
  const OperandRows x{call.x, call.out.first ? tokens : features, rows, call.x_stride * 2, 1, rows * call.x_stride * 2};
  const int64_t w_rows = call.blocks * kHopperBlock, w_bytes = kHopperBlock * 2;
  const OperandRows w{call.w, kHopperBlock, w_rows, w_bytes, 1, w_rows * w_bytes};
  const cudaError_t error = describe(kind, x, 64, &maps.x);
  return error == cudaSuccess ? describe(kind, w, kHopperBlock, &maps.w) : error;
}

template <int kGroups, bool kHalf, bool kTranspose, bool kFirst>
cudaError_t launch(const SparseHopperCall& call, const Maps& maps, cudaStream_t stream) {
  const auto kernel = sparse_hopper_kernel<kGroups, kHalf, kTranspose, kFirst>;
  constexpr int bytes = kSparseRingBytes<kGroups>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return launch_after(kernel, kHopperShares, SparseRing<kGroups>::kThreads, bytes, true, stream, call, maps.x, maps.w);
}

template <int kGroups, bool kHalf>
cudaError_t launch(const SparseHopperCall& call, const Maps& maps, cudaStream_t stream) {
  const auto of = call.transpose
                      ? call.out.first ? launch<kGroups, kHalf, true, true> : launch<kGroups, kHalf, true, false>
                  : call.out.first ? launch<kGroups, kHalf, false, true>
                                   : launch<kGroups, kHalf, false, false>;
  return of(call, maps, stream);
}

}  // namespace

cudaError_t launch_sparse_hopper(const SparseHopperCall& call, cudaStream_t stream) {
  Maps maps;
  cudaError_t error = describe(call, maps);
  if (error != cudaSuccess) return error;
  clear_flags_kernel<<<1, 1024, 0, stream>>>(call.flags, hopper_flags(call.out.tokens));
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const bool two = hopper_groups(call.out.tokens) == 2;
  const auto of = two ? call.half ? launch<2, true> : launch<2, false> : call.half ? launch<1, true> : launch<1, false>;
  return of(call, maps, stream);
}

}  // namespace lowprec
