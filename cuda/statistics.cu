// The cast that gathers statistics, on CUDA: a block takes a page at a time, each of its 256 threads four neighbouring
// lanes. A second kernel of one block adds up the pages.

#include <algorithm>
#include <cstdint>

#include "lowprec/cast_kernel.h"
#include "lowprec/launch.h"
#include "lowprec/quick.h"
#include "lowprec/statistics_ops.h"
#include "lowprec/statistics_quick.h"

namespace lowprec {
namespace {

static_assert(kThreads == kLanes / 4);
constexpr int kBlocksOfPages = 2;            // blocks that a multiprocessor is to hold at once
constexpr int kBlocksPerMultiprocessor = 8;  // of the grid
constexpr int kCopies = 32;                  // of a histogram: one for each thread of a warp, in a bank of its own
constexpr int64_t kNarrow = 256;             // bins that shared memory has room for
constexpr uint32_t kEveryone = 0xffffffff;

/// Four elements, which move in accesses of up to 16 bytes.
template <class T>
using Quad = Chunk<T, 4>;

// Quads move by intrinsics, which stay one access each: stores by assignment were taken apart into one for each element
// where a branch beside them stores elements.
template <class T>
__device__ Quad<T> load_quad(const T* from) {
  using Vector = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  constexpr int vectors = sizeof(Quad<T>) / sizeof(Vector);
  Vector parts[vectors];
#pragma unroll
  for (int i = 0; i < vectors; ++i) parts[i] = __ldg(reinterpret_cast<const Vector*>(from) + i);
  return reinterpret_cast<const Quad<T>&>(parts);
}

template <class T>
__device__ void store_quad(T* to, const Quad<T>& quad) {
  using Vector = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  constexpr int vectors = sizeof(Quad<T>) / sizeof(Vector);
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    __stwb(reinterpret_cast<Vector*>(to) + i, reinterpret_cast<const Vector*>(&quad)[i]);
  }
}

/// An array of `count` elements; `aligned` where quads may begin at every fourth one.
template <class T>
struct Array {
  T* data;
  int64_t count;
  bool aligned;

  Array(T* data, int64_t count)
      : data(data), count(count), aligned(reinterpret_cast<uintptr_t>(data) % alignof(Quad<T>) == 0) {}

  /// The quad at an index; zeros for what lies past the end.
  __device__ Quad<std::remove_const_t<T>> load(int64_t index) const {
    using Bits = std::remove_const_t<T>;
    if (aligned && index + 4 <= count) return load_quad<Bits>(data + index);
    Quad<Bits> quad{};
    for (int j = 0; j < 4; ++j) {
      if (index + j < count) quad.at[j] = data[index + j];
    }
    return quad;
  }

  __device__ void store(int64_t index, const Quad<T>& quad) const {
    if (aligned && index + 4 <= count) {
      store_quad(data + index, quad);
      return;
    }
    for (int j = 0; j < 4; ++j) {
      if (index + j < count) data[index + j] = quad.at[j];
    }
  }
};

/// The counts of a thread.
template <class C>
struct Counts {
  uint32_t saturated = 0;
  uint32_t flushed = 0;
  uint32_t nan = 0;
  typename C::Word amax = 0;  // the bits of a magnitude
  float quick_amax = 0;       // of numbers that went the quick way

  __device__ void add(typename C::Bits x, typename C::Bits y, bool beyond) {
    const auto before = static_cast<typename C::Word>(x & (C::sign - 1));
    const bool is_nan = before > C::infinity;
    nan += is_nan;
    saturated += beyond & !is_nan;
    flushed += ((y & (C::sign - 1)) == 0) & (before != 0);
    if (before < C::infinity && before > amax) amax = before;
  }

