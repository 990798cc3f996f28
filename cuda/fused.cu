// The fused casts on CUDA. Casts into both layouts go by tiles through shared memory, the others element by element.

#include <algorithm>
#include <cstdint>

#include "lowprec/cast_kernel.h"
#include "lowprec/fused_ops.h"
#include "lowprec/fused_quick.h"
#include "lowprec/inline.h"
#include "lowprec/launch.h"
#include "lowprec/philox.h"
#include "lowprec/quick.h"

namespace lowprec {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 32;  // several times what it holds, so that none ends early

/// The words of elements, by their index; zeros where nothing is drawn.
struct AnyDraw {
  uint64_t seed;
  uint64_t offset;
  int bits;
  bool random;

  __device__ AnyDraw(const DeviceDraws& from, bool random)
      : seed(from.seed.read()), offset(from.offset.read()), bits(from.bits), random(random) {}

  /// Of four elements, from a multiple of four on.
  __device__ Words four(int64_t index) const { return random ? draw_four(bits, seed, offset, index) : Words{}; }
  __device__ uint32_t one(int64_t index) const { return random ? draw_one(bits, seed, offset, index) : 0; }
};

// Elements of any width, as 64-bit words.

__device__ uint64_t load_one(const Array& from, int64_t i) {
  switch (from.bytes) {
    case 8:
      return static_cast<const uint64_t*>(from.data)[i];
    case 4:
      return static_cast<const uint32_t*>(from.data)[i];
    case 2:
      return static_cast<const uint16_t*>(from.data)[i];
    default:
      return static_cast<const uint8_t*>(from.data)[i];
  }
}

__device__ void store_one(const Array& to, int64_t i, uint64_t bits) {
  switch (to.bytes) {
    case 8:
      static_cast<uint64_t*>(to.data)[i] = bits;
      return;
    case 4:
      static_cast<uint32_t*>(to.data)[i] = static_cast<uint32_t>(bits);
      return;
    case 2:
      static_cast<uint16_t*>(to.data)[i] = static_cast<uint16_t>(bits);
      return;
    default:
      static_cast<uint8_t*>(to.data)[i] = static_cast<uint8_t>(bits);
  }
}

/// Four elements that move together, in accesses of up to 16 bytes.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  T at[4];
};

struct Quad {
  uint64_t at[4];
};

template <class T>
__device__ Quad load_as(const Array& from, int64_t quad) {
  const Four<T> four = static_cast<const Four<T>*>(from.data)[quad];
  return {{four.at[0], four.at[1], four.at[2], four.at[3]}};
}

template <class T>
__device__ void store_as(const Array& to, int64_t quad, const Quad& bits) {
  Four<T> four;
#pragma unroll
  for (int j = 0; j < 4; ++j) four.at[j] = static_cast<T>(bits.at[j]);
  static_cast<Four<T>*>(to.data)[quad] = four;
}

__device__ Quad load_four(const Array& from, int64_t quad) {
  switch (from.bytes) {
    case 8:
      return load_as<uint64_t>(from, quad);
    case 4:
      return load_as<uint32_t>(from, quad);
    case 2:
      return load_as<uint16_t>(from, quad);
    default:
      return load_as<uint8_t>(from, quad);
  }
}

__device__ void store_four(const Array& to, int64_t quad, const Quad& bits) {
  switch (to.bytes) {
    case 8:
      return store_as<uint64_t>(to, quad, bits);
    case 4:
      return store_as<uint32_t>(to, quad, bits);
    case 2:
      return store_as<uint16_t>(to, quad, bits);
    default:
      return store_as<uint8_t>(to, quad, bits);
  }
}

bool aligned_fours(const Array& array) {
  return reinterpret_cast<uintptr_t>(array.data) % std::min(4 * array.bytes, 16) == 0;
}

/// y + x, in place.
struct Sums {
  Accumulate op;
  QuickSums quick;
  bool usable;
  Array y;
  Array x;

  struct Common {};
  __device__ Common common() const { return {}; }

  __device__ uint64_t apply(uint64_t y_bits, uint64_t x_bits, uint32_t word) const {
    uint64_t sum;
    if (usable && quick.apply(y_bits, x_bits, sum)) return sum;
    return slow(op, y_bits, x_bits, word);
  }

  __device__ void four(int64_t quad, const Words& words, Common) const {
    Quad sums = load_four(y, quad);
    const Quad terms = load_four(x, quad);
#pragma unroll
    for (int j = 0; j < 4; ++j) sums.at[j] = apply(sums.at[j], terms.at[j], words.word[j]);
    store_four(y, quad, sums);
  }

