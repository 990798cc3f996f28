// Addresses of shared memory, and barriers that lie there. Device code.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

LOWPREC_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

LOWPREC_DEVICE void begin_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

LOWPREC_DEVICE void arrive(uint32_t barrier) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
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

}  // namespace lowprec
