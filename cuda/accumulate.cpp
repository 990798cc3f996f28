// Sums and matrix products under an accumulator on the CPU, shared out among torch's threads by outputs.

#include <cstdint>

#include "lowprec/accumulate.h"
#include "lowprec/accumulate_ops.h"
#include "lowprec/draws.h"

namespace lowprec {
namespace {

constexpr int64_t kGrain = 4096;  // roundings that are worth a thread

/// The bits of an input as those of its carrier.
template <class C>
class Widen {
 public:
  LOWPREC_INLINE uint64_t operator()(typename C::Bits bits) const {
    if constexpr (std::is_same_v<C, CarrierOf<C>>) {
      return bits;
    } else {
      const Number x = from_.read(bits);
      return x.nan ? Float32::quiet_nan : write_(bits & (C::sign - 1), x.negative);
    }
  }

 private:
  Layout from_ = Layout::of(C{});
  Writer write_{from_, Layout::of(CarrierOf<C>{})};
};

/// A tensor of up to three dimensions as its elements' places.
template <class C>
struct View {
  const typename C::Bits* data;
  int64_t stride[3] = {};

  explicit View(const Tensor& x) : data(static_cast<const typename C::Bits*>(x.const_data_ptr())) {
    for (int64_t i = 0; i < x.dim(); ++i) stride[i] = x.stride(i);
  }
  const typename C::Bits* at(int64_t i, int64_t j, int64_t k) const {
    return data + i * stride[0] + j * stride[1] + k * stride[2];
  }
};

struct Cpu {
  template <class C>
  static void accumulate(const AccumulatorSpec& spec, const Tensor& x, const Tensor& out, const Source& source) {
    using Carrier = CarrierOf<C>;
    const View<C> rows(x);
    const int64_t terms = x.size(1), step = x.stride(1);
    const Widen<C> widen;
    run<Carrier>(spec, terms, out, source, [&](const SumPlan<Carrier>& plan, int64_t output) {
      const auto* row = rows.at(output, 0, 0);
      return plan.sum(output, terms, [&](int64_t k) { return term_of<Carrier>(widen(row[k * step])); });
    });
  }

  template <class C>
  static void matmul(const AccumulatorSpec& spec, const Tensor& a, const Tensor& b, const Tensor& out,
                     const Source& source) {
    using Carrier = CarrierOf<C>;
    const View<C> left(a), right(b);
    const int64_t rows = a.size(1), columns = b.size(2), terms = a.size(2);
    const Widen<C> widen;
    run<Carrier>(spec, terms, out, source, [&](const SumPlan<Carrier>& plan, int64_t output) {
      const int64_t column = output % columns, row = output / columns % rows, batch = output / columns / rows;
      const auto* x = left.at(batch, row, 0);
      const auto* y = right.at(batch, 0, column);
      return plan.sum(output, terms, [&](int64_t k) {
        return plan.products(widen(x[k * left.stride[2]]), widen(y[k * right.stride[1]]));
      });
    });
  }

 private:
  /// Every output by itself: any spec, no float arithmetic.
  template <class Carrier, class Sum>
  static void run(const AccumulatorSpec& spec, int64_t terms, const Tensor& out, const Source& source, const Sum& sum) {
    const SumPlan<Carrier> plan(spec, terms, read_word(source.seed), read_word(source.offset));
    auto* results = static_cast<typename Carrier::Bits*>(out.mutable_data_ptr());
    parallel_for(0, out.numel(), std::max<int64_t>(kGrain / std::max<int64_t>(terms, 1), 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t output = begin; output < end; ++output) {
                     results[output] = static_cast<typename Carrier::Bits>(sum(plan, output));
                   }
                 });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_accumulate<Cpu>(library); }

}  // namespace
}  // namespace lowprec
