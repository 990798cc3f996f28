// Codes of 8 bits or fewer, stored densely: one after another, low bits first. For host and device.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

/// Codes that are packed together: so many fill whole bytes, whatever their width.
constexpr int kGroup = 8;

/// Four codes, one to a byte, next to each other.
LOWPREC_INLINE uint32_t squeeze(uint32_t codes, int bits) {
  const uint32_t mask = (1u << bits) - 1;
  const uint32_t pairs = (codes & (mask * 0x00010001u)) | ((codes >> (8 - bits)) & (mask << bits) * 0x00010001u);
  return (pairs & 0xffff) | (pairs >> 16 << (2 * bits));
}

/// And back.
LOWPREC_INLINE uint32_t spread(uint32_t dense, int bits) {
  const uint32_t mask = (1u << bits) - 1;
  const uint32_t low = (1u << (2 * bits)) - 1;
  const uint32_t pairs = (dense & low) | ((dense >> (2 * bits) & low) << 16);
  return (pairs & (mask * 0x00010001u)) | ((pairs & (mask << bits) * 0x00010001u) << (8 - bits));
}

/// A group of codes, one to a byte in two words, as one number; and back.
LOWPREC_INLINE uint64_t join(const uint32_t* codes, int bits) {
  return squeeze(codes[0], bits) | static_cast<uint64_t>(squeeze(codes[1], bits)) << (4 * bits);
}
LOWPREC_INLINE void split(uint64_t dense, int bits, uint32_t* codes) {
  codes[0] = spread(static_cast<uint32_t>(dense), bits);
  codes[1] = spread(static_cast<uint32_t>(dense >> (4 * bits)), bits);
}

/// Rows of codes and of the bytes that hold them. Each row starts on a byte.
struct Rows {
  int64_t count;
  int64_t size;  // codes in a row
  int bits;

  LOWPREC_INLINE int64_t bytes() const { return (size * bits + 7) / 8; }
  LOWPREC_INLINE int64_t groups() const { return (size + kGroup - 1) / kGroup; }

  /// One row instead, where no byte is shared out or left over between them.
  LOWPREC_INLINE Rows joined() const { return size % kGroup ? *this : Rows{1, count * size, bits}; }
};

/// A group of a row.
struct Group {
  int64_t code;  // where its codes begin
  int64_t byte;  // and its bytes
  int codes;     // fewer at the end of a row
  int bytes;

  LOWPREC_INLINE Group(const Rows& rows, int64_t index) {
    const int64_t row = rows.count == 1 ? 0 : index / rows.groups();
    const int64_t first = (index - row * rows.groups()) * kGroup;
    code = row * rows.size + first;
    byte = row * rows.bytes() + first / kGroup * rows.bits;
    codes = static_cast<int>(rows.size - first < kGroup ? rows.size - first : kGroup);
    bytes = (codes * rows.bits + 7) / 8;
  }
};

/// An op that leaves codes as they are, so that packing alone is a cast too.
struct Same {
  using Input = uint8_t;
  using Output = uint8_t;
  static constexpr bool random = false;

  template <class AnyTally>
  LOWPREC_INLINE uint8_t operator()(uint8_t code, uint32_t, AnyTally&) const {
    return code;
  }
};

}  // namespace lowprec
