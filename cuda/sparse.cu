// Block-sparse products without a declared accumulator on CUDA: what the kernels are given, and the choice of one.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "lowprec/fused_ops.h"
#include "lowprec/launch.h"
#include "lowprec/sparse_hopper.h"
#include "lowprec/sparse_launch.h"
#include "lowprec/sparse_plain.h"
#include "lowprec/sparse_shares_launch.h"
#include "lowprec/sparse_transpose.h"
#include "lowprec/torch_stable.h"

namespace lowprec {
namespace {

constexpr Format kBFloat16{8, 7, 127, Specials::ieee, true};
constexpr Format kFloat16{5, 10, 15, Specials::ieee, true};
constexpr int64_t kPlainBlocks = 1 << 16;
constexpr int64_t kDecodedTokens = 512;  // from which on codes are decoded beforehand if warpgroups serve them then

/// A product as it is asked for.
struct Request {
  Tensor x;
  Tensor w;
  const Tensor& table;
  const MaybeTensor& gate;
  int64_t outputs;
  bool first;
  bool transpose;

  int64_t tokens() const { return x.size(first ? 1 : 0); }
  int64_t block() const { return w.size(2); }
  int64_t features() const { return outputs * block(); }
  int64_t blocks() const { return w.size(0); }
  const int* offsets() const { return static_cast<const int*>(table.const_data_ptr()); }
  const int* pairs() const { return offsets() + outputs + 1; }
  /// Columns as a whole.
  SparseParts columns() const { return {pairs() + 2 * blocks(), static_cast<int>(outputs)}; }
  /// And in parts.
  SparseParts parts() const {
    return {columns().of + 4 * outputs, static_cast<int>(sparse_parts(outputs, blocks(), block()))};
  }
  /// And in equal shares of a product of codes.
  SparseLine line() const {
    const auto shares = reinterpret_cast<const SparseShare*>(parts().of + 4 * parts().count);
    const auto tiles = static_cast<int>((tokens() + kSparseTokens - 1) / kSparseTokens);
    return {offsets(), shares, static_cast<int>(outputs), tiles, sparse_shares(block()), sparse_slots(block())};
  }
  int64_t table_size() const {
    const int64_t parts = sparse_parts(outputs, blocks(), block()), shares = sparse_shares(block()) + 1;
    return outputs + 1 + 2 * blocks() + 4 * (outputs + parts + shares);
  }
};

/// What is done with the sums.
struct Result {
  ScalarType dtype;  // of values
  std::optional<Format> format;
  int64_t rounding;
  bool saturate;
  bool codes;
  const Source& draws;

