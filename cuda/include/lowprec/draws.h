// Random words of a cast on the CPU, a block at a time.
#pragma once

#include <cstdint>

#include "lowprec/cast_ops.h"
#include "lowprec/inline.h"
#include "lowprec/philox.h"

namespace lowprec {
namespace {  // a function in clones has one home in each file that uses it

inline uint64_t read_word(const MaybeTensor& word) {
  if (!word) return 0;
  STD_TORCH_CHECK(word->is_cpu(), "seed and offset of a cast on the CPU must be on the CPU");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(word->const_data_ptr()));
}

/// Seed and offset of stochastic rounding, read from their tensors.
struct Draws {
  uint64_t seed = 0;
  uint64_t offset = 0;
  int bits = 32;
  Place place;

  Draws() = default;
  explicit Draws(const Source& source)
      : seed(read_word(source.seed)), offset(read_word(source.offset)), bits(source.bits), place(source.place) {}
};

template <int kBits>
LOWPREC_CLONES void draw_block(uint64_t seed, uint64_t offset, int64_t begin, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; i += 4) {
    const Words draws = draw_four<kBits>(seed, offset, begin + i);
    for (int j = 0; j < 4; ++j) words[i + j] = draws.word[j];
  }
}

/// The random words of a block, a few more than count where that is no multiple of four.
inline void draw(const Draws& draws, int64_t begin, int64_t count, uint32_t* words) {
  if (draws.place.width) {
    for (int64_t i = 0; i < count; ++i) {
      words[i] = draw_one(draws.bits, draws.seed, draws.offset, draws.place.index(begin + i));
    }
    return;
  }
  const auto block = draws.bits == 32 ? draw_block<32> : draws.bits == 16 ? draw_block<16> : draw_block<8>;
  block(draws.seed, draws.offset, begin, count, words);
}

}  // namespace
}  // namespace lowprec
