// Block-sparse products under an accumulator on CUDA: what the kernels are given, and the choice of one.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "lowprec/accumulate_ops.h"
#include "lowprec/launch.h"
#include "lowprec/sparse_accumulate_kernel.h"
#include "lowprec/sparse_accumulate_leaves.h"
#include "lowprec/sparse_accumulate_operands.h"
#include "lowprec/sparse_accumulate_single.h"
#include "lowprec/sparse_accumulate_tiles.h"
#include "lowprec/torch_stable.h"

namespace lowprec {
namespace {

using MaybeFormat = std::optional<Format>;
using Tensors = std::vector<Tensor>;

MaybeFormat format_of(const Ints& fields) {
  if (fields.empty()) return std::nullopt;
  const Format format = read_format(fields);
  STD_TORCH_CHECK(format.bits() <= 8, "codes must be of a format of 8 bits at most");
  return format;
}

/// A tensor of values, or of codes.
struct SparseOperand {
  Tensor tensor;
  MaybeFormat format;

  SparseOperand(const Tensor& tensor, const MaybeFormat& format) : tensor(tensor), format(format) {
    STD_TORCH_CHECK(!format || tensor.scalar_type() == ScalarType::Byte, "codes must be uint8");
  }
};

bool is_within(const Format& format, ValueKind kind) {
  return kind == ValueKind::float64    ? Grid::of(format, Float64{}).within
         : kind == ValueKind::float32  ? Grid::of(format, Float32{}).within
         : kind == ValueKind::bfloat16 ? Grid::of(format, BFloat16{}).within
                                       : Grid::of(format, Float16{}).within;
}

ValueKind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return ValueKind::float64;
    case ScalarType::Float:
      return ValueKind::float32;
    case ScalarType::Half:
      return ValueKind::float16;
    case ScalarType::BFloat16:
      return ValueKind::bfloat16;
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16 values, or codes with their format");
  }
}

/// The dtype in which both operands' values are multiplied.
ValueKind common_kind(const SparseOperand& left, const SparseOperand& right) {
  if (!left.format || !right.format) {
    const ValueKind kind = kind_of((left.format ? right : left).tensor.scalar_type());
    STD_TORCH_CHECK(left.format || right.format || kind_of(right.tensor.scalar_type()) == kind,
                    "both operands must have one dtype");
    const MaybeFormat& codes = left.format ? left.format : right.format;
    STD_TORCH_CHECK(!codes || is_within(*codes, kind), "the values' dtype cannot hold all values of the codes' format");
    return kind;
  }
  for (const ValueKind kind : {ValueKind::bfloat16, ValueKind::float16, ValueKind::float32}) {
    if (is_within(*left.format, kind) && is_within(*right.format, kind)) return kind;
  }
  STD_TORCH_CHECK(false, "float32 cannot hold all values of the codes' formats");
}

/// The kind of float8 that a format's codes are, if the model of Hopper's tensor cores knows it.
std::optional<ValueKind> native_kind(const MaybeFormat& format) {
  const auto is = [&](const Format& other) {
    return format && format->ebits == other.ebits && format->mbits == other.mbits && format->bias == other.bias &&
           format->specials == other.specials && format->subnormals == other.subnormals;
  };
  if (is({4, 3, 7, Specials::fn, true})) return ValueKind::e4m3;
  if (is({5, 2, 15, Specials::ieee, true})) return ValueKind::e5m2;
  return std::nullopt;
}

/// In what form kernels take an operand.
struct OperandForm {
  ValueKind kind;
  Form form;

  ScalarType dtype() const {
    if (kind == ValueKind::float64) return ScalarType::Double;
    return form == Form::half ? ScalarType::Half : form == Form::bfloat ? ScalarType::BFloat16 : ScalarType::Float;
  }
};

Element element_of(ScalarType dtype) {
  return dtype == ScalarType::Double     ? Element::float64
         : dtype == ScalarType::Half     ? Element::float16
         : dtype == ScalarType::BFloat16 ? Element::bfloat16
                                         : Element::float32;
}

