// The casts as operators: checks, results, and the choice of a kernel. A backend runs it: one for CPU, one for CUDA.
//
// Python has checked every argument and said what is wrong with it. The checks here are a second fence, for callers
// that come by another way.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "lowprec/cast.h"
#include "lowprec/dispatch.h"
#include "lowprec/elementwise.h"
#include "lowprec/philox.h"
#include "lowprec/torch_stable.h"

namespace lowprec {

using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

inline Format read_format(const Ints& fields) {
  STD_TORCH_CHECK(fields.size() == 5, "format must have 5 fields, got ", fields.size());
  Format format{static_cast<int>(fields[0]), static_cast<int>(fields[1]), static_cast<int>(fields[2]),
                static_cast<Specials>(fields[3]), fields[4] != 0};
  STD_TORCH_CHECK(format.valid(), "no such format: 1-", fields[0], "-", fields[1], ", bias ", fields[2]);
  return format;
}

/// The dtype of a format's codes.
inline ScalarType code_dtype(const Format& format) {
  return format.bits() <= 8 ? ScalarType::Byte : format.bits() <= 16 ? ScalarType::UInt16 : ScalarType::UInt32;
}

inline void check_same_place(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.device() == other.device(), "expected tensors on one device");
}

inline void check_out(const Tensor& x, const Tensor& out, ScalarType dtype) {
  STD_TORCH_CHECK(out.scalar_type() == dtype && same_shape(x, out), "out has another dtype or shape than the result");
  check_same_place(x, out);
}

inline void check_word(const MaybeTensor& word) {
  STD_TORCH_CHECK(!word || (word->scalar_type() == ScalarType::Long && word->numel() == 1),
                  "seed and offset must be 0-dim int64 tensors");
}

inline Place read_place(const Ints& place) {
  if (place.empty()) return {};
  STD_TORCH_CHECK(place.size() == 3 && place[0] >= 0 && place[1] > 0 && place[2] >= 0,
                  "place must be [start, width, pitch]");
  return {place[0], place[1], place[2]};
}

template <class C>
void check_within(const Format& format, C container) {
  STD_TORCH_CHECK(Grid::of(format, container).within, "the dtype cannot hold every finite value of the format");
}

/// With a shift on the device, that is for the kernel to see to; here, whether it can.
template <class C>
void check_within(const Setting& setting, C container) {
  Format format = setting.format;
  if (setting.shift) format.bias -= shift_within(format, container, 0);
  check_within(format, container);
}

/// The format with its bias lowered by a shift on the CPU, as far as the dtype holds its values.
inline Format shifted(Format format, const MaybeTensor& shift, ScalarType dtype) {
  if (!shift) return format;
  STD_TORCH_CHECK(shift->scalar_type() == ScalarType::Long && shift->numel() == 1,
                  "shift must be a 0-dim int64 tensor");
  STD_TORCH_CHECK(shift->is_cpu(), "shift must be on the CPU here");
  const int64_t by = *static_cast<const int64_t*>(shift->const_data_ptr());
  for_container(dtype, [&](auto container) { format.bias -= shift_within(format, container, by); });
  return format;
}

/// What makes the ops of x. A shift on its device is left to the kernel, which reads it when it runs.
inline Setting setting_of(const Tensor& x, const Format& format, bool saturate, const MaybeTensor& shift) {
  if (!shift || shift->is_cpu()) return {shifted(format, shift, x.scalar_type()), saturate};
  STD_TORCH_CHECK(shift->scalar_type() == ScalarType::Long && shift->numel() == 1,
                  "shift must be a 0-dim int64 tensor");
  check_same_place(x, *shift);
  return {format, saturate, static_cast<const int64_t*>(shift->const_data_ptr())};
}

/// What stochastic rounding draws from.
struct Source {
  const MaybeTensor& seed;
  const MaybeTensor& offset;
  int bits;
  Place place;

  Source(const MaybeTensor& seed, const MaybeTensor& offset, int64_t random_bits, Place place = {})
      : seed(seed), offset(offset), bits(static_cast<int>(random_bits)), place(place) {
    STD_TORCH_CHECK(bits == 32 || bits == 16 || bits == 8, "random_bits must be 32, 16 or 8, got ", random_bits);
    check_word(seed);
    check_word(offset);
  }
};

