// How the update's operands come into shared memory: as 16-bit values, zeros past the last token, in the arrangement
// from which ldmatrix reads them without bank conflicts.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/sparse_update.h"

namespace lowprec {

/// Tokens of a stage by the features of a tile, as 16-bit values or as bytes, in granules of 16 bytes. With features
/// last a row is a token, and an odd number of granules keeps rows apart. With features first it is a feature, and
/// granules are exchanged within it.
template <bool kFirst, bool kBytes>
struct UpdateStage {
  static constexpr int log_each = kBytes ? 4 : 3;  // log2 of elements in a granule

  int tokens;    // 16, 32 or 64
  int features;  // of inputs and outputs
  int log_row;   // features first: log2 of granules in a row

  LOWPREC_DEVICE UpdateStage(int tokens, int features)
      : tokens(tokens), features(features), log_row(6 - log_each - (tokens < 64) - (tokens < 32)) {}

  /// Bytes from row to row.
  LOWPREC_DEVICE int pitch() const { return 16 * (kFirst ? 1 << log_row : features >> log_each | 1); }
  LOWPREC_DEVICE int bytes() const { return kFirst ? features * pitch() : tokens * pitch(); }

  /// What granules of a feature's row are exchanged by: a mask of their place.
  LOWPREC_DEVICE int swizzle(int feature) const { return ((feature & 7) >> (3 - log_row)) & ((1 << log_row) - 1); }

  /// Where the granule of a token and a feature begins, one of which is a multiple of its elements.
  LOWPREC_DEVICE uint32_t at(int token, int feature) const {
    if constexpr (kFirst) return feature * pitch() + (((token >> log_each) ^ swizzle(feature)) << 4);
    return token * pitch() + (feature >> log_each << 4);
  }
};

/// As many features of a tile beside each other as a granule has: where their numbers begin, and what is from row to
/// row.
struct alignas(16) UpdateColumn {
  const char* data;  // of the first token
  int stride;        // bytes from token to token, or from feature to feature
};

/// Call visit(what visit.begin(column) gives, feature of the column, token, address) for the granules of columns from
/// `begin` to `end` and of the first `tokens` tokens, a multiple of 16; two at a time without a branch where rows are
/// tokens.
template <bool kFirst, bool kBytes, class Visit>
LOWPREC_DEVICE void for_granules(const UpdateStage<kFirst, kBytes>& stage, uint32_t base, int begin, int end,
                                 int tokens, const Visit& visit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pitch = stage.pitch();
  if constexpr (kFirst) {
    constexpr int log_each = UpdateStage<kFirst, kBytes>::log_each, each = 1 << log_each;
    const int rows = 32 >> stage.log_row, token = each * (lane & ((1 << stage.log_row) - 1));
    if (token >= tokens) return;
    const uint32_t step = kUpdateWarps * rows * pitch;
    int feature = each * begin + warp * rows + (lane >> stage.log_row);
    uint32_t to = base + stage.at(token, feature);
#pragma unroll 1
    for (; feature < each * end; feature += kUpdateWarps * rows, to += step) {
      visit(visit.begin(feature >> log_each), feature & (each - 1), token, to);
    }
  } else {
#pragma unroll 1
    for (int column = begin + lane; column < end; column += 32) {
      const auto own = visit.begin(column);
      uint32_t to = base + 16 * column + warp * pitch;
#pragma unroll 1
      for (int token = warp; token < tokens; token += 2 * kUpdateWarps) {
#pragma unroll
        for (int n = 0; n < 2; ++n, to += kUpdateWarps * pitch) visit(own, 0, token + n * kUpdateWarps, to);
      }
    }
  }
}

/// Copies of granules of elements that lie side by side, of so many bytes each: by the asynchronous copier.
template <bool kFirst, int kSize>
struct CopyGranules {
  const UpdateColumn* columns;
  int first;  // token
  int valid;

  LOWPREC_DEVICE UpdateColumn begin(int column) const { return columns[column]; }

  LOWPREC_DEVICE void operator()(const UpdateColumn& column, int feature, int token, uint32_t to) const {
    const char* const along = kFirst ? column.data + static_cast<int64_t>(first + token) * kSize : column.data;
    uint64_t from;  // by one instruction: the compiler takes four
    asm("mad.wide.s32 %0, %1, %2, %3;"
        : "=l"(from)
        : "r"(kFirst ? feature : first + token), "r"(column.stride), "l"(along));
    const int bytes = kFirst ? min(max(valid - token, 0) * kSize, 16) : token < valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  }
};

/// Of values in any strides: one after the other.
template <bool kFirst>
struct CopyElements {
  const UpdateColumn* columns;
  const UpdateOperand& operand;
  int first;  // token
  int valid;

  LOWPREC_DEVICE const char* begin(int column) const { return columns[column].data; }

  LOWPREC_DEVICE void operator()(const char* data, int feature, int token, uint32_t to) const {
    const int64_t step = kFirst ? operand.token : operand.feature;
    int64_t from = feature * operand.feature + (static_cast<int64_t>(first) + token) * operand.token;
#pragma unroll 1
    for (int i = 0; i < 8; ++i, from += step) {
      const bool any = (kFirst ? token + i : token) < valid;
      const uint16_t element = any ? reinterpret_cast<const uint16_t*>(data)[from] : 0;
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + 2 * i), "h"(element) : "memory");
    }
  }
};

}  // namespace lowprec
