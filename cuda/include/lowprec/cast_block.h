// The loop of a cast on the CPU, over a block of elements.
#pragma once

#include <cstdint>

#include "lowprec/cast.h"
#include "lowprec/inline.h"

namespace lowprec {
namespace {  // a function in clones has one home in each file that uses it

template <class Op>
LOWPREC_INLINE void cast_all(const Op op, const typename Op::Input* x, typename Op::Output* out, int64_t count,
                             const uint32_t* words) {
  NoTally none;
  // Each element is read before its own place is written, also where x and out are the same array.
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = op(x[i], Op::random ? words[i] : 0, none);
}

/// One loop for regular grids and one for the others, each without the branch that tells them apart.
template <class Op>
LOWPREC_CLONES void cast_block(Op op, const typename Op::Input* x, typename Op::Output* out, int64_t count,
                               const uint32_t* words) {
  if (op.grid.regular) {
    op.grid.regular = true;
    return cast_all(op, x, out, count, words);
  }
  op.grid.regular = false;
  return cast_all(op, x, out, count, words);
}

}  // namespace
}  // namespace lowprec
