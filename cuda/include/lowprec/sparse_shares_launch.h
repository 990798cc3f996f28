// How a block-sparse product of codes by equal shares is launched. Without torch.
#pragma once

#include <algorithm>
#include <cmath>

#include "lowprec/sparse_launch.h"
#include "lowprec/sparse_shares_kernel.h"

namespace lowprec {

/// How the codes of a format meet codes: not at all, where decoding takes more.
inline PairDecode meeting_decode(const Format& format) {
  PairDecode decode(format, true);
  if (decode.way != Decoding::float16) return decode;
  decode.way = format.bits() == 8 ? Decoding::digits_float16 : Decoding::short_digits_float16;
  return decode;
}

/// The power of two that this leaves to the sums. Digits are multiples of 2^-24 below 2^16; sums of their products are
/// multiples of 2^-48, and with a power from 2^-48 to 2^30 of 2^-96: normal numbers of float32, rounded as without.
inline float meeting_scale(const Format& format, Decoding way) {
  const bool digits = way == Decoding::digits_float16 || way == Decoding::short_digits_float16;
  return digits ? std::ldexp(1.0F, Float16::bias - format.bias) : 1.0F;
}

/// Multiply as described, on a device with so many bytes of shared memory for a multiprocessor's thread blocks.
template <int kBlock>
cudaError_t launch_shares(SharesCall call, bool transpose, int memory, bool early, cudaStream_t stream) {
  using Shape = SharesShape<kBlock>;
  const int room = memory / Shape::resident - 1024 - Shape::ring;
  call.stages = std::clamp(room / Shape::stage, Shape::min_stages, Shape::max_stages);
  const int bytes = Shape::ring + call.stages * Shape::stage;
  const auto kernel = transpose ? sparse_shares_kernel<kBlock, true> : sparse_shares_kernel<kBlock, false>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  clear_flags_kernel<<<1, 1024, 0, stream>>>(call.flags, call.line.count);
  const cudaError_t cleared = cudaGetLastError();
  if (cleared != cudaSuccess) return cleared;
  return launch_after(kernel, call.line.count, Shape::threads, bytes, early, stream, call);
}

}  // namespace lowprec
