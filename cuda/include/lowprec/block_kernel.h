// The kernels of casts to and from block formats on CUDA. Device code only, without torch.
//
// `rows_kernel` is for the usual case: short blocks along contiguous rows, with power-of-two scales. A thread holds 32
// bytes, a block's threads are neighbours in a warp, and every element is read once. `tiles_kernel` is for all else:
// a group of threads walks a block twice, for its scale and for the cast; the second time it comes from the cache. A
// block that is the whole tensor has its peak from `peak_kernel`.
#pragma once

#include <cstdint>

#include "lowprec/block.h"
#include "lowprec/block_fp4.h"
#include "lowprec/cast_kernel.h"
#include "lowprec/float_grid.h"
#include "lowprec/quick.h"

namespace lowprec {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kEveryone = 0xffffffff;

/// The largest magnitude of a tensor and what else it holds, gathered by atomic maxima: their order does not matter.
struct GatheredPeak {
  unsigned long long amax;
  unsigned int infinite;
  unsigned int nan;
};

LOWPREC_DEVICE uint64_t shuffle(uint64_t x, int mask) {
  return __shfl_xor_sync(kEveryone, static_cast<unsigned long long>(x), mask);
}
LOWPREC_DEVICE uint32_t shuffle(uint32_t x, int mask) { return __shfl_xor_sync(kEveryone, x, mask); }

/// The peak of all `lanes` neighbouring threads, a power of two.
template <class C>
LOWPREC_DEVICE Peak<C> over_lanes(Peak<C> peak, int lanes) {
  for (int mask = 1; mask < lanes; mask *= 2) {
    peak.merge({shuffle(peak.amax, mask), shuffle(peak.infinite, mask), shuffle(peak.nan, mask)});
  }
  return peak;
}

/// The peak of a whole thread block.
template <class C>
LOWPREC_DEVICE Peak<C> over_threads(Peak<C> peak) {
  __shared__ typename C::Word amax[kThreads / kWarp], infinite[kThreads / kWarp], nan[kThreads / kWarp];
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  peak = over_lanes(peak, kWarp);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    amax[warp] = peak.amax;
    infinite[warp] = peak.infinite;
    nan[warp] = peak.nan;
  }
  __syncthreads();
  for (int i = 0; i < static_cast<int>(kThreads / kWarp); ++i) peak.merge({amax[i], infinite[i], nan[i]});
  return peak;
}

/// Elements that move in one access of 16 bytes.
template <class C>
using Access = Chunk<typename C::Bits, 16 / sizeof(typename C::Bits)>;

/// The peak of all elements, into `out`, which is zero. The first `accesses` may be read whole.
template <class C>
__global__ void __launch_bounds__(kThreads)
    peak_kernel(const typename C::Bits* x, int64_t accesses, int64_t count, GatheredPeak* out) {
  constexpr int width = sizeof(Access<C>) / sizeof(typename C::Bits);
  Peak<C> peak;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
#pragma unroll 4
  for (int64_t i = first; i < accesses; i += step) {
    const auto in = reinterpret_cast<const Access<C>*>(x)[i];
#pragma unroll
    for (int j = 0; j < width; ++j) peak.add(in.at[j] & (C::sign - 1));
  }
  for (int64_t i = accesses * width + first; i < count; i += step) peak.add(x[i] & (C::sign - 1));
  peak = over_threads(peak);
  if (threadIdx.x != 0) return;
  atomicMax(&out->amax, static_cast<unsigned long long>(peak.amax));
  if (peak.infinite) atomicOr(&out->infinite, 1u);
  if (peak.nan) atomicOr(&out->nan, 1u);
}

template <class C>
LOWPREC_DEVICE Peak<C> read(const GatheredPeak& from) {
  return {static_cast<typename C::Word>(from.amax), from.infinite, from.nan};
}

template <class C>
__global__ void tensor_scale_kernel(const TensorScale op, const GatheredPeak* peak, uint32_t* out) {
  *out = op.of(static_cast<typename C::Word>(peak->amax), peak->infinite != 0, C{});
}

/// How blocks lie in a tensor: see `Tiles`.
struct TileGrid {
  int64_t rows;
  int64_t columns;
  int64_t height;
  int64_t width;
  int64_t down;
  int64_t across;
  int64_t count;

  struct Tile {
    int64_t begin;
    int64_t height;
    int64_t width;
  };

  LOWPREC_DEVICE Tile tile(int64_t index) const {
    const int64_t strip = index / across, column = index % across * width, row = strip % down * height;
    const int64_t below = rows - row, right = columns - column;
    return {(strip / down * rows + row) * columns + column, below < height ? below : height,
            right < width ? right : width};
  }
};

