// Sums and matrix products by the vectors that a CPU has: AVX-512, or AVX2. Each set of instructions has a source file
// of its own; what those share lies in accumulate_step.h and accumulate_panels.h.
#pragma once

#include "lowprec/inline.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LOWPREC_VECTORS 1
#endif

#ifdef LOWPREC_VECTORS

// GCC 12 warns of its own header's undefined operands (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

// Everything that the shared headers need: they are included where functions may use more instructions than the machine
// has, and a function of the standard library that is compiled there must not be taken for everyone's.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>
#include <string_view>
#include <type_traits>
#include <utility>

#endif

#include "lowprec/accumulate.h"
#include "lowprec/accumulate_ops.h"
#include "lowprec/default_arithmetic.h"
#include "lowprec/operands.h"
#include "lowprec/philox.h"
#include "lowprec/round.h"

#ifdef LOWPREC_VECTORS

namespace lowprec {

enum class Vectors { none, avx2, avx512 };

/// The vectors of the machine, or fewer where torch is told so by the same variable.
inline Vectors vectors() {
  static const Vectors found = [] {
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view limit = variable ? variable : "";
    if (limit == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Vectors::none;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    return wide && limit != "avx2" ? Vectors::avx512 : Vectors::avx2;
  }();
  return found;
}

/// Directions of an instruction.
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
constexpr int kZero = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;

/// All outputs of a product; false if these vectors do not serve the accumulator.
template <class C>
bool multiply_avx512(const AccumulatorSpec& spec, uint64_t seed, uint64_t offset, const Product<C>& x,
                     typename CarrierOf<C>::Bits* out);
template <class C>
bool multiply_avx2(const AccumulatorSpec& spec, uint64_t seed, uint64_t offset, const Product<C>& x,
                   typename CarrierOf<C>::Bits* out);

}  // namespace lowprec

#endif
