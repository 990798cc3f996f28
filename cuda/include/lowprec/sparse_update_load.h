// How the update's operands come into shared memory: as 16-bit values, zeros past the last token, in the arrangement
// from which ldmatrix reads them without bank conflicts.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/sparse_update.h"

namespace lowprec {

/// Tokens of a stage by the features of a tile, in granules of 16 bytes. With features last a row is a token, and an
/// odd number of granules keeps rows apart. With features first it is a feature, and granules are exchanged within it.
template <bool kFirst>
struct UpdateStage {
  int tokens;    // 16, 32 or 64
  int features;  // of inputs and outputs
  int log_row;   // features first: log2 of granules in a row

  LOWPREC_DEVICE UpdateStage(int tokens, int features)
      : tokens(tokens),
        features(features),
        log_row(tokens == 64   ? 3
                : tokens == 32 ? 2
                               : 1) {}

  /// Bytes from row to row.
  LOWPREC_DEVICE int pitch() const { return kFirst ? tokens * 2 : ((features / 8) | 1) * 16; }
  LOWPREC_DEVICE int bytes() const { return kFirst ? features * pitch() : tokens * pitch(); }

  /// What granules of a feature's row are exchanged by: a mask of their place.
  LOWPREC_DEVICE int swizzle(int feature) const { return ((feature & 7) >> (3 - log_row)) & ((1 << log_row) - 1); }

  /// Where the granule of a token and a feature begins, one of which is a multiple of 8.
  LOWPREC_DEVICE uint32_t at(int token, int feature) const {
    if constexpr (kFirst) return feature * pitch() + (((token >> 3) ^ swizzle(feature)) << 4);
    return token * pitch() + (feature >> 3 << 4);
  }
};

/// A part of a stage: the blocks of one operand, and where they begin among its features.
struct UpdateSlots {
  const int* blocks;  // in shared memory
  int count;
  int feature;  // the first one's in the stage
  int log_block;

  LOWPREC_DEVICE int features() const { return count << log_block; }

  /// The layer's feature that one of the operand's is.
  LOWPREC_DEVICE int operator[](int feature) const {
    return (blocks[feature >> log_block] << log_block) + (feature & ((1 << log_block) - 1));
  }
};

/// Call visit(feature of the layer, token, address, whether there is such a granule) for the granules of an operand's
/// blocks and of the first `tokens` tokens, a multiple of 16. The same thread visits a granule each time. Granules come
/// in batches without branches between them.
template <bool kFirst, class Visit>
LOWPREC_DEVICE void for_granules(const UpdateStage<kFirst>& stage, uint32_t base, const UpdateSlots& slots, int tokens,
                                 const Visit& visit) {
  constexpr int warps = kUpdateWarps, log_warps = 3, batch = Visit::batch;
  static_assert(1 << log_warps == warps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, features = slots.features();
  if constexpr (kFirst) {
    const int rows = 32 >> stage.log_row, token = 8 * (lane & ((1 << stage.log_row) - 1));
    if (token >= tokens) return;
    int feature = warp * rows + (lane >> stage.log_row);
    uint32_t to = base + stage.at(token, slots.feature + feature);
    const uint32_t step = warps * rows * stage.pitch();
    for (; feature < features; feature += batch * warps * rows) {
#pragma unroll
      for (int n = 0; n < batch; ++n, to += step) {
        const int own = feature + n * warps * rows;
        visit(slots[min(own, features - 1)], token, to, own < features);
      }
    }
  } else {
    // Warps divide groups of features among them, and only as far as there are too few the tokens: what a thread finds
    // out about its features then serves many tokens.
    const int log_lanes = features <= 64 ? 3 : features <= 128 ? 4 : 5, rows = 32 >> log_lanes;
    const int groups = (features + 255) / 256, log_share = log_warps - min(groups - 1, 2);
    const int stride = rows << log_share;
    const uint32_t step = stride * stage.pitch();
    for (int unit = warp; unit < groups << log_share; unit += warps) {
      const int feature = 256 * (unit >> log_share) + 8 * (lane & ((1 << log_lanes) - 1));
      if (feature >= features) continue;
      const int own = slots[feature];
      int token = (unit & ((1 << log_share) - 1)) * rows + (lane >> log_lanes);
      uint32_t to = base + stage.at(token, slots.feature + feature);
      for (; token < tokens; token += batch * stride) {
#pragma unroll
        for (int n = 0; n < batch; ++n, to += step) visit(own, token + n * stride, to, token + n * stride < tokens);
      }
    }
  }
}

LOWPREC_DEVICE void store_granule(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

/// Copies of granules of values, or into their lower halves of codes, that lie side by side: by the asynchronous
/// copier.
template <bool kFirst, int kBytes>
struct CopyGranules {
  static constexpr int batch = 2;
  static constexpr int size = kBytes / 8;  // of an element

  const char* data;  // of the first token
  int stride;        // bytes from token to token, or from feature to feature
  int valid;         // tokens

  LOWPREC_DEVICE void operator()(int feature, int token, uint32_t to, bool any) const {
    const char* const along = data + (kFirst ? token : feature) * static_cast<int64_t>(size);
    uint64_t from;  // by one instruction: the compiler takes four
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(from) : "r"(kFirst ? feature : token), "r"(stride), "l"(along));
    const int bytes = kFirst ? min(max(valid - token, 0) * size, kBytes) : token < valid ? kBytes : 0;
    if constexpr (kBytes == 16) {
      asm volatile(
          "{.reg .pred any; setp.ne.b32 any, %3, 0; @any cp.async.cg.shared.global [%0], [%1], 16, %2;}" ::"r"(to),
          "l"(from), "r"(bytes), "r"(static_cast<int>(any))
          : "memory");
    } else {
      asm volatile(
          "{.reg .pred any; setp.ne.b32 any, %3, 0; @any cp.async.ca.shared.global [%0], [%1], 8, %2;}" ::"r"(to),
          "l"(from), "r"(bytes), "r"(static_cast<int>(any))
          : "memory");
    }
  }
};

/// Of either, in any strides: one element after the other.
template <bool kFirst>
struct CopyElements {
  static constexpr int batch = 1;

  const UpdateOperand& operand;
  int64_t first;  // token
  int valid;
  bool codes;

  LOWPREC_DEVICE void operator()(int feature, int token, uint32_t to, bool) const {
    const int64_t step = kFirst ? operand.token : operand.feature;
    int64_t from = feature * operand.feature + (first + token) * operand.token;
#pragma unroll 1
    for (int i = 0; i < 8; ++i, from += step) {
      const bool any = (kFirst ? token + i : token) < valid;
      if (codes) {
        const uint32_t element = any ? static_cast<const uint8_t*>(operand.data)[from] : 0;
        asm volatile("st.shared.u8 [%0], %1;" ::"r"(to + i), "r"(element) : "memory");
      } else {
        const uint16_t element = any ? static_cast<const uint16_t*>(operand.data)[from] : 0;
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + 2 * i), "h"(element) : "memory");
      }
    }
  }
};

/// Makes values of the codes in a granule's lower half. The code 0 is zero in every format.
template <class Read>
struct DecodeGranules {
  static constexpr int batch = Read::batch;

  const Read& read;

  LOWPREC_DEVICE void operator()(int, int, uint32_t at, bool any) const {
    if (!any) return;
    uint2 codes;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(codes.x), "=r"(codes.y) : "r"(at) : "memory");
    store_granule(at, read(codes));
  }
};

}  // namespace lowprec