/// What a cast to a block format reads and writes. `scales` may be null; `peak`, if not, is that of every block.
template <class Blocks>
struct BlockArrays {
  const typename Blocks::Container::Bits* x;
  typename Blocks::Output* out;
  uint8_t* scales;
  const uint32_t* tensor_scale;
  const GatheredPeak* peak;
};

/// Draws of single elements.
struct DrawOne {
  uint64_t seed;
  uint64_t offset;
  int bits;

  LOWPREC_DEVICE explicit DrawOne(const DeviceDraws& from)
      : seed(from.seed.read()), offset(from.offset.read()), bits(from.bits) {}
};

template <class Blocks>
LOWPREC_DEVICE void write_scale(const Blocks& blocks, uint8_t* scales, int64_t index,
                                const typename Blocks::Scale& scale, bool nan) {
  if (scales) scales[index] = static_cast<uint8_t>(nan ? blocks.nan() : blocks.scales.code(scale));
}

/// A block for `lanes` threads: a power of two up to a warp, or a whole thread block. Each takes every lanes-th column.
template <class Blocks>
__global__ void __launch_bounds__(kThreads)
    tiles_kernel(Blocks blocks, const BlockArrays<Blocks> arrays, const TileGrid grid, const int lanes,
                 const DeviceDraws draws, const uint32_t mode) {
  using C = typename Blocks::Container;
  if (arrays.tensor_scale) blocks.take(*arrays.tensor_scale);
  const DrawOne draw(draws);
  const int64_t groups = static_cast<int64_t>(gridDim.x) * kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  // All threads of a warp, or of a block, take as many turns, some of them without a tile.
  for (int64_t turn = 0; turn < grid.count; turn += groups) {
    const int64_t index = turn + group;
    const auto tile = index < grid.count ? grid.tile(index) : TileGrid::Tile{0, 0, 0};
    Peak<C> peak;
    if (arrays.peak) {
      peak = read<C>(*arrays.peak);
    } else {
      for (int64_t row = 0; row < tile.height; ++row) {
        const auto* x = arrays.x + tile.begin + row * grid.columns;
        for (int64_t column = lane; column < tile.width; column += lanes) peak.add(x[column] & (C::sign - 1));
      }
      peak = lanes > static_cast<int>(kWarp) ? over_threads(peak) : over_lanes(peak, lanes);
    }
    if (index >= grid.count) continue;
    const auto scale = blocks.scales.of(peak.amax, peak.infinite);
    if (lane == 0 && (!arrays.peak || index == 0)) write_scale(blocks, arrays.scales, index, scale, peak.nan);
    const auto at = blocks.at(scale);
    for (int64_t row = 0; row < tile.height; ++row) {
      const int64_t begin = tile.begin + row * grid.columns;
      for (int64_t column = lane; column < tile.width; column += lanes) {
        const int64_t i = begin + column;
        const uint32_t word = Blocks::At::random ? draw_one(draw.bits, draw.seed, draw.offset, i) : mode;
        arrays.out[i] = at(arrays.x[i], word);
      }
    }
  }
}

// Short blocks along contiguous rows.

/// Elements of a thread: 32 bytes.
template <class Blocks>
constexpr int kRun = 32 / sizeof(typename Blocks::Container::Bits);

/// The quick way for elements under a power-of-two scale: the number times 2^-k is rounded as in `FloatGrid`. Rounding
/// that product towards zero, which matters below float32's numbers alone, changes no digit that these modes look at.
template <class Blocks>
struct QuickOf {
  static constexpr bool exists = false;
};

template <class C, class Mode>
  requires(sizeof(typename C::Bits) <= 4 && !std::is_same_v<Mode, AnyMode>)
struct QuickOf<PowerBlocks<C, BlockQuantize<C, Mode>>> {
  static constexpr bool exists = true;
  static constexpr bool codes = false;

  FloatQuantize<Mode> cast;
  bool usable;

  template <class Blocks>
  explicit QuickOf(const Blocks& from) : cast(from.format.element, from.saturate) {
    usable = cast.grid.usable && !cast.makes_nan();  // whose bits no product would keep
  }
};

template <class C, class Mode>
  requires(sizeof(typename C::Bits) <= 4 && !std::is_same_v<Mode, AnyMode>)
struct QuickOf<PowerBlocks<C, BlockEncode<C, Mode, uint8_t>>> {
  static constexpr bool exists = true;
  static constexpr bool codes = true;

  FloatEncode<Mode> cast;
  bool usable;
  bool twos_complement;
  uint32_t sign;

  template <class Blocks>
  explicit QuickOf(const Blocks& from)
      : cast(from.format.element, from.saturate),
        usable(cast.grid.usable),
        twos_complement(from.format.twos_complement()),
        sign(from.format.element.sign_code()) {}
};

template <class Blocks>
using RunIn = Chunk<typename Blocks::Container::Bits, kRun<Blocks>>;
template <class Blocks>
using RunOut = Chunk<typename Blocks::Output, kRun<Blocks>>;

