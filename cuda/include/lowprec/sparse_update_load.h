// How the update's operands come into shared memory: as 16-bit values, zeros past the last token, in the arrangement
// from which ldmatrix reads them without bank conflicts.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"
#include "lowprec/sparse_codes.h"
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

/// Granules that a thread copies together: so many loads are under way at once.
constexpr int kUpdateBatch = 4;

/// Where granules come from, how many of their elements there are, and where they go.
struct UpdateBatch {
  int64_t from[kUpdateBatch];  // element
  int valid[kUpdateBatch];     // -1: no granule
  uint32_t to[kUpdateBatch];
};

LOWPREC_DEVICE void store_granule(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

/// Copies of 16-bit values that lie side by side: by the asynchronous copier.
struct CopyValues {
  const uint16_t* data;

  LOWPREC_DEVICE void operator()(const UpdateBatch& batch) const {
#pragma unroll
    for (int n = 0; n < kUpdateBatch; ++n) {
      if (batch.valid[n] < 0) continue;
      const void* from = batch.valid[n] > 0 ? data + batch.from[n] : data;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(batch.to[n]), "l"(from),
                   "r"(2 * batch.valid[n])
                   : "memory");
    }
  }
};

/// Of codes that lie side by side.
template <bool kHalf>
struct CopyCodes {
  const uint8_t* data;
  const CodeReader<kHalf>& read;

  LOWPREC_DEVICE void operator()(const UpdateBatch& batch) const {
    uint2 codes[kUpdateBatch];
#pragma unroll
    for (int n = 0; n < kUpdateBatch; ++n) codes[n] = load(batch.from[n], batch.valid[n]);
#pragma unroll
    for (int n = 0; n < kUpdateBatch; ++n) {
      if (batch.valid[n] >= 0) store_granule(batch.to[n], read(codes[n]));
    }
  }

 private:
  /// The code 0 is zero in every format.
  LOWPREC_DEVICE uint2 load(int64_t from, int valid) const {
    if (valid == 8) return __ldg(reinterpret_cast<const uint2*>(data + from));
    uint64_t codes = 0;
    for (int i = 0; i < valid; ++i) codes |= static_cast<uint64_t>(data[from + i]) << (8 * i);
    return {static_cast<uint32_t>(codes), static_cast<uint32_t>(codes >> 32)};
  }
};

/// Of either, in any strides: one element after the other.
template <bool kHalf>
struct CopyStrided {
  const void* data;
  int64_t stride;  // from element to element of a granule
  bool codes;
  const CodeReader<kHalf>& read;

  LOWPREC_DEVICE void operator()(const UpdateBatch& batch) const {
#pragma unroll 1
    for (int n = 0; n < kUpdateBatch; ++n) {
      if (batch.valid[n] >= 0) store_granule(batch.to[n], granule(batch.from[n], batch.valid[n]));
    }
  }

 private:
  LOWPREC_DEVICE uint4 granule(int64_t from, int valid) const {
    uint64_t low = 0, high = 0;
#pragma unroll 1
    for (int i = 7; i >= 0; --i) {
      const int width = codes ? 8 : 16;
      uint64_t element = 0;
      if (i < valid) {
        const int64_t at = from + i * stride;
        element = codes ? static_cast<const uint8_t*>(data)[at] : static_cast<const uint16_t*>(data)[at];
      }
      high = high << width | low >> (64 - width);
      low = low << width | element;
    }
    const uint2 words = {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32)};
    if (codes) return read(words);
    return {words.x, words.y, static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)};
  }
};

/// A part of a stage: the blocks of one operand, and where they begin among its features.
struct UpdateSlots {
  const int* blocks;  // in shared memory
  int count;
  int feature;  // the first one's in the stage
  int log_block;
};

/// Copy tokens [token, token + 16 · steps) of an operand's blocks, of which `valid` exist.
template <bool kFirst, class Copy>
LOWPREC_DEVICE void copy_blocks(const UpdateStage<kFirst>& stage, uint32_t base, const UpdateOperand& operand,
                                const UpdateSlots& slots, int64_t token, int valid, const Copy& copy) {
  constexpr int warps = kUpdateThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tokens = (valid + 15) & ~15, features = slots.count << slots.log_block;
  UpdateBatch batch;
  if constexpr (kFirst) {
    const int rows = 32 >> stage.log_row, part = 8 * (lane & ((1 << stage.log_row) - 1));
    const int left = part < tokens ? max(min(valid - part, 8), 0) : -1;
    for (int row = warp * rows + (lane >> stage.log_row); row < features; row += warps * rows * kUpdateBatch) {
#pragma unroll
      for (int n = 0; n < kUpdateBatch; ++n) {
        const int each = row + n * warps * rows;
        const bool any = each < features;
        const int64_t block = slots.blocks[any ? each >> slots.log_block : 0];
        const int64_t feature = (block << slots.log_block) + (each & ((1 << slots.log_block) - 1));
        batch.from[n] = feature * operand.feature + (token + part) * operand.token;
        batch.valid[n] = any ? left : -1;
        batch.to[n] = base + stage.at(part, slots.feature + each);
      }
      copy(batch);
    }
  } else {
    const int granules = features / 8;
    const int log_lanes = granules <= 8 ? 3 : granules <= 16 ? 4 : 5, rows = 32 >> log_lanes;
    for (int granule = lane & ((1 << log_lanes) - 1); granule < granules; granule += 32) {
      const int log_wide = slots.log_block - 3;
      const int64_t block = slots.blocks[granule >> log_wide];
      const int64_t feature = (block << slots.log_block) + 8 * (granule & ((1 << log_wide) - 1));
      const int64_t from = feature * operand.feature + token * operand.token;
      for (int row = warp * rows + (lane >> log_lanes); row < tokens; row += warps * rows * kUpdateBatch) {
#pragma unroll
        for (int n = 0; n < kUpdateBatch; ++n) {
          const int each = row + n * warps * rows;
          batch.from[n] = from + each * operand.token;
          batch.valid[n] = each >= tokens ? -1 : each < valid ? 8 : 0;
          batch.to[n] = base + stage.at(each, slots.feature + 8 * granule);
        }
        copy(batch);
      }
    }
  }
}

}  // namespace lowprec
