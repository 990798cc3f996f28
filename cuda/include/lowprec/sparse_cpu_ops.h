// Block-sparse products as operators on the CPU: checks, operands as values of one dtype, gates, and results.
//
// Python has checked every argument and said what is wrong with it. The checks here are a second fence. Conversions
// between dtypes go by the casts' operators, whose integers no mode of the machine changes.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "lowprec/accumulate_ops.h"
#include "lowprec/default_arithmetic.h"
#include "lowprec/draws.h"
#include "lowprec/sparse_cpu.h"
#include "lowprec/torch_stable.h"

namespace lowprec {

using Tensors = std::vector<Tensor>;

constexpr int64_t kMaxBlock = 64;

/// Seed and offset of stochastic levels.
struct SumSeed {
  uint64_t seed;
  uint64_t offset;

  SumSeed(const MaybeTensor& seed, const MaybeTensor& offset) : seed(read_word(seed)), offset(read_word(offset)) {}
};

/// Roundings of an output with so many terms.
inline int64_t roundings_of(const AccumulatorSpec& spec, int64_t terms) {
  if (spec.leaf == Leaf::exact) terms = terms > 0;
  if (spec.leaf >= Leaf::hopper_fp8) terms = spec.terms ? (terms + spec.terms - 1) / spec.terms : terms > 0;
  return Tree(spec, terms).roundings;
}

/// Whether sums are formed in float32, one term after the other.
inline bool is_plain(const AccumulatorSpec& spec) {
  const LevelSpec& level = spec.level[0];
  const Format& format = level.format;
  return spec.leaf == Leaf::terms && !spec.has_product && spec.levels == 1 && level.fan_in == 0 &&
         level.rounding == 0 && !level.saturate && format.ebits == 8 && format.mbits == 23 && format.bias == 127 &&
         format.specials == Specials::ieee && format.subnormals;
}

/// A float dtype as a format, whose codes are its bits.
inline Ints dtype_format(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return {5, 10, 15, 1, 1};
    case ScalarType::BFloat16:
      return {8, 7, 127, 1, 1};
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "expected float64, float32, float16 or bfloat16");
      return {8, 23, 127, 1, 1};
  }
}

inline Tensor decode(const Tensor& codes, const Ints& format, ScalarType dtype) {
  return call("lowprec::decode", "", codes, format, dtype);
}

/// The same numbers in a wider dtype, or those of a carrier rounded to nearest, ties to even, in a narrower one.
inline Tensor convert(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  const bool widens = dtype == ScalarType::Double || (dtype == ScalarType::Float && x.element_size() < 4);
  if (widens) {
    const Ints format = dtype_format(x.scalar_type());
    return decode(view_as(x, code_dtype(read_format(format))), format, dtype);
  }
  const MaybeTensor none;
  const int64_t nearest_even = 0, random_bits = 32;
  return view_as(call("lowprec::encode", "", x, dtype_format(dtype), nearest_even, false, none, none, random_bits),
                 dtype);
}

/// The first dtype that holds the values of both formats.
inline ScalarType dtype_for(const Ints& left, const Ints& right) {
  for (const ScalarType dtype : {ScalarType::BFloat16, ScalarType::Half}) {
    bool holds = true;
    for_container(dtype, [&](auto container) {
      for (const Ints* format : {&left, &right}) holds = holds && Grid::of(read_format(*format), container).within;
    });
    if (holds) return dtype;
  }
  return ScalarType::Float;
}

/// The dtype in which operands, values or codes, are multiplied.
inline ScalarType common_dtype(const Tensor& x, const Ints& x_format, const Tensor& w, const Ints& w_format) {
  if (!x_format.empty() && !w_format.empty()) return dtype_for(x_format, w_format);
  STD_TORCH_CHECK(!x_format.empty() || !w_format.empty() || x.scalar_type() == w.scalar_type(),
                  "both operands must have one dtype");
  return x_format.empty() ? x.scalar_type() : w.scalar_type();
}

