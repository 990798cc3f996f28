// The update of block-sparse weights on CUDA, dW = Σ xᵀ · dy over pairs: which kernel serves the operands, and how the
// pairs go into launches.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lowprec/cast_ops.h"
#include "lowprec/sparse_update_kernel.h"
#include "lowprec/sparse_update_plain.h"
#include "lowprec/torch_stable.h"

namespace lowprec {
namespace {

using Tensors = std::vector<Tensor>;

/// What a call asks for.
struct Update {
  const Tensors& x;
  const Tensors& dy;
  const Tensor& table;
  const MaybeTensor& gate;
  int64_t weights;
  int64_t block;
  bool first;
  const Ints& x_format;
  const Ints& dy_format;
  const Tensor& out;  // contiguous, at a multiple of 16 bytes
  double beta;

  int64_t size() const { return weights * block * block; }
};

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Bytes from row to row, of codes or 16-bit values, if 16 may be copied at once, else 0.
int quick_stride(const Tensor& x) {
  const int64_t size = x.scalar_type() == ScalarType::Byte ? 1 : 2, bytes = x.size(0) > 1 ? x.stride(0) * size : 16;
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && bytes % 16 == 0;
  return aligned && x.stride(1) == 1 && bytes < 1 << 30 ? static_cast<int>(bytes) : 0;
}

UpdateOperand operand_of(const Tensor& x, bool first) {
  return {x.const_data_ptr(), x.stride(first), x.stride(!first), quick_stride(x)};
}

/// The pairs of one launch, the i-th.
int pairs_of_launch(const Update& call, int64_t launch, UpdatePair* pairs) {
  const auto begin = static_cast<size_t>(launch) * kUpdatePairs, end = std::min(begin + kUpdatePairs, call.x.size());
  for (size_t i = begin; i < end; ++i) {
    pairs[i - begin] = {operand_of(call.x[i], call.first), operand_of(call.dy[i], call.first),
                        static_cast<int>(call.x[i].size(call.first))};
  }
  return static_cast<int>(end - begin);
}

/// At least one, if only to write zeros.
int64_t launches(const Update& call) {
  return std::max<int64_t>(quotient_up(static_cast<int64_t>(call.x.size()), kUpdatePairs), 1);
}

const float* gate_of(const Update& call) {
  return call.gate ? static_cast<const float*>(call.gate->const_data_ptr()) : nullptr;
}

// By tensor cores.

/// Into which of 16-bit dtypes operands are made, if any.
enum class Carrier { none, bfloat16, float16 };

/// Whether both are codes of 8 bits that bfloat16 has by one multiplication.
bool plain_codes(const Update& call) {
  const auto plain = [](const Ints& fields) {
    if (fields.empty()) return false;
    const Format format = read_format(fields);
    return format.bits() == 8 && holds<BFloat16>(format) && CodeReader<false>(format).is_plain();
  };
  return plain(call.x_format) && plain(call.dy_format);
}

Carrier carrier_of(const Update& call) {
  if (call.x.empty()) return Carrier::none;
  if (plain_codes(call)) return Carrier::bfloat16;
  bool half = true, bfloat16 = true;
  const auto restrict_to = [&](const Tensor& x, const Ints& fields) {
    if (fields.empty()) {
      half &= x.scalar_type() == ScalarType::Half;
      bfloat16 &= x.scalar_type() == ScalarType::BFloat16;
    } else {
      const Format format = read_format(fields);
      half &= holds<Float16>(format);
      bfloat16 &= holds<BFloat16>(format);
    }
  };
  restrict_to(call.x[0], call.x_format);
  restrict_to(call.dy[0], call.dy_format);
  return half ? Carrier::float16 : bfloat16 ? Carrier::bfloat16 : Carrier::none;
}

int64_t tiles_of(const Update& call) { return quotient_up(call.weights, update_tile(static_cast<int>(call.block))); }

/// Whether the table has a plan: one made for CUDA does.
bool is_planned(const Update& call) {
  const int64_t tile = 4 + 6 * update_tile(static_cast<int>(call.block));
  return call.table.numel() >= 3 * call.weights + tiles_of(call) * tile;
}

/// Whether tensor cores serve a call.
bool takes_tensor_cores(const Update& call) {
  return carrier_of(call) != Carrier::none && call.out.scalar_type() != ScalarType::Double && is_planned(call) &&
         attribute(call.out, cudaDevAttrComputeCapabilityMajor) >= 8;
}

UpdateOutput::Kind output_kind(ScalarType dtype) {
  return dtype == ScalarType::Float  ? UpdateOutput::float32
         : dtype == ScalarType::Half ? UpdateOutput::float16
                                     : UpdateOutput::bfloat16;
}

template <bool kHalf>
UpdateCodes<kHalf> codes_of(const Update& call) {
  UpdateCodes<kHalf> codes{};
  const Ints* const formats[2] = {&call.x_format, &call.dy_format};
  for (int i = 0; i < 2; ++i) {
    if (!formats[i]->empty()) codes.read[i] = CodeReader<kHalf>(read_format(*formats[i]));
  }
  return codes;
}

/// Into how many parts the tokens of a launch are split: enough thread blocks to fill the device, each with enough to
/// do to be worth its sums' way through memory.
int parts_of(const Update& call, int chunks) {
  const int64_t wanted = 2 * attribute(call.out, cudaDevAttrMultiProcessorCount) / std::max<int64_t>(tiles_of(call), 1);
  return static_cast<int>(std::max<int64_t>(std::min<int64_t>(wanted, chunks / 4), 1));
}

template <int kSide, bool kFirst, bool kHalf, bool kBytes>
void launch_tiles(const Update& call, UpdateCall update) {
  using Tile = UpdateTile<kSide, kFirst, kHalf, kBytes>;
  const int head = Tile::head, most = attribute(call.out, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int room = attribute(call.out, cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 1024;  // for two at a time
  const int stage = 16 * (2 * (2 * update_tile(update.block) * update.block) + 16);
  const int least = head + std::max(stage, Tile::board);
  const int bytes = std::min(most, std::max(room, least));
  STD_TORCH_CHECK(bytes >= least, "the device has too little shared memory for the update of blocks of ", call.block);
  update.stage_bytes = bytes - head;
  const auto kernel = update_kernel<kSide, kFirst, kHalf, kBytes>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const dim3 grid(static_cast<unsigned>(update.tiles), static_cast<unsigned>(update.parts));
  kernel<<<grid, kUpdateThreads, static_cast<size_t>(bytes), current_stream(call.out)>>>(update, codes_of<kHalf>(call));
  check_cuda(cudaGetLastError());
}

/// Whether codes stay bytes until they are in registers: e4m3fn and e5m2, and plain ones, in rows of 16 bytes.
bool takes_bytes(const Update& call) {
  if (call.x_format.empty() || call.dy_format.empty() || call.block == 8) return false;
  const auto simple = [](const Ints& fields) {
    const CodeReader<true> reader(read_format(fields));
    return reader.is_float16_top || reader.is_own_e4m3;
  };
  const auto whole = [](const Tensor& x) { return quick_stride(x) != 0; };
  const bool quick = plain_codes(call) || (simple(call.x_format) && simple(call.dy_format));
  return quick && std::all_of(call.x.begin(), call.x.end(), whole) &&
         std::all_of(call.dy.begin(), call.dy.end(), whole) &&
         attribute(call.out, cudaDevAttrComputeCapabilityMajor) >= 9;
}

template <int kSide, bool kHalf, bool kBytes>
void launch_layout(const Update& call, const UpdateCall& update) {
  call.first ? launch_tiles<kSide, true, kHalf, kBytes>(call, update)
             : launch_tiles<kSide, false, kHalf, kBytes>(call, update);
}

template <int kSide>
void launch_side(const Update& call, const UpdateCall& update) {
  const bool half = carrier_of(call) == Carrier::float16;
  if constexpr (kSide > 8) {
    if (!call.x_format.empty()) {  // all others are decoded by now
      return half ? launch_layout<kSide, true, true>(call, update) : launch_layout<kSide, false, true>(call, update);
    }
  }
  half ? launch_layout<kSide, true, false>(call, update) : launch_layout<kSide, false, false>(call, update);
}

void launch(const Update& call, const UpdateCall& update) {
  if (call.block == 8) return launch_side<8>(call, update);
  if (call.block == 16) return launch_side<16>(call, update);
  launch_side<32>(call, update);
}

/// A launch of some of the pairs.
UpdateCall call_of(const Update& call, int64_t launch) {
  UpdateCall update{};
  update.pairs = pairs_of_launch(call, launch, update.pair);
  for (int i = 0; i < update.pairs; ++i) {
    update.chunks += static_cast<int>(quotient_up(update.pair[i].tokens, kUpdateChunk));
  }
  const int parts = parts_of(call, update.chunks);
  update.part_chunks = static_cast<int>(std::max<int64_t>(quotient_up(update.chunks, parts), 1));
  update.parts = static_cast<int>(std::max<int64_t>(quotient_up(update.chunks, update.part_chunks), 1));
  update.block = static_cast<int>(call.block);
  while (1 << update.log_block < update.block) ++update.log_block;
  update.weights = call.weights;
  update.tiles = static_cast<int>(tiles_of(call));
  update.tile = update_tile(update.block);
  update.plan = static_cast<const int*>(call.table.const_data_ptr()) + 3 * call.weights;
  update.out = {call.out.mutable_data_ptr(), nullptr, gate_of(call), static_cast<float>(call.beta),
                output_kind(call.out.scalar_type())};
  return update;
}

void add_parts(const Update& call, const UpdateOutput& out, int64_t parts) {
  const auto blocks = static_cast<unsigned>(quotient_up(call.size(), 4 * kUpdateThreads));
  add_parts_kernel<<<blocks, kUpdateThreads, 0, current_stream(call.out)>>>(out, static_cast<int>(parts), call.size(),
                                                                            static_cast<int>(call.block * call.block));
  check_cuda(cudaGetLastError());
}

/// Into how many rounds the tokens of a launch go: where operands are twice what the L2 cache holds or more, it holds
/// those of a round. Tiles of small blocks read more the more of their inputs differ, so they soon are at tokens far
/// apart, and what they share comes from memory again. Tiles of larger ones keep step, and have no need of rounds.
int rounds_of(const Update& call, const UpdateCall& update) {
  if (call.block > 16 || update.parts > 1 || update.chunks == 0) return 1;
  const auto row = [&](const Tensor& x) { return x.size(!call.first) * (x.scalar_type() == ScalarType::Byte ? 1 : 2); };
  const int64_t bytes = kUpdateChunk * update.chunks * (row(call.x[0]) + row(call.dy[0]));
  const int64_t cache = std::max(attribute(call.out, cudaDevAttrL2CacheSize), 1);
  return bytes < 2 * cache ? 1 : static_cast<int>(std::min<int64_t>(quotient_up(bytes, cache), update.chunks));
}

/// One round after the other, each adding its float32 sums to what those before it left.
void in_rounds(const Update& call, std::vector<UpdateCall>& calls) {
  const bool direct = call.out.scalar_type() == ScalarType::Float && !call.gate && call.beta == 0;
  const Tensor sums = direct ? call.out : empty(call.out, {call.size()}, ScalarType::Float);
  UpdateOutput to{sums.mutable_data_ptr(), nullptr, nullptr, 0, UpdateOutput::float32};
  for (UpdateCall& each : calls) {
    each.part_chunks = static_cast<int>(quotient_up(each.chunks, rounds_of(call, each)));
    each.parts = 1;
    for (; each.first_part * each.part_chunks < each.chunks; ++each.first_part) {
      each.out = to;
      launch(call, each);
      to.beta = 1;
    }
  }
  if (direct) return;
  UpdateOutput out = call_of(call, 0).out;
  out.sums = static_cast<float*>(sums.mutable_data_ptr());
  add_parts(call, out, 1);
}

/// In one launch, or several whose sums are added up.
void multiply(const Update& call) {
  std::vector<UpdateCall> calls;
  int64_t parts = 0, rounds = 0;
  for (int64_t i = 0; i < launches(call); ++i) {
    const UpdateCall& each = calls.emplace_back(call_of(call, i));
    parts += each.parts;
    rounds = std::max<int64_t>(rounds, rounds_of(call, each));
  }
  if (rounds > 1) return in_rounds(call, calls);
  if (parts == 1) return launch(call, calls[0]);
  const Tensor sums = empty(call.out, {parts, call.size()}, ScalarType::Float);
  auto* next = static_cast<float*>(sums.mutable_data_ptr());
  UpdateOutput out = calls[0].out;
  out.sums = next;
  for (UpdateCall& each : calls) {
    each.out.sums = next;
    launch(call, each);
    next += each.parts * call.size();
  }
  add_parts(call, out, parts);
}

/// Codes as values, if that is what they are.
Tensors values_of(const Tensors& operands, const Ints& format, ScalarType dtype) {
  if (format.empty()) return operands;
  Tensors values;
  for (const Tensor& each : operands) values.push_back(decode_codes(each, format, dtype));
  return values;
}

/// Codes that may not stay bytes are decoded beforehand: tiles would do it each for itself.
void by_tensor_cores(const Update& call) {
  if (takes_bytes(call)) return multiply(call);
  const ScalarType dtype = carrier_of(call) == Carrier::float16 ? ScalarType::Half : ScalarType::BFloat16;
  const Tensors x = values_of(call.x, call.x_format, dtype), dy = values_of(call.dy, call.dy_format, dtype);
  const Ints none;
  multiply({x, dy, call.table, call.gate, call.weights, call.block, call.first, none, none, call.out, call.beta});
}

// For every dtype.

PlainElement element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return PlainElement::float64;
    case ScalarType::Float:
      return PlainElement::float32;
    case ScalarType::Half:
      return PlainElement::float16;
    case ScalarType::BFloat16:
      return PlainElement::bfloat16;
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16");
  }
}

template <class Sum>
void one_by_one(const Update& call) {
  PlainCall plain{};
  const Ints* const formats[2] = {&call.x_format, &call.dy_format};
  for (int i = 0; i < 2 && !call.x.empty(); ++i) {
    const bool codes = !formats[i]->empty();
    plain.kind[i] = codes ? PlainElement::codes : element_of((i ? call.dy : call.x)[0].scalar_type());
    if (codes) plain.layout[i] = Layout::of(read_format(*formats[i]));
  }
  plain.block = static_cast<int>(call.block);
  plain.weights = call.weights;
  plain.table = static_cast<const int*>(call.table.const_data_ptr());
  plain.gate = gate_of(call);
  plain.out = call.out.mutable_data_ptr();
  plain.beta = call.beta;
  plain.out_kind = element_of(call.out.scalar_type());
  const int64_t count = launches(call);
  const ScalarType dtype = sizeof(Sum) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor sums = empty(call.out, {count > 1 ? call.size() : 0}, dtype);
  plain.sums = sums.mutable_data_ptr();
  const auto blocks = static_cast<unsigned>(quotient_up(call.size(), kUpdateThreads));
  for (int64_t i = 0; i < count; ++i) {
    plain.pairs = pairs_of_launch(call, i, plain.pair);
    plain.begins = i == 0;
    plain.ends = i + 1 == count;
    plain_update_kernel<Sum><<<blocks, kUpdateThreads, 0, current_stream(call.out)>>>(plain);
    check_cuda(cudaGetLastError());
  }
}

void check(const Update& call) {
  STD_TORCH_CHECK(call.x.size() == call.dy.size(), "x and dy must be lists of one length");
  STD_TORCH_CHECK(call.block == 8 || call.block == 16 || call.block == 32 || call.block == 64,
                  "block must be 8, 16, 32 or 64, got ", call.block);
  STD_TORCH_CHECK(call.table.scalar_type() == ScalarType::Int && call.table.is_contiguous() &&
                      call.table.numel() >= 3 * call.weights && call.weights >= 0 && call.weights < int64_t{1} << 31,
                  "table is not the update table of so many blocks");
  check_same_place(call.out, call.table);
  const auto check_operand = [&](const Tensor& x, const Tensor& like, const Ints& format) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(!call.first) % call.block == 0 && x.scalar_type() == like.scalar_type(),
                    "x and dy must be matrices of whole blocks of features, of one dtype each");
    STD_TORCH_CHECK(format.empty() == (x.scalar_type() != ScalarType::Byte), "codes take a format, values none");
    STD_TORCH_CHECK(format.empty() || read_format(format).bits() <= 8, "codes must have a format of up to 8 bits");
    check_same_place(call.out, x);
  };
  for (size_t i = 0; i < call.x.size(); ++i) {
    check_operand(call.x[i], call.x[0], call.x_format);
    check_operand(call.dy[i], call.dy[0], call.dy_format);
    STD_TORCH_CHECK(call.x[i].size(call.first) == call.dy[i].size(call.first), "a pair must have one number of tokens");
    STD_TORCH_CHECK(call.x[i].size(call.first) < int64_t{1} << 31, "pairs must have fewer than 2^31 tokens");
  }
  STD_TORCH_CHECK(!call.gate || (call.gate->scalar_type() == ScalarType::Float && call.gate->is_contiguous() &&
                                 call.gate->numel() == call.weights && call.gate->device() == call.out.device()),
                  "gate must be contiguous float32, one for each block");
}

