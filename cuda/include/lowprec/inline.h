// How functions are compiled: for host and device alike, and on the host once for each instruction set.
#pragma once

#include <cstring>
#include <type_traits>

// A scalar function that kernels on either side inline. One definition for both is what makes their bits agree.
// LOWPREC_DEVICE is for what only the device has instructions for.
#ifdef __CUDACC__
#define LOWPREC_INLINE __host__ __device__ __forceinline__
#define LOWPREC_DEVICE __device__ __forceinline__
#else
#define LOWPREC_INLINE inline __attribute__((always_inline))
#define LOWPREC_DEVICE LOWPREC_INLINE
#endif

// A host loop that is compiled for several instruction sets, of which the machine's best is chosen when it is loaded.
// So one library serves every x86-64 machine and still uses the vectors it has.
#if defined(__x86_64__) && defined(__gnu_linux__) && __GNUC__ >= 12 && !defined(__clang__)
#define LOWPREC_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define LOWPREC_CLONES
#endif

namespace lowprec {

LOWPREC_INLINE constexpr int min(int a, int b) { return a < b ? a : b; }
LOWPREC_INLINE constexpr int max(int a, int b) { return a > b ? a : b; }

/// The bits of a value as another type of the same size.
template <class To, class From>
LOWPREC_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To> && std::is_trivially_copyable_v<From>);
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace lowprec