inline Tensor values_of(const Tensor& x, const Ints& format, ScalarType dtype) {
  return format.empty() ? x : decode(x, format, dtype);
}

/// The float8 dtype of codes that the model of Hopper's tensor cores takes as they are.
inline std::optional<ScalarType> native_dtype(const Ints& format) {
  if (format == Ints{4, 3, 7, 2, 1}) return ScalarType::Float8_e4m3fn;
  if (format == Ints{5, 2, 15, 1, 1}) return ScalarType::Float8_e5m2;
  return std::nullopt;
}

/// Whether they do: a gated weight is no code any more.
inline bool are_native(const AccumulatorSpec& spec, const MaybeTensor& gate, const Ints& left, const Ints& right) {
  return spec.leaf == Leaf::hopper_fp8 && !gate && native_dtype(left) && native_dtype(right);
}

/// f of each element of x [blocks, b, b], with its block's gate.
template <class Number, class F>
void for_gated(const Tensor& x, const float* gate, const F& f) {
  const int64_t each = x.size(1) * x.size(2);
  auto* values = static_cast<Number*>(x.mutable_data_ptr());
  parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
    const DefaultArithmetic arithmetic;
    for (int64_t id = begin; id < end; ++id) {
      for (int64_t i = id * each; i < (id + 1) * each; ++i) values[i] = f(values[i], gate[id], id, i);
    }
  });
}

/// x [blocks, b, b] times its gates, which are rounded to its dtype first, as is the product; +0 where a gate is 0.
inline Tensor gated(const Tensor& x, const MaybeTensor& gate) {
  if (!gate) return contiguous(x);
  const ScalarType dtype = x.scalar_type(), carrier = carrier_dtype(dtype);
  const Tensor factors = convert(convert(*gate, dtype), carrier);
  const Tensor result = empty(x, x.sizes(), carrier);
  copy(result, convert(contiguous(x), carrier));
  const auto* gates = static_cast<const float*>(gate->const_data_ptr());
  for_container(carrier, [&](auto container) {
    using Number = NumberOf<decltype(container)>;
    const auto* factor = static_cast<const Number*>(factors.const_data_ptr());
    for_gated<Number>(result, gates, [&](Number value, float of, int64_t id, int64_t) {
      return of == 0 ? Number(0) : value * factor[id];
    });
  });
  return convert(result, dtype);
}

inline void check_gate(const MaybeTensor& gate, int64_t blocks) {
  STD_TORCH_CHECK(!gate || (gate->is_cpu() && gate->scalar_type() == ScalarType::Float && gate->dim() == 1 &&
                            gate->size(0) == blocks),
                  "gate must be float32, one for each block");
}

inline void check_table(const Tensor& table, int64_t size) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Int && table.dim() == 1 && table.size(0) >= size,
                  "the table must be int32 on the CPU, and complete");
}

inline void check_block(int64_t block) {
  STD_TORCH_CHECK(block == 8 || block == 16 || block == 32 || block == kMaxBlock, "block must be 8, 16, 32 or 64");
}

/// [N, C] as [C, N], unless it is that.
inline Tensor features_first(const Tensor& x, bool first) { return first ? x : torch::stable::transpose(x, 0, 1); }

/// A product's operands: x [N, C] or [C, N] and w [blocks, b, b], contiguous and gated, as values of one dtype.
struct SparseCall {
  Tensor x;
  Tensor w;
  Tensor table;
  MaybeTensor gate;
  int64_t outputs;
  bool first;
  bool transpose;

  int64_t block() const { return w.size(1); }
  int64_t tokens() const { return x.size(first ? 1 : 0); }
  int64_t features() const { return x.size(first ? 0 : 1); }
  /// From output to output of a result.
  int64_t token_step() const { return first ? 1 : outputs * block(); }
  int64_t feature_step() const { return first ? tokens() : 1; }