  /// A number whose cast left a note.
  __device__ void add(typename C::Bits x, uint32_t note) {
    const auto before = static_cast<typename C::Word>(x & (C::sign - 1));
    nan += before > C::infinity;
    saturated += (note & kNoteSaturated) != 0;
    flushed += (note & kNoteFlushed) != 0;
    if (before < C::infinity && before > amax) amax = before;
  }
};

/// Counts in one block's shared memory, then in the vector of statistics: integers, exact as float64, and a maximum, so
/// the order of blocks does not matter.
struct BlockCounts {
  uint32_t counts[3];
  unsigned long long amax;

  __device__ void clear() {
    if (threadIdx.x < 3) counts[threadIdx.x] = 0;
    if (threadIdx.x == 3) amax = 0;
  }

  template <class C>
  __device__ void add(const Counts<C>& own) {
    const uint32_t warp[] = {__reduce_add_sync(kEveryone, own.saturated), __reduce_add_sync(kEveryone, own.flushed),
                             __reduce_add_sync(kEveryone, own.nan)};
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < 3; ++i) atomicAdd(&counts[i], warp[i]);
    }
    const uint64_t general = amax_bits<C>(own.amax);
    const uint64_t quick = bit_cast<uint64_t>(static_cast<double>(own.quick_amax));
    atomicMax(&amax, static_cast<unsigned long long>(general > quick ? general : quick));
  }

  __device__ void add_to(double* stats) const {
    if (threadIdx.x < 3 && counts[threadIdx.x]) atomicAdd(&stats[kSaturated + threadIdx.x], counts[threadIdx.x]);
    if (threadIdx.x == 3) atomicMax(reinterpret_cast<unsigned long long*>(&stats[kAmax]), amax);
  }
};

/// A block's histogram: in shared memory up to kNarrow bins, else where it is wanted.
class Histogram {
 public:
  __device__ Histogram(int64_t* codes, int64_t bins, uint32_t* shared)
      : codes_(reinterpret_cast<unsigned long long*>(codes)), bins_(static_cast<int>(bins)), shared_(shared) {}

  __device__ void clear() const {
    if (!copied()) return;
    for (int i = threadIdx.x; i < bins_ * kCopies; i += kThreads) shared_[i] = 0;
  }

  __device__ bool wanted() const { return codes_ != nullptr; }

  __device__ void add(uint32_t code) const {
    if (bins_ <= kNarrow) {
      atomicAdd(&shared_[code * kCopies + threadIdx.x % kCopies], 1u);
    } else {
      atomicAdd(&codes_[code], 1ull);
    }
  }

  __device__ void finish() const {
    if (!copied()) return;
    for (int bin = threadIdx.x; bin < bins_; bin += kThreads) {
      uint32_t sum = 0;
      for (int i = 0; i < kCopies; ++i) sum += shared_[bin * kCopies + (bin + i) % kCopies];
      if (sum) atomicAdd(&codes_[bin], static_cast<unsigned long long>(sum));
    }
  }

 private:
  __device__ bool copied() const { return wanted() && bins_ <= kNarrow; }

  unsigned long long* codes_;
  int bins_;
  uint32_t* shared_;
};

/// The way that every format and number can take: the cast, and the codes of its results.
template <class C, class Mode>
struct General {
  Quantize<C, Mode> op;
  Coder<C, Mode> coder;
};

/// Both ways.
template <class C, class Mode>
struct Casts {
  General<C, Mode> general;
  QuickRounder<Mode> quick;

  LOWPREC_INLINE Casts(const Format& format, bool saturate)
      : general{{format, saturate}, {format, saturate}}, quick(format, saturate) {}
};

/// The casts whose exponents a shift on the device moves.
template <class C, class Mode>
__device__ Casts<C, Mode> shifted(const Setting& setting, const Casts<C, Mode>&) {
  Format format = setting.format;
  format.bias -= shift_within(format, C{}, *setting.shift);
  return {format, setting.saturate};
}

