// Sums and matrix products under an accumulator on the CPU, shared out among torch's threads by outputs.

#include <cstdint>

#include "lowprec/accumulate_cpu.h"
#include "lowprec/draws.h"

namespace lowprec {
namespace {

template <class C>
const typename C::Bits* elements(const Tensor& x) {
  return static_cast<const typename C::Bits*>(x.const_data_ptr());
}

struct Cpu {
  /// A sum is a product with ones.
  template <class C>
  static void accumulate(const AccumulatorSpec& spec, const Tensor& x, const Tensor& out, const Source& source) {
    constexpr auto one = static_cast<typename C::Bits>(static_cast<typename C::Bits>(C::bias) << C::fraction_bits);
    const Lines<C> lines{elements<C>(x), x.stride(0), x.stride(1)};
    AccumulatorSpec sums = spec;
    sums.has_product = false;
    multiply<C>(sums, {{&one, 0, 0}, lines, 0, 0, 1, 1, out.numel(), x.size(1), 0, 0, 1}, out, source);
  }

  template <class C>
  static void matmul(const AccumulatorSpec& spec, const Tensor& a, const Tensor& b, const Tensor& out,
                     const Source& source) {
    const int64_t rows = a.size(1), columns = b.size(2), terms = a.size(2);
    const Lines<C> left{elements<C>(a), a.stride(1), a.stride(2)}, right{elements<C>(b), b.stride(2), b.stride(1)};
    multiply<C>(spec, {left, right, a.stride(0), b.stride(0), a.size(0), rows, columns, terms, 0, columns, 1}, out,
                source);
  }

 private:
  template <class C>
  static void multiply(const AccumulatorSpec& spec, const Product<C>& x, const Tensor& out, const Source& source) {
    multiply_any(spec, read_word(source.seed), read_word(source.offset), x,
                 static_cast<typename CarrierOf<C>::Bits*>(out.mutable_data_ptr()));
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_accumulate<Cpu>(library); }

}  // namespace
}  // namespace lowprec