template <class C, class To>
void launch_preparation(const Preparation<C>& how, void* out, cudaStream_t stream) {
  constexpr int64_t most = 65535;
  const dim3 threads(kPrepareWidth, kPrepareHeight);
  const dim3 blocks(static_cast<unsigned>(std::min((how.columns + 4 * kPrepareWidth - 1) / (4 * kPrepareWidth), most)),
                    static_cast<unsigned>(std::min((how.rows + kPrepareHeight - 1) / kPrepareHeight, most)));
  prepare_kernel<C, To><<<blocks, threads, 0, stream>>>(how, static_cast<To*>(out));
  check_cuda(cudaGetLastError());
}

/// Write a matrix of operands in a form, `to` being a matrix with contiguous rows.
void prepare(const SparseOperand& from, const OperandForm& form, const float* gate, const Tensor& to) {
  const Tensor& x = from.tensor;
  if (x.numel() == 0) return;
  const Operand operand{x.const_data_ptr(), element_of(x.scalar_type()), {0, x.stride(0), x.stride(1)}};
  const Format format = from.format.value_or(Format{4, 3, 7, Specials::fn, true});
  const auto how = [&](auto container) {
    using C = decltype(container);
    return Preparation<C>{operand,
                          from.format.has_value(),
                          Decode<uint8_t, C>(format),
                          form.kind,
                          form.form,
                          Gates{gate},
                          x.size(0),
                          x.size(1),
                          to.stride(0)};
  };
  void* out = to.mutable_data_ptr();
  const cudaStream_t stream = current_stream(x);
  if (form.kind == ValueKind::float64) return launch_preparation<Float64, uint64_t>(how(Float64{}), out, stream);
  if (to.scalar_type() == ScalarType::Float) return launch_preparation<Float32, uint32_t>(how(Float32{}), out, stream);
  launch_preparation<Float32, uint16_t>(how(Float32{}), out, stream);
}

