// Sums and matrix products under an accumulator on the CPU, shared out among torch's threads by outputs.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "lowprec/accumulate.h"
#include "lowprec/accumulate_ops.h"
#include "lowprec/accumulate_vectors.h"
#include "lowprec/draws.h"
#include "lowprec/operands.h"

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

#ifdef LOWPREC_VECTORS

enum class Vectors { none, avx2, avx512 };

/// The vectors of the machine, or fewer where torch is told so by the same variable.
inline Vectors vectors() {
  static const Vectors found = [] {
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view limit = variable ? variable : "";
    if (limit == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Vectors::none;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    return wide && limit != "avx2" ? Vectors::avx512 : Vectors::avx2;
  }();
  return found;
}

#endif

/// Every output by itself, whatever the accumulator: no float arithmetic.
template <class C, class Sum>
void sum_each(const AccumulatorSpec& spec, int64_t terms, const Tensor& out, uint64_t seed, uint64_t offset,
              const Sum& sum) {
  const SumPlan<C> plan(spec, terms, seed, offset);
  auto* results = static_cast<typename C::Bits*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(terms, 1), 1);
  parallel_for(0, out.numel(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) results[i] = static_cast<typename C::Bits>(sum(plan, i));
  });
}

template <class C>
const typename C::Bits* elements(const Tensor& x) {
  return static_cast<const typename C::Bits*>(x.const_data_ptr());
}

struct Cpu {
  template <class C>
  static void accumulate(const AccumulatorSpec& spec, const Tensor& x, const Tensor& out, const Source& source) {
    using Carrier = CarrierOf<C>;
    const Lines<C> lines{elements<C>(x), x.stride(0), x.stride(1)};
    const int64_t terms = x.size(1);
    const uint64_t seed = read_word(source.seed), offset = read_word(source.offset);
    if (add_by_vectors(spec, lines, terms, out, seed, offset)) return;
    const Widen<C> widen;
    sum_each<Carrier>(spec, terms, out, seed, offset, [&](const SumPlan<Carrier>& plan, int64_t i) {
      const auto* line = lines.data + i * lines.stride;
      return plan.sum(i, terms, [&](int64_t k) { return term_of<Carrier>(widen(line[k * lines.step])); });
    });
  }

  template <class C>
  static void matmul(const AccumulatorSpec& spec, const Tensor& a, const Tensor& b, const Tensor& out,
                     const Source& source) {
    using Carrier = CarrierOf<C>;
    const int64_t rows = a.size(1), columns = b.size(2), terms = a.size(2);
    const Product<C> x{{elements<C>(a), a.stride(1), a.stride(2)},
                       {elements<C>(b), b.stride(2), b.stride(1)},
                       a.stride(0),
                       b.stride(0),
                       a.size(0),
                       rows,
                       columns,
                       terms,
                       0,
                       columns,
                       1};
    const uint64_t seed = read_word(source.seed), offset = read_word(source.offset);
    if (multiply_by_vectors(spec, x, out, seed, offset)) return;
    const Widen<C> widen;
    sum_each<Carrier>(spec, terms, out, seed, offset, [&](const SumPlan<Carrier>& plan, int64_t i) {
      const Product<C> one = x.at(i / columns / rows);
      const auto* left = one.left.data + i / columns % rows * one.left.stride;
      const auto* right = one.right.data + i % columns * one.right.stride;
      return plan.sum(i, terms, [&](int64_t k) {
        return plan.products(widen(left[k * x.left.step]), widen(right[k * x.right.step]));
      });
    });
  }

 private:
  /// A sum is a product with ones.
  template <class C>
  static bool add_by_vectors(const AccumulatorSpec& spec, const Lines<C>& lines, int64_t terms, const Tensor& out,
                             uint64_t seed, uint64_t offset) {
    constexpr auto one = static_cast<typename C::Bits>(static_cast<typename C::Bits>(C::bias) << C::fraction_bits);
    const Product<C> x{{&one, 0, 0}, lines, 0, 0, 1, 1, out.numel(), terms, 0, 0, 1};
    AccumulatorSpec sums = spec;
    sums.has_product = false;
    return multiply_by_vectors(sums, x, out, seed, offset);
  }

  template <class C>
  static bool multiply_by_vectors([[maybe_unused]] const AccumulatorSpec& spec, [[maybe_unused]] const Product<C>& x,
                                  [[maybe_unused]] const Tensor& out, [[maybe_unused]] uint64_t seed,
                                  [[maybe_unused]] uint64_t offset) {
#ifdef LOWPREC_VECTORS
    auto* results = static_cast<typename CarrierOf<C>::Bits*>(out.mutable_data_ptr());
    switch (vectors()) {
      case Vectors::avx512:
        return multiply_avx512(spec, seed, offset, x, results);
      case Vectors::avx2:
        return multiply_avx2(spec, seed, offset, x, results);
      default:
        return false;
    }
#else
    return false;
#endif
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_accumulate<Cpu>(library); }

}  // namespace
}  // namespace lowprec