  SparseColumns columns() const {
    const auto* data = static_cast<const int32_t*>(table.const_data_ptr());
    return {outputs, data, data + outputs + 1};
  }
  const float* gate_data() const { return gate ? static_cast<const float*>(gate->const_data_ptr()) : nullptr; }
  bool closed(int64_t id) const { return gate && gate_data()[id] == 0; }

  Tensor result(ScalarType dtype) const {
    const int64_t size = outputs * block();
    return first ? empty(x, {size, tokens()}, dtype) : empty(x, {tokens(), size}, dtype);
  }

  void check() const {
    STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 3 && w.size(1) == w.size(2) && outputs >= 0 && x.is_cpu() && w.is_cpu(),
                    "x must be [N, C] or [C, N] and w [blocks, b, b]");
    check_block(block());
    STD_TORCH_CHECK(features() % block() == 0, "the features of x must be whole blocks");
    check_gate(gate, w.size(0));
    check_table(table, outputs + 1 + 2 * w.size(0));
    const SparseColumns at = columns();
    bool fits = at.offsets[0] == 0 && at.offsets[outputs] <= w.size(0);
    for (int64_t j = 0; fits && j < outputs; ++j) fits = at.offsets[j] <= at.offsets[j + 1];
    for (int64_t n = 0; fits && n < at.offsets[outputs]; ++n) {
      const int64_t input = at.pairs[2 * n], id = at.pairs[2 * n + 1];
      fits = input >= 0 && input < features() / block() && id >= 0 && id < w.size(0);
    }
    STD_TORCH_CHECK(fits, "the table is not that of x and w");
  }
};

/// An update's operands: pairs of x and dy, as values of one dtype.
struct UpdateCall {
  Tensors x;
  Tensors dy;
  Tensor table;
  int64_t blocks;
  int64_t block;
  bool first;

  int64_t tokens_of(size_t n) const { return x[n].size(first ? 1 : 0); }
  int64_t tokens() const {
    int64_t tokens = 0;
    for (size_t n = 0; n < x.size(); ++n) tokens += tokens_of(n);
    return tokens;
  }
  int64_t inputs() const { return x[0].size(first ? 0 : 1); }
  int64_t outputs() const { return dy[0].size(first ? 0 : 1); }
  /// (input block, output block) of each weight; the weights in Morton order follow.
  const int32_t* at() const { return static_cast<const int32_t*>(table.const_data_ptr()); }

  Tensor result(ScalarType dtype) const { return empty(x[0], {blocks, block, block}, dtype); }

  void check() const {
    STD_TORCH_CHECK(!x.empty() && x.size() == dy.size(), "x and dy must be as many, and at least one");
    for (size_t n = 0; n < x.size(); ++n) check_pair(n);
    check_block(block);
    STD_TORCH_CHECK(inputs() % block == 0 && outputs() % block == 0, "features must be whole blocks");
    check_table(table, 3 * blocks);
    bool fits = true;
    for (int64_t id = 0; fits && id < blocks; ++id) {
      const int32_t input = at()[2 * id], output = at()[2 * id + 1], named = at()[2 * blocks + id];
      fits = input >= 0 && input < inputs() / block && output >= 0 && output < outputs() / block && named >= 0 &&
             named < blocks;
    }
    STD_TORCH_CHECK(fits, "the table is not that of x and dy");
  }

  /// All tokens as one pair, contiguous with features first.
  void join() {
    const Tensor left = joined(x), right = joined(dy);
    x = {left};
    dy = {right};
    first = true;
  }

 private:
  void check_pair(size_t n) const {
    const int64_t feature = first ? 0 : 1;
    STD_TORCH_CHECK(x[n].dim() == 2 && dy[n].dim() == 2 && x[n].is_cpu() && dy[n].is_cpu() &&
                        x[n].size(1 - feature) == dy[n].size(1 - feature) && x[n].size(feature) == x[0].size(feature) &&
                        dy[n].size(feature) == dy[0].size(feature) && x[n].scalar_type() == x[0].scalar_type() &&
                        dy[n].scalar_type() == dy[0].scalar_type(),
                    "pairs must have one number of features and one dtype, and x and dy the same tokens");
  }

