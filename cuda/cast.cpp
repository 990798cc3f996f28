// Casts on the CPU: loops that the compiler turns into vector code, shared out among torch's threads.

#include <algorithm>
#include <cstdint>

#include "lowprec/cast_ops.h"
#include "lowprec/inline.h"
#include "lowprec/philox.h"

namespace lowprec {
namespace {

// Elements that one loop works on: their random words stay in the first-level cache, and a multiple of the 16 elements
// that a Philox counter can serve.
constexpr int64_t kBlock = 2048;
constexpr int64_t kGrain = 16;  // blocks that are worth a thread

/// Seed and offset of stochastic rounding, read from their tensors.
struct Draws {
  uint64_t seed;
  uint64_t offset;
  int bits;
  Place place;
};

uint64_t read_word(const MaybeTensor& word) {
  if (!word) return 0;
  STD_TORCH_CHECK(word->is_cpu(), "seed and offset of a cast on the CPU must be on the CPU");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(word->const_data_ptr()));
}

template <int kBits>
LOWPREC_CLONES void draw_block(uint64_t seed, uint64_t offset, int64_t begin, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; i += 4) {
    const Words draws = draw_four<kBits>(seed, offset, begin + i);
    for (int j = 0; j < 4; ++j) words[i + j] = draws.word[j];
  }
}

/// The random words of a block, a few more than count where that is no multiple of four.
void draw(const Draws& draws, int64_t begin, int64_t count, uint32_t* words) {
  if (draws.place.width) {
    for (int64_t i = 0; i < count; ++i) {
      words[i] = draw_one(draws.bits, draws.seed, draws.offset, draws.place.index(begin + i));
    }
    return;
  }
  const auto block = draws.bits == 32 ? draw_block<32> : draws.bits == 16 ? draw_block<16> : draw_block<8>;
  block(draws.seed, draws.offset, begin, count, words);
}

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

struct Cpu {
  template <class Op>
  static void run(const Op& op, const Tensor& x, const Tensor& out, const Source& source) {
    const Draws draws =
        Op::random ? Draws{read_word(source.seed), read_word(source.offset), source.bits, source.place} : Draws{};
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
