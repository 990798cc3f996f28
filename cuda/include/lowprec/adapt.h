// Measured biases: when one is measured, and what the measurement makes of its state, for host and device.
//
// The steps are those of lowprec/adapt.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "lowprec/container.h"
#include "lowprec/inline.h"

namespace lowprec {

/// Kinds of bias management, in the order of Python's `BIASES`.
enum class Bias : int { fixed, dynamic, delayed, sampled };

/// The places of a state. Peak and arrived are the kernels' own, and zero between calls.
enum Place { kCalls, kShift, kSeed, kPeak, kArrived, kHistory };

/// What a call uses is the first so many places of its state.
constexpr int kUsed = 3;

/// In the place of an exponent: nothing was measured.
constexpr int64_t kNothing = -4096;

/// How a bias follows its tensor: the arguments of `lowprec.Cast`.
struct Adaptation {
  Bias bias;
  int64_t emax;  // of the format's own bias
  int64_t pad;
  int64_t frequency;
  int64_t history;
  bool by_deviation;
  double stdv;
};

LOWPREC_INLINE int floor_log2(uint64_t n) {
  int log = -1;
  for (; n; n >>= 1) ++log;
  return log;
}

/// Whether a sampled bias is measured at a call, counted from 1: at 1 to 6, 8, 10 and 12; from 16 on four times for
/// each power of two, until that is `frequency` calls apart.
LOWPREC_INLINE bool is_due(int64_t call, int64_t frequency) {
  const int doublings = call >= 16 ? floor_log2(static_cast<uint64_t>(call)) - 2 : (call >= 6) + (call >= 12);
  const int64_t interval = int64_t{1} << doublings;
  return call % (interval < frequency ? interval : frequency) == 0;
}

/// Whether the next call measures its tensor.
LOWPREC_INLINE bool measures(const Adaptation& rule, const int64_t* state) {
  if (rule.bias == Bias::sampled) return is_due(state[kCalls] + 1, rule.frequency);
  return rule.bias != Bias::fixed;
}

/// floor(log2) of a finite float64 magnitude, from its bits; kNothing for zero.
LOWPREC_INLINE int64_t exponent_of(uint64_t magnitude) {
  if (!magnitude) return kNothing;
  const int field = static_cast<int>(magnitude >> Float64::fraction_bits);
  return field ? field - Float64::bias : floor_log2(magnitude) + 1 - Float64::bias - Float64::fraction_bits;
}

/// The same of mean |x| + stdv · sqrt(E[x²] - E[|x|]²), from a tensor's sums over its finite elements. Where these
/// overflow, or all that there is counts as zero in them, the largest magnitude serves.
LOWPREC_INLINE int64_t exponent_by_deviation(double stdv, double count, double absolute, double squares,
                                             uint64_t largest) {
  const double mean = absolute / count;
  const double variance = squares / count - mean * mean;
  const double m = mean + stdv * std::sqrt(variance < 0 ? 0 : variance);
  const bool usable = m > 0 && bit_cast<uint64_t>(m) < Float64::infinity;
  return exponent_of(usable ? bit_cast<uint64_t>(m) : largest);
}

/// Count a call in its state and write down what it is to use. `exponent` is that of its tensor, or kNothing.
LOWPREC_INLINE void update(const Adaptation& rule, int64_t exponent, int64_t* state, int64_t* used) {
  for (int i = 0; i < kUsed; ++i) used[i] = state[i];
  ++state[kCalls];
  if (exponent == kNothing) return;
  int64_t* history = state + kHistory;
  int64_t from = kNothing;
  for (int64_t i = 0; i < rule.history; ++i) from = history[i] > from ? history[i] : from;
  if (from == kNothing) from = exponent;
  state[kShift] = used[kShift] = from + (rule.pad - rule.emax);
  for (int64_t i = rule.history - 1; i > 0; --i) history[i] = history[i - 1];
  if (rule.history > 0) history[0] = exponent;
}

}  // namespace lowprec