/// Cast four elements, none larger than `amax`, by way of float32, and gather.
template <class C, class Mode>
__device__ void cast_quick(const QuickRounder<Mode>& quick, const Quad<typename C::Bits>& from, const uint32_t* words,
                           float amax, Quad<typename C::Bits>& to, Counts<C>& counts, const Histogram& histogram,
                           QuadSums<kTerms>& lanes) {
  float x[4], y[4];
  to_floats(C{}, from, x);
  quick.round(x, words, y, amax, counts.saturated);
  if (any_zero(y)) {
#pragma unroll
    for (int j = 0; j < 4; ++j) counts.flushed += y[j] == 0 && x[j] != 0;
  }
  if (histogram.wanted()) {
#pragma unroll
    for (int j = 0; j < 4; ++j) histogram.add(quick.code_of(y[j]));
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const double before = x[j];
    lanes.at[kAbsolute][j] += fabs(before);
    lanes.at[kTotal][j] += before;
    lanes.at[kSquares][j] = __fma_rn(before, before, lanes.at[kSquares][j]);  // the product is exact
    if constexpr (QuickRounder<Mode>::exact_error) {
      const double error = y[j] - x[j];
      lanes.at[kError][j] = __fma_rn(error, error, lanes.at[kError][j]);
    } else {
      const double error = static_cast<double>(y[j]) - before;
      lanes.at[kError][j] += error * error;
    }
  }
  store(C{}, y, to);
}

template <class C, class Mode>
__device__ void cast_general(const General<C, Mode>& general, const Quad<typename C::Bits>& from, const uint32_t* words,
                             Quad<typename C::Bits>& to, Counts<C>& counts, const Histogram& histogram,
                             QuadSums<kTerms>& lanes) {
  Coder<C, Mode> coder = general.coder;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    to.at[j] = general.op(from.at[j], words[j], coder);
    counts.add(from.at[j], to.at[j], coder.beyond);
    if (histogram.wanted()) histogram.add(coder.code_of(from.at[j]));
    double terms[kTerms];
    terms_of<C>(from.at[j], to.at[j], terms);
#pragma unroll
    for (int term = 0; term < kTerms; ++term) lanes.at[term][j] += terms[term];
  }
}

/// Quads that a thread loads while it works on as many.
template <class C>
constexpr int kQuadsAtOnce = sizeof(typename C::Bits) == 2 ? 4 : 2;

/// A thread's quads of a few rows.
template <class C>
struct Rows {
  Quad<typename C::Bits> quads[kQuadsAtOnce<C>];

  __device__ void load(const Array<const typename C::Bits>& x, int64_t first) {
    constexpr int64_t last = (kQuadsAtOnce<C> - 1) * kLanes + 4;
    if (x.aligned && first + last <= x.count) {
#pragma unroll
      for (int i = 0; i < kQuadsAtOnce<C>; ++i) {
        quads[i] = load_quad<typename C::Bits>(x.data + first + i * kLanes);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kQuadsAtOnce<C>; ++i) quads[i] = x.load(first + i * kLanes);
    }
  }

  /// Max |x|; NaN if an element is.
  __device__ float amax() const {
    float amax = 0;
#pragma unroll
    for (int i = 0; i < kQuadsAtOnce<C>; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) amax = max_or_nan(amax, fabsf(to_float(C{}, quads[i].at[j])));
    }
    return amax;
  }
};

