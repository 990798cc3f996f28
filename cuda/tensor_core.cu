// Products with tensor-core leaves on CUDA: which kernel serves a device and an accumulator, and in what form it takes
// its operands.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include "lowprec/accumulate_ops.h"
#include "lowprec/fused_ops.h"
#include "lowprec/launch.h"
#include "lowprec/tensor_core_launch.h"
#include "lowprec/tensor_core_portable.h"
#include "lowprec/torch_stable.h"

namespace lowprec {
namespace {

constexpr Format kFloat32{8, 23, 127, Specials::ieee, true};

/// What a call asks for.
struct Request {
  const Tensor& a;
  const Tensor& b;
  AccumulatorSpec spec;
  const Source& source;
  Output out;
};

bool is_float8(ScalarType dtype) { return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2; }

Operands operands_of(ScalarType a, ScalarType b) {
  if (a == ScalarType::BFloat16 && b == a) return Operands::bf16;
  if (a == ScalarType::Half && b == a) return Operands::fp16;
  STD_TORCH_CHECK(is_float8(a) && is_float8(b),
                  "a and b must both be bfloat16, both float16, or each float8_e4m3fn or float8_e5m2");
  const bool left = a == ScalarType::Float8_e4m3fn, right = b == ScalarType::Float8_e4m3fn;
  if (left) return right ? Operands::e4m3_e4m3 : Operands::e4m3_e5m2;
  return right ? Operands::e5m2_e4m3 : Operands::e5m2_e5m2;
}

/// The leaves of a product in instructions of `step` terms. A leaf of all terms, or of more than there are, is as long
/// as they are, up to whole stages.
ProductShape shape_of(const Request& call, int64_t step) {
  const int64_t depth = call.a.size(2), steps = (depth + step - 1) / step;
  const int64_t whole = (steps + kStageSteps - 1) / kStageSteps * kStageSteps;
  STD_TORCH_CHECK(call.spec.terms >= 0 && call.spec.terms % step == 0, "a leaf must take a multiple of ", step,
                  " terms, got ", call.spec.terms);
  STD_TORCH_CHECK(std::max({call.a.size(0), call.a.size(1), call.b.size(2), depth}) < std::numeric_limits<int>::max(),
                  "matrices must have fewer than 2^31 rows and columns");
  const int64_t asked = call.spec.terms == 0 ? whole : std::min(call.spec.terms / step, whole);
  const int64_t leaf = std::max<int64_t>(asked, 1);
  return {call.a.size(0),         call.a.size(1),         call.b.size(2), static_cast<int>((steps + leaf - 1) / leaf),
          static_cast<int>(leaf), static_cast<int>(steps)};
}

/// A matrix product on Hopper: its operands as the tensor memory accelerator takes them.
class Hopper {
 public:
  static constexpr int kOutputs = lowprec::kOutputs;

  explicit Hopper(const Request& call)
      : call_(call),
        kind_(operands_of(call.a.scalar_type(), call.b.scalar_type())),
        shape_(shape_of(call, 32 / bytes_of(kind_))),
        a_(rows_of(call.a)),
        b_(rows_of(bytes_of(kind_) == 1 ? torch::stable::transpose(call.b, 1, 2) : call.b)) {}

  const ProductShape& shape() const { return shape_; }
  int64_t flags() const { return Schedule(shape_).count * kCluster * kFlags; }

  /// Any steps.
  template <class Sum>
  void run(const typename Sum::Setting& setting, int* flags, const int* again) const {
    launch<Steps, Sum>(setting, flags, again);
  }

  /// Stages by a kernel of their own, where leaves are made of them. Zeros at the end of a 16-bit leaf change nothing.
  template <class Sum, class Any>
  void run_quick(const typename Sum::Setting& setting, int* flags) const {
    if (shape_.leaf_steps % kStageSteps || bytes_of(kind_) == 1) return launch<Steps, Any>(setting, flags, nullptr);
    if (kind_ == Operands::bf16) return launch<Stages<Operands::bf16>, Sum>(setting, flags, nullptr);
    launch<Stages<Operands::fp16>, Sum>(setting, flags, nullptr);
  }

 private:
  template <class Way, class Sum>
  void launch(const typename Sum::Setting& setting, int* flags, const int* again) const {
    const ProductCall call{shape_, kind_, call_.out, flags, again, false, false};
    check_cuda(launch_products<Way, Sum>(call, setting, describe_rows(a_), describe_rows(b_),
                                         attribute(call_.a, cudaDevAttrMultiProcessorCount), current_stream(call_.a)));
  }

  bool aligned(int64_t elements) const { return elements * bytes_of(kind_) % 16 == 0; }

  /// So many elements, up to a multiple of 16 bytes.
  int64_t padded(int64_t elements) const {
    const int64_t unit = 16 / bytes_of(kind_);
    return (elements + unit - 1) / unit * unit;
  }

