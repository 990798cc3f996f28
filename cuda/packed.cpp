// Dense codes on the CPU: a block of them is cast as ever, in the first-level cache, and packed from there or to there.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lowprec/cast_block.h"
#include "lowprec/draws.h"
#include "lowprec/packed_ops.h"

namespace lowprec {
namespace {

constexpr int64_t kBlock = 2048;  // codes; a multiple of what a Philox counter can serve
constexpr int64_t kGrain = 16;    // blocks that are worth a thread

/// Whole groups of a width known to the compiler, and then of any.
template <int kBits>
void pack_groups(const uint8_t* codes, uint8_t* dense, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t words[2];
    std::memcpy(words, codes + i * kGroup, kGroup);
    const uint64_t joined = join(words, kBits);
    std::memcpy(dense + i * kBits, &joined, kBits);
  }
}

template <int kBits>
void unpack_groups(const uint8_t* dense, uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint64_t joined = 0;
    std::memcpy(&joined, dense + i * kBits, kBits);
    uint32_t words[2];
    split(joined, kBits, words);
    std::memcpy(codes + i * kGroup, words, kGroup);
  }
}

using Repack = void (*)(const uint8_t*, uint8_t*, int64_t);
constexpr Repack kPack[] = {pack_groups<1>, pack_groups<2>, pack_groups<3>, pack_groups<4>,
                            pack_groups<5>, pack_groups<6>, pack_groups<7>, pack_groups<8>};
constexpr Repack kUnpack[] = {unpack_groups<1>, unpack_groups<2>, unpack_groups<3>, unpack_groups<4>,
                              unpack_groups<5>, unpack_groups<6>, unpack_groups<7>, unpack_groups<8>};

/// Codes to bytes: `codes` has room for whole groups, `dense` for its bytes alone.
void pack_block(uint8_t* codes, uint8_t* dense, int64_t count, int bits) {
  const int64_t whole = count / kGroup;
  kPack[bits - 1](codes, dense, whole);
  if (count % kGroup == 0) return;
  std::fill(codes + count, codes + (whole + 1) * kGroup, uint8_t{0});
  uint8_t last[kGroup];
  kPack[bits - 1](codes + whole * kGroup, last, 1);
  std::memcpy(dense + whole * bits, last, (count % kGroup * bits + 7) / 8);
}

void unpack_block(const uint8_t* dense, uint8_t* codes, int64_t count, int bits) {
  const int64_t whole = count / kGroup;
  kUnpack[bits - 1](dense, codes, whole);
  if (count % kGroup == 0) return;
  uint8_t last[kGroup] = {};
  std::memcpy(last, dense + whole * bits, (count % kGroup * bits + 7) / 8);
  kUnpack[bits - 1](last, codes + whole * kGroup, 1);
}

/// Call f(first code, first byte, count) for each block of each row.
template <class F>
void for_blocks(const Rows& rows, F f) {
  const int64_t blocks = (rows.size + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain * kBlock / std::min(rows.size, kBlock));
  parallel_for(0, rows.count * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / blocks, first = i % blocks * kBlock;
      f(row * rows.size + first, row * rows.bytes() + first / kGroup * rows.bits, std::min(kBlock, rows.size - first));
    }
  });
}

template <class Op>
void cast(const Op& op, const typename Op::Input* x, typename Op::Output* out, int64_t count, const uint32_t* words) {
  if constexpr (std::is_same_v<Op, Same>) {
    std::copy(x, x + count, out);
  } else {
    cast_block(op, x, out, count, words);
  }
}

struct Cpu {
  template <class Op>
  static void pack(const Setting& setting, const Tensor& x, const Tensor& out, const Source& source, const Rows& rows) {
    const Op op = setting.make<Op>();
    const Draws draws = Op::random ? Draws(source) : Draws();
    const auto* input = static_cast<const typename Op::Input*>(x.const_data_ptr());
    auto* dense = static_cast<uint8_t*>(out.mutable_data_ptr());
    for_blocks(rows, [&](int64_t first, int64_t byte, int64_t count) {
      alignas(64) uint32_t words[Op::random ? kBlock + 8 : 1] = {};
      alignas(64) uint8_t codes[kBlock] = {};
      // Words come four at a time, from an element whose index is a multiple of four.
      const int64_t before = first % 4;
      if (Op::random) draw(draws, first - before, count + before, words);
      cast(op, input + first, codes, count, Op::random ? words + before : nullptr);
      pack_block(codes, dense + byte, count, rows.bits);
    });
  }

  template <class Op>
  static void unpack(const Setting& setting, const Tensor& x, const Tensor& out, const Rows& rows) {
    const Op op = setting.make<Op>();
    const auto* dense = static_cast<const uint8_t*>(x.const_data_ptr());
    auto* output = static_cast<typename Op::Output*>(out.mutable_data_ptr());
    for_blocks(rows, [&](int64_t first, int64_t byte, int64_t count) {
      alignas(64) uint8_t codes[kBlock] = {};
      unpack_block(dense + byte, codes, count, rows.bits);
      cast(op, codes, output + first, count, nullptr);
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lowprec, CPU, library) { register_packed<Cpu>(library); }

}  // namespace
}  // namespace lowprec
