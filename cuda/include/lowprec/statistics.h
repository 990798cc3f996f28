// Statistics of numbers: which numbers sums take, and the one order in which they add them up, for host and device.
//
// A page is 16 rows of 1024 elements. Lane l of 1024 adds up element l of every row, in order, starting from +0; then
// the lanes are added pairwise, neighbours first. The sums of pages are the elements of one more page, with as many
// rows as that takes. What is missing adds +0, which changes no sum.
#pragma once

#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/inline.h"

namespace lowprec {

constexpr int kLanes = 1024;
constexpr int kRows = 16;
constexpr int64_t kPage = kLanes * kRows;

/// The places of a vector of statistics, in the order of Python's `FIELDS`.
enum Field { kElements, kSaturated, kFlushed, kNan, kAmax, kSums, kFields = kSums + 4 };

/// The sums behind a vector's counts: Σ|x|, Σx, Σx² and Σe², e being the error.
enum Term { kAbsolute, kTotal, kSquares, kError, kTerms };

/// What a cast noted of an element for a later pass: the low bits of its code, as sign and magnitude, and these.
enum Note : uint32_t { kNoteCode = 0xffff, kNoteFlushed = 1u << 30, kNoteSaturated = 1u << 31 };

LOWPREC_INLINE int64_t pages_of(int64_t count) { return (count + kPage - 1) / kPage; }

/// A finite magnitude as a float64 number, exactly, whatever the machine makes of subnormal ones.
template <class C>
LOWPREC_INLINE double magnitude_of(typename C::Word bits) {
  constexpr int shift = Float64::fraction_bits - C::fraction_bits;
  constexpr uint64_t bias = static_cast<uint64_t>(Float64::bias - C::bias) << Float64::fraction_bits;
  constexpr uint64_t smallest = bias + (uint64_t{1} << Float64::fraction_bits);  // the smallest normal number
  const uint64_t wide = static_cast<uint64_t>(bits) << shift;
  const double normal = bit_cast<double>(wide + bias);
  // A subnormal number has the fraction of that many times the smallest normal one, less that.
  const double subnormal = bit_cast<double>(wide + smallest) - bit_cast<double>(smallest);
  return bits >> C::fraction_bits ? normal : subnormal;
}

/// Smaller float64 magnitudes count as zero: or a square or a difference might be subnormal, and then depend on modes
/// of the machine.
template <>
LOWPREC_INLINE double magnitude_of<Float64>(uint64_t bits) {
  constexpr uint64_t least = static_cast<uint64_t>(Float64::bias - 448) << Float64::fraction_bits;
  return bit_cast<double>(bits >= least ? bits : 0);
}

/// A finite number as float64, exactly.
template <class C>
LOWPREC_INLINE double number_of(typename C::Bits x) {
#ifdef __CUDA_ARCH__
  // Conversions of the device flush nothing.
  if constexpr (C::fraction_bits == Float32::fraction_bits) return __uint_as_float(x);
  if constexpr (C::fraction_bits == BFloat16::fraction_bits) return __uint_as_float(static_cast<uint32_t>(x) << 16);
#endif
  const double value = magnitude_of<C>(static_cast<typename C::Word>(x & (C::sign - 1)));
  return x & C::sign ? -value : value;
}

/// The four terms of a number and what it became: zero where the number is infinite or NaN, and no error where the
/// result is.
template <class C>
LOWPREC_INLINE void terms_of(typename C::Bits x, typename C::Bits y, double (&terms)[kTerms]) {
  const bool finite = (x & (C::sign - 1)) < C::infinity;
  const bool both = finite & ((y & (C::sign - 1)) < C::infinity);
  const typename C::Bits counted = finite ? x : 0;
  const double before = number_of<C>(counted);
  const double error = number_of<C>(both ? y : counted) - before;
  terms[kAbsolute] = before < 0 ? -before : before;
  terms[kTotal] = before;
  terms[kSquares] = before * before;
  terms[kError] = error * error;
}

/// The bits of max |x| as float64, from those of a finite magnitude: they compare as the numbers do.
template <class C>
LOWPREC_INLINE uint64_t amax_bits(typename C::Word magnitude) {
  return bit_cast<uint64_t>(magnitude_of<C>(magnitude));
}
template <>
LOWPREC_INLINE uint64_t amax_bits<Float64>(uint64_t magnitude) {
  return magnitude;
}

#ifdef __CUDACC__

/// The four lanes of one of a block's 256 threads, for several sums at once.
template <int kSumsAtOnce>
struct QuadSums {
  double at[kSumsAtOnce][4] = {};
};

/// Add up four sums over the threads of a warp, neighbours first. Thread k of each four returns sum k.
LOWPREC_DEVICE double add_threads(const double (&sum)[4]) {
  constexpr uint32_t everyone = 0xffffffff;
  // Neighbours share the work: an odd thread goes on with the odd sums, then every other pair with the last two.
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  const double low = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(everyone, odd ? sum[0] : sum[1], 1);
  const double high = (odd ? sum[3] : sum[2]) + __shfl_xor_sync(everyone, odd ? sum[2] : sum[3], 1);
  double own = (upper ? high : low) + __shfl_xor_sync(everyone, upper ? low : high, 2);
#pragma unroll
  for (int apart = 4; apart < 32; apart *= 2) own += __shfl_xor_sync(everyone, own, apart);
  return own;
}

/// Add up the lanes of a block of 256 threads, of which thread t has lanes 4t .. 4t + 3. Thread k returns sum k.
/// For every thread of the block; `shared` is at their disposal before and after.
template <int kSumsAtOnce>
__device__ double add_lanes(const QuadSums<kSumsAtOnce>& lanes, double (&shared)[kSumsAtOnce][8]) {
  static_assert(kSumsAtOnce <= 4);
  double sum[4] = {};
#pragma unroll
  for (int k = 0; k < kSumsAtOnce; ++k) {
    sum[k] = (lanes.at[k][0] + lanes.at[k][1]) + (lanes.at[k][2] + lanes.at[k][3]);
  }
  const double own = add_threads(sum);
  if (threadIdx.x % 32 < kSumsAtOnce) shared[threadIdx.x % 32][threadIdx.x / 32] = own;
  __syncthreads();
  double total = 0;
  if (threadIdx.x < kSumsAtOnce) {
    const double* s = shared[threadIdx.x];
    total = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  }
  __syncthreads();
  return total;
}

/// Add up the sums of pages, [pages][sums], as a block of 256 threads does. Thread k returns sum k.
template <int kSumsAtOnce>
__device__ double add_pages(const double* pages, int64_t count, double (&shared)[kSumsAtOnce][8]) {
  QuadSums<kSumsAtOnce> lanes;
#pragma unroll 2
  for (int64_t begin = 4 * threadIdx.x; begin < count; begin += kLanes) {
    double page[4][kSumsAtOnce];  // all loads before the first sum
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < kSumsAtOnce; ++k) page[j][k] = begin + j < count ? pages[(begin + j) * kSumsAtOnce + k] : 0;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < kSumsAtOnce; ++k) lanes.at[k][j] += page[j][k];
    }
  }
  return add_lanes(lanes, shared);
}

#endif

}  // namespace lowprec
