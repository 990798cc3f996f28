// The cast that gathers statistics, as an operator: checks, results, and the choice of a kernel.
#pragma once

#include <cstdint>

#include "lowprec/cast_ops.h"
#include "lowprec/statistics.h"

namespace lowprec {

/// Where statistics go: the vector, and a bin for each code or none.
struct Gathered {
  double* stats;
  int64_t* codes;
  int64_t bins;

  Gathered(const Tensor& x, const Format& format, const Tensor& stats, const MaybeTensor& codes)
      : stats(static_cast<double*>(place_of(x, stats, ScalarType::Double, kFields))),
        codes(nullptr),
        bins(int64_t{1} << format.bits()) {
    if (!codes) return;
    STD_TORCH_CHECK(format.bits() <= 16, "codes are counted of formats up to 16 bits");
    this->codes = static_cast<int64_t*>(place_of(x, *codes, ScalarType::Long, bins));
  }

 private:
  static void* place_of(const Tensor& x, const Tensor& counters, ScalarType dtype, int64_t size) {
    STD_TORCH_CHECK(counters.scalar_type() == dtype && counters.numel() == size && counters.is_contiguous(),
                    "stats must be a contiguous float64 vector of 9, codes an int64 one of a number for each code");
    check_same_place(x, counters);
    return counters.mutable_data_ptr();
  }
};

/// Gather what a cast of contiguous numbers left behind: its results, and a word of `Note` for each, uint32.
void gather_on_cpu(const Tensor& x, const Tensor& results, const Tensor& notes, const Gathered& to);
void gather_on_cuda(const Tensor& x, const Tensor& results, const Tensor& notes, const Gathered& to);

/// The code of a number from what its cast told of it.
template <class C, class Mode>
class Coder {
 public:
  /// The last number's, where it rounded past the largest finite magnitude.
  bool beyond;

  LOWPREC_INLINE Coder(const Format& format, bool saturate)
      : max_code_(format.max_code()),
        overflow_(format.overflow_code(saturate)),
        nan_(format.nan_code()),
        sign_(format.sign_code()),
        nan_sign_(format.specials == Specials::finite ? 0 : format.sign_code()),
        first_signed_(format.has_negative_zero() ? 0 : 1) {}

  template <class Word>
  LOWPREC_INLINE void add(bool is_beyond, Word code) {
    beyond = is_beyond;
    code_ = static_cast<uint32_t>(code);
  }

  /// The code that x became.
  LOWPREC_INLINE uint32_t code_of(typename C::Bits x) const {
    const auto magnitude = static_cast<typename C::Word>(x & (C::sign - 1));
    const bool negative = x & C::sign;
    const bool infinite = Mode::overflows(negative) | (magnitude == C::infinity);
    const uint32_t large = infinite ? overflow_ : max_code_;
    const uint32_t code = beyond ? large : code_;
    const uint32_t sign = negative ? sign_ : 0;
    const uint32_t signed_code = code >= first_signed_ ? code | sign : code;
    return magnitude > C::infinity ? nan_ | (sign & nan_sign_) : signed_code;
  }

 private:
  uint32_t code_;
  uint32_t max_code_;
  uint32_t overflow_;
  uint32_t nan_;
  uint32_t sign_;
  uint32_t nan_sign_;
  uint32_t first_signed_;  // the smallest magnitude code that can be negative
};

/// `Backend::run<C, Mode>(setting, x, out, source, gathered)` applies a cast to the elements of x and gathers.
template <class Backend>
Tensor quantize_statistics(const Tensor& x, const Ints& fields, int64_t rounding, bool saturate,
                           const MaybeTensor& seed, const MaybeTensor& offset, int64_t random_bits,
                           const MaybeTensor& shift, const Tensor& stats, const MaybeTensor& codes) {
  Tensor out = empty_like(x, x.scalar_type());
  const Setting setting = setting_of(x, read_format(fields), saturate, shift);
  const Source source(seed, offset, random_bits);
  const Gathered gathered(x, setting.format, stats, codes);
  for_container(x.scalar_type(), [&](auto container) {
    check_within(setting, container);
    for_rounding(rounding, [&](auto mode) {
      Backend::template run<decltype(container), decltype(mode)>(setting, x, out, source, gathered);
    });
  });
  return out;
}

/// Register the operator for a backend's device.
template <class Backend>
void register_statistics(Library& library) {
  library.impl("quantize_statistics", TORCH_BOX(&quantize_statistics<Backend>));
}

}  // namespace lowprec
