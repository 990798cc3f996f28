// Casts to dense codes and back as operators: checks, results, and the choice of a kernel. A backend runs it.
#pragma once

#include <cstdint>
#include <vector>

#include "lowprec/cast_ops.h"
#include "lowprec/packed.h"

namespace lowprec {

/// `Backend::pack<Op>(setting, x, out, source, rows)` applies a cast to the elements of x and stores its codes densely;
/// `Backend::unpack<Op>(setting, dense, out, rows)` applies one to dense codes.
template <class Backend>
struct PackedOps {
  static Tensor encode_packed(const Tensor& x, const Ints& fields, int64_t rounding, bool saturate,
                              const MaybeTensor& seed, const MaybeTensor& offset, int64_t random_bits) {
    const Format format = read_format(fields);
    const Rows rows = rows_of(x, x.dim() ? x.size(x.dim() - 1) : 1, format.bits());
    const Tensor out = empty_rows(x, rows.bytes(), ScalarType::Byte);
    const Source source(seed, offset, random_bits);
    for_container(x.scalar_type(), [&](auto container) {
      for_rounding(rounding, [&](auto mode) {
        using Op = Encode<decltype(container), decltype(mode), uint8_t>;
        if (x.numel()) Backend::template pack<Op>({format, saturate}, contiguous(x), out, source, rows.joined());
      });
    });
    return out;
  }

  static Tensor decode_packed(const Tensor& dense, const Ints& fields, int64_t size, ScalarType dtype) {
    const Format format = read_format(fields);
    const Rows rows = dense_rows(dense, size, format.bits());
    const Tensor out = empty_rows(dense, size, dtype);
    for_container(dtype, [&](auto container) {
      check_within(format, container);
      using Op = Decode<uint8_t, decltype(container)>;
      if (out.numel()) Backend::template unpack<Op>({format}, contiguous(dense), out, rows.joined());
    });
    return out;
  }

  static Tensor pack_codes(const Tensor& codes, int64_t bits) {
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, "codes must be uint8");
    const Rows rows = rows_of(codes, codes.dim() ? codes.size(codes.dim() - 1) : 1, bits);
    const Tensor out = empty_rows(codes, rows.bytes(), ScalarType::Byte);
    const MaybeTensor none;
    if (codes.numel()) Backend::template pack<Same>({}, contiguous(codes), out, {none, none, 32}, rows.joined());
    return out;
  }

  static Tensor unpack_codes(const Tensor& dense, int64_t bits, int64_t size) {
    const Rows rows = dense_rows(dense, size, bits);
    const Tensor out = empty_rows(dense, size, ScalarType::Byte);
    if (out.numel()) Backend::template unpack<Same>({}, contiguous(dense), out, rows.joined());
    return out;
  }

 private:
  static Rows rows_of(const Tensor& x, int64_t size, int64_t bits) {
    STD_TORCH_CHECK(bits >= 1 && bits <= 8, "codes of 1 to 8 bits can be packed, these have ", bits);
    return {size ? x.numel() / size : 0, size, static_cast<int>(bits)};
  }

  static Rows dense_rows(const Tensor& dense, int64_t size, int64_t bits) {
    STD_TORCH_CHECK(dense.scalar_type() == ScalarType::Byte && dense.dim() > 0 && size >= 0,
                    "dense codes must be uint8 with a dimension of bytes");
    Rows rows = rows_of(dense, 0, bits);
    rows.size = size;
    const int64_t bytes = dense.size(dense.dim() - 1);
    STD_TORCH_CHECK(bytes == rows.bytes(), "rows of ", size, " codes have ", rows.bytes(), " bytes, got ", bytes);
    rows.count = bytes ? dense.numel() / bytes : 0;
    return rows;
  }

  /// Contiguous, of x's shape but for the last dimension; a 0-dim tensor is a row of one.
  static Tensor empty_rows(const Tensor& x, int64_t last, ScalarType dtype) {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    if (sizes.empty()) sizes.push_back(1);
    sizes.back() = last;
    return torch::stable::new_empty(x, sizes, dtype);
  }
};

/// Register the operators for a backend's device.
template <class Backend>
void register_packed(Library& library) {
  using Ops = PackedOps<Backend>;
  library.impl("encode_packed", TORCH_BOX(&Ops::encode_packed));
  library.impl("decode_packed", TORCH_BOX(&Ops::decode_packed));
  library.impl("pack_codes", TORCH_BOX(&Ops::pack_codes));
  library.impl("unpack_codes", TORCH_BOX(&Ops::unpack_codes));
}

}  // namespace lowprec
