// The quick way of a cast on a GPU, for as many elements as a thread takes at a time. Device code only.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "lowprec/cast.h"
#include "lowprec/container.h"
#include "lowprec/float_grid.h"
#include "lowprec/inline.h"

namespace lowprec {

/// Elements that move together, in accesses of up to 16 bytes.
template <class T, int kWidth>
struct alignas(std::min<size_t>(sizeof(T) * kWidth, 16)) Chunk {
  T at[kWidth];
};

/// How many elements a thread takes at a time: 16 bytes of the wider side, and no fewer than share a random counter.
template <class Op>
constexpr int chunk_width = std::max<int>(16 / std::max(sizeof(typename Op::Input), sizeof(typename Op::Output)), 4);

template <class Op>
using Inputs = Chunk<typename Op::Input, chunk_width<Op>>;
template <class Op>
using Outputs = Chunk<typename Op::Output, chunk_width<Op>>;

/// The random words of a chunk.
template <class Op>
struct ChunkWords {
  uint32_t at[chunk_width<Op>];
};

/// A number of a container as float32, and a float32 that the container holds as its bits. NaN may change its bits.
LOWPREC_DEVICE float to_float(Float32, uint32_t bits) { return as_float(bits); }
LOWPREC_DEVICE float to_float(BFloat16, uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
LOWPREC_DEVICE float to_float(Float16, uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

template <int kWidth>
LOWPREC_DEVICE void store(Float32, const float* values, Chunk<uint32_t, kWidth>& out) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out.at[i] = as_bits(values[i]);
}

template <int kWidth>
LOWPREC_DEVICE void store(BFloat16, const float* values, Chunk<uint16_t, kWidth>& out) {
  auto* pairs = reinterpret_cast<uint32_t*>(out.at);
#pragma unroll
  for (int i = 0; i < kWidth; i += 2) {
    pairs[i / 2] = __byte_perm(as_bits(values[i]), as_bits(values[i + 1]), 0x7632);
  }
}

template <int kWidth>
LOWPREC_DEVICE void store(Float16, const float* values, Chunk<uint16_t, kWidth>& out) {
  auto* pairs = reinterpret_cast<uint32_t*>(out.at);
#pragma unroll
  for (int i = 0; i < kWidth; i += 2) {
    const __half2 pair = __floats2half2_rn(values[i], values[i + 1]);
    pairs[i / 2] = reinterpret_cast<const uint32_t&>(pair);
  }
}

/// Whether none of a chunk's numbers is NaN: two to an instruction.
template <int kWidth>
LOWPREC_DEVICE bool all_numbers(const float* x) {
  bool numbers = true;
#pragma unroll
  for (int i = 0; i < kWidth; i += 2) numbers &= x[i] < x[i + 1] || x[i] >= x[i + 1];
  return numbers;
}

/// An op's quick way. `usable` is whether it serves the format at all, `plain` whether the shorter form of it does;
/// `try_apply` returns false, having done nothing, where a chunk has an element that it does not serve.
template <class Op>
struct Quick {
  static constexpr bool exists = false;
};

template <class C, class Mode>
struct QuickQuantize {
  using Op = Quantize<C, Mode>;
  static constexpr bool exists = true;
  bool usable;
  bool plain;

  QuickQuantize() = default;
  LOWPREC_INLINE QuickQuantize(const Format& format, bool saturate) : cast_(format, saturate) {
    usable = cast_.grid.usable && !(C::exponent_bits < 8 && cast_.makes_nan());
    plain = cast_.grid.plain;
  }

  template <bool kPlain>
  LOWPREC_DEVICE bool try_apply(const Inputs<Op>& in, const ChunkWords<Op>& draws, Outputs<Op>& out) const {
    constexpr int width = chunk_width<Op>;
    float x[width];
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] = to_float(C{}, in.at[i]);
    if (!all_numbers<width>(x)) return false;
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] = cast_.template apply<kPlain>(x[i], draws.at[i]);
    store(C{}, x, out);
    return true;
  }

 private:
  FloatQuantize<Mode> cast_;
};

template <class C, class Mode, class Code>
struct QuickEncode {
  using Op = Encode<C, Mode, Code>;
  static constexpr bool exists = true;
  bool usable;
  bool plain;

  QuickEncode() = default;
  LOWPREC_INLINE QuickEncode(const Format& format, bool saturate) : cast_(format, saturate) {
    usable = cast_.grid.usable;
    plain = cast_.grid.plain;
  }

  template <bool kPlain>
  LOWPREC_DEVICE bool try_apply(const Inputs<Op>& in, const ChunkWords<Op>& draws, Outputs<Op>& out) const {
    constexpr int width = chunk_width<Op>;
    constexpr int share = 4 / sizeof(Code);
    float x[width];
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] = to_float(C{}, in.at[i]);
    if (!all_numbers<width>(x)) return false;
    auto* words = reinterpret_cast<uint32_t*>(out.at);
#pragma unroll
    for (int i = 0; i < width; i += share) {
      uint32_t word = 0;
#pragma unroll
      for (int j = share - 1; j >= 0; --j) {
        word = (word << (8 * sizeof(Code) % 32)) + cast_.template apply<kPlain>(x[i + j], draws.at[i + j]);
      }
      words[i / share] = word;
    }
    return true;
  }

 private:
  FloatEncode<Mode> cast_;
};

template <class Code, class C>
struct QuickDecode {
  using Op = Decode<Code, C>;
  static constexpr bool exists = true;
  bool usable;
  bool plain;

  QuickDecode() = default;
  LOWPREC_INLINE QuickDecode(const Format& format, bool) : cast_(format) {
    usable = cast_.usable;
    plain = cast_.plain;
  }

  template <bool kPlain>
  LOWPREC_DEVICE bool try_apply(const Inputs<Op>& in, const ChunkWords<Op>&, Outputs<Op>& out) const {
    constexpr int width = chunk_width<Op>;
    float x[width];
    bool finite = true;
#pragma unroll
    for (int i = 0; i < width; ++i) finite &= kPlain || cast_.finite(in.at[i]);
    if (!finite) return false;
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] = cast_.template apply<kPlain>(in.at[i]);
    store(C{}, x, out);
    return true;
  }

 private:
  FloatDecode cast_;
};

// Not float64, which does not pass through float32, nor codes wider than its significand.
template <class C, class Mode>
  requires(sizeof(typename C::Bits) <= 4)
struct Quick<Quantize<C, Mode>> : QuickQuantize<C, Mode> {
  using QuickQuantize<C, Mode>::QuickQuantize;
};
template <class C, class Mode, class Code>
  requires(sizeof(typename C::Bits) <= 4 && sizeof(Code) <= 2)
struct Quick<Encode<C, Mode, Code>> : QuickEncode<C, Mode, Code> {
  using QuickEncode<C, Mode, Code>::QuickEncode;
};
template <class Code, class C>
  requires(sizeof(typename C::Bits) <= 4 && sizeof(Code) <= 2)
struct Quick<Decode<Code, C>> : QuickDecode<Code, C> {
  using QuickDecode<Code, C>::QuickDecode;
};

}  // namespace lowprec