/// Whether a matrix can be read 16 bytes at a time.
bool has_aligned_rows(const Tensor& x) {
  const int64_t unit = x.scalar_type() == ScalarType::Double ? 2 : x.scalar_type() == ScalarType::Float ? 4 : 8;
  return x.stride(1) == 1 && (x.size(0) <= 1 || (x.stride(0) >= x.size(1) && x.stride(0) % unit == 0)) &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

/// What pads rows is multiplied by nothing, but the last copy of 16 bytes takes it along.
void clear_ends(const Tensor& rows, int64_t columns) {
  const int64_t pitch = rows.size(1);
  if (rows.size(0) == 0 || columns == pitch) return;
  const auto size = static_cast<int64_t>(rows.element_size());
  auto* ends = static_cast<char*>(rows.mutable_data_ptr()) + columns * size;
  check_cuda(cudaMemset2DAsync(ends, pitch * size, 0, (pitch - columns) * size, rows.size(0), current_stream(rows)));
}

/// Tokens and features of all tensors one after the other: [N, C], or [C, N] if features come first, in a form, with
/// rows that begin at multiples of 16 bytes. The tensor itself where it is that.
Tensor features_in(const Tensors& tensors, const MaybeFormat& format, const OperandForm& form, bool first) {
  const Tensor& one = tensors.front();
  if (tensors.size() == 1 && !format && form.form == Form::carrier && one.scalar_type() == form.dtype() &&
      has_aligned_rows(one)) {
    return one;
  }
  int64_t tokens = 0;
  for (const Tensor& x : tensors) tokens += x.size(first);
  const int64_t features = one.size(!first), rows = first ? features : tokens, columns = first ? tokens : features;
  const Tensor room = empty(one, {rows, (columns + 7) / 8 * 8}, form.dtype());
  clear_ends(room, columns);
  int64_t done = 0;
  for (const Tensor& x : tensors) {
    prepare({x, format}, form, nullptr, torch::stable::narrow(const_cast<Tensor&>(room), first, done, x.size(first)));
    done += x.size(first);
  }
  return torch::stable::narrow(const_cast<Tensor&>(room), 1, 0, columns);
}

/// Weights times their gates in a form, contiguous.
Tensor weights_in(const SparseOperand& w, const OperandForm& form, const float* gate) {
  const Tensor dense = contiguous(w.tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0;
  if (!w.format && form.form == Form::carrier && dense.scalar_type() == form.dtype() && !gate && aligned) return dense;
  const int64_t blocks = dense.size(0), size = dense.size(1) * dense.size(2);
  Tensor room = empty(dense, {blocks, size}, form.dtype());
  prepare({torch::stable::view(dense, {blocks, size}), w.format}, form, gate, room);
  return room;
}

template <class Bits>
Features<Bits> features_of(const Tensor& x, bool first) {
  return {static_cast<const Bits*>(x.const_data_ptr()), x.stride(first), x.stride(!first)};
}

void check_block(int64_t block) {
  STD_TORCH_CHECK(block == 8 || block == 16 || block == 32 || block == 64, "blocks must be of 8, 16, 32 or 64, got ",
                  block);
}

const float* gate_of(const MaybeTensor& gate, int64_t blocks) {
  if (!gate) return nullptr;
  STD_TORCH_CHECK(gate->scalar_type() == ScalarType::Float && gate->dim() == 1 && gate->size(0) == blocks &&
                      (blocks <= 1 || gate->stride(0) == 1),
                  "gate must be float32 of one dimension, contiguous, with an element for each block");
  return static_cast<const float*>(gate->const_data_ptr());
}

const int32_t* table_of(const Tensor& table, const Tensor& x, int64_t length) {
  check_same_place(x, table);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int && table.dim() == 1 && table.size(0) >= length &&
                      (table.size(0) <= 1 || table.stride(0) == 1),
                  "the table must be contiguous int32 of ", length, " elements or more");
  return static_cast<const int32_t*>(table.const_data_ptr());
}

/// What a call asks for, beside its operands.
struct Request {
  AccumulatorSpec spec;
  SumDraws draws;
  ValueKind kind;
  bool native;  // float8 codes as they are

  /// How an operand is taken.
  OperandForm form(const MaybeFormat& format) const {
    const Form model = spec.leaf == Leaf::hopper_fp8 ? Form::hopper_fp8 : Form::hopper_fp16;
    if (spec.leaf == Leaf::hopper_fp8 || spec.leaf == Leaf::hopper_fp16) {
      return {native ? *native_kind(format) : kind, model};
    }
    if (!is_tensor_core()) return {kind, Form::carrier};
    return {kind, kind == ValueKind::float16 ? Form::half : Form::bfloat};
  }

  bool is_tensor_core() const { return spec.leaf == Leaf::tensor_core; }

  bool is_hopper() const { return spec.leaf == Leaf::hopper_fp8 || spec.leaf == Leaf::hopper_fp16; }
  bool has_leaves() const { return is_hopper() || is_tensor_core(); }
  bool is_double() const { return kind == ValueKind::float64; }

  /// One running sum of all terms in float32.
  bool is_single() const {
    return spec.leaf == Leaf::terms && !spec.has_product && spec.levels == 1 && spec.level[0].fan_in == 0 &&
           lowprec::is_single(spec.level[0]) && !is_double();
  }
};

Request request_of(const Tensor& x, const Ints& accumulator, const MaybeTensor& seed, const MaybeTensor& offset,
                   const SparseOperand& left, const SparseOperand& right, bool gated) {
  const AccumulatorSpec spec = read_accumulator(accumulator);
  const ValueKind kind = common_kind(left, right);
  const bool is_double = kind == ValueKind::float64;
  is_double ? check_within(spec, Float64{}) : check_within(spec, Float32{});
  const Source source(seed, offset, 32);
  const bool native = spec.leaf == Leaf::hopper_fp8 && !gated && native_kind(left.format) && native_kind(right.format);
  Request call{spec, {device_word(x, source.seed), device_word(x, source.offset)}, kind, native};
  STD_TORCH_CHECK(!call.is_tensor_core() || kind == ValueKind::float16 || kind == ValueKind::bfloat16,
                  "tensor_core takes bfloat16 or float16 values, or codes that one of them holds");
  STD_TORCH_CHECK(!call.is_hopper() || !is_double, "the model of Hopper's tensor cores takes no float64");
  const int step = spec.leaf == Leaf::hopper_fp8 ? HopperFp8::step : HopperFp16::step;
  STD_TORCH_CHECK(!call.has_leaves() || spec.terms % step == 0, "a leaf must take a multiple of ", step, " terms");
  return call;
}

unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many outputs for one call");
  return static_cast<unsigned>(blocks);
}

