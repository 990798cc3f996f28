// Casts to block formats as operators: checks, how blocks lie in a tensor, and the choice of a kernel. A backend runs
// it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "lowprec/block.h"
#include "lowprec/cast_ops.h"
#include "lowprec/dispatch.h"
#include "lowprec/elementwise.h"
#include "lowprec/statistics_ops.h"
#include "lowprec/torch_stable.h"

namespace lowprec {

/// A tensor as [batch, rows, columns] in row-major order, in tiles of `height` × `width`; the last ones may be short.
struct Tiles {
  int64_t batch = 1;
  int64_t rows = 1;
  int64_t columns = 1;
  int64_t height = 1;
  int64_t width = 1;
  std::vector<int64_t> scales;  // the shape of the scales

  int64_t down() const { return (rows + height - 1) / height; }
  int64_t across() const { return (columns + width - 1) / width; }
  bool whole() const { return scales.empty(); }
};

/// Fields of Python's `BlockFormat`: the element's five, rows, columns, rule, tensor scale, and a float scale's five.
inline BlockFormat read_block_format(const Ints& fields) {
  STD_TORCH_CHECK(fields.size() == 9 || fields.size() == 14, "a block format has 9 or 14 fields, got ", fields.size());
  STD_TORCH_CHECK(fields[7] >= 0 && fields[7] <= 2, "no such rule: ", fields[7]);
  BlockFormat format{read_format(Ints(fields.begin(), fields.begin() + 5)),
                     static_cast<Rule>(fields[7]),
                     fields.size() == 14,
                     fields[8] != 0,
                     {}};
  if (format.float_scale) format.scale = read_format(Ints(fields.begin() + 9, fields.end()));
  STD_TORCH_CHECK(format.float_scale || !format.tensor_scale, "a tensor scale needs a float format as the scale");
  STD_TORCH_CHECK(!format.float_scale || (format.element.bits() <= 16 && format.scale.bits() <= 8),
                  "with a float scale elements have up to 16 bits, and scales up to 8");
  return format;
}

inline Tiles tiles_of(const Tensor& x, const Ints& fields, int64_t dim) {
  const int64_t rows = fields[5], columns = fields[6], rank = x.dim();
  STD_TORCH_CHECK(rows >= 0 && columns >= 0 && (rows == 0 || columns > 0), "no such block");
  Tiles tiles;
  const auto clamp = [](int64_t size, int64_t length) { return std::min(size, std::max<int64_t>(length, 1)); };
  const auto size = [&](int64_t d) { return d >= 0 && d < rank ? x.size(d) : 1; };
  for (int64_t d = 0; d < rank; ++d) tiles.scales.push_back(x.size(d));
  if (rows == 0 && columns == 0) {
    tiles.columns = x.numel();
    tiles.width = clamp(x.numel(), x.numel());
    tiles.scales.clear();
  } else if (rows > 0) {
    for (int64_t d = 0; d < rank - 2; ++d) tiles.batch *= x.size(d);
    tiles.rows = size(rank - 2);
    tiles.columns = size(rank - 1);
    tiles.height = clamp(rows, tiles.rows);
    tiles.width = clamp(columns, tiles.columns);
    if (rank >= 1) tiles.scales[rank - 1] = tiles.across();
    if (rank >= 2) tiles.scales[rank - 2] = tiles.down();
  } else if (rank > 0) {
    dim += dim < 0 ? rank : 0;
    STD_TORCH_CHECK(dim >= 0 && dim < rank, "dim is out of range");
    int64_t outer = 1, inner = 1;
    for (int64_t d = 0; d < dim; ++d) outer *= x.size(d);
    for (int64_t d = dim + 1; d < rank; ++d) inner *= x.size(d);
    const bool last = dim == rank - 1;
    tiles.batch = last ? 1 : outer;
    tiles.rows = last ? outer : x.size(dim);
    tiles.columns = last ? x.size(dim) : inner;
    (last ? tiles.width : tiles.height) = clamp(columns, x.size(dim));
    tiles.scales[dim] = last ? tiles.across() : tiles.down();
  }
  return tiles;
}

/// Call f with the functor of a mode: the two common ones, and one that is told the mode's number at run time.
template <class F>
void for_block_rounding(int64_t mode, F f) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 6, "unknown rounding mode ", mode);
  mode == 0 ? f(NearestEven{}) : mode == 6 ? f(Stochastic{}) : f(AnyMode{});
}

/// Wide codes are rare enough that their modes but the random one are chosen at run time.
template <class Code, class Mode>
using ForCode = std::conditional_t<(sizeof(Code) > 1 && !Mode::random), AnyMode, Mode>;

