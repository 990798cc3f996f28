// How the kernel of tensor_core_kernel.h is launched: operands described to the tensor memory accelerator, a grid of
// clusters. Host code without torch; errors are CUDA's.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "lowprec/tensor_core_kernel.h"

namespace lowprec {

/// An operand as rows of elements that lie side by side: the first one's along the depth, the second one's along the
/// columns where elements have 16 bits and along the depth where they have 8. Addresses and strides are multiples of 16
/// bytes.
struct OperandRows {
  const void* data;
  int64_t width;  // elements of a row
  int64_t rows;
  int64_t row_stride;    // bytes
  int64_t matrices;      // one for all of the batch, or as many as it has
  int64_t batch_stride;  // bytes
};

inline CUtensorMapDataType map_type(Operands kind) {
  return kind == Operands::bf16   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
         : kind == Operands::fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

/// The driver's function, which no library of the runtime names.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
             : nullptr;
}

/// Boxes of so many rows, 128 bytes wide, zeros beyond the operand's edges.
inline cudaError_t describe(Operands kind, const OperandRows& x, int box_rows, CUtensorMap* map) {
  static const auto encode = tensor_map_encoder();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(x.width), static_cast<cuuint64_t>(x.rows),
                               static_cast<cuuint64_t>(x.matrices)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(x.row_stride), static_cast<cuuint64_t>(x.batch_stride)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(128 / bytes_of(kind)), static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = encode(map, map_type(kind), 3, const_cast<void*>(x.data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Way, class Sum>
cudaError_t launch_products(ProductCall call, const typename Sum::Setting& setting, const OperandRows& a,
                            const OperandRows& b, int multiprocessors, cudaStream_t stream) {
  CUtensorMap map_a, map_b;
  cudaError_t error = describe(call.kind, a, kTile, &map_a);
  if (error == cudaSuccess) error = describe(call.kind, b, 64, &map_b);
  const auto kernel = product_kernel<Way, Sum>;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes);
  }
  if (error != cudaSuccess) return error;
  call.a_batched = a.matrices > 1;
  call.b_batched = b.matrices > 1;
  const int64_t clusters = std::min<int64_t>(Schedule(call.shape).count, multiprocessors / kCluster);
  kernel<<<static_cast<unsigned>(clusters * kCluster), kBlockThreads, kRingBytes, stream>>>(call, setting, map_a,
                                                                                            map_b);
  return cudaGetLastError();
}

}  // namespace lowprec
