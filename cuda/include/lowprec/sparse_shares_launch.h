// How a block-sparse product of codes by equal shares is launched. Without torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "lowprec/sparse_launch.h"
#include "lowprec/sparse_shares_kernel.h"

namespace lowprec {

/// How codes of x meet codes of w: as they are decoded, and the power of two that this leaves to the sums.
struct Meeting {
  PairDecode x;
  PairDecode w;
  float scale = 1;
};

/// As float16, the power of one operand. Digits are multiples of 2^-24 below 2^16; sums of their products are multiples
/// of 2^-48, and with the powers of both from 2^-48 to 2^30 of 2^-96: normal numbers of float32, rounded as without.
inline float leave_power(PairDecode& decode, const Format& format) {
  if (decode.way != Decoding::float16) return 1;
  decode.take_digits(format, true);
  return std::ldexp(1.0F, Float16::bias - format.bias);
}

/// Whether digits of x as bfloat16 meet those of w times 2^127. Exponent fields, digits m and biases added up: products
/// are multiples of 2^(-125 - m), 2^-139 at the least, below 2^(fields - 127), and with the power that they lack,
/// 2^(127 - bias), multiples of 2^(2 - bias - m) below 2^(fields - bias). So sums of 2^31 are float32's on either side:
/// those below its normal numbers are exact, since their digits are there, the others are rounded as in any other
/// range.
inline bool meets_bfloat16(const Format& x, const Format& w) {
  const int fields = (1 << x.ebits) + (1 << w.ebits), bias = x.bias + w.bias;
  return fields <= 192 && bias >= 0 && bias <= BFloat16::bias && fields - bias <= 96;
}

/// Nothing, where decoding takes more.
inline std::optional<Meeting> meeting(const Format& x, const Format& w) {
  Meeting half{PairDecode(x, true), PairDecode(w, true)};
  if (half.x.way != Decoding::none && half.w.way != Decoding::none) {
    half.scale = leave_power(half.x, x) * leave_power(half.w, w);
    return half;
  }
  Meeting wide{PairDecode(x, false), PairDecode(w, false)};
  const bool finite = wide.x.way == Decoding::bfloat16 && wide.w.way == Decoding::bfloat16;
  if (!finite || !meets_bfloat16(x, w)) return std::nullopt;
  wide.x.take_digits(x, false);
  if (w.bits() == 8) wide.w.way = Decoding::whole_bfloat16;
  wide.w.wide.scale = codes::power_of_two<BFloat16>(BFloat16::bias);
  wide.scale = std::ldexp(1.0F, BFloat16::bias - x.bias - w.bias);
  return wide;
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