  Tensor joined(const Tensors& parts) const {
    if (parts.size() == 1) return contiguous(features_first(parts[0], first));
    const Tensor whole = empty(parts[0], {parts[0].size(first ? 0 : 1), tokens()}, parts[0].scalar_type());
    int64_t start = 0;
    for (const Tensor& part : parts) {
      Tensor target = whole;
      const int64_t count = part.size(first ? 1 : 0);
      copy(torch::stable::narrow(target, 1, start, count), features_first(part, first));
      start += count;
    }
    return whole;
  }
};

/// The operators of lowprec/_ops.py. A backend forms sums of values:
/// - `multiply<C>(call, out)` and `update<C>(call, out)` in C's carrier, one term after the other; any strides;
/// - `multiply_under<C>(spec, seed, call, out)` and `update_under<C>` under an accumulator whose leaves are terms,
///   `multiply_hopper(spec, seed, call, out)` and `update_hopper` under the others; x and dy lie with features first
///   and contiguous, and an update has one pair.
template <class Backend>
struct SparseOps {
  static Tensor matmul(const Tensor& x, const Tensor& w, const Tensor& table, const MaybeTensor& gate, int64_t outputs,
                       bool first, bool transpose, const Ints& x_format, const Ints& w_format, ScalarType dtype) {
    return convert(sums(call_of(x, w, table, gate, outputs, first, transpose, x_format, w_format)), dtype);
  }

  static Tensor matmul_cast(const Tensor& x, const Tensor& w, const Tensor& table, const MaybeTensor& gate,
                            int64_t outputs, bool first, bool transpose, const Ints& x_format, const Ints& w_format,
                            const Ints& format, int64_t rounding, bool saturate, const MaybeTensor& seed,
                            const MaybeTensor& offset, int64_t random_bits, bool codes, ScalarType dtype) {
    const Tensor y = matmul(x, w, table, gate, outputs, first, transpose, x_format, w_format, ScalarType::Float);
    if (codes) return call("lowprec::encode", "", y, format, rounding, saturate, seed, offset, random_bits);
    const MaybeTensor none;
    return convert(
        call("lowprec::quantize", "", y, format, rounding, saturate, seed, offset, random_bits, none, Ints()), dtype);
  }

  static Tensor matmul_accumulate(const Tensor& x, const Tensor& w, const Tensor& table, const MaybeTensor& gate,
                                  int64_t outputs, bool first, bool transpose, const Ints& accumulator,
                                  const MaybeTensor& seed, const MaybeTensor& offset, const Ints& x_format,
                                  const Ints& w_format) {
    const AccumulatorSpec spec = checked(accumulator);
    const Source source(seed, offset, 32);
    if (are_native(spec, gate, x_format, w_format)) {
      return under(spec, source,
                   call_of(view_as(x, *native_dtype(x_format)), view_as(w, *native_dtype(w_format)), table, gate,
                           outputs, first, transpose));
    }
    const SparseCall call = call_of(x, w, table, gate, outputs, first, transpose, x_format, w_format);
    return is_plain(spec) && call.x.scalar_type() != ScalarType::Double ? sums(call) : under(spec, source, call);
  }

  static Tensor weight_grad(const Tensors& x, const Tensors& dy, const Tensor& table, const MaybeTensor& gate,
                            int64_t blocks, int64_t block, bool first, const Ints& x_format, const Ints& dy_format,
                            ScalarType dtype) {
    check_gate(gate, blocks);
    return convert(gated(sums(call_of(x, dy, table, blocks, block, first, x_format, dy_format)), gate), dtype);
  }

