// Rings of stages in shared memory that one warp fills by asynchronous copies and others read, and flags between thread
// blocks. Device code.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

LOWPREC_DEVICE void begin_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

LOWPREC_DEVICE void arrive(uint32_t barrier) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

/// Arrive when this thread's asynchronous copies have.
LOWPREC_DEVICE void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/// Wait until the barrier's phase of this parity is over, asleep where the device can do that.
LOWPREC_DEVICE void await_phase(uint32_t barrier, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LOWPREC_WAIT "try_wait"
#else
#define LOWPREC_WAIT "test_wait"
#endif
  asm volatile(
      "{\n .reg .pred over;\n"
      "again:\n mbarrier." LOWPREC_WAIT
      ".parity.shared.b64 over, [%0], %1;\n"
      " @!over bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#undef LOWPREC_WAIT
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