  __device__ void one(int64_t i, uint32_t word) const { store_one(y, i, apply(load_one(y, i), load_one(x, i), word)); }

 private:
  static __device__ __noinline__ uint64_t slow(const Accumulate& op, uint64_t y_bits, uint64_t x_bits, uint32_t word) {
    return op(y_bits, x_bits, word);
  }
};

/// act(scale · x + bias).
template <Activation kind>
struct Activations {
  Activate op;
  QuickActivations quick;
  bool usable;
  Array x;
  Array out;
  Affine affine;

  /// Scale and bias, where they are the same for all elements.
  struct Common {
    double scale;
    double bias;
  };
  __device__ Common common() const { return {read_double(affine.scale, 0), read_double(affine.bias, 0)}; }

  __device__ uint64_t apply(uint64_t bits, double scale, double bias, uint32_t word) const {
    uint64_t result;
    if (usable && quick.apply<kind>(op, bits, scale, bias, result)) return result;
    return slow(op, bits, scale, bias, word);
  }

  __device__ void four(int64_t quad, const Words& words, const Common& common) const {
    Quad bits = load_four(x, quad);
    if (!affine.varies()) {
#pragma unroll
      for (int j = 0; j < 4; ++j) bits.at[j] = apply(bits.at[j], common.scale, common.bias, words.word[j]);
    } else {
      int64_t rest = 4 * quad % affine.inner, channel = affine.channel(4 * quad);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const double factor = read_double(affine.scale, channel), summand = read_double(affine.bias, channel);
        bits.at[j] = apply(bits.at[j], factor, summand, words.word[j]);
        if (++rest < affine.inner) continue;
        rest = 0;
        channel = channel + 1 < affine.count ? channel + 1 : 0;
      }
    }
    store_four(out, quad, bits);
  }

  __device__ void one(int64_t i, uint32_t word) const {
    const int64_t channel = affine.varies() ? affine.channel(i) : 0;
    const double factor = read_double(affine.scale, channel), summand = read_double(affine.bias, channel);
    store_one(out, i, apply(load_one(x, i), factor, summand, word));
  }

 private:
  static __device__ __noinline__ uint64_t slow(const Activate& op, uint64_t bits, double scale, double bias,
                                               uint32_t word) {
    return op.apply<kind>(bits, scale, bias, word);
  }
};

/// The first `quads` fours, then what elements are left one by one.
template <class Work>
__global__ void __launch_bounds__(kThreads)
    fused_kernel(const __grid_constant__ Work work, int64_t count, int64_t quads, const DeviceDraws draws) {
  const auto common = work.common();
  const AnyDraw draw(draws, work.op.round.choice.random);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t quad = thread; quad < quads; quad += threads) work.four(quad, draw.four(4 * quad), common);
#pragma unroll 1
  for (int64_t i = 4 * quads + thread; i < count; i += threads) work.one(i, draw.one(i));
}

int multiprocessors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <class Work>
void launch(const Work& work, const Tensor& x, bool aligned, const DeviceDraws& draws) {
  const DeviceGuard guard(x.get_device_index());
  const int64_t count = x.numel(), quads = aligned ? count / 4 : 0;
  const int64_t blocks = ((aligned ? quads : count) + kThreads) / kThreads;
  const int64_t most = multiprocessors(x.get_device_index()) * kBlocksPerMultiprocessor;
  fused_kernel<<<static_cast<int>(std::min(blocks, most)), kThreads, 0, current_stream(x)>>>(work, count, quads, draws);
  check_cuda(cudaGetLastError());
}

// Casts into both layouts.

/// Matrices, one after the other, and where their casts go.
struct Matrices {
  Array x;
  Array rows;     // as x lies; without data if not wanted
  Array columns;  // as its transpose lies
  bool row_values;
  bool column_values;
  int64_t height;
  int64_t width;
  int64_t count;
};

/// A tile's place: its corner in one of the matrices.
struct Corner {
  int64_t matrix;
  int64_t row;
  int64_t column;

  __device__ Corner(int64_t tile, const Matrices& m, int high, int wide) {
    const int64_t across = (m.width + wide - 1) / wide, down = (m.height + high - 1) / high;
    column = tile % across * wide;
    row = tile / across % down * high;
    matrix = tile / across / down;
  }
};

/// Any dtype, format and mode.
struct AnyCast {
  Layout x;
  Rounder round;
  Writer write;