  static void weight_grad_out(const Tensors& x, const Tensors& dy, const Tensor& table, const MaybeTensor& gate,
                              int64_t blocks, int64_t block, bool first, const Ints& x_format, const Ints& dy_format,
                              const Tensor& out, double beta) {
    STD_TORCH_CHECK(
        out.is_cpu() && out.dim() == 3 && out.size(0) == blocks && out.size(1) == block && out.size(2) == block,
        "out must be [blocks, b, b]");
    const ScalarType dtype = carrier_dtype(out.scalar_type());
    const Tensor dw = weight_grad(x, dy, table, gate, blocks, block, first, x_format, dy_format, dtype);
    if (beta != 0) for_container(dtype, [&](auto container) { add<NumberOf<decltype(container)>>(dw, out, beta); });
    copy(out, convert(dw, out.scalar_type()));
  }

  static Tensor weight_grad_accumulate(const Tensors& x, const Tensors& dy, const Tensor& table,
                                       const MaybeTensor& gate, int64_t blocks, int64_t block, bool first,
                                       const Ints& accumulator, const MaybeTensor& seed, const MaybeTensor& offset,
                                       const Ints& x_format, const Ints& dy_format) {
    const AccumulatorSpec spec = checked(accumulator);
    const Source source(seed, offset, 32);
    check_gate(gate, blocks);
    if (are_native(spec, {}, x_format, dy_format)) {
      const auto left = viewed(x, x_format), right = viewed(dy, dy_format);
      return gated(under(spec, source, call_of(left, right, table, blocks, block, first)), gate);
    }
    const UpdateCall call = call_of(x, dy, table, blocks, block, first, x_format, dy_format);
    const bool plain = is_plain(spec) && call.x[0].scalar_type() != ScalarType::Double;
    return gated(plain ? sums(call) : under(spec, source, call), gate);
  }

 private:
  static AccumulatorSpec checked(const Ints& accumulator) {
    const AccumulatorSpec spec = read_accumulator(accumulator);
    STD_TORCH_CHECK(spec.leaf != Leaf::tensor_core,
                    "tensor_core leaves are what the hardware gives: they need a CUDA device, got operands on cpu; "
                    "hopper_fp16 and hopper_fp8 model Hopper's on any device");
    return spec;
  }

  static SparseCall call_of(const Tensor& x, const Tensor& w, const Tensor& table, const MaybeTensor& gate,
                            int64_t outputs, bool first, bool transpose) {
    MaybeTensor gates;
    if (gate) gates = contiguous(*gate);
    SparseCall call{x, w, contiguous(table), gates, outputs, first, transpose};
    call.check();
    call.w = gated(w, gates);
    return call;
  }

  static SparseCall call_of(const Tensor& x, const Tensor& w, const Tensor& table, const MaybeTensor& gate,
                            int64_t outputs, bool first, bool transpose, const Ints& x_format, const Ints& w_format) {
    const ScalarType dtype = common_dtype(x, x_format, w, w_format);
    return call_of(values_of(x, x_format, dtype), values_of(w, w_format, dtype), table, gate, outputs, first,
                   transpose);
  }

  static UpdateCall call_of(const Tensors& x, const Tensors& dy, const Tensor& table, int64_t blocks, int64_t block,
                            bool first) {
    UpdateCall call{x, dy, contiguous(table), blocks, block, first};
    call.check();
    return call;
  }

  static UpdateCall call_of(const Tensors& x, const Tensors& dy, const Tensor& table, int64_t blocks, int64_t block,
                            bool first, const Ints& x_format, const Ints& dy_format) {
    STD_TORCH_CHECK(!x.empty() && !dy.empty(), "x and dy must be at least one");
    const ScalarType dtype = common_dtype(x[0], x_format, dy[0], dy_format);
    Tensors left, right;
    for (const Tensor& each : x) left.push_back(values_of(each, x_format, dtype));
    for (const Tensor& each : dy) right.push_back(values_of(each, dy_format, dtype));
    return call_of(left, right, table, blocks, block, first);
  }

