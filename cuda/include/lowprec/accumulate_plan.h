// Which kernel multiplies matrices under an accumulator, and its launches. Without torch.
#pragma once

#include <cstdint>

#include "lowprec/accumulate_halves.h"
#include "lowprec/accumulate_pairs.h"
#include "lowprec/accumulate_tiles.h"

namespace lowprec {

/// Which of the kernels adds the terms.
enum class Kernel { none, single, nearest, directed, random, float16, bfloat16, pairs };

/// A product by tiles, planned on the host: whether it can be, what memory it takes besides, and its launches.
class TilePlan {
 public:
  TilePlan(const AccumulatorSpec& spec, const Operands& of, const SumDraws& draws)
      : plan_(spec, of.terms, 0, 0), draws_(draws), to_(spec.level[0]), of_(of) {
    const LevelSpec& first = spec.level[0];
    kernel_ = of.a.element == Element::float16 && is_ieee(first, 5, 10)   ? Kernel::float16
              : of.a.element == Element::bfloat16 && is_ieee(first, 8, 7) ? Kernel::bfloat16
              : is_single(first)                                          ? Kernel::single
              : !to_.usable                                               ? Kernel::none
              : to_.random                                                ? Kernel::random
              : to_.nearest_even                                          ? Kernel::nearest
                                                                          : Kernel::directed;
    if (is_pairwise(spec)) kernel_ = Kernel::pairs;
    const bool many_stages = kernel_ != Kernel::pairs && plan_.tree.stages > 1 + kUpper;
    if (spec.leaf != Leaf::terms || spec.has_product || many_stages || of.terms == 0 || !of.b.data ||
        of.a.element == Element::float64) {
      kernel_ = Kernel::none;
    }
    if (kernel_ == Kernel::none) return;
    if (is_single(first) || halves()) to_ = as_they_are();
    if (kernel_ != Kernel::pairs) tower_ = tower_of(spec, plan_.tree, to_);
    set_product();
    if (blocks() > kMostBlocks) kernel_ = Kernel::none;
  }

  bool usable() const { return kernel_ != Kernel::none; }

  int64_t workspace() const { return bytes(product_.a) + bytes(product_.b); }

  /// `memory` of the workspace's size is free again when all has run.
  void launch(void* memory, float* out, cudaStream_t stream) {
    place(product_.a, memory);
    place(product_.b, static_cast<char*>(memory) + bytes(product_.a));
    pack(of_.a, of_.a.stride[1], of_.a.stride[2], of_.rows, product_.scale_a, product_.unscale_a, 0, product_.a,
         stream);
    pack(of_.b, of_.b.stride[2], of_.b.stride[1], of_.columns, product_.scale_b, product_.unscale_b, Float32::sign,
         product_.b, stream);
    const WayRules rules = to_.usable ? WayRules(to_) : WayRules{};
    switch (kernel_) {
      case Kernel::single:
        return run(SingleWays<>{to_}, out, stream);
      case Kernel::nearest:
        return run(NearestWays<>{to_, rules}, out, stream);
      case Kernel::directed:
        return run(DirectedWays<>{to_, rules}, out, stream);
      case Kernel::random:
        return run(RandomWays{to_, rules}, out, stream);
      case Kernel::float16:
        return run_halves<false>(out, stream);
      case Kernel::bfloat16:
        return run_halves<true>(out, stream);
      case Kernel::pairs:
        return run(PairWays{to_, rules, !to_.usable}, out, stream);
      default:
        return;
    }
  }

 private:
  static constexpr int64_t kMostBlocks = 0x7FFFFFFF;

  /// Whether sums of two are all that there is, rounded to nearest even.
  bool is_pairwise(const AccumulatorSpec& spec) const {
    const bool nearest = is_single(spec.level[0]) || (to_.usable && to_.nearest_even);
    return spec.levels == 1 && spec.level[0].fan_in == 2 && nearest &&
           tiles_of<kDepth>(of_.terms) < int64_t{1} << kPairLevels;
  }

  void set_product() {
    product_ = scaled_product(to_);
    product_.a = packed(of_.a, of_.rows), product_.b = packed(of_.b, of_.columns);
    product_.batches = of_.batches, product_.rows = of_.rows;
    product_.columns = of_.columns, product_.terms = of_.terms;
  }

  Packed packed(const Operand& operand, int64_t lines) const {
    const int64_t depths = halves() ? tiles_of<kHalfDepth>(of_.terms) : tiles_of<kDepth>(of_.terms);
    const int64_t batches = operand.stride[0] == 0 ? 1 : of_.batches;
    return {nullptr, nullptr, tiles_of<kTile>(lines), depths, batches};
  }

  static int64_t bytes(const Packed& packed) {
    return packed.count() * static_cast<int64_t>(kTileSize * sizeof(float) + sizeof(TileNotes));
  }

  static void place(Packed& packed, void* memory) {
    packed.tiles = static_cast<float*>(memory);
    packed.notes = reinterpret_cast<TileNotes*>(packed.tiles + packed.count() * kTileSize);
  }

  void pack(const Operand& operand, int64_t line_stride, int64_t term_stride, int64_t lines, float scale, float inverse,
            uint32_t past, const Packed& to, cudaStream_t stream) const {
    const Lines from{operand, operand.stride[0], line_stride, term_stride, lines, of_.terms, scale, inverse, past};
    const int64_t blocks = to.count() < kMostBlocks ? to.count() : kMostBlocks;
    const auto kernel = halves() ? pack_halves_kernel : pack_kernel;
    kernel<<<static_cast<unsigned>(blocks), kTileThreads, 0, stream>>>(from, to);
  }

  int64_t blocks() const {
    static_assert(RandomWays::side == PairWays::side);
    const bool small = kernel_ == Kernel::random || kernel_ == Kernel::pairs;
    const int side = small ? Share<RandomWays::side>::tile : kTile;
    return of_.batches * ((of_.rows + side - 1) / side) * ((of_.columns + side - 1) / side);
  }

  bool halves() const { return kernel_ == Kernel::float16 || kernel_ == Kernel::bfloat16; }

  template <bool kBfloat>
  void run_halves(float* out, cudaStream_t stream) const {
    const int shared = shared_bytes<typename HalfSums<kBfloat>::To>(halves_kernel<kBfloat>);
    halves_kernel<kBfloat>
        <<<static_cast<unsigned>(blocks()), kTileThreads, shared, stream>>>(product_, plan_, tower_, draws_, out);
  }

  template <class Ways>
  void run(const Ways& ways, float* out, cudaStream_t stream) const {
    const int shared = shared_bytes<typename Ways::To>(tiles_kernel<Ways>);
    tiles_kernel<<<static_cast<unsigned>(blocks()), kTileThreads, shared, stream>>>(product_, ways, plan_, tower_,
                                                                                    draws_, out);
  }

  /// Shared memory besides the tiles, which a kernel may have once it is told so.
  template <class To, class Kernel>
  int shared_bytes(Kernel kernel) const {
    if (!tower_.single) return 0;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSingleBytes<To>);
    return kSingleBytes<To>;
  }

  SumPlan<Float32> plan_;
  Tower tower_{};
  SumDraws draws_;
  QuickRound to_;
  Operands of_;
  Kernel kernel_;
  Product product_;
};

}  // namespace lowprec
