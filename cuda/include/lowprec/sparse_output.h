// Where the sums of block-sparse products go, four neighbours at a time. Device code.
#pragma once

#include <cstdint>

#include "lowprec/quick.h"
#include "lowprec/tensor_core_output.h"
#include "lowprec/warp_matrix.h"

namespace lowprec {

constexpr int kSparseTokens = 64;    // of a tile
constexpr int kSparseThreads = 128;  // that multiply and write it

/// How four neighbours are written: as they are, rounded to 16 bits, as codes of 8 bits to nearest even by the quick
/// way, or by `store_four`, which can do all.
enum class RunForm : int { single, bfloat16, float16, codes, any };

struct SparseOutput {
  using Codes = QuickEncode<Float32, NearestEven, uint8_t>;

  Output to;
  int64_t tokens;
  int64_t features;
  bool first;    // features first
  RunForm form;  // `any` unless every four lie at a multiple of their size
  Codes codes;
};

/// Two sums in 16 bits each.
LOWPREC_DEVICE uint32_t narrow_pair(bool half, float low, float high) {
  return half ? narrow_pair<true>(low, high) : narrow_pair<false>(low, high);
}

/// Write four sums of no cast, from `index` on: a multiple of four, and taken as one, by which a compiler knows that
/// one access will do.
LOWPREC_DEVICE void write_sums(RunForm form, void* to, int64_t index, float4 run) {
  if (form == RunForm::single) {
    static_cast<float4*>(to)[index >> 2] = run;
  } else {
    const bool half = form == RunForm::float16;
    static_cast<uint2*>(to)[index >> 2] = {narrow_pair(half, run.x, run.y), narrow_pair(half, run.z, run.w)};
  }
}

/// Four sums as codes.
template <bool kPlain>
LOWPREC_DEVICE uint32_t codes_of(const SparseOutput::Codes& codes, float4 run) {
  using Op = SparseOutput::Codes::Op;
  const Inputs<Op> sums{as_bits(run.x), as_bits(run.y), as_bits(run.z), as_bits(run.w)};
  Outputs<Op> result;
  codes.apply<kPlain>(sums, {}, result);
  return result.word(0);
}

/// So many of four sums in any form, at any place.
LOWPREC_DEVICE void write_any(const SparseOutput& out, int64_t index, float4 run, int count) {
  const float sums[4] = {run.x, run.y, run.z, run.w};
  store_four(out.to, index, sums, count);
}

/// So many runs of four neighbours, as many rows of the result apart: tokens where features come first, else features.
struct SparseRuns {
  const SparseOutput& out;
  int64_t row;
  int64_t place;
  int rows;
  int count;

  /// Write those that lie not beyond the last token; read(n) has the sums of the n-th.
  template <class Read>
  LOWPREC_DEVICE void write(Read read) const {
    if (out.form == RunForm::codes) return write_codes(read);
    if (out.form != RunForm::any) return write_sums(read);
    for_each(read, [&](int64_t index, float4 run, int n) { write_any(out, index, run, n); });
  }

  /// As they are, or in 16 bits; so many are read before the first is written.
  template <int kAhead = 1, class Read>
  LOWPREC_DEVICE void write_sums(Read read) const {
    const RunForm form = out.form;
    void* const to = out.to.data;
    for_each<kAhead>(read, [&](int64_t index, float4 run, int) { lowprec::write_sums(form, to, index, run); });
  }

  /// As codes.
  template <int kAhead = 1, class Read>
  LOWPREC_DEVICE void write_codes(Read read) const {
    out.codes.plain ? write_codes_by<true, kAhead>(read) : write_codes_by<false, kAhead>(read);
  }

 private:
  /// With the format in registers, which no store can change.
  template <bool kPlain, int kAhead, class Read>
  LOWPREC_DEVICE void write_codes_by(Read read) const {
    const SparseOutput::Codes codes = out.codes;
    auto* const to = static_cast<uint32_t*>(out.to.data);
    for_each<kAhead>([&](int n) { return codes_of<kPlain>(codes, read(n)); },
                     [&](int64_t index, uint32_t four, int) { to[index >> 2] = four; });
  }

  /// Call store(index, read(n), how many of four) for the n-th.
  template <int kAhead = 1, class Read, class Store>
  LOWPREC_DEVICE void for_each(Read read, Store store) const {
    const bool first = out.first;
    const int64_t pitch = first ? out.tokens : out.features, step = rows * pitch;
    int64_t index = row * pitch + place, left = out.tokens - (first ? place : row);
#pragma unroll 1
    for (int n = 0; n < count; n += kAhead) {
      decltype(read(0)) run[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) run[i] = read(n + i);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (left > 0) store(index, run[i], first && left < 4 ? static_cast<int>(left) : 4);
        index += step;
        left -= first ? 0 : rows;
      }
    }
  }
};

/// Where the runs of a tile of tokens and a block of outputs lie on a board in shared memory, which has them as the
/// result does, and which of them a thread takes.
struct SparseBoard {
  int pitch;  // of rows, apart so that banks do not meet
  int width;
  int row;  // of a thread's first run
  int column;
  int rows;  // from there to its next one

  LOWPREC_DEVICE SparseBoard(bool first, int block) : width(first ? kSparseTokens : block) {
    const int shift = 31 - __clz(width), i = 4 * threadIdx.x;
    pitch = width + 4;
    row = i >> shift;
    column = i & (width - 1);
    rows = 4 * kSparseThreads >> shift;
  }

  LOWPREC_DEVICE SparseRuns runs(const SparseOutput& out, int64_t token, int64_t output, int count) const {
    return {out, (out.first ? output : token) + row, (out.first ? token : output) + column, rows, count};
  }

  /// The n-th run of a thread.
  LOWPREC_DEVICE float4 at(const float* board, int n) const {
    return *reinterpret_cast<const float4*>(board + (row + n * rows) * pitch + column);
  }
};

/// How many runs of a tile a thread has.
LOWPREC_INLINE constexpr int sparse_runs(int block) { return kSparseTokens * block / 4 / kSparseThreads; }

}  // namespace lowprec