  __device__ void apply(uint64_t bits, uint32_t word, uint64_t& value, uint64_t& code) const {
    const Number number = x.read(bits);
    const uint64_t magnitude = round(number, word);
    value = number.nan ? bits : write(magnitude, number.negative);
    code = number.nan ? round.to.nan(number.negative) : round.to.with_sign(magnitude, number.negative);
  }
};

constexpr int kSide = 32;

__global__ void __launch_bounds__(kThreads)
    transpose_any(const AnyCast cast, const Matrices m, int64_t tiles, const DeviceDraws draws) {
  __shared__ uint64_t staged[kSide][kSide + 1];
  const AnyDraw draw(draws, cast.round.choice.random);
  const int lane = threadIdx.x % kSide, first = threadIdx.x / kSide;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Corner at(tile, m, kSide, kSide);
    const int64_t base = at.matrix * m.height * m.width;
    for (int r = first; r < kSide; r += kThreads / kSide) {
      if (at.row + r >= m.height || at.column + lane >= m.width) continue;
      const int64_t i = base + (at.row + r) * m.width + at.column + lane;
      uint64_t value, code;
      cast.apply(load_one(m.x, i), draw.one(i), value, code);
      if (m.rows.data) store_one(m.rows, i, m.row_values ? value : code);
      staged[r][lane] = m.column_values ? value : code;
    }
    __syncthreads();
    for (int c = first; m.columns.data && c < kSide; c += kThreads / kSide) {
      if (at.column + c >= m.width || at.row + lane >= m.height) continue;
      store_one(m.columns, base + (at.column + c) * m.height + at.row + lane, staged[lane][c]);
    }
    __syncthreads();
  }
}

/// Casts to values in dtype D and to codes of up to 8 bits, for as many elements as 16 bytes hold: the quick way, and
/// the one for what that does not serve. Where both are wanted, the code is that of the value, which needs no rounding.
template <class D, class Mode>
struct ByteCast {
  Quick<Quantize<D, Mode>> quantize;
  Quick<Encode<D, TowardZero, uint8_t>> exact;
  Quick<Encode<D, Mode, uint8_t>> encode;
  AnyCast any;
  bool values;
  bool quick;

  static constexpr int width = 16 / sizeof(typename D::Bits);
  using Values = Chunk<typename D::Bits, width>;
  using Codes = Chunk<uint8_t, width>;

  ByteCast(const Format& format, bool saturate, bool values, const AnyCast& any)
      : quantize(format, saturate), exact(format, saturate), encode(format, saturate), any(any), values(values) {
    quick = encode.usable && (!values || quantize.usable);
  }

  /// The values where they are wanted, and the codes.
  __device__ void apply(const Values& x, int64_t index, const AnyDraw& draw, Values& rounded, Codes& codes) const {
    ChunkWords<Quantize<D, Mode>> words{};
    if constexpr (Mode::random) lowprec::draw<width>(draw.bits, draw.seed, draw.offset, index, words.at);
    if (values) {
      quantize.template apply<false>(x, words, rounded);
      exact.template apply<false>(rounded, ChunkWords<Encode<D, TowardZero, uint8_t>>{}, codes);
    } else {
      encode.template apply<false>(x, reinterpret_cast<const EncodeWords&>(words), codes);
    }
  }

 private:
  using EncodeWords = ChunkWords<Encode<D, Mode, uint8_t>>;
};

// A tile of bytes: a thread packs the codes of four neighbours in a row into a word, then takes the words of 16 rows
// and writes 16 bytes of each of their four columns, so that eight threads fill a line of 128 bytes.
constexpr int kTileRows = 128;
constexpr int kTileColumns = 64;
constexpr int kTileThreads = 128;
constexpr int kRowsAtOnce = 16;
constexpr int kQuads = kTileColumns / 4;
// Every 16 rows begin four banks further on: eight groups of rows and four columns of words then meet 32 banks.
constexpr int kShift = 4;

__device__ int staged_at(int row, int quad) { return row * kQuads + row / kRowsAtOnce * kShift + quad; }

/// The bytes of four words, one word for each place: a 4 x 4 transpose.
__device__ void transpose_bytes(const uint32_t (&rows)[4], uint32_t (&columns)[4]) {
  const uint32_t low01 = __byte_perm(rows[0], rows[1], 0x5140), high01 = __byte_perm(rows[0], rows[1], 0x7362);
  const uint32_t low23 = __byte_perm(rows[2], rows[3], 0x5140), high23 = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(low01, low23, 0x5410);
  columns[1] = __byte_perm(low01, low23, 0x7632);
  columns[2] = __byte_perm(high01, high23, 0x5410);
  columns[3] = __byte_perm(high01, high23, 0x7632);
}