/// The random words of a thread's elements.
template <class Blocks>
struct RunWords {
  uint32_t at[kRun<Blocks>];
};

/// A thread's elements by the way that serves every number. Not inlined: it is rarely taken.
template <class Blocks>
__device__ __noinline__ RunOut<Blocks> cast_run(const Blocks& blocks, int k, RunIn<Blocks> in, RunWords<Blocks> words,
                                                uint32_t mode) {
  const auto at = blocks.at(k);
  RunOut<Blocks> out;
#pragma unroll 1
  for (int i = 0; i < kRun<Blocks>; ++i) out.at[i] = at(in.at[i], Blocks::At::random ? words.at[i] : mode);
  return out;
}

/// A thread's elements by the quick way, if it serves them all.
template <bool kPlain, class Blocks>
LOWPREC_DEVICE bool try_quick(const QuickOf<Blocks>& quick, int k, const RunIn<Blocks>& in,
                              const RunWords<Blocks>& words, RunOut<Blocks>& out) {
  using C = typename Blocks::Container;
  float x[kRun<Blocks>];
#pragma unroll
  for (int i = 0; i < kRun<Blocks>; ++i) x[i] = to_float(C{}, in.at[i]);
  if (!all_numbers<kRun<Blocks>>(x)) return false;
  const float down = power_of_two(-k);
  if constexpr (QuickOf<Blocks>::codes) {
    uint32_t fours[kRun<Blocks> / 4] = {};
#pragma unroll
    for (int i = kRun<Blocks> - 1; i >= 0; --i) {
      const uint32_t code = quick.cast.template apply<kPlain>(__fmul_rz(x[i], down), words.at[i]);
      fours[i / 4] = (fours[i / 4] << 8) + stored(code, quick.sign, !kPlain && quick.twos_complement);
    }
#pragma unroll
    for (int i = 0; i < kRun<Blocks>; i += 4) reinterpret_cast<uint32_t*>(out.at)[i / 4] = fours[i / 4];
  } else {
    const float up = power_of_two(k);
#pragma unroll
    for (int i = 0; i < kRun<Blocks>; ++i) {
      x[i] = __fmul_rn(quick.cast.template apply<kPlain>(__fmul_rz(x[i], down), words.at[i]), up);
    }
    store(C{}, x, out);
  }
  return true;
}

/// Blocks of 2^shift runs, one after another, for up to a warp of threads. The arrays are aligned.
template <class Blocks>
__global__ void __launch_bounds__(kThreads, 4)
    rows_kernel(const __grid_constant__ Blocks blocks, const QuickOf<Blocks> quick, const BlockArrays<Blocks> arrays,
                const int64_t runs, const int shift, const DeviceDraws draws, const uint32_t mode) {
  using C = typename Blocks::Container;
  const int lanes = 1 << shift;
  using Word = typename C::Word;
  const DrawOne draw_from(draws);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t turn = static_cast<int64_t>(blockIdx.x) * kThreads; turn < runs; turn += step) {
    const int64_t run = turn + threadIdx.x;
    const bool active = run < runs;
    RunIn<Blocks> in = {};
    if (active) in = reinterpret_cast<const RunIn<Blocks>*>(arrays.x)[run];
    Word largest = 0;
#pragma unroll
    for (int i = 0; i < kRun<Blocks>; ++i) {
      const Word magnitude = in.at[i] & (C::sign - 1);
      largest = largest > magnitude ? largest : magnitude;
    }
    for (int mask = 1; mask < lanes; mask *= 2) {
      const Word other = shuffle(largest, mask);
      largest = largest > other ? largest : other;
    }
    Peak<C> peak{largest, 0, 0};
    if (__any_sync(kEveryone, largest >= C::infinity)) {
      peak.amax = 0;
#pragma unroll
      for (int i = 0; i < kRun<Blocks>; ++i) peak.add(in.at[i] & (C::sign - 1));
      peak = over_lanes(peak, lanes);
    }
    if (!active) continue;
    const int k = blocks.scales.of(peak.amax, peak.infinite);
    if ((run & (lanes - 1)) == 0) write_scale(blocks, arrays.scales, run >> shift, k, peak.nan);
    RunWords<Blocks> words = {};
    if constexpr (Blocks::At::random) {
#pragma unroll
      for (int i = 0; i < kRun<Blocks>; i += 8) {
        draw<8>(draw_from.bits, draw_from.seed, draw_from.offset, run * kRun<Blocks> + i, words.at + i);
      }
    }
    RunOut<Blocks> out;
    const bool done = quick.usable && (quick.cast.grid.plain ? try_quick<true>(quick, k, in, words, out)
                                                             : try_quick<false>(quick, k, in, words, out));
    if (!done) out = cast_run(blocks, k, in, words, mode);
    reinterpret_cast<RunOut<Blocks>*>(arrays.out)[run] = out;
  }
}

