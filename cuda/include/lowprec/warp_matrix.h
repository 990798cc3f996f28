// A warp's instructions for products of matrices of 16-bit values, from compute capability 8.0 on. Device code.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/shared_memory.h"

namespace lowprec {

/// Four 8 × 8 matrices, transposed or as they lie: each lane gives the address of a row.
template <bool kTranspose>
LOWPREC_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t from) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  }
}

/// Two, the rows of which are those of the first 16 lanes.
template <bool kTranspose>
LOWPREC_DEVICE void load_matrices(uint32_t (&to)[2], uint32_t from) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  }
}

/// Add the products of 16 rows by 16 terms of float16, or bfloat16, and of those terms by 8 columns.
template <bool kHalf>
LOWPREC_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t low, uint32_t high) {
  if constexpr (kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
  }
}

/// Two float32 as 16-bit values, the first one below.
template <bool kHalf>
LOWPREC_DEVICE uint32_t narrow_pair(float low, float high) {
  uint32_t pair;
  if constexpr (kHalf) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

}  // namespace lowprec