template <class C, class Mode>
__global__ void __launch_bounds__(kThreads, kBlocksOfPages)
    page_kernel(const Casts<C, Mode> given, const Setting setting, const Array<const typename C::Bits> x,
                const Array<typename C::Bits> out, const DeviceDraws draws, double* pages, double* stats,
                int64_t* codes, int64_t bins) {
  extern __shared__ uint32_t copies[];
  __shared__ double sums[kTerms][8];
  __shared__ BlockCounts block_counts;
  // Shared memory, not registers, has what few elements need.
  __shared__ alignas(General<C, Mode>) unsigned char room[sizeof(General<C, Mode>)];
  auto& general = reinterpret_cast<General<C, Mode>&>(room);
  const Histogram histogram(codes, bins, copies);
  histogram.clear();
  block_counts.clear();
  QuickRounder<Mode> quick = given.quick;
  if (setting.shift) {
    const Casts<C, Mode> casts = shifted(setting, given);
    quick = casts.quick;
    if (threadIdx.x == 0) general = casts.general;
  } else {
    if (threadIdx.x == 0) general = given.general;
  }
  __syncthreads();
  const uint64_t seed = Mode::random ? draws.seed.read() : 0;
  const uint64_t offset = Mode::random ? draws.offset.read() : 0;
  Counts<C> counts;

  int64_t begin = blockIdx.x * kPage;
  Rows<C> next;
  next.load(x, begin + 4 * threadIdx.x);
  while (begin < x.count) {
    const int64_t next_begin = begin + gridDim.x * kPage;
    const int left = x.count - begin < kPage ? static_cast<int>(x.count - begin) : static_cast<int>(kPage);
    QuadSums<kTerms> lanes;
#pragma unroll 1
    for (int row = 0; row < kRows; row += kQuadsAtOnce<C>) {
      const Rows<C> rows = next;
      const int next_row = row + kQuadsAtOnce<C>;
      const int64_t ahead = next_row < kRows ? begin + next_row * kLanes : next_begin;
      next.load(x, ahead + 4 * threadIdx.x);
      const int first = row * kLanes + 4 * static_cast<int>(threadIdx.x);
      if constexpr (sizeof(typename C::Bits) <= 4) {
        const float amax = rows.amax();
        if (left == kPage && out.aligned && quick.usable && amax < quick.bound) {
          counts.quick_amax = fmaxf(counts.quick_amax, amax);
#pragma unroll
          for (int i = 0; i < kQuadsAtOnce<C>; ++i) {
            const int64_t index = begin + first + i * kLanes;
            const Words words = Mode::random ? draw_four(draws.bits, seed, offset, index) : Words{};
            Quad<typename C::Bits> results;
            cast_quick<C>(quick, rows.quads[i], words.word, amax, results, counts, histogram, lanes);
            store_quad(out.data + index, results);
          }
          continue;
        }
      }
#pragma unroll 1
      for (int place = first; place < first + kQuadsAtOnce<C> * kLanes && place < left; place += kLanes) {
        const Words words = Mode::random ? draw_four(draws.bits, seed, offset, begin + place) : Words{};
        Quad<typename C::Bits> results;
        cast_general(general, x.load(begin + place), words.word, results, counts, histogram, lanes);
        out.store(begin + place, results);
      }
    }
    const double total = add_lanes(lanes, sums);
    if (threadIdx.x < kTerms) pages[begin / kPage * kTerms + threadIdx.x] = total;
    begin = next_begin;
  }
  block_counts.add(counts);
  __syncthreads();
  block_counts.add_to(stats);
  histogram.finish();
}

/// One pass over what a cast left behind.
template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksOfPages)
    note_kernel(const Array<const typename C::Bits> x, const Array<const typename C::Bits> y,
                const Array<const uint32_t> notes, double* pages, double* stats, int64_t* codes, int64_t bins) {
  extern __shared__ uint32_t copies[];
  __shared__ double sums[kTerms][8];
  __shared__ BlockCounts block_counts;
  const Histogram histogram(codes, bins, copies);
  histogram.clear();
  block_counts.clear();
  __syncthreads();
  Counts<C> counts;
  for (int64_t begin = blockIdx.x * kPage; begin < x.count; begin += gridDim.x * kPage) {
    QuadSums<kTerms> lanes;
#pragma unroll 2
    for (int row = 0; row < kRows; ++row) {
      const int64_t first = begin + row * kLanes + 4 * threadIdx.x;
      if (first >= x.count) break;
      const auto from = x.load(first), to = y.load(first);
      const auto note = notes.load(first);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        counts.add(from.at[j], note.at[j]);
        if (histogram.wanted()) histogram.add(note.at[j] & kNoteCode);
        double terms[kTerms];
        terms_of<C>(from.at[j], to.at[j], terms);
#pragma unroll
        for (int term = 0; term < kTerms; ++term) lanes.at[term][j] += terms[term];
      }
    }
    const double total = add_lanes(lanes, sums);
    if (threadIdx.x < kTerms) pages[begin / kPage * kTerms + threadIdx.x] = total;
  }
  block_counts.add(counts);
  __syncthreads();
  block_counts.add_to(stats);
  histogram.finish();
}