/// By the kernel that takes every accumulator.
template <class C>
void sum_any(const Request& call, const SparseSums<typename C::Bits>& of, const Tensor& out) {
  const int64_t blocks = std::min<int64_t>((of.outputs() + kSumThreads - 1) / kSumThreads, 1 << 20);
  const Levels levels{call.spec, call.draws, call.spec.is_random()};
  sum_blocks_kernel<C><<<grid_size(blocks), kSumThreads, 0, current_stream(out)>>>(
      SumPlan<C>(call.spec, 0, 0, 0), levels, of, static_cast<typename C::Bits*>(out.mutable_data_ptr()));
}

/// By a tensor core's own leaves.
void sum_leaves(const Request& call, const SparseSums<uint16_t>& of, const Tensor& out) {
  STD_TORCH_CHECK(attribute(out, cudaDevAttrComputeCapabilityMajor) >= 8,
                  "tensor_core needs a device of compute capability 8.0");
  const LevelSpec& first = call.spec.level[0];
  const bool one = call.spec.levels == 1 && first.fan_in == 0;
  const Levels levels{call.spec, call.draws, call.spec.is_random()};
  const LeafCall leaves{of, call.kind == ValueKind::float16, SumPlan<Float32>(call.spec, 0, 0, 0), levels};
  const int64_t groups = of.updates ? of.update.blocks : of.product.table.outputs;
  const int64_t rows = ((of.updates ? of.update.block : of.product.tokens) + 15) / 16;
  const int64_t most = int64_t{attribute(out, cudaDevAttrMultiProcessorCount)} * 16;
  const int64_t blocks = std::min((groups * rows * (one ? 1 : 8) + kLeafWarps - 1) / kLeafWarps, most);
  auto* results = static_cast<float*>(out.mutable_data_ptr());
  const auto launch = !one               ? sum_leaves_kernel<1, LeafTree<4, kMaxStages>>
                      : is_single(first) ? sum_leaves_kernel<8, PlainLeaves<32>>
                                         : sum_leaves_kernel<8, LeafTree<32, 1>>;
  launch<<<grid_size(blocks), 32 * kLeafWarps, 0, current_stream(out)>>>(leaves, groups, rows, results);
}

/// Which of the steps of accumulate_quick.h add up terms that are packed.
enum class Quick { none, single, nearest, directed };

Quick quick_way(const Request& call, int64_t most_terms, bool gated) {
  const LevelSpec& first = call.spec.level[0];
  const bool few = Tree(call.spec, most_terms).stages <= 1 + kUpper;
  if (call.spec.leaf != Leaf::terms || call.spec.has_product || call.spec.is_random() || call.is_double() || !few) {
    return Quick::none;
  }
  if (is_single(first)) return Quick::single;
  const QuickRound to(first);
  if (!to.usable) return Quick::none;
  if (to.nearest_even) return Quick::nearest;
  return gated && to.sign < 0 ? Quick::none : Quick::directed;  // the terms of a closed block are +0, negated or not
}

QuickRound round_of(const Request& call, Quick way) {
  return way == Quick::single ? as_they_are() : QuickRound(call.spec.level[0]);
}

PatchSums patch_sums(const Request& call, const QuickRound& to, int64_t most_terms) {
  const SumPlan<Float32> plan(call.spec, most_terms, 0, 0);
  return {scaled_product(to), plan, call.spec, tower_of(call.spec, plan.tree, to)};
}

/// Call f with the ways of a level.
template <class F>
void for_ways(Quick way, const QuickRound& to, F f) {
  if (way == Quick::single) return f(SingleWays<Patch>{to});
  const WayRules rules(to);
  way == Quick::nearest ? f(NearestWays<Patch>{to, rules}) : f(DirectedWays<Patch>{to, rules});
}

/// An operand in tiles of 128 lines by 16 terms, in memory that is to live as long as they do.
struct PackedOperand {
  Packed packed;
  Tensor memory;
};

PackedOperand pack_lines(const Tensor& x, bool terms_first, float scale, float inverse) {
  const int64_t lines = x.size(terms_first), terms = x.size(!terms_first);
  Packed to{nullptr, nullptr, tiles_of<kTile>(lines), tiles_of<kDepth>(terms), 1};
  const int64_t size = to.count() * static_cast<int64_t>(kTileSize * sizeof(float) + sizeof(TileNotes));
  Tensor memory = empty(x, {size}, ScalarType::Byte);
  to.tiles = static_cast<float*>(memory.mutable_data_ptr());
  to.notes = reinterpret_cast<TileNotes*>(to.tiles + to.count() * kTileSize);
  const Operand operand{x.const_data_ptr(), Element::float32};
  const Lines from{operand, 0, x.stride(terms_first), x.stride(!terms_first), lines, terms, scale, inverse, 0};
  if (to.count() > 0) {
    const int64_t blocks = std::min<int64_t>(to.count(), std::numeric_limits<int>::max());
    pack_kernel<<<grid_size(blocks), kTileThreads, 0, current_stream(x)>>>(from, to);
    check_cuda(cudaGetLastError());
  }
  return {to, memory};
}

