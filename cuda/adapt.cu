// The measurement of biases on CUDA, in one kernel: every block asks the state whether the call measures, and if not
// leaves the tensor unread; the last one to be done updates the state.

#include <algorithm>
#include <cstdint>

#include "lowprec/adapt_ops.h"
#include "lowprec/inline.h"
#include "lowprec/statistics.h"

namespace lowprec {
namespace {

constexpr int kThreads = kLanes / 4;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kSumsAtOnce = 3;  // finite elements, Σ|x|, Σx²

/// Elements that move together.
template <class Bits>
struct alignas(16) Chunk {
  static constexpr int width = 16 / sizeof(Bits);
  Bits at[width];
};

template <class C>
__device__ typename C::Word finite_magnitude(typename C::Bits x) {
  const auto magnitude = static_cast<typename C::Word>(x & (C::sign - 1));
  return magnitude < C::infinity ? magnitude : 0;
}

template <class Word>
__device__ void raise(Word& amax, Word magnitude) {
  amax = amax > magnitude ? amax : magnitude;
}

/// The largest finite magnitude of a thread's share of an array: whole chunks, then what is left one by one.
template <class C>
__device__ typename C::Word largest(const typename C::Bits* x, int64_t count) {
  using Inputs = Chunk<typename C::Bits>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % alignof(Inputs) == 0;
  const int64_t chunks = aligned ? count / Inputs::width : 0;
  typename C::Word amax = 0;
#pragma unroll 4
  for (int64_t chunk = thread; chunk < chunks; chunk += threads) {
    const Inputs inputs = reinterpret_cast<const Inputs*>(x)[chunk];
    for (int i = 0; i < Inputs::width; ++i) raise(amax, finite_magnitude<C>(inputs.at[i]));
  }
  for (int64_t i = chunks * Inputs::width + thread; i < count; i += threads) raise(amax, finite_magnitude<C>(x[i]));
  return amax;
}

/// The sums of a block's pages, [pages][sums].
template <class C>
__device__ void add_up(const typename C::Bits* x, int64_t count, double* pages, double (&shared)[kSumsAtOnce][8]) {
  for (int64_t begin = blockIdx.x * kPage; begin < count; begin += gridDim.x * kPage) {
    QuadSums<kSumsAtOnce> lanes;
    for (int row = 0; row < kRows; ++row) {
      const int64_t first = begin + row * kLanes + 4 * threadIdx.x;
      for (int j = 0; j < 4 && first + j < count; ++j) {
        double terms[kTerms];
        terms_of<C>(x[first + j], x[first + j], terms);
        lanes.at[0][j] += (x[first + j] & (C::sign - 1)) < C::infinity;
        lanes.at[1][j] += terms[kAbsolute];
        lanes.at[2][j] += terms[kSquares];
      }
    }
    const double total = add_lanes(lanes, shared);
    if (threadIdx.x < kSumsAtOnce) pages[begin / kPage * kSumsAtOnce + threadIdx.x] = total;
  }
}

/// Whether this block is the last of the grid to come here. What all of them wrote before, the last one sees.
__device__ bool is_last(int64_t* arrived) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto before = atomicAdd(reinterpret_cast<unsigned long long*>(arrived), 1ull);
    last = before == gridDim.x - 1;
  }
  __syncthreads();
  __threadfence();
  return last;
}

template <class C>
__global__ void __launch_bounds__(kThreads) adapt_kernel(const Adaptation rule, const typename C::Bits* x,
                                                         int64_t count, int64_t* state, int64_t* used, double* pages) {
  __shared__ double sums[kSumsAtOnce][8];
  __shared__ double totals[kSumsAtOnce];
  __shared__ unsigned long long block_peak;
  // No block changes these numbers before all have arrived.
  const bool due = measures(rule, state);
  if (due) {
    if (threadIdx.x == 0) block_peak = 0;
    __syncthreads();
    atomicMax(&block_peak, static_cast<unsigned long long>(amax_bits<C>(largest<C>(x, count))));
    __syncthreads();
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned long long*>(&state[kPeak]), block_peak);
    if (rule.by_deviation) add_up<C>(x, count, pages, sums);
  }
  if (!is_last(&state[kArrived])) return;
  if (due && rule.by_deviation) {
    const double total = add_pages<kSumsAtOnce>(pages, pages_of(count), sums);
    if (threadIdx.x < kSumsAtOnce) totals[threadIdx.x] = total;
    __syncthreads();
  }
  if (threadIdx.x > 0) return;
  const uint64_t peak = atomicExch(reinterpret_cast<unsigned long long*>(&state[kPeak]), 0ull);
  int64_t exponent = due ? exponent_of(peak) : kNothing;
  if (due && peak && rule.by_deviation) {
    exponent = exponent_by_deviation(rule.stdv, totals[0], totals[1], totals[2], peak);
  }
  state[kArrived] = 0;
  update(rule, exponent, state, used);
}

int grid_size(const Adaptation& rule, int64_t count, int device) {
  if (rule.bias == Bias::fixed) return 1;
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks = std::max<int64_t>(pages_of(count), 1);
  return static_cast<int>(std::min<int64_t>(blocks, multiprocessors * kBlocksPerMultiprocessor));
}

struct Cuda {
  template <class C>
  static void run(const Adaptation& rule, const Tensor& x, int64_t* state, int64_t* used) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t scratch = rule.by_deviation ? pages_of(x.numel()) * kSumsAtOnce : 0;
    const Tensor pages = torch::stable::new_empty(x, {scratch}, ScalarType::Double);
    adapt_kernel<C><<<grid_size(rule, x.numel(), x.get_device_index()), kThreads, 0, current_stream(x)>>>(
        rule, static_cast<const typename C::Bits*>(x.const_data_ptr()), x.numel(), state, used,
        static_cast<double*>(pages.mutable_data_ptr()));
    check_cuda(cudaGetLastError());
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CUDA, library) { library.impl("adapt", TORCH_BOX(&adapt<Cuda>)); }

}  // namespace
}  // namespace lowprec