// NVFP4 along contiguous rows, to nearest even.

template <class Blocks>
constexpr bool four_bit = false;
template <class C, class Target>
  requires(sizeof(typename C::Bits) <= 4 && (std::is_same_v<Target, Values> || std::is_same_v<Target, uint8_t>))
constexpr bool four_bit<RatioBlocks<C, NearestEven, Target>> = true;

/// A thread's elements by the way that serves every number. Not inlined: it is rarely taken.
template <class Blocks>
__device__ __noinline__ RunOut<Blocks> cast_ratio(const Blocks& given, uint32_t tensor_scale,
                                                  Peak<typename Blocks::Container> peak, RunIn<Blocks> in,
                                                  uint32_t& code) {
  Blocks blocks = given;
  blocks.take(tensor_scale);
  const auto scale = blocks.scales.of(peak.amax, peak.infinite);
  code = peak.nan ? blocks.nan() : blocks.scales.code(scale);
  const auto at = blocks.at(scale);
  RunOut<Blocks> out;
#pragma unroll 1
  for (int i = 0; i < kRun<Blocks>; ++i) out.at[i] = at(in.at[i], 0);
  return out;
}

/// Blocks of 2^shift runs, one after another, for up to a warp of threads. The arrays are aligned.
template <class Blocks>
__global__ void __launch_bounds__(kThreads)
    four_bit_kernel(const __grid_constant__ Blocks blocks, const BlockArrays<Blocks> arrays, const int64_t runs,
                    const int shift) {
  using C = typename Blocks::Container;
  using Word = typename C::Word;
  constexpr bool codes = !Blocks::At::values;
  const int lanes = 1 << shift;
  const uint32_t tensor_scale = *arrays.tensor_scale;
  const FourBitScale scales(tensor_scale);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t turn = static_cast<int64_t>(blockIdx.x) * kThreads; turn < runs; turn += step) {
    const int64_t run = turn + threadIdx.x;
    const bool active = run < runs;
    RunIn<Blocks> in = {};
    if (active) in = reinterpret_cast<const RunIn<Blocks>*>(arrays.x)[run];
    Word largest = 0;
#pragma unroll
    for (int i = 0; i < kRun<Blocks>; ++i) {
      const Word magnitude = in.at[i] & (C::sign - 1);
      largest = largest > magnitude ? largest : magnitude;
    }
    for (int mask = 1; mask < lanes; mask *= 2) {
      const Word other = shuffle(largest, mask);
      largest = largest > other ? largest : other;
    }
    uint32_t code = largest < C::infinity ? scales.code(to_float(C{}, static_cast<typename C::Bits>(largest))) : 0;
    const double divisor = scales.divisor(code);
    const bool quick = code && FourBitBlock<C>::serves(divisor);
    Peak<C> peak{largest, 0, 0};
    if (__any_sync(kEveryone, !quick)) {
      peak.amax = 0;
#pragma unroll
      for (int i = 0; i < kRun<Blocks>; ++i) peak.add(in.at[i] & (C::sign - 1));
      peak = over_lanes(peak, lanes);
    }
    if (!active) continue;
    RunOut<Blocks> out;
    if (quick) {
      const FourBitBlock<C> block(divisor);
#pragma unroll
      for (int i = 0; i < kRun<Blocks>; ++i) {
        const bool minus = in.at[i] & C::sign;
        const float x = to_float(C{}, static_cast<typename C::Bits>(in.at[i] & (C::sign - 1)));
        const uint32_t found = block.template find<codes>(as_bits(x));
        out.at[i] = static_cast<typename Blocks::Output>(found | (minus ? (codes ? 8u : uint32_t{C::sign}) : 0u));
      }
    } else {
      uint32_t found;
      out = cast_ratio(blocks, tensor_scale, peak, in, found);
      code = found;
    }
    if (arrays.scales && (run & (lanes - 1)) == 0) arrays.scales[run >> shift] = static_cast<uint8_t>(code);
    reinterpret_cast<RunOut<Blocks>*>(arrays.out)[run] = out;
  }
}

/// Codes to values, one element at a time.
template <class Op>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(Op op, const typename Op::Input* codes, const uint8_t* scales, const uint32_t* tensor_scale,
                  typename Op::Output* out, const TileGrid grid, const int64_t count) {
  if (tensor_scale) op.take(*tensor_scale);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t row = i / grid.columns, column = i - row * grid.columns;
    const int64_t strip = row / grid.rows * grid.down + row % grid.rows / grid.height;
    out[i] = op(codes[i], op.scale(scales[strip * grid.across + column / grid.width]));
  }
}

}  // namespace lowprec