void launch_patches(Quick way, const QuickRound& to, const PatchCall& call, int64_t blocks, int threads,
                    const Tensor& out) {
  for_ways(way, to, [&](const auto& ways) {
    const auto kernel = patch_kernel<std::decay_t<decltype(ways)>>;
    const int kept = call.sums.tower.single ? threads * Patch::outputs : 0;
    const int shared = (2 * call.stage_floats() + kept) * static_cast<int>(sizeof(float));
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<grid_size(blocks), threads, shared, current_stream(out)>>>(call, ways,
                                                                        static_cast<float*>(out.mutable_data_ptr()));
  });
}

// Products.

/// The product as the launch's operands say it.
struct ProductCall {
  Tensor x;
  Tensor weights;
  DirectionTable table;
  const float* gate;
  int block;
  bool transpose;
  bool first;

  template <class Bits>
  SparseProduct<Bits> of() const {
    return {features_of<Bits>(x, first),
            static_cast<const Bits*>(weights.const_data_ptr()),
            table,
            Gates{gate},
            block,
            transpose,
            first,
            x.size(first)};
  }
};

template <int kLeft, bool kFirst, bool kTranspose>
void launch_single(const SingleProduct& product, float* out, cudaStream_t stream) {
  using Column = SingleColumn<kLeft, kFirst, kTranspose>;
  const SparseProduct<float>& of = product.of;
  const int64_t tiles = (of.tokens + Column::kTokens - 1) / Column::kTokens;
  const int shared = Column::kStages * Column::stage_floats(of.block) * static_cast<int>(sizeof(float));
  single_product_kernel<kLeft, kFirst, kTranspose>
      <<<grid_size(tiles * of.table.outputs), 32 * of.block / kRight, shared, stream>>>(product, out);
}

template <int kLeft>
void launch_single(const SingleProduct& product, float* out, cudaStream_t stream) {
  const bool transpose = product.of.transpose;
  if (product.of.first) {
    transpose ? launch_single<kLeft, true, true>(product, out, stream)
              : launch_single<kLeft, true, false>(product, out, stream);
  } else {
    transpose ? launch_single<kLeft, false, true>(product, out, stream)
              : launch_single<kLeft, false, false>(product, out, stream);
  }
}

void sum_single(const ProductCall& product, const Tensor& out) {
  const SingleProduct single{product.of<float>(), product.x.stride(0)};
  auto* results = static_cast<float*>(out.mutable_data_ptr());
  const cudaStream_t stream = current_stream(out);
  single.of.tokens <= 64 ? launch_single<2>(single, results, stream) : launch_single<4>(single, results, stream);
}

struct PackedWeights {
  PackedBlocks packed;
  Tensor memory;
};

PackedWeights pack_weights(const ProductCall& product, float scale, float inverse) {
  const Tensor& w = product.weights;
  const int64_t size = int64_t{product.block} * product.block, blocks = w.numel() / size;
  const int64_t parts = blocks * (product.block / stage_terms(product.block));
  Tensor memory = empty(w, {w.numel() * 4 + parts * static_cast<int64_t>(sizeof(TileNotes))}, ScalarType::Byte);
  auto* tiles = static_cast<float*>(memory.mutable_data_ptr());
  const PackedBlocks to{tiles, reinterpret_cast<TileNotes*>(tiles + w.numel())};
  if (parts > 0) {
    const int64_t launched = std::min<int64_t>((parts + kPackWarps - 1) / kPackWarps, 1 << 20);
    pack_blocks_kernel<<<grid_size(launched), 32 * kPackWarps, 0, current_stream(w)>>>(
        static_cast<const float*>(w.const_data_ptr()), blocks, product.block, product.transpose, scale, inverse, to);
    check_cuda(cudaGetLastError());
  }
  return {to, memory};
}

