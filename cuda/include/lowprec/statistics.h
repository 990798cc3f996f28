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

/// A number as sums take it: zero where it is infinite or NaN.
template <class C>
LOWPREC_INLINE double number_of(typename C::Bits x) {
  const auto magnitude = static_cast<typename C::Word>(x & (C::sign - 1));
  const double value = magnitude_of<C>(magnitude < C::infinity ? magnitude : 0);
  return x & C::sign ? -value : value;
}

/// The four terms of a number and what it became.
template <class C>
LOWPREC_INLINE void terms_of(typename C::Bits x, typename C::Bits y, double (&terms)[kTerms]) {
  const double before = number_of<C>(x);
  const double after = number_of<C>(y);
  const bool finite = ((x & (C::sign - 1)) < C::infinity) & ((y & (C::sign - 1)) < C::infinity);
  const double error = finite ? after - before : 0.0;
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

}  // namespace lowprec