  /// The same matrices with rows that begin at multiples of 16 bytes: themselves, or a copy.
  Tensor rows_of(const Tensor& x) const {
    const bool rows = x.stride(2) == 1 && (x.size(1) == 1 || (x.stride(1) > 0 && aligned(x.stride(1))));
    const bool matrices = x.size(0) == 1 || (x.stride(0) >= 0 && aligned(x.stride(0)));
    if (rows && matrices && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0) return x;
    Tensor room = empty(x, {x.size(0), x.size(1), padded(x.size(2))}, x.scalar_type());
    Tensor rows_only = torch::stable::narrow(room, 2, 0, x.size(2));
    copy(rows_only, x);
    return rows_only;
  }

  OperandRows describe_rows(const Tensor& x) const {
    const int64_t bytes = bytes_of(kind_);
    const int64_t matrices = x.size(0) > 1 && x.stride(0) == 0 ? 1 : x.size(0);
    // The stride of a dimension of one means nothing; the descriptor wants multiples of 16 bytes all the same.
    const int64_t row = x.size(1) > 1 ? x.stride(1) : padded(x.size(2));
    const int64_t matrix = matrices > 1 ? x.stride(0) : x.size(1) * row;
    return {x.const_data_ptr(), x.size(2), x.size(1), row * bytes, matrices, matrix * bytes};
  }

  const Request& call_;
  Operands kind_;
  ProductShape shape_;
  Tensor a_;
  Tensor b_;
};

/// On other devices, from the operands as they lie.
class Portable {
 public:
  static constexpr int kOutputs = kPortableOutputs;

  explicit Portable(const Request& call) : call_(call), shape_(shape_of(call, kPortableStep)) {}

  const ProductShape& shape() const { return shape_; }
  int64_t flags() const { return tiles() * kPortableFlags; }

  template <class Sum>
  void run(const typename Sum::Setting& setting, int* flags, const int* again) const {
    if (call_.a.scalar_type() == ScalarType::Half) {
      launch<true, Sum>(setting, flags, again);
    } else {
      launch<false, Sum>(setting, flags, again);
    }
  }

  template <class, class Any>
  void run_quick(const typename Any::Setting& setting, int* flags) const {
    run<Any>(setting, flags, nullptr);
  }

 private:
  template <bool kHalfs, class Sum>
  void launch(const typename Sum::Setting& setting, int* flags, const int* again) const {
    const PortableCall call{shape_, call_.a.size(2), strided(call_.a), strided(call_.b), call_.out, flags, again};
    const int64_t blocks = std::min<int64_t>(tiles(), attribute(call_.a, cudaDevAttrMultiProcessorCount) * 16);
    portable_product_kernel<kHalfs, Sum>
        <<<static_cast<unsigned>(blocks), kPortableThreads, 0, current_stream(call_.a)>>>(call, setting);
    check_cuda(cudaGetLastError());
  }

  int64_t tiles() const {
    const auto count = [](int64_t n) { return (n + kPortableTile - 1) / kPortableTile; };
    return shape_.batch * count(shape_.rows) * count(shape_.columns);
  }