void sum_patches(const Request& call, Quick way, const ProductCall& product, const Tensor& out) {
  const QuickRound to = round_of(call, way);
  const int64_t tokens = product.x.size(product.first), features = product.x.size(!product.first);
  PatchCall of{patch_sums(call, to, features), false, {}, {}};
  Product& scales = of.sums.scales;
  const PackedOperand x = pack_lines(product.x, product.first, scales.scale_a, scales.unscale_a);
  const PackedWeights weights = pack_weights(product, scales.scale_b, scales.unscale_b);
  scales.a = x.packed;
  of.product = {weights.packed, product.table, Gates{product.gate}, product.block, product.first, tokens};
  of.update.of.block = product.block;
  const int64_t blocks = tiles_of<kTile>(tokens) * product.table.outputs;
  launch_patches(way, to, of, blocks, of.product.threads(), out);
}

template <class C>
void sum_any(const Request& call, const ProductCall& product, const Tensor& out) {
  using Bits = typename C::Bits;
  SparseSums<Bits> of{false, product.of<Bits>(), {}};
  if (call.is_hopper()) of.product.zero = static_cast<Bits>(operand::zero);
  sum_any<C>(call, of, out);
}

Tensor sparse_matmul_accumulate(const Tensor& x, const Tensor& w, const Tensor& table, const MaybeTensor& gate,
                                int64_t outputs, bool first, bool transpose, const Ints& accumulator,
                                const MaybeTensor& seed, const MaybeTensor& offset, const Ints& x_format,
                                const Ints& w_format) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 3 && w.size(1) == w.size(2), "x must have 2 dimensions and w be blocks");
  const int64_t blocks = w.size(0), block = w.size(2);
  check_block(block);
  check_same_place(x, w);
  STD_TORCH_CHECK(x.size(!first) % block == 0, "x must have whole blocks of features");
  const SparseOperand left(x, format_of(x_format)), right(w, format_of(w_format));
  const Request call = request_of(x, accumulator, seed, offset, left, right, gate.has_value());
  const int32_t* entries = table_of(table, x, outputs + 1 + 2 * blocks);
  const float* gates = gate_of(gate, blocks);
  const int64_t tokens = x.size(first), features = outputs * block;
  const auto dtype = call.is_double() ? ScalarType::Double : ScalarType::Float;
  const Tensor out = first ? empty(x, {features, tokens}, dtype) : empty(x, {tokens, features}, dtype);
  if (out.numel() == 0) return out;
  const DeviceGuard guard(x.get_device_index());
  const ProductCall product{features_in({x}, left.format, call.form(left.format), first),
                            weights_in(right, call.form(right.format), gates),
                            {entries, static_cast<int>(outputs)},
                            gates,
                            static_cast<int>(block),
                            transpose,
                            first};
  const Quick way = quick_way(call, x.size(!first), gates);
  if (call.is_single()) {
    sum_single(product, out);
  } else if (call.is_tensor_core()) {
    sum_leaves(call, {false, product.of<uint16_t>(), {}}, out);
  } else if (way != Quick::none) {
    sum_patches(call, way, product, out);
  } else {
    call.is_double() ? sum_any<Float64>(call, product, out) : sum_any<Float32>(call, product, out);
  }
  check_cuda(cudaGetLastError());
  return out;
}

// Updates.

struct UpdateCall {
  Tensor x;
  Tensor dy;
  const int32_t* table;
  const float* gate;
  int blocks;
  int block;
  bool first;

  template <class Bits>
  SparseUpdate<Bits> of() const {
    return {
        features_of<Bits>(x, first), features_of<Bits>(dy, first), table, Gates{gate}, blocks, block, x.size(first)};
  }
};