  ScalarType stored() const { return codes ? code_dtype(*format) : dtype; }
};

bool starts_at_16(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

void check_request(const Request& call) {
  const int64_t b = call.block();
  STD_TORCH_CHECK(call.x.dim() == 2 && call.w.dim() == 3 && call.w.size(1) == b && call.table.dim() == 1,
                  "expected x [N, C] or [C, N], w [blocks, b, b] and a table of one dimension");
  STD_TORCH_CHECK(b == 8 || b == 16 || b == 32 || b == 64, "blocks have 8, 16, 32 or 64 features a side, got ", b);
  STD_TORCH_CHECK(call.x.size(call.first ? 0 : 1) % b == 0, "x must have whole blocks of features");
  STD_TORCH_CHECK(call.table.scalar_type() == ScalarType::Int && call.table.is_contiguous() &&
                      call.table.numel() == call.table_size(),
                  "the table is not one of these weights");
  check_same_place(call.x, call.w);
  check_same_place(call.x, call.table);
  if (!call.gate) return;
  check_same_place(call.x, *call.gate);
  STD_TORCH_CHECK(call.gate->scalar_type() == ScalarType::Float && call.gate->numel() == call.blocks(),
                  "gate must be float32 [blocks]");
}

/// How the codes of one operand are read: none for values.
std::optional<Format> read_codes(const Tensor& x, const Ints& fields) {
  if (fields.empty()) return std::nullopt;
  const Format format = read_format(fields);
  STD_TORCH_CHECK(format.bits() <= 8 && x.scalar_type() == ScalarType::Byte, "codes must be uint8, of up to 8 bits");
  return format;
}

Ints fields_of(const Format& format) {
  return {format.ebits, format.mbits, format.bias, static_cast<int64_t>(format.specials), format.subnormals};
}

/// A product with values for codes.
Request decoded(Request call, const std::optional<Format>& x, const std::optional<Format>& w, ScalarType dtype) {
  if (x) call.x = decode_codes(call.x, fields_of(*x), dtype);
  if (w) call.w = decode_codes(call.w, fields_of(*w), dtype);
  return call;
}

/// The first dtype that holds the formats, or that of the values beside them.
ScalarType operand_dtype(const Request& call, const std::optional<Format>& x, const std::optional<Format>& w) {
  if (!x && !w) {
    STD_TORCH_CHECK(call.x.scalar_type() == call.w.scalar_type(), "x and w must have one dtype");
  }
  const auto both_within = [&](auto container) {
    return (!x || Grid::of(*x, container).within) && (!w || Grid::of(*w, container).within);
  };
  const auto holds_both = [&](ScalarType dtype) {
    bool within = false;
    for_container(dtype, [&](auto container) { within = both_within(container); });
    return within;
  };
  if (!x || !w) {
    const ScalarType own = x ? call.w.scalar_type() : call.x.scalar_type();
    STD_TORCH_CHECK(holds_both(own), "the dtype of the values cannot hold those of the codes");
    return own;
  }
  for (const ScalarType dtype : {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}) {
    if (holds_both(dtype)) return dtype;
  }
  STD_TORCH_CHECK(false, "float32 cannot hold the values of the codes");
}

/// Whether rows begin at multiples of 16 bytes and, if `whole`, end there.
bool has_rows(const Tensor& x, bool whole) {
  const int64_t unit = 16 / bytes_of(x.scalar_type());
  return x.stride(1) == 1 && x.stride(0) % unit == 0 && x.stride(0) >= x.size(1) && starts_at_16(x) &&
         !(whole && x.size(1) % unit);
}

/// Room for rows of so many elements, up to multiples of 16 bytes, with zeros where it is `whole`.
Tensor room_of(const Tensor& x, int64_t rows, int64_t columns, bool whole) {
  const int64_t unit = 16 / bytes_of(x.scalar_type());
  Tensor room = empty(x, {rows, (columns + unit - 1) / unit * unit}, x.scalar_type());
  const auto bytes = static_cast<size_t>(room.numel() * bytes_of(x.scalar_type()));
  if (whole && columns % unit) check_cuda(cudaMemsetAsync(room.mutable_data_ptr(), 0, bytes, current_stream(x)));
  return room;
}

/// The same in such rows.
Tensor rows_of(const Tensor& x, bool whole) {
  if (has_rows(x, whole)) return x;
  Tensor room = room_of(x, x.size(0), x.size(1), whole);
  Tensor rows = torch::stable::narrow(room, 1, 0, x.size(1));
  copy(rows, x);
  return room;
}

/// Tokens by features as features by tokens, in whole rows.
Tensor turned(const Tensor& x) {
  const Tensor other = torch::stable::transpose(x, 0, 1);
  if (x.stride(1) != 1) return rows_of(other, true);
  const Tensor room = room_of(x, x.size(1), x.size(0), false);
  const auto launch = bytes_of(x.scalar_type()) == 1 ? launch_transpose<uint8_t> : launch_transpose<uint16_t>;
  check_cuda(launch(x.const_data_ptr(), x.stride(0), room.mutable_data_ptr(), room.stride(0), x.size(0), x.size(1),
                    current_stream(x)));
  return room;
}

Tensor blocks_of(const Tensor& w) {
  if (w.is_contiguous() && starts_at_16(w)) return w;
  Tensor blocks = empty(w, w.sizes(), w.scalar_type());
  copy(blocks, w);
  return blocks;
}

/// Where sums go, and how they are written.
Output output_of(const Tensor& x, const Result& result, const Tensor& out) {
  const ScalarType stored = result.stored();
  const bool narrow = !result.format && stored != ScalarType::Float;  // sums rounded as they are written
  const Format own = stored == ScalarType::Half ? kFloat16 : kBFloat16;
  const SumCast cast(result.format.value_or(own), result.rounding, result.saturate, result.codes,
                     layout_of(result.dtype), device_draws(x, result.draws));
  return {out.mutable_data_ptr(), bytes_of(stored), result.dtype == ScalarType::Half,
          narrow || result.format.has_value(), cast};
}

/// How runs of sums are written that lie at multiples of their size.
RunForm form_of(const Result& result, const SparseOutput::Codes& codes) {
  if (result.codes) {
    return codes.usable && result.format->bits() <= 8 && result.rounding == 0 ? RunForm::codes : RunForm::any;
  }
  if (result.format) return RunForm::any;
  return result.dtype == ScalarType::Half       ? RunForm::float16
         : result.dtype == ScalarType::BFloat16 ? RunForm::bfloat16
                                                : RunForm::single;
}

SparseOutput written(const Request& call, const Tensor& x, const Result& result, const Tensor& out) {
  const bool aligned = !(call.first && call.tokens() % 4);
  SparseOutput::Codes codes;
  if (result.codes) codes = {*result.format, result.saturate};
  return {output_of(x, result, out),
          call.tokens(),
          call.features(),
          call.first,
          aligned ? form_of(result, codes) : RunForm::any,
          codes};
}

/// The compute capability's first number.
int major_of(const Tensor& x) {
  const int major = attribute(x, cudaDevAttrComputeCapabilityMajor);
  STD_TORCH_CHECK(major >= 8, "block-sparse products need a device of compute capability 8.0, this one has ", major);
  return major;
}

unsigned plain_grid(int64_t count) {
  return static_cast<unsigned>(std::min((count + kSparsePlainThreads - 1) / kSparsePlainThreads, kPlainBlocks));
}

/// Write float32 sums, whose rows may be longer, as is asked for.
void write_sums(const Request& call, const Tensor& sums, const Result& result, const Tensor& out) {
  write_sums_kernel<<<plain_grid(out.numel() / 4 + 1), kSparsePlainThreads, 0, current_stream(call.x)>>>(
      static_cast<const float*>(sums.const_data_ptr()), out.numel(), out.size(1), sums.size(1),
      output_of(call.x, result, out));
  check_cuda(cudaGetLastError());
}

/// Sums by tensor cores.
void multiply(const Request& call, const PairDecode& x_codes, const PairDecode& w_codes, bool half,
              const Result& result, const Tensor& out) {
  const bool turns = !call.first && sparse_turns(call.block(), x_codes.way != Decoding::none);
  const Tensor x = turns ? turned(call.x) : rows_of(call.x, call.first), w = blocks_of(call.w);
  const int64_t tokens = call.tokens(), tiles = (tokens + kSparseTokens - 1) / kSparseTokens;
  const int major = major_of(x);
  SparseCall kernel{x.const_data_ptr(),
                    x.stride(0),
                    w.const_data_ptr(),
                    call.gate ? static_cast<const float*>(call.gate->const_data_ptr()) : nullptr,
                    call.pairs(),
                    call.columns(),
                    nullptr,
                    call.first || turns,
                    half,
                    x_codes,
                    w_codes,
                    written(call, x, result, out)};
  Tensor partial;
  if (sparse_splits(tokens, call.block())) {
    kernel.parts = call.parts();
    partial = empty(x, {tiles * kernel.parts.count, kSparseTokens * call.block()}, ScalarType::Float);
    kernel.partial = static_cast<float*>(partial.mutable_data_ptr());
  }
  const int block = static_cast<int>(call.block());
  check_cuda(launch_sparse(kernel, block, call.transpose, major >= 9, current_stream(x)));
}

/// Of codes by codes, by equal shares.
void multiply_shares(const Request& call, const Meeting& codes, const Result& result, const Tensor& out) {
  const Tensor x = call.first ? rows_of(call.x, true) : turned(call.x), w = blocks_of(call.w);
  const int major = major_of(x), memory = attribute(x, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const SparseLine line = call.line();
  const Tensor partial = empty(x, {line.count, kSparseTokens * call.block()}, ScalarType::Float);
  const Tensor flags = empty(x, {line.count}, ScalarType::Int);
  const SharesCall kernel{static_cast<const uint8_t*>(x.const_data_ptr()),
                          x.stride(0),
                          static_cast<const uint8_t*>(w.const_data_ptr()),
                          call.pairs(),
                          line,
                          static_cast<float*>(partial.mutable_data_ptr()),
                          static_cast<uint32_t*>(flags.mutable_data_ptr()),
                          codes.scale,
                          0,
                          codes.x,
                          codes.w,
                          written(call, x, result, out)};
  const auto launch = call.block() == 8    ? launch_shares<8>
                      : call.block() == 16 ? launch_shares<16>
                      : call.block() == 32 ? launch_shares<32>
                                           : launch_shares<64>;
  check_cuda(launch(kernel, call.transpose, memory, major >= 9, current_stream(x)));
}

/// Whether warpgroups serve a product of values.
bool takes_warpgroups(const Request& call) {
  return !call.gate && call.block() == kHopperBlock && hopper_serves(call.tokens(), call.blocks()) &&
         major_of(call.x) == 9;
}

/// Of many tokens on Hopper, by warpgroups. Sums that are neither written as they are nor cast by the quick way are
/// left in float32 to a kernel that does it: in this one a thread has no registers for that.
void multiply_many(const Request& call, bool half, const Result& result, const Tensor& out) {
  const Tensor x = rows_of(call.x, call.first), w = blocks_of(call.w);
  SparseOutput to = written(call, x, result, out);
  const bool direct = to.form != RunForm::any;
  Tensor sums;
  if (!direct) {
    if (call.first) to.tokens = (to.tokens + 3) / 4 * 4;  // x has zeros there
    sums = empty(x, {out.size(0), call.first ? to.tokens : out.size(1)}, ScalarType::Float);
    to.to.data = sums.mutable_data_ptr();
    to.form = RunForm::single;
  }
  const Tensor partial = empty(x, {hopper_partials(to.tokens)}, ScalarType::Float);
  const Tensor flags = empty(x, {hopper_flags(to.tokens)}, ScalarType::Int);
  const SparseHopperCall kernel{x.const_data_ptr(),
                                x.stride(0),
                                call.x.size(call.first ? 0 : 1),
                                w.const_data_ptr(),
                                call.blocks(),
                                call.offsets(),
                                call.pairs(),
                                static_cast<int>(call.outputs),
                                static_cast<float*>(partial.mutable_data_ptr()),
                                static_cast<uint32_t*>(flags.mutable_data_ptr()),
                                half,
                                call.transpose,
                                to};
  check_cuda(launch_sparse_hopper(kernel, current_stream(x)));
  if (!direct) write_sums(call, sums, result, out);
}

/// By tensor cores: in `dtype`, bfloat16 or float16.
void multiply_narrow(Request call, const std::optional<Format>& x, const std::optional<Format>& w, ScalarType dtype,
                     const Result& result, const Tensor& out) {
  const bool half = dtype == ScalarType::Half;
  const bool many = (!x && !w) || (x && w && call.tokens() >= kDecodedTokens);
  if (many && takes_warpgroups(call)) {
    return multiply_many(decoded(call, x, w, dtype), half, result, out);
  }
  // The products are the same numbers in either dtype; but a gated weight is rounded into `dtype`.
  if (x && w && !call.gate) {
    if (const auto codes = meeting(*x, *w)) return multiply_shares(call, *codes, result, out);
  }
  const auto prepare = [&](Tensor& operand, const std::optional<Format>& format) {
    const PairDecode decode = format ? PairDecode(*format, half) : PairDecode();
    if (format && decode.way == Decoding::none) operand = decode_codes(operand, fields_of(*format), dtype);
    return decode;
  };
  const PairDecode x_codes = prepare(call.x, x), w_codes = prepare(call.w, w);
  multiply(call, x_codes, w_codes, half, result, out);
}

template <class T>
void multiply_plain(const Request& call, const Tensor& out) {
  const int along = call.first ? 1 : 0;
  const SparsePlainCall<T> kernel{static_cast<const T*>(call.x.const_data_ptr()),
                                  call.x.stride(along),
                                  call.x.stride(1 - along),
                                  static_cast<const T*>(call.w.const_data_ptr()),
                                  call.gate ? static_cast<const float*>(call.gate->const_data_ptr()) : nullptr,
                                  call.offsets(),
                                  call.pairs(),
                                  static_cast<T*>(out.mutable_data_ptr()),
                                  call.tokens(),
                                  call.features(),
                                  static_cast<int>(call.block()),
                                  call.first,
                                  call.transpose};
  sparse_plain_kernel<<<plain_grid(out.numel()), kSparsePlainThreads, 0, current_stream(call.x)>>>(kernel);
  check_cuda(cudaGetLastError());
}

/// Float64, and float32, in sums of its own.
void multiply_wide(const Request& coded, const std::optional<Format>& x, const std::optional<Format>& w,
                   ScalarType dtype, const Result& result, const Tensor& out) {
  Request call = decoded(coded, x, w, dtype);
  call.w = contiguous(call.w);
  if (dtype == ScalarType::Double) {
    STD_TORCH_CHECK(!result.format && result.dtype == dtype, "sums of float64 are written as they are");
    return multiply_plain<double>(call, out);
  }
  if (!result.format && result.dtype == dtype) return multiply_plain<float>(call, out);
  const Tensor sums = empty(call.x, out.sizes(), dtype);
  multiply_plain<float>(call, sums);
  write_sums(call, sums, result, out);
}

Tensor run(Request call, const Ints& x_format, const Ints& w_format, const Result& result) {
  check_request(call);
  const std::optional<Format> x = read_codes(call.x, x_format), w = read_codes(call.w, w_format);
  const ScalarType dtype = operand_dtype(call, x, w);
  const int64_t tokens = call.tokens(), features = call.features();
  STD_TORCH_CHECK(std::max({tokens, features, call.blocks()}) < std::numeric_limits<int>::max(),
                  "tokens, features and blocks must be fewer than 2^31");
  const DeviceGuard guard(call.x.get_device_index());
  const Tensor out = call.first ? empty(call.x, {features, tokens}, result.stored())
                                : empty(call.x, {tokens, features}, result.stored());
  if (out.numel() == 0) return out;
  const MaybeTensor gate = call.gate ? MaybeTensor(contiguous(*call.gate)) : std::nullopt;
  const Request with_gate{call.x, call.w, call.table, gate, call.outputs, call.first, call.transpose};
  if (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) {
    multiply_narrow(with_gate, x, w, dtype, result, out);
  } else {
    multiply_wide(with_gate, x, w, dtype, result, out);
  }
  return out;
}

Tensor sparse_matmul(const Tensor& x, const Tensor& w, const Tensor& table, const MaybeTensor& gate, int64_t outputs,
                     bool first, bool transpose, const Ints& x_format, const Ints& w_format, ScalarType dtype) {
  const MaybeTensor none;
  const Source source(none, none, 32);
  return run({x, w, table, gate, outputs, first, transpose}, x_format, w_format,
             {dtype, std::nullopt, 0, false, false, source});
}

Tensor sparse_matmul_cast(const Tensor& x, const Tensor& w, const Tensor& table, const MaybeTensor& gate,
                          int64_t outputs, bool first, bool transpose, const Ints& x_format, const Ints& w_format,
                          const Ints& format, int64_t rounding, bool saturate, const MaybeTensor& seed,
                          const MaybeTensor& offset, int64_t random_bits, bool codes, ScalarType dtype) {
  const Format to = read_format(format);
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 6, "unknown rounding mode ", rounding);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "values are written in float32, float16 or bfloat16");
  for_container(dtype, [&](auto container) {
    if (!codes) check_within(to, container);
  });
  const Source source(seed, offset, random_bits);
  return run({x, w, table, gate, outputs, first, transpose}, x_format, w_format,
             {dtype, to, rounding, saturate, codes, source});
}

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) {
  library.impl("sparse_matmul", TORCH_BOX(&sparse_matmul));
  library.impl("sparse_matmul_cast", TORCH_BOX(&sparse_matmul_cast));
}

}  // namespace
}  // namespace lowprec