/// The operators of lowprec/_ops.py that cast to and from block formats.
///
/// `Backend::cast(blocks, x, out, scales, tiles, source, mode, tensor_scale)` casts a contiguous tensor; `scales` and
/// `tensor_scale` may be null. `Backend::tensor_scale(op, container, x, out)` writes one float32.
/// `Backend::decode(op, codes, scales, tensor_scale, out, tiles)` is the way back. `Backend::gather(x, results, notes,
/// to)` gathers statistics.
template <class Backend>
struct BlockOps {
  static Tensor quantize(const Tensor& x, const Ints& format, int64_t dim, int64_t rounding, bool saturate,
                         const MaybeTensor& seed, const MaybeTensor& offset, int64_t random_bits) {
    Tensor out = empty_like(x, x.scalar_type());
    quantize_into(x, format, dim, rounding, saturate, {seed, offset, random_bits}, out);
    return out;
  }

  static void quantize_out(const Tensor& x, const Ints& format, int64_t dim, int64_t rounding, bool saturate,
                           const MaybeTensor& seed, const MaybeTensor& offset, int64_t random_bits, const Tensor& out) {
    check_out(x, out, x.scalar_type());
    quantize_into(x, format, dim, rounding, saturate, {seed, offset, random_bits}, out);
  }

  /// Values, then notes, then one pass over both: in row-major order, whatever the strides.
  static Tensor quantize_statistics(const Tensor& x, const Ints& fields, int64_t dim, int64_t rounding, bool saturate,
                                    const MaybeTensor& seed, const MaybeTensor& offset, int64_t random_bits,
                                    const Tensor& stats, const MaybeTensor& codes) {
    Tensor out = empty_like(x, x.scalar_type());
    const BlockFormat format = read_block_format(fields);
    const Gathered to(x, format.element, stats, codes);
    if (x.numel() == 0) return out;
    const Tensor source = contiguous(x);
    const Tensor values = out.is_contiguous() ? out : empty_like(source, x.scalar_type());
    quantize_into(source, fields, dim, rounding, saturate, {seed, offset, random_bits}, values);
    const Tensor notes = empty(x, x.sizes(), ScalarType::UInt32);
    note_into(source, fields, dim, rounding, saturate, {seed, offset, random_bits}, notes);
    Backend::gather(source, values, notes, to);
    if (values.get() != out.get()) copy(out, values);
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor> encode(const Tensor& x, const Ints& fields, int64_t dim, int64_t rounding,
                                                   bool saturate, const MaybeTensor& seed, const MaybeTensor& offset,
                                                   int64_t random_bits) {
    const BlockFormat format = read_block_format(fields);
    const Tiles tiles = tiles_of(x, fields, dim);
    const Tensor source = contiguous(x);
    Tensor codes = empty(x, x.sizes(), code_dtype(format.element));
    Tensor scales = empty(x, tiles.scales, ScalarType::Byte);
    Tensor second = empty(x, std::vector<int64_t>(format.tensor_scale ? 0 : 1, 0), ScalarType::Float);
    for_container(x.scalar_type(), [&](auto container) {
      check_holds(format, container);
      measure(format, container, source, second);
      for_code(code_dtype(format.element), [&](auto code) {
        for_block_rounding(rounding, [&](auto mode) {
          using C = std::decay_t<decltype(container)>;
          using Code = std::decay_t<decltype(code)>;
          using Mode = ForCode<Code, std::decay_t<decltype(mode)>>;
          const Call call{source, codes, &scales, tiles, {seed, offset, random_bits}, rounding, &second};
          if (!format.float_scale) {
            run(call, PowerBlocks<C, BlockEncode<C, Mode, Code>>(format, saturate, rounding));
          } else if constexpr (sizeof(Code) <= 2) {
            run(call, RatioBlocks<C, Mode, Code>(format, saturate, rounding));
          }
        });
      });
    });
    return {codes, scales, second};
  }

  static Tensor decode(const Tensor& codes, const Tensor& scales, const MaybeTensor& tensor_scale, const Ints& fields,
                       int64_t dim, ScalarType dtype) {
    const BlockFormat format = read_block_format(fields);
    const Tiles tiles = tiles_of(codes, fields, dim);
    STD_TORCH_CHECK(codes.scalar_type() == code_dtype(format.element),
                    "the codes have another dtype than the format's");
    STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Byte && same_sizes(scales, tiles.scales),
                    "scales must be uint8 of the blocks' shape");
    STD_TORCH_CHECK(tensor_scale.has_value() == format.tensor_scale, "tensor_scale is for formats that have one");
    STD_TORCH_CHECK(!tensor_scale || (tensor_scale->scalar_type() == ScalarType::Float && tensor_scale->numel() == 1),
                    "tensor_scale must be a 0-dim float32 tensor");
    check_same_place(codes, scales);
    if (tensor_scale) check_same_place(codes, *tensor_scale);
    Tensor out = empty(codes, codes.sizes(), dtype);
    if (codes.numel() == 0) return out;
    for_container(dtype, [&](auto container) {
      for_code(codes.scalar_type(), [&](auto code) {
        const DecodeBlock<std::decay_t<decltype(code)>, std::decay_t<decltype(container)>> op(format);
        const auto* second = tensor_scale ? static_cast<const uint32_t*>(tensor_scale->const_data_ptr()) : nullptr;
        Backend::decode(op, contiguous(codes), contiguous(scales), second, out, tiles);
      });
    });
    return out;
  }