  static Tensors viewed(const Tensors& codes, const Ints& format) {
    Tensors result;
    for (const Tensor& each : codes) result.push_back(view_as(each, *native_dtype(format)));
    return result;
  }

  static Tensor sums(const SparseCall& call) {
    Tensor out = call.result(carrier_dtype(call.x.scalar_type()));
    for_container(call.x.scalar_type(), [&](auto container) {
      if (out.numel() > 0) Backend::template multiply<decltype(container)>(call, out);
    });
    return out;
  }

  static Tensor sums(const UpdateCall& call) {
    Tensor out = call.result(carrier_dtype(call.x[0].scalar_type()));
    if (call.tokens() == 0) torch::stable::zero_(out);
    for_container(call.x[0].scalar_type(), [&](auto container) {
      if (out.numel() > 0 && call.tokens() > 0) Backend::template update<decltype(container)>(call, out);
    });
    return out;
  }

  static Tensor under(const AccumulatorSpec& spec, const Source& source, SparseCall call) {
    const bool hopper = spec.leaf >= Leaf::hopper_fp8;
    const Tensor out = call.result(hopper ? ScalarType::Float : carrier_dtype(call.x.scalar_type()));
    const SumSeed seed(source.seed, source.offset);
    const Tensor packed = contiguous(features_first(call.x, call.first));
    call.x = call.first ? packed : torch::stable::transpose(packed, 0, 1);
    if (out.numel() == 0) return out;
    if (hopper) {
      Backend::multiply_hopper(spec, seed, call, out);
      return out;
    }
    for_container(call.x.scalar_type(), [&](auto container) {
      using C = decltype(container);
      check_within(spec, CarrierOf<C>{});
      Backend::template multiply_under<C>(spec, seed, call, out);
    });
    return out;
  }

  static Tensor under(const AccumulatorSpec& spec, const Source& source, UpdateCall call) {
    const bool hopper = spec.leaf >= Leaf::hopper_fp8;
    const Tensor out = call.result(hopper ? ScalarType::Float : carrier_dtype(call.x[0].scalar_type()));
    const SumSeed seed(source.seed, source.offset);
    call.join();
    if (out.numel() == 0) return out;
    if (hopper) {
      Backend::update_hopper(spec, seed, call, out);
      return out;
    }
    for_container(call.x[0].scalar_type(), [&](auto container) {
      using C = decltype(container);
      check_within(spec, CarrierOf<C>{});
      Backend::template update_under<C>(spec, seed, call, out);
    });
    return out;
  }

  /// dw = dw + beta · out.
  template <class Number>
  static void add(const Tensor& dw, const Tensor& out, double beta) {
    const Tensor before = convert(contiguous(out), dw.scalar_type());
    const auto* from = static_cast<const Number*>(before.const_data_ptr());
    auto* to = static_cast<Number*>(dw.mutable_data_ptr());
    parallel_for(0, dw.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      const DefaultArithmetic arithmetic;
      for (int64_t i = begin; i < end; ++i) to[i] += from[i] * static_cast<Number>(beta);
    });
  }
};

/// Register the operators for the CPU.
template <class Backend>
void register_sparse(Library& library) {
  using Ops = SparseOps<Backend>;
  library.impl("sparse_matmul", TORCH_BOX(&Ops::matmul));
  library.impl("sparse_matmul_cast", TORCH_BOX(&Ops::matmul_cast));
  library.impl("sparse_matmul_accumulate", TORCH_BOX(&Ops::matmul_accumulate));
  library.impl("sparse_weight_grad", TORCH_BOX(&Ops::weight_grad));
  library.impl("sparse_weight_grad_out", TORCH_BOX(&Ops::weight_grad_out));
  library.impl("sparse_weight_grad_accumulate", TORCH_BOX(&Ops::weight_grad_accumulate));
}

}  // namespace lowprec