/// What the quick way does not serve: a few elements from memory to memory.
__device__ __noinline__ void cast_slowly(const AnyCast& cast, const Matrices& m, int64_t begin, int count,
                                         const AnyDraw& draw, uint8_t* staged) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    uint64_t value, code;
    cast.apply(load_one(m.x, begin + i), draw.one(begin + i), value, code);
    if (m.rows.data) store_one(m.rows, begin + i, m.row_values ? value : code);
    staged[i] = static_cast<uint8_t>(code);
  }
}

template <class D, class Mode>
__device__ void cast_tile(const ByteCast<D, Mode>& cast, const Matrices& m, const Corner& at, const AnyDraw& draw,
                          uint32_t* staged) {
  using Cast = ByteCast<D, Mode>;
  constexpr int width = Cast::width, across = kTileColumns / width, down = kTileThreads / across;
  constexpr int steps = kTileRows / down, together = 4;
  const int column = threadIdx.x % across * width, first = threadIdx.x / across;
  if (at.column + column >= m.width) return;
  const int64_t corner = (at.matrix * m.height + at.row) * m.width + at.column + column;
  const auto* x = static_cast<const typename D::Bits*>(m.x.data);
#pragma unroll 1
  for (int step = 0; step < steps; step += together) {
    typename Cast::Values chunks[together];
#pragma unroll
    for (int k = 0; k < together; ++k) {
      const int row = first + (step + k) * down;
      if (at.row + row < m.height)
        chunks[k] = *reinterpret_cast<const typename Cast::Values*>(x + corner + row * m.width);
    }
#pragma unroll
    for (int k = 0; k < together; ++k) {
      const int row = first + (step + k) * down;
      const int64_t i = corner + row * m.width;
      if (at.row + row >= m.height) break;
      uint32_t* words = staged + staged_at(row, column / 4);
      if (!cast.quick) {
        cast_slowly(cast.any, m, i, width, draw, reinterpret_cast<uint8_t*>(words));
        continue;
      }
      typename Cast::Values rounded;
      typename Cast::Codes codes;
      cast.apply(chunks[k], i, draw, rounded, codes);
      *reinterpret_cast<typename Cast::Codes*>(words) = codes;
      if (!m.rows.data) continue;
      if (m.row_values) {
        *reinterpret_cast<typename Cast::Values*>(static_cast<typename D::Bits*>(m.rows.data) + i) = rounded;
      } else {
        *reinterpret_cast<typename Cast::Codes*>(static_cast<uint8_t*>(m.rows.data) + i) = codes;
      }
    }
  }
}

/// Write 16 rows of four columns, whose bytes lie next to each other in the transposed result.
__device__ void write_columns(const Matrices& m, const Corner& at, const uint32_t* staged) {
  const int group = threadIdx.x % (kTileRows / kRowsAtOnce), quad = threadIdx.x / (kTileRows / kRowsAtOnce);
  const int64_t row = at.row + group * kRowsAtOnce, column = at.column + 4 * quad;
  if (row >= m.height || column >= m.width) return;
  uint32_t columns[4][4];  // four columns of 16 bytes
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t rows[4], turned[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) rows[j] = staged[staged_at(group * kRowsAtOnce + 4 * i + j, quad)];
    transpose_bytes(rows, turned);
#pragma unroll
    for (int j = 0; j < 4; ++j) columns[j][i] = turned[j];
  }
  auto* out = static_cast<uint8_t*>(m.columns.data) + (at.matrix * m.width + column) * m.height + row;
  const bool whole = m.height % kRowsAtOnce == 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint8_t* to = out + j * m.height;
    if (whole) {
      *reinterpret_cast<uint4*>(to) = make_uint4(columns[j][0], columns[j][1], columns[j][2], columns[j][3]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (row + i < m.height) to[i] = static_cast<uint8_t>(columns[j][i / 4] >> (8 * (i % 4)));
    }
  }
}

template <class D, class Mode>
__global__ void __launch_bounds__(kTileThreads, 5)
    transpose_bytes_kernel(const __grid_constant__ ByteCast<D, Mode> cast, const __grid_constant__ Matrices m,
                           int64_t tiles, const DeviceDraws draws) {
  __shared__ alignas(16) uint32_t staged[kTileRows * kQuads + kTileRows / kRowsAtOnce * kShift];
  const AnyDraw draw(draws, Mode::random);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Corner at(tile, m, kTileRows, kTileColumns);
    cast_tile(cast, m, at, draw, staged);
    __syncthreads();
    write_columns(m, at, staged);
    __syncthreads();
  }
}