 private:
  struct Call {
    const Tensor& x;  // contiguous, as is `out`
    const Tensor& out;
    Tensor* scales;
    const Tiles& tiles;
    const Source& source;
    int64_t rounding;
    const Tensor* tensor_scale;
  };

  static bool same_sizes(const Tensor& x, const std::vector<int64_t>& shape) {
    return std::equal(x.sizes().begin(), x.sizes().end(), shape.begin(), shape.end());
  }

  template <class C>
  static void check_holds(const BlockFormat& format, C) {
    if (format.float_scale) return;
    const PowerScale<C> scales(format);
    const int digits = format.element.mbits + (format.element.ebits > 0);
    STD_TORCH_CHECK(scales.low <= scales.high && digits <= C::fraction_bits + 1,
                    "the dtype cannot hold the elements with any scale");
  }

  /// The tensor's scale, where the format has one.
  template <class C>
  static void measure(const BlockFormat& format, C container, const Tensor& x, const Tensor& out) {
    if (format.tensor_scale) Backend::tensor_scale(TensorScale(format), container, x, out);
  }

  template <class Blocks>
  static void run(const Call& call, const Blocks& blocks) {
    const bool has = call.tensor_scale && call.tensor_scale->numel() == 1;
    const auto* second = has ? static_cast<const uint32_t*>(call.tensor_scale->const_data_ptr()) : nullptr;
    auto* scales = call.scales ? static_cast<uint8_t*>(call.scales->mutable_data_ptr()) : nullptr;
    Backend::cast(blocks, call.x, call.out, scales, call.tiles, call.source, call.rounding, second);
  }

  static void quantize_into(const Tensor& x, const Ints& fields, int64_t dim, int64_t rounding, bool saturate,
                            const Source& draws, const Tensor& out) {
    const BlockFormat format = read_block_format(fields);
    const Tiles tiles = tiles_of(x, fields, dim);
    if (x.numel() == 0) return;
    const Tensor source = contiguous(x);
    const Tensor target = out.is_contiguous() ? out : empty_like(source, out.scalar_type());
    const Tensor second = empty(x, std::vector<int64_t>(format.tensor_scale ? 0 : 1, 0), ScalarType::Float);
    for_container(x.scalar_type(), [&](auto container) {
      check_holds(format, container);
      measure(format, container, source, second);
      for_block_rounding(rounding, [&](auto mode) {
        using C = std::decay_t<decltype(container)>;
        using Mode = std::decay_t<decltype(mode)>;
        const Call call{source, target, nullptr, tiles, draws, rounding, &second};
        if (format.float_scale) {
          run(call, RatioBlocks<C, Mode, Values>(format, saturate, rounding));
        } else {
          run(call, PowerBlocks<C, BlockQuantize<C, Mode>>(format, saturate, rounding));
        }
      });
    });
    if (target.get() != out.get()) copy(out, target);
  }

  /// What statistics need of each element, as `Note` has it; x and out are contiguous.
  static void note_into(const Tensor& x, const Ints& fields, int64_t dim, int64_t rounding, bool saturate,
                        const Source& draws, const Tensor& out) {
    const BlockFormat format = read_block_format(fields);
    const Tiles tiles = tiles_of(x, fields, dim);
    const Tensor second = empty(x, std::vector<int64_t>(format.tensor_scale ? 0 : 1, 0), ScalarType::Float);
    for_container(x.scalar_type(), [&](auto container) {
      measure(format, container, x, second);
      for_block_rounding(rounding, [&](auto mode) {
        using C = std::decay_t<decltype(container)>;
        using Mode = std::decay_t<decltype(mode)>;
        const Call call{x, out, nullptr, tiles, draws, rounding, &second};
        if (format.float_scale) {
          run(call, RatioBlocks<C, ForCode<uint32_t, Mode>, Notes>(format, saturate, rounding));
        } else {
          run(call, PowerBlocks<C, BlockNote<C, Mode>>(format, saturate, rounding));
        }
      });
    });
  }
};

/// Register the operators for a backend's device.
template <class Backend>
void register_blocks(Library& library) {
  using Ops = BlockOps<Backend>;
  library.impl("quantize_block", TORCH_BOX(&Ops::quantize));
  library.impl("quantize_block_out", TORCH_BOX(&Ops::quantize_out));
  library.impl("quantize_block_statistics", TORCH_BOX(&Ops::quantize_statistics));
  library.impl("encode_block", TORCH_BOX(&Ops::encode));
  library.impl("decode_block", TORCH_BOX(&Ops::decode));
}

}  // namespace lowprec
