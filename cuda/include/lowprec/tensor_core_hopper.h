// Hopper's instructions that the kernel of tensor_core.cu is made of: barriers in shared memory, copies of tiles by the
// tensor memory accelerator, products by a warpgroup. Device code only; empty elsewhere.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/shared_memory.h"

namespace lowprec {

/// A barrier in shared memory that counts arrivals and bytes.
struct Barrier {
  uint64_t state;

  LOWPREC_DEVICE void init(int arrivals) { begin_barrier(shared_address(&state), arrivals); }

  /// Arrive, and announce bytes that copies will bring.
  LOWPREC_DEVICE void expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                 : "memory");
  }

  LOWPREC_DEVICE void arrive() { lowprec::arrive(shared_address(&state)); }

  /// Arrive at the same barrier of a block of the cluster.
  LOWPREC_DEVICE void arrive_at(uint32_t block) {
    asm volatile(
        "{\n .reg .b32 remote;\n"
        " mapa.shared::cluster.u32 remote, %0, %1;\n"
        " mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(&state)),
        "r"(block)
        : "memory");
  }

  LOWPREC_DEVICE void wait(uint32_t parity) { await_phase(shared_address(&state), parity); }
};

/// Copy a box of a tensor of three dimensions to the same place in every block of the cluster that `blocks` has a bit
/// for, and tell the barrier there.
LOWPREC_DEVICE void copy_box(void* to, const CUtensorMap& map, Barrier& barrier, int x, int y, int z, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&barrier.state)), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

LOWPREC_DEVICE void copy_box(void* to, const CUtensorMap& map, Barrier& barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&barrier.state)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

/// The same of what is hardly wanted again: first to leave the L2 cache.
LOWPREC_DEVICE void copy_once(void* to, const CUtensorMap& map, Barrier& barrier, int x, int y, int z) {
  constexpr uint64_t evict_first = 0x12F0000000000000;  // a cache policy, as createpolicy.fractional makes it
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&barrier.state)), "r"(x), "r"(y), "r"(z),
      "l"(evict_first)
      : "memory");
}

LOWPREC_DEVICE uint32_t block_of_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

LOWPREC_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

template <int kRegisters>
LOWPREC_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
LOWPREC_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Order what a warpgroup's threads did to registers and shared memory before the products that follow.
LOWPREC_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

LOWPREC_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Wait until no more than so many groups of products are under way.
template <int kGroups>
LOWPREC_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

/// Keep the compiler from moving what reads or writes registers across this point.
template <int N>
LOWPREC_DEVICE void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

/// A matrix in shared memory, 128 bytes a row in the accelerator's 128-byte swizzle, as the instructions take it: the
/// low half has its place, in units of 16 bytes, and how far one group of 64 columns is from the next (of matrices that
/// lie along their other dimension). The high half is the same for all: 1024 bytes from 8 rows to the next, the
/// swizzle.
LOWPREC_DEVICE uint32_t matrix(uint32_t at, uint32_t leading) { return leading >> 4 << 16 | (at >> 4 & 0x3FFF); }

// The instructions, by the types of their operands: D[64, 128] = A · B + (keep ? D : 0).

enum class Operands : int { bf16, fp16, e4m3_e4m3, e4m3_e5m2, e5m2_e4m3, e5m2_e5m2 };

/// Bytes of an element.
LOWPREC_INLINE constexpr int bytes_of(Operands kind) { return kind <= Operands::fp16 ? 2 : 1; }

#define LOWPREC_EIGHT(d, i)                                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define LOWPREC_WGMMA(types, layout)                                                                                \
  asm volatile(                                                                                                     \
      "{\n .reg .pred keep;\n .reg .b64 a, b;\n setp.ne.b32 keep, %66, 0;\n"                                        \
      " mov.b64 a, {%64, 0x40000040};\n mov.b64 b, {%65, 0x40000040};\n"                                            \
      " wgmma.mma_async.sync.aligned." types                                                                        \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22,"  \
      " %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43,"   \
      " %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"       \
      " a, b, keep, 1, 1" layout ";\n}"                                                                             \
      : LOWPREC_EIGHT(d, 0), LOWPREC_EIGHT(d, 8), LOWPREC_EIGHT(d, 16), LOWPREC_EIGHT(d, 24), LOWPREC_EIGHT(d, 32), \
        LOWPREC_EIGHT(d, 40), LOWPREC_EIGHT(d, 48), LOWPREC_EIGHT(d, 56)                                            \
      : "r"(a), "r"(b), "r"(keep))

/// A lies along the depth; B of 16-bit elements along its columns, of 8-bit ones along the depth.
LOWPREC_DEVICE void multiply_matrices(Operands kind, float (&d)[64], uint32_t a, uint32_t b, int keep) {
  switch (kind) {
    case Operands::bf16:
      LOWPREC_WGMMA("m64n128k16.f32.bf16.bf16", ", 0, 1");
      break;
    case Operands::fp16:
      LOWPREC_WGMMA("m64n128k16.f32.f16.f16", ", 0, 1");
      break;
    case Operands::e4m3_e4m3:
      LOWPREC_WGMMA("m64n128k32.f32.e4m3.e4m3", "");
      break;
    case Operands::e4m3_e5m2:
      LOWPREC_WGMMA("m64n128k32.f32.e4m3.e5m2", "");
      break;
    case Operands::e5m2_e4m3:
      LOWPREC_WGMMA("m64n128k32.f32.e5m2.e4m3", "");
      break;
    default:
      LOWPREC_WGMMA("m64n128k32.f32.e5m2.e5m2", "");
  }
}

/// bfloat16, or float16, operands that lie along the depth, or along A's rows and B's columns.
template <bool kHalf, bool kRowsOfA, bool kColumnsOfB>
LOWPREC_DEVICE void multiply_matrices(float (&d)[64], uint32_t a, uint32_t b, int keep) {
#define LOWPREC_WGMMA_LAYOUT(layout)                   \
  if constexpr (kHalf) {                               \
    LOWPREC_WGMMA("m64n128k16.f32.f16.f16", layout);   \
  } else {                                             \
    LOWPREC_WGMMA("m64n128k16.f32.bf16.bf16", layout); \
  }
  if constexpr (kRowsOfA && kColumnsOfB) {
    LOWPREC_WGMMA_LAYOUT(", 1, 1")
  } else if constexpr (kRowsOfA) {
    LOWPREC_WGMMA_LAYOUT(", 1, 0")
  } else if constexpr (kColumnsOfB) {
    LOWPREC_WGMMA_LAYOUT(", 0, 1")
  } else {
    LOWPREC_WGMMA_LAYOUT(", 0, 0")
  }
#undef LOWPREC_WGMMA_LAYOUT
}

#undef LOWPREC_WGMMA
#undef LOWPREC_EIGHT

}  // namespace lowprec
