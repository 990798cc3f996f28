// Random bits as a pure function of (seed, offset, element index): Philox4x32-10.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

/// The four 32-bit words of one counter value.
struct Words {
  uint32_t word[4];
};

LOWPREC_INLINE uint32_t low_half(uint64_t x) { return static_cast<uint32_t>(x); }
LOWPREC_INLINE uint32_t high_half(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

/// Ten rounds under the key `seed` of the counter (low, high of group, low, high of offset).
LOWPREC_INLINE Words philox(uint64_t seed, uint64_t offset, uint64_t group) {
  uint32_t k0 = low_half(seed), k1 = high_half(seed);
  uint32_t c0 = low_half(group), c1 = high_half(group), c2 = low_half(offset), c3 = high_half(offset);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t second = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = high_half(second) ^ c1 ^ k0;
    c1 = low_half(second);
    c2 = high_half(first) ^ c3 ^ k1;
    c3 = low_half(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// One word by a computed index, without an array in memory.
LOWPREC_INLINE uint32_t select(const Words& words, int index) {
  const uint32_t low = index & 1 ? words.word[1] : words.word[0];
  const uint32_t high = index & 1 ? words.word[3] : words.word[2];
  return index & 2 ? high : low;
}

/// The draws of elements index .. index + 3, index a multiple of 4, each in the top `kBits` of its word.
/// A word serves 32 / kBits elements, from its low end; a counter value serves four times as many.
template <int kBits>
LOWPREC_INLINE Words draw_four(uint64_t seed, uint64_t offset, int64_t index) {
  constexpr int share = 32 / kBits;
  const Words words = philox(seed, offset, static_cast<uint64_t>(index) / (4 * share));
  const int first = static_cast<int>(index / share % 4);
  Words draws;
  for (int i = 0; i < 4; ++i) {
    draws.word[i] = select(words, first + i / share) >> (kBits * (i % share)) << (32 - kBits);
  }
  return draws;
}

LOWPREC_INLINE Words draw_four(int bits, uint64_t seed, uint64_t offset, int64_t index) {
  return bits == 32   ? draw_four<32>(seed, offset, index)
         : bits == 16 ? draw_four<16>(seed, offset, index)
                      : draw_four<8>(seed, offset, index);
}

/// Where a shard lies in a whole tensor, by whose index it draws: runs of `width` elements, `pitch` apart, from
/// `start`.
struct Place {
  int64_t start = 0;
  int64_t width = 0;  // 0: the whole tensor
  int64_t pitch = 0;

  LOWPREC_INLINE int64_t index(int64_t i) const { return width ? start + i / width * pitch + i % width : i; }
};

/// The draw of one element, as `draw_four`.
LOWPREC_INLINE uint32_t draw_one(int bits, uint64_t seed, uint64_t offset, int64_t index) {
  return select(draw_four(bits, seed, offset, index - index % 4), static_cast<int>(index % 4));
}

}  // namespace lowprec
