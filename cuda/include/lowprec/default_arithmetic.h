// The float unit's settings while a kernel on the CPU computes with it.
#pragma once

#ifdef __x86_64__
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace lowprec {
namespace {

/// The machine's default: to nearest, nothing flushed, no traps. The caller's settings come back at the end.
class DefaultArithmetic {
 public:
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;
#ifdef __x86_64__
  DefaultArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultArithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultArithmetic() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
};

}  // namespace
}  // namespace lowprec
