// Sums and matrix products under an accumulator on CUDA: what the kernels are given, and the choice of one.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "lowprec/accumulate_kernel.h"
#include "lowprec/accumulate_ops.h"
#include "lowprec/accumulate_plan.h"
#include "lowprec/launch.h"

namespace lowprec {
namespace {

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::Half:
      return Element::float16;
    default:
      return Element::bfloat16;
  }
}

/// A tensor of three dimensions, or of the last two.
Operand operand_of(const Tensor& x) {
  Operand operand{x.const_data_ptr(), element_of(x)};
  for (int64_t i = 0; i < x.dim(); ++i) operand.stride[3 - x.dim() + i] = x.stride(i);
  return operand;
}

/// Blocks for so many outputs, each with a thread of its own where the grid's limit permits.
int grid_size(int64_t outputs) {
  return static_cast<int>(
      std::min<int64_t>((outputs + kSumThreads - 1) / kSumThreads, std::numeric_limits<int>::max()));
}

struct Cuda {
  template <class C>
  static void accumulate(const AccumulatorSpec& spec, const Tensor& x, const Tensor& out, const Source& source) {
    run<CarrierOf<C>>(spec, {operand_of(x), {}, 1, x.size(0), 1, x.size(1)}, x, out, source);
  }

  template <class C>
  static void matmul(const AccumulatorSpec& spec, const Tensor& a, const Tensor& b, const Tensor& out,
                     const Source& source) {
    const Operands of{operand_of(a), operand_of(b), a.size(0), a.size(1), b.size(2), a.size(2)};
    run<CarrierOf<C>>(spec, of, a, out, source);
  }

 private:
  template <class C>
  static void run(const AccumulatorSpec& spec, const Operands& of, const Tensor& x, const Tensor& out,
                  const Source& source) {
    const SumDraws draws{device_word(x, source.seed), device_word(x, source.offset)};
    auto* results = static_cast<typename C::Bits*>(out.mutable_data_ptr());
    const DeviceGuard guard(x.get_device_index());
    if constexpr (std::is_same_v<C, Float32>) {
      TilePlan tiles(spec, of, draws);
      if (tiles.usable()) {
        const Tensor memory = empty(x, {tiles.workspace()}, ScalarType::Byte);
        tiles.launch(memory.mutable_data_ptr(), static_cast<float*>(out.mutable_data_ptr()), current_stream(x));
        return check_cuda(cudaGetLastError());
      }
    }
    sum_kernel<C><<<grid_size(of.outputs()), kSumThreads, 0, current_stream(x)>>>(SumPlan<C>(spec, of.terms, 0, 0), of,
                                                                                  draws, results);
    check_cuda(cudaGetLastError());
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { register_accumulate<Cuda>(library); }

}  // namespace
}  // namespace lowprec
