// The kernel of the casts on CUDA: a thread takes a few chunks at a time, far enough apart that its neighbours' lie in
// between. Device code only, without torch.
#pragma once

#include <cstdint>

#include "lowprec/cast.h"
#include "lowprec/format.h"
#include "lowprec/grid.h"
#include "lowprec/philox.h"
#include "lowprec/quick.h"

namespace lowprec {

constexpr int kThreads = 256;
// Blocks that a multiprocessor is to hold at once: the registers that this leaves a thread are those that it needs.
template <class Op>
constexpr int kBlocksAtOnce = 4;
// Chunks that a thread loads before it works on the first: what keeps the memory busy meanwhile.
template <class Op>
constexpr int kChunksAtOnce = 4;

/// A 64-bit word that a kernel reads when it runs, where it is on the device: a replayed graph sees its new value.
struct DeviceWord {
  const int64_t* pointer = nullptr;
  int64_t value = 0;

  LOWPREC_DEVICE int64_t read() const { return pointer ? *pointer : value; }
};

/// What stochastic rounding draws from.
struct DeviceDraws {
  DeviceWord seed;
  DeviceWord offset;
  int bits;
  Place place;
};

/// Both ways of a cast.
template <class Op>
struct Ways {
  Op op;
  Quick<Op> quick;

  LOWPREC_INLINE Ways(const Format& format, bool saturate)
      : op(Setting{format, saturate}.make<Op>()), quick(format, saturate) {}
};

template <class Op>
  requires(!Quick<Op>::exists)
struct Ways<Op> {
  Op op;

  LOWPREC_INLINE Ways(const Format& format, bool saturate) : op(Setting{format, saturate}.make<Op>()) {}
};

/// Values that a shift moves. Codes stay as they are.
template <class Op>
constexpr bool can_shift = false;
template <class C, class Mode>
constexpr bool can_shift<Quantize<C, Mode>> = true;

template <class C, class Mode>
LOWPREC_DEVICE void apply_shift(const Setting& from, Ways<Quantize<C, Mode>>& ways) {
  Format format = from.format;
  format.bias -= shift_within(format, C{}, *from.shift);
  ways = Ways<Quantize<C, Mode>>(format, from.saturate);
}

/// The draws of whole chunks, or of one element.
template <class Op>
class Draw {
 public:
  LOWPREC_DEVICE explicit Draw(const DeviceDraws& from)
      : seed_(from.seed.read()), offset_(from.offset.read()), bits_(from.bits), place_(from.place) {}

  LOWPREC_DEVICE ChunkWords<Op> chunk(int64_t chunk) const {
    ChunkWords<Op> draws;
    if constexpr (Op::random) {
      draw<chunk_width<Op>>(bits_, seed_, offset_, place_.index(chunk * chunk_width<Op>), draws.at);
    } else {
      for (int i = 0; i < chunk_width<Op>; ++i) draws.at[i] = 0;
    }
    return draws;
  }

  LOWPREC_DEVICE uint32_t one(int64_t index) const {
    return Op::random ? draw_one(bits_, seed_, offset_, place_.index(index)) : 0;
  }

 private:
  uint64_t seed_;
  uint64_t offset_;
  int bits_;
  Place place_;
};

/// A thread's chunks of one tile, kThreads apart.
template <class Op, int kChunks>
struct Tile {
  const Inputs<Op>* x;
  Outputs<Op>* out;
  const Draw<Op>& draw;
  int64_t first;

  /// By the quick way, all of them: every load comes before the first store.
  template <bool kPlain>
  LOWPREC_DEVICE void apply(const Quick<Op>& quick) const {
    Inputs<Op> inputs[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) inputs[i] = x[first + i * kThreads];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      Outputs<Op> outputs;
      quick.template apply<kPlain>(inputs[i], draw.chunk(first + i * kThreads), outputs);
      out[first + i * kThreads] = outputs;
    }
  }

  /// By the way that every format can take, those before `chunks`.
  LOWPREC_DEVICE void apply(const Op& op, int64_t chunks) const {
    NoTally none;
#pragma unroll 1
    for (int64_t chunk = first; chunk < min(first + kChunks * kThreads, chunks); chunk += kThreads) {
      const Inputs<Op> inputs = x[chunk];
      const ChunkWords<Op> draws = draw.chunk(chunk);
      Outputs<Op> outputs;
#pragma unroll
      for (int i = 0; i < chunk_width<Op>; ++i) outputs.at[i] = op(inputs.at[i], draws.at[i], none);
      out[chunk] = outputs;
    }
  }

 private:
  static LOWPREC_DEVICE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
};

/// The first `chunks` chunks, then what elements are left one by one: x and out may be the same array, since each
/// thread reads a place before it writes there, and no other one touches it.
template <class Op, int kChunks = kChunksAtOnce<Op>, int kBlocks = kBlocksAtOnce<Op>>
__global__ void __launch_bounds__(kThreads, kBlocks)
    cast_kernel(const Ways<Op> given, const Setting setting, const typename Op::Input* x, typename Op::Output* out,
                int64_t count, int64_t chunks, const DeviceDraws draws) {
  constexpr int64_t size = kThreads * kChunks;
  Ways<Op> ways = given;
  if constexpr (can_shift<Op>) {
    if (setting.shift) apply_shift(setting, ways);
  }
  const Draw<Op> draw(draws);

  for (int64_t begin = blockIdx.x * size; begin < chunks; begin += gridDim.x * size) {
    const Tile<Op, kChunks> tile{reinterpret_cast<const Inputs<Op>*>(x), reinterpret_cast<Outputs<Op>*>(out), draw,
                                 begin + threadIdx.x};
    if constexpr (Quick<Op>::exists) {
      if (ways.quick.usable && begin + size <= chunks) {
        ways.quick.plain ? tile.template apply<true>(ways.quick) : tile.template apply<false>(ways.quick);
        continue;
      }
    }
    tile.apply(ways.op, chunks);
  }
  NoTally none;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t i = chunks * chunk_width<Op> + thread; i < count; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    out[i] = ways.op(x[i], draw.one(i), none);
  }
}

/// How many whole chunks there are; none unless both arrays begin where chunks may, and a shard's draws where theirs
/// do.
template <class Op>
int64_t whole_chunks(const void* x, const void* out, int64_t count, const Place& place) {
  const auto aligned = [](const void* array, size_t to) { return reinterpret_cast<uintptr_t>(array) % to == 0; };
  constexpr int width = chunk_width<Op>;
  const bool runs = place.start % width == 0 && place.width % width == 0 && place.pitch % width == 0;
  const bool usable = aligned(x, alignof(Inputs<Op>)) && aligned(out, alignof(Outputs<Op>)) && (!Op::random || runs);
  return usable ? count / width : 0;
}

}  // namespace lowprec