void compute(const Update& call) {
  check(call);
  if (call.size() == 0) return;
  const DeviceGuard guard(call.out.get_device_index());
  if (takes_tensor_cores(call)) return by_tensor_cores(call);
  const bool wide = call.out.scalar_type() == ScalarType::Double ||
                    (!call.x.empty() &&
                     (call.x[0].scalar_type() == ScalarType::Double || call.dy[0].scalar_type() == ScalarType::Double));
  wide ? one_by_one<double>(call) : one_by_one<float>(call);
}

/// The gate as kernels take it.
MaybeTensor contiguous_gate(const MaybeTensor& gate) { return gate ? MaybeTensor(contiguous(*gate)) : MaybeTensor(); }

Tensor sparse_weight_grad(const Tensors& x, const Tensors& dy, const Tensor& table, const MaybeTensor& gate,
                          int64_t blocks, int64_t block, bool first, const Ints& x_format, const Ints& dy_format,
                          ScalarType dtype) {
  const Tensor out = empty(table, {blocks, block, block}, dtype);
  compute({x, dy, contiguous(table), contiguous_gate(gate), blocks, block, first, x_format, dy_format, out, 0.0});
  return out;
}

void sparse_weight_grad_out(const Tensors& x, const Tensors& dy, const Tensor& table, const MaybeTensor& gate,
                            int64_t blocks, int64_t block, bool first, const Ints& x_format, const Ints& dy_format,
                            Tensor out, double beta) {
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == blocks && out.size(1) == block && out.size(2) == block,
                  "out must have the shape [blocks, block, block]");
  const bool fits = out.is_contiguous() && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0;
  const Tensor room = fits ? out : empty(out, {blocks, block, block}, out.scalar_type());
  if (!fits && beta != 0) copy(room, out);
  compute({x, dy, contiguous(table), contiguous_gate(gate), blocks, block, first, x_format, dy_format, room, beta});
  if (!fits) copy(out, room);
}

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) {
  library.impl("sparse_weight_grad", TORCH_BOX(&sparse_weight_grad));
  library.impl("sparse_weight_grad_out", TORCH_BOX(&sparse_weight_grad_out));
}

}  // namespace
}  // namespace lowprec