/// Add the pages to the vector. The last quad may have been filled up with zeros, whose code is zero.
__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* pages, int64_t count, double* stats, int64_t* codes) {
  __shared__ double sums[kTerms][8];
  const double total = add_pages<kTerms>(pages, pages_of(count), sums);
  if (threadIdx.x < kTerms) stats[kSums + threadIdx.x] += total;
  if (threadIdx.x == 0) {
    stats[kElements] += static_cast<double>(count);
    if (codes) codes[0] -= (4 - count % 4) % 4;
  }
}

int grid_size(int64_t pages, int device) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return static_cast<int>(std::min<int64_t>(pages, multiprocessors * kBlocksPerMultiprocessor));
}

struct Cuda {
  template <class C, class Mode>
  static void run(const Setting& setting, const Tensor& x, const Tensor& out, const Source& source,
                  const Gathered& to) {
    using Bits = typename C::Bits;
    const DeviceGuard guard(x.get_device_index());
    const DeviceDraws draws = device_draws(x, source);
    const Casts<C, Mode> casts(setting.format, setting.saturate);
    elementwise(x, out, Mode::random, [&](const void* from, void* into, int64_t count) {
      const cudaStream_t stream = current_stream(x);
      const Tensor scratch = torch::stable::new_empty(x, {pages_of(count) * kTerms}, ScalarType::Double);
      auto* pages = static_cast<double*>(scratch.mutable_data_ptr());
      const size_t shared = to.codes && to.bins <= kNarrow ? to.bins * kCopies * sizeof(uint32_t) : 0;
      page_kernel<C, Mode><<<grid_size(pages_of(count), x.get_device_index()), kThreads, shared, stream>>>(
          casts, setting, Array<const Bits>(static_cast<const Bits*>(from), count),
          Array<Bits>(static_cast<Bits*>(into), count), draws, pages, to.stats, to.codes, to.bins);
      check_cuda(cudaGetLastError());
      total_kernel<<<1, kThreads, 0, stream>>>(pages, count, to.stats, to.codes);
      check_cuda(cudaGetLastError());
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { register_statistics<Cuda>(library); }

}  // namespace

void gather_on_cuda(const Tensor& x, const Tensor& results, const Tensor& notes, const Gathered& to) {
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const int64_t count = x.numel(), page_count = pages_of(count);
  const Tensor scratch = torch::stable::new_empty(x, {page_count * kTerms}, ScalarType::Double);
  auto* pages = static_cast<double*>(scratch.mutable_data_ptr());
  const size_t shared = to.codes && to.bins <= kNarrow ? to.bins * kCopies * sizeof(uint32_t) : 0;
  for_container(x.scalar_type(), [&](auto container) {
    using C = decltype(container);
    using Bits = const typename C::Bits;
    note_kernel<C><<<grid_size(page_count, x.get_device_index()), kThreads, shared, stream>>>(
        Array<Bits>(static_cast<Bits*>(x.const_data_ptr()), count),
        Array<Bits>(static_cast<Bits*>(results.const_data_ptr()), count),
        Array<const uint32_t>(static_cast<const uint32_t*>(notes.const_data_ptr()), count), pages, to.stats, to.codes,
        to.bins);
    check_cuda(cudaGetLastError());
  });
  total_kernel<<<1, kThreads, 0, stream>>>(pages, count, to.stats, to.codes);
  check_cuda(cudaGetLastError());
}

}  // namespace lowprec