int64_t tiles_of(const Matrices& m, int high, int wide) {
  return m.count * ((m.height + high - 1) / high) * ((m.width + wide - 1) / wide);
}

/// Whether 16 bytes of x at a time lie where such accesses may, and the same elements of the results.
bool byte_tiles_fit(const Matrices& m) {
  const auto aligned = [](const Array& array) { return reinterpret_cast<uintptr_t>(array.data) % 16 == 0; };
  return m.x.bytes <= 4 && m.columns.data && m.columns.bytes == 1 && !m.column_values && aligned(m.x) &&
         aligned(m.rows) && aligned(m.columns) && m.width % (16 / m.x.bytes) == 0;
}

Vector device_vector(const MaybeTensor& x) {
  if (!x) return {};
  const Vector vector(*x);
  if (x->is_cuda()) return vector;
  Vector number;
  number.value = vector.at(0);
  return number;
}

struct Cuda {
  static Vector vector(const MaybeTensor& x) { return device_vector(x); }

  static void accumulate(const Accumulate& op, const Tensor& y, const Tensor& x, const Source& source,
                         const Target& target, const std::optional<Format>& codes) {
    const QuickSums quick{reader_of(y, std::nullopt), reader_of(x, codes),
                          writer_of(y, target.format, false, target.rounding, target.saturate)};
    const Sums work{op, quick, quick.usable(), Array(y), Array(x)};
    const bool aligned = aligned_fours(work.y) && aligned_fours(work.x);
    launch(work, y, aligned, device_draws(y, source));
  }

  static void activate(const Activate& op, Activation kind, const Tensor& x, const Tensor& out, const Affine& affine,
                       const Source& source, const Target& target) {
    const QuickActivations quick{reader_of(x, std::nullopt),
                                 writer_of(out, target.format, op.codes, target.rounding, target.saturate)};
    const DeviceDraws draws = device_draws(x, source);
    for_activation(kind, [&](auto chosen) {
      const Activations<decltype(chosen)::value> work{op, quick, quick.usable(), Array(x), Array(out), affine};
      launch(work, x, aligned_fours(work.x) && aligned_fours(work.out), draws);
    });
  }

  static void transpose(const Tensor& x, const Format& format, int64_t rounding, bool saturate, const Source& source,
                        const MaybeTensor& rows, const MaybeTensor& columns) {
    const int64_t height = x.size(x.dim() - 2), width = x.size(x.dim() - 1);
    const auto array = [](const MaybeTensor& out) { return out ? Array(*out) : Array(); };
    const auto values = [&](const MaybeTensor& out) { return out && out->scalar_type() == x.scalar_type(); };
    const Matrices m{Array(x),        array(rows), array(columns), values(rows),
                     values(columns), height,      width,          x.numel() / (height * width)};
    const Layout own = layout_of(x.scalar_type()), to = Layout::of(format);
    const AnyCast any{own, {to, rounding, saturate || format.specials == Specials::finite}, {to, own}};
    const DeviceDraws draws = device_draws(x, source);
    if (!byte_tiles_fit(m)) {
      return launch_tiles(transpose_any, kThreads, any, x, m, tiles_of(m, kSide, kSide), draws);
    }
    for_rounding(rounding, [&](auto mode) {
      for_container(x.scalar_type(), [&](auto container) {
        using D = decltype(container);
        if constexpr (sizeof(typename D::Bits) <= 4) {
          const ByteCast<D, decltype(mode)> cast(format, saturate, m.row_values, any);
          launch_tiles(transpose_bytes_kernel<D, decltype(mode)>, kTileThreads, cast, x, m,
                       tiles_of(m, kTileRows, kTileColumns), draws);
        }
      });
    });
  }

 private:
  template <class Kernel, class Cast>
  static void launch_tiles(Kernel kernel, int threads, const Cast& cast, const Tensor& x, const Matrices& m,
                           int64_t tiles, const DeviceDraws& draws) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t most = multiprocessors(x.get_device_index()) * kBlocksPerMultiprocessor;
    kernel<<<static_cast<int>(std::min(tiles, most)), threads, 0, current_stream(x)>>>(cast, m, tiles, draws);
    check_cuda(cudaGetLastError());
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { register_fused<Cuda>(library); }

}  // namespace
}  // namespace lowprec