  static StridedOperand strided(const Tensor& x) {
    return {static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
  }

  const Request& call_;
  ProductShape shape_;
};

bool is_float32(const LevelSpec& level) {
  const Format& format = level.format;
  return format.ebits == kFloat32.ebits && format.mbits == kFloat32.mbits && format.bias == kFloat32.bias &&
         format.specials == kFloat32.specials && format.subnormals && level.rounding == 0 && !level.saturate;
}

AnySetting any_setting(const Request& call, int leaves) {
  const LevelSpec& level = call.spec.level[0];
  return {SumRounder<Float32>(level.format, level.rounding, level.saturate), device_word(call.a, call.source.seed),
          device_word(call.a, call.source.offset), leaves};
}

/// One level over all leaves: in registers.
template <class Product>
void sum_in_registers(const Request& call, const Product& product) {
  const LevelSpec& level = call.spec.level[0];
  const AnySetting any = any_setting(call, product.shape().leaves);
  const RoundedSetting rounded(level.format, level.saturate);
  constexpr int n = Product::kOutputs;
  if (is_float32(level)) return product.template run_quick<PlainSum<n>, PlainSum<n>>({}, nullptr);
  if (level.rounding != 0 || !rounded.usable) return product.template run<AnySum<n>>(any, nullptr, nullptr);
  const Tensor flags = empty(call.a, {product.flags()}, ScalarType::Int);
  auto* failed = static_cast<int*>(flags.mutable_data_ptr());
  using Either = RoundedSum<n, Overflow::either>;
  if (rounded.saturate) {
    product.template run_quick<RoundedSum<n, Overflow::saturates>, Either>(rounded, failed);
  } else if (rounded.smallest == Smallest::float32) {
    product.template run_quick<RoundedSum<n, Overflow::overflows, Smallest::float32>, Either>(rounded, failed);
  } else {
    product.template run_quick<RoundedSum<n, Overflow::overflows>, Either>(rounded, failed);
  }
  product.template run<AnySum<n>>(any, nullptr, failed);
}

/// Call f with the product on the device of its operands.
template <class F>
void for_product(const Request& call, F f) {
  const int major = attribute(call.a, cudaDevAttrComputeCapabilityMajor);
  STD_TORCH_CHECK(major >= 8, "tensor_core needs a device of compute capability 8.0, this one has ", major, ".x");
  const Operands kind = operands_of(call.a.scalar_type(), call.b.scalar_type());
  if (major == 9) return f(Hopper(call));
  STD_TORCH_CHECK(bytes_of(kind) == 2, "tensor_core takes float8 operands on compute capability 9.0 alone");
  f(Portable(call));
}

void check_operands(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
                  "a and b must have shapes [B, M, K] and [B, K, N]");
  check_same_place(a, b);
}

/// The leaves of every output, [B, M, N, L].
Tensor tensor_core_leaves(const Tensor& a, const Tensor& b, int64_t terms) {
  check_operands(a, b);
  const MaybeTensor none;
  const Source source(none, none, 32);
  const DeviceGuard guard(a.get_device_index());
  AccumulatorSpec spec{};
  spec.terms = terms;
  const SumCast cast(kFloat32, 0, false, false, Layout::of(Float32{}), {});
  const Request call{a, b, spec, source, {nullptr, 4, false, false, cast}};
  Tensor out;
  for_product(call, [&](const auto& product) {
    const ProductShape& shape = product.shape();
    const int leaves = a.size(2) == 0 ? 0 : shape.leaves;
    out = empty(a, {shape.batch, shape.rows, shape.columns, leaves}, ScalarType::Float);
    if (out.numel() == 0) return;
    using Values = LeafValues<std::decay_t<decltype(product)>::kOutputs>;
    product.template run<Values>({static_cast<float*>(out.mutable_data_ptr()), leaves}, nullptr, nullptr);
  });
  return out;
}

/// The product rounded to a format and written as values of `dtype` or as codes; without a format, the sums in float32.
Tensor multiply(const Tensor& a, const Tensor& b, const Ints& accumulator, const MaybeTensor& seed,
                const MaybeTensor& offset, const std::optional<Format>& format, int64_t rounding, bool saturate,
                const Source& draws, bool codes, ScalarType dtype) {
  check_operands(a, b);
  const AccumulatorSpec spec = read_accumulator(accumulator);
  STD_TORCH_CHECK(spec.leaf == Leaf::tensor_core && !spec.has_product && spec.levels == 1 && spec.level[0].fan_in == 0,
                  "tensor-core leaves are added up here in one level that takes all of them");
  check_within(spec, Float32{});
  const Source source(seed, offset, 32);
  const DeviceGuard guard(a.get_device_index());
  Tensor out = empty(a, {a.size(0), a.size(1), b.size(2)}, codes ? code_dtype(*format) : dtype);
  if (out.numel() == 0) return out;
  if (a.size(2) == 0) {  // zero is the code of zero in every format
    const int64_t bytes = out.numel() * bytes_of(out.scalar_type());
    check_cuda(cudaMemsetAsync(out.mutable_data_ptr(), 0, static_cast<size_t>(bytes), current_stream(a)));
    return out;
  }
  const SumCast cast(format ? *format : kFloat32, rounding, saturate, codes, layout_of(dtype), device_draws(a, draws));
  const Request call{
      a,
      b,
      spec,
      source,
      {out.mutable_data_ptr(), bytes_of(out.scalar_type()), dtype == ScalarType::Half, format.has_value(), cast}};
  for_product(call, [&](const auto& product) { sum_in_registers(call, product); });
  return out;
}

Tensor tensor_core_matmul(const Tensor& a, const Tensor& b, const Ints& accumulator, const MaybeTensor& seed,
                          const MaybeTensor& offset) {
  const MaybeTensor none;
  return multiply(a, b, accumulator, seed, offset, std::nullopt, 0, false, Source(none, none, 32), false,
                  ScalarType::Float);
}

Tensor tensor_core_matmul_cast(const Tensor& a, const Tensor& b, const Ints& accumulator, const MaybeTensor& seed,
                               const MaybeTensor& offset, const Ints& format, int64_t rounding, bool saturate,
                               const MaybeTensor& cast_seed, const MaybeTensor& cast_offset, int64_t random_bits,
                               bool codes, ScalarType dtype) {
  const Format to = read_format(format);
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 6, "unknown rounding mode ", rounding);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "values are written in float32, float16 or bfloat16");
  for_container(dtype, [&](auto container) {
    if (!codes) check_within(to, container);
  });
  return multiply(a, b, accumulator, seed, offset, to, rounding, saturate, Source(cast_seed, cast_offset, random_bits),
                  codes, dtype);
}

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) {
  library.impl("tensor_core_matmul", TORCH_BOX(&tensor_core_matmul));
  library.impl("tensor_core_matmul_cast", TORCH_BOX(&tensor_core_matmul_cast));
  library.impl("tensor_core_leaves", TORCH_BOX(&tensor_core_leaves));
}

}  // namespace
}  // namespace lowprec