/// The operators of lowprec/_ops.py. `Backend::run<Op>(setting, x, out, source)` applies a cast to the elements of x.
template <class Backend>
struct CastOps {
  static Tensor quantize(const Tensor& x, const Ints& format, int64_t rounding, bool saturate, const MaybeTensor& seed,
                         const MaybeTensor& offset, int64_t random_bits, const MaybeTensor& shift, const Ints& place) {
    Tensor out = empty_like(x, x.scalar_type());
    const Source source(seed, offset, random_bits, read_place(place));
    quantize_into(x, setting_of(x, read_format(format), saturate, shift), rounding, source, out);
    return out;
  }

  static void quantize_out(const Tensor& x, const Ints& format, int64_t rounding, bool saturate,
                           const MaybeTensor& seed, const MaybeTensor& offset, int64_t random_bits, const Tensor& out) {
    check_out(x, out, x.scalar_type());
    quantize_into(x, {read_format(format), saturate}, rounding, {seed, offset, random_bits}, out);
  }

  static Tensor encode(const Tensor& x, const Ints& format, int64_t rounding, bool saturate, const MaybeTensor& seed,
                       const MaybeTensor& offset, int64_t random_bits) {
    Tensor out = empty_like(x, code_dtype(read_format(format)));
    encode_into(x, read_format(format), rounding, saturate, {seed, offset, random_bits}, out);
    return out;
  }

  static void encode_out(const Tensor& x, const Ints& format, int64_t rounding, bool saturate, const MaybeTensor& seed,
                         const MaybeTensor& offset, int64_t random_bits, const Tensor& out) {
    check_out(x, out, code_dtype(read_format(format)));
    encode_into(x, read_format(format), rounding, saturate, {seed, offset, random_bits}, out);
  }

  static Tensor decode(const Tensor& codes, const Ints& format, ScalarType dtype) {
    Tensor out = empty_like(codes, dtype);
    decode_into(codes, read_format(format), out);
    return out;
  }

  static void decode_out(const Tensor& codes, const Ints& format, const Tensor& out) {
    check_out(codes, out, out.scalar_type());
    decode_into(codes, read_format(format), out);
  }

 private:
  static void quantize_into(const Tensor& x, const Setting& setting, int64_t rounding, const Source& source,
                            const Tensor& out) {
    for_container(x.scalar_type(), [&](auto container) {
      check_within(setting, container);
      for_rounding(rounding, [&](auto mode) {
        Backend::template run<Quantize<decltype(container), decltype(mode)>>(setting, x, out, source);
      });
    });
  }

  static void encode_into(const Tensor& x, const Format& format, int64_t rounding, bool saturate, const Source& source,
                          const Tensor& out) {
    for_container(x.scalar_type(), [&](auto container) {
      for_code(code_dtype(format), [&](auto code) {
        for_rounding(rounding, [&](auto mode) {
          using Op = Encode<decltype(container), decltype(mode), decltype(code)>;
          Backend::template run<Op>({format, saturate}, x, out, source);
        });
      });
    });
  }

  static void decode_into(const Tensor& codes, const Format& format, const Tensor& out) {
    STD_TORCH_CHECK(codes.scalar_type() == code_dtype(format), "the codes have another dtype than the format's");
    const MaybeTensor none;
    for_container(out.scalar_type(), [&](auto container) {
      check_within(format, container);
      for_code(codes.scalar_type(), [&](auto code) {
        Backend::template run<Decode<decltype(code), decltype(container)>>({format}, codes, out, {none, none, 32});
      });
    });
  }
};

/// Register the operators for a backend's device.
template <class Backend>
void register_casts(Library& library) {
  using Ops = CastOps<Backend>;
  library.impl("quantize", TORCH_BOX(&Ops::quantize));
  library.impl("quantize_out", TORCH_BOX(&Ops::quantize_out));
  library.impl("encode", TORCH_BOX(&Ops::encode));
  library.impl("encode_out", TORCH_BOX(&Ops::encode_out));
  library.impl("decode", TORCH_BOX(&Ops::decode));
  library.impl("decode_out", TORCH_BOX(&Ops::decode_out));
}

}  // namespace lowprec
