// Casts on the CPU: loops that the compiler turns into vector code, shared out among torch's threads.

#include <algorithm>
#include <cstdint>

#include "lowprec/cast_block.h"
#include "lowprec/cast_ops.h"
#include "lowprec/draws.h"

namespace lowprec {
namespace {

// Elements that one loop works on: their random words stay in the first-level cache, and a multiple of the 16 elements
// that a Philox counter can serve.
constexpr int64_t kBlock = 2048;
constexpr int64_t kGrain = 16;  // blocks that are worth a thread

struct Cpu {
  template <class Op>
  static void run(const Setting& setting, const Tensor& x, const Tensor& out, const Source& source) {
    const Op op = setting.make<Op>();
    const Draws draws = Op::random ? Draws(source) : Draws();
    elementwise(x, out, Op::random, [&](const void* from, void* to, int64_t count) {
      const auto* input = static_cast<const typename Op::Input*>(from);
      auto* output = static_cast<typename Op::Output*>(to);
      parallel_for(0, (count + kBlock - 1) / kBlock, kGrain, [&](int64_t first, int64_t last) {
        alignas(64) uint32_t words[Op::random ? kBlock : 1];
        for (int64_t begin = first * kBlock; begin < std::min(last * kBlock, count); begin += kBlock) {
          const int64_t size = std::min(kBlock, count - begin);
          if (Op::random) draw(draws, begin, size, words);
          cast_block(op, input + begin, output + begin, size, words);
        }
      });
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_casts<Cpu>(library); }

}  // namespace
}  // namespace lowprec
