// Rings of stages in shared memory that one warp fills by asynchronous copies and others read, and flags between thread
// blocks. Device code.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/shared_memory.h"

namespace lowprec {

/// Arrive when this thread's asynchronous copies have.
LOWPREC_DEVICE void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/// Wait for so many threads, of whole warps.
LOWPREC_DEVICE void meet(int which, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(which), "r"(threads) : "memory");
}

/// Say that all is written that was before this thread's last barrier.
LOWPREC_DEVICE void set_flag(uint32_t* flag) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}

LOWPREC_DEVICE void await_flag(const uint32_t* flag) {
  uint32_t value = 0;
  while (true) {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    if (value) return;
    __nanosleep(32);
  }
}

}  // namespace lowprec
