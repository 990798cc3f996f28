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

/// Both halves of a product. The device's own instruction: spelled as a 64-bit product it comes with an addition of
/// zero.
LOWPREC_INLINE uint64_t multiply(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

/// Ten rounds under the key `seed` of the counter (low, high of group, low, high of offset).
LOWPREC_INLINE Words philox(uint64_t seed, uint64_t offset, uint64_t group) {
  uint32_t k0 = low_half(seed), k1 = high_half(seed);
  uint32_t c0 = low_half(group), c1 = high_half(group), c2 = low_half(offset), c3 = high_half(offset);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = multiply(c0, 0xD2511F53u);
    const uint64_t second = multiply(c2, 0xCD9E8D57u);
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

/// The draws of kWidth elements from `index` on, a multiple of kWidth, which is 4 or 8: each in the top kBits of its
/// word. A word serves 32 / kBits elements, from its low end; a counter value serves four times as many.
template <int kBits, int kWidth>
LOWPREC_INLINE void draw(uint64_t seed, uint64_t offset, int64_t index, uint32_t* draws) {
  constexpr int share = 32 / kBits;
  constexpr int group = 4 * share < kWidth ? 4 * share : kWidth;  // elements that one counter value serves here
  for (int begin = 0; begin < kWidth; begin += group) {
    const Words words = philox(seed, offset, static_cast<uint64_t>(index + begin) / (4 * share));
    const int first = static_cast<int>(index / share % 4) & -(group / share);
    for (int i = 0; i < group; ++i) {
      draws[begin + i] = select(words, first + i / share) >> (kBits * (i % share)) << (32 - kBits);
    }
  }
}

template <int kWidth>
LOWPREC_INLINE void draw(int bits, uint64_t seed, uint64_t offset, int64_t index, uint32_t* draws) {
  return bits == 32   ? draw<32, kWidth>(seed, offset, index, draws)
         : bits == 16 ? draw<16, kWidth>(seed, offset, index, draws)
                      : draw<8, kWidth>(seed, offset, index, draws);
}

/// The draws of four elements, likewise.
template <int kBits>
LOWPREC_INLINE Words draw_four(uint64_t seed, uint64_t offset, int64_t index) {
  Words draws;
  draw<kBits, 4>(seed, offset, index, draws.word);
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