template <bool kFirst>
void launch_single(const SingleUpdate& update, float* out, cudaStream_t stream) {
  const UpdateShape shape(update.of.block);
  const int shared =
      kUpdateStages * SingleUpdates<kFirst>::stage_floats(update.of.block) * static_cast<int>(sizeof(float));
  check_cuda(cudaFuncSetAttribute(single_update_kernel<kFirst>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  single_update_kernel<kFirst>
      <<<grid_size((update.of.blocks + shape.weights - 1) / shape.weights), shape.threads, shared, stream>>>(update,
                                                                                                             out);
}

void sum_single(const UpdateCall& update, const Tensor& out) {
  const SingleUpdate single{update.of<float>(), update.x.stride(0), update.dy.stride(0)};
  auto* results = static_cast<float*>(out.mutable_data_ptr());
  update.first ? launch_single<true>(single, results, current_stream(out))
               : launch_single<false>(single, results, current_stream(out));
}

void sum_patches(const Request& call, Quick way, const UpdateCall& update, const Tensor& out) {
  const QuickRound to = round_of(call, way);
  PatchCall of{patch_sums(call, to, update.x.size(update.first)), true, {}, {update.of<float>()}};
  Product& scales = of.sums.scales;
  const PackedOperand x = pack_lines(update.x, !update.first, scales.scale_a, scales.unscale_a);
  const PackedOperand dy = pack_lines(update.dy, !update.first, scales.scale_b, scales.unscale_b);
  scales.a = x.packed, scales.b = dy.packed;
  of.product.block = update.block;
  of.product.table.outputs = 1;
  const int64_t weights = of.update.weights();
  launch_patches(way, to, of, (update.blocks + weights - 1) / weights, of.update.threads(), out);
}

void check_pairs(const Tensors& x, const Tensors& dy, bool first) {
  STD_TORCH_CHECK(!x.empty() && x.size() == dy.size(), "x and dy must be equally many tensors");
  for (size_t i = 0; i < x.size(); ++i) {
    STD_TORCH_CHECK(x[i].dim() == 2 && dy[i].dim() == 2 && x[i].size(first) == dy[i].size(first),
                    "the tensors of a pair must have 2 dimensions and equally many tokens");
    STD_TORCH_CHECK(x[i].size(!first) == x[0].size(!first) && dy[i].size(!first) == dy[0].size(!first) &&
                        x[i].scalar_type() == x[0].scalar_type() && dy[i].scalar_type() == dy[0].scalar_type(),
                    "all pairs must have the same features and dtypes");
    check_same_place(x[0], x[i]);
    check_same_place(x[0], dy[i]);
  }
}

Tensor sparse_weight_grad_accumulate(const Tensors& x, const Tensors& dy, const Tensor& table, const MaybeTensor& gate,
                                     int64_t blocks, int64_t block, bool first, const Ints& accumulator,
                                     const MaybeTensor& seed, const MaybeTensor& offset, const Ints& x_format,
                                     const Ints& dy_format) {
  check_pairs(x, dy, first);
  check_block(block);
  STD_TORCH_CHECK(x[0].size(!first) % block == 0 && dy[0].size(!first) % block == 0,
                  "x and dy must have whole blocks of features");
  const SparseOperand left(x[0], format_of(x_format)), right(dy[0], format_of(dy_format));
  const Request call = request_of(x[0], accumulator, seed, offset, left, right, false);
  const auto dtype = call.is_double() ? ScalarType::Double : ScalarType::Float;
  const Tensor out = empty(x[0], {blocks, block, block}, dtype);
  const int32_t* entries = table_of(table, x[0], 2 * blocks);
  if (out.numel() == 0) return out;
  const DeviceGuard guard(x[0].get_device_index());
  const UpdateCall update{features_in(x, left.format, call.form(left.format), first),
                          features_in(dy, right.format, call.form(right.format), first),
                          entries,
                          gate_of(gate, blocks),
                          static_cast<int>(blocks),
                          static_cast<int>(block),
                          first};
  const Quick way = quick_way(call, update.x.size(first), false);
  if (call.is_single()) {
    sum_single(update, out);
  } else if (call.is_tensor_core()) {
    sum_leaves(call, {true, {}, update.of<uint16_t>()}, out);
  } else if (way != Quick::none) {
    sum_patches(call, way, update, out);
  } else if (call.is_double()) {
    sum_any<Float64>(call, {true, {}, update.of<uint64_t>()}, out);
  } else {
    sum_any<Float32>(call, {true, {}, update.of<uint32_t>()}, out);
  }
  check_cuda(cudaGetLastError());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) {
  library.impl("sparse_matmul_accumulate", TORCH_BOX(&sparse_matmul_accumulate));
  library.impl("sparse_weight_grad_accumulate", TORCH_BOX(&sparse_weight_grad_accumulate));
}

}  // namespace
}  // namespace lowprec
