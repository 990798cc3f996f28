// Equal shares of a block-sparse product for thread blocks that stay: where each begins, and what it walks.
//
// An item is a tile of tokens of one output column; items lie column by column, the tiles of one beside each other, and
// count as many pairs as the column has and a stage more for what an item costs beside its pairs. The items' line is
// cut into equal shares at whole stages of an item, or between items where that is near. So a thread block has at most
// one item that another one ends, which it takes first, and one that others began, which it takes last: by then the
// others have long published theirs. Nothing here depends on the device.
#pragma once

#include <cstdint>

#include "lowprec/inline.h"

namespace lowprec {

/// Blocks of a stage of 64 features, or of 128 where there is little to copy. lowprec/block_tables.py plans by the same
/// numbers.
LOWPREC_INLINE constexpr int sparse_slots(int64_t block) { return static_cast<int>((block <= 16 ? 128 : 64) / block); }

/// Thread blocks that are on a multiprocessor at once, and shares: for 132 of those, whatever the device has.
LOWPREC_INLINE constexpr int sparse_resident(int64_t block) {
  return block == 64 ? 2 : block == 32 ? 3 : block == 16 ? 4 : 5;
}
LOWPREC_INLINE constexpr int sparse_shares(int64_t block) { return 132 * sparse_resident(block); }

/// Where a share begins in a line of items of one tile, as the table has it: column, and the first pairs of that, of
/// the next and of the one after that.
struct SparseShare {
  int column;
  int begin;
  int end;
  int after;
};

/// And with tiles: so many pairs of an item lie before.
struct SparseCut {
  int column;
  int begin;
  int end;
  int tile;
  int place;

  LOWPREC_INLINE bool same_item(const SparseCut& other) const { return column == other.column && tile == other.tile; }
  LOWPREC_INLINE bool before(const SparseCut& other) const {
    return column < other.column || (column == other.column && tile < other.tile);
  }
};

/// What a product's shares are made of.
struct SparseLine {
  const int* offsets;         // [outputs + 1]
  const SparseShare* shares;  // [count + 1]
  int outputs;
  int tiles;
  int count;
  int slots;  // blocks of a stage

  LOWPREC_INLINE int64_t length() const { return tiles * (offsets[outputs] + static_cast<int64_t>(slots) * outputs); }

  /// Where a column begins in the line.
  LOWPREC_INLINE int64_t start(int column, int begin) const {
    return tiles * (begin + static_cast<int64_t>(slots) * column);
  }

  /// Where share n begins. A column's pairs times tiles fit an int: x has 64 b times as many elements.
  LOWPREC_INLINE SparseCut cut(int n) const {
    const SparseShare share = shares[n];
    const int own = share.end - share.begin, cost = own + slots;
    const auto rest = static_cast<int>(n * length() / count - start(share.column, share.begin));
    const int place = rest % cost / slots * slots;
    SparseCut cut{share.column, share.begin, share.end, rest / cost, place > slots ? place : 0};
    if (place <= slots || place + slots < own) return cut;
    cut.place = 0;
    if (++cut.tile < tiles) return cut;
    return {share.column + 1, share.end, share.after, 0, 0};
  }

  /// The first share that may have a part of an item.
  LOWPREC_INLINE int first_share(const SparseCut& item) const {
    const int64_t at =
        start(item.column, item.begin) + static_cast<int64_t>(item.tile) * (item.end - item.begin + slots);
    return static_cast<int>(((at + 1) * count - 1) / length());
  }

  /// Whether a share has pairs of an item, and another one its last.
  LOWPREC_INLINE bool has_part(int n, const SparseCut& item) const {
    const SparseCut from = cut(n), to = cut(n + 1);
    return to.same_item(item) && to.place > (from.same_item(item) ? from.place : 0);
  }
};

/// How a piece of an item ends: not yet, as all of it, to be joined by the one who ends it, by joining others' to it,
/// or as the last of all.
enum class PieceEnd : int { none, whole, published, joined, all };

struct SparsePiece {
  int column;
  int tile;
  int begin;  // of its pairs
  int count;
  PieceEnd end;
};

/// The pieces of a share, in the order in which it takes them.
struct SparseWalk {
  const SparseLine& line;
  const SparseCut from;
  const SparseCut to;
  SparseCut next;  // of the whole ones
  int after;       // where the pairs of the column after that end
  enum class Turn { begun, whole, ended, over } turn = Turn::begun;

  LOWPREC_INLINE SparseWalk(const SparseLine& line, int share)
      : line(line), from(line.cut(share)), to(line.cut(share + 1)), next(from), after(offset(from.column + 2)) {
    if (from.place > 0) step();
  }

  LOWPREC_INLINE int offset(int column) const { return line.offsets[min(column, line.outputs)]; }

  LOWPREC_INLINE void step() {
    if (++next.tile < line.tiles) return;
    next = {next.column + 1, next.end, after, 0, 0};
    after = offset(next.column + 2);
  }

  /// The next one, if there is one.
  LOWPREC_INLINE bool take(SparsePiece& piece) {
    const bool same = from.same_item(to);
    if (turn == Turn::begun) {
      turn = Turn::whole;
      const int start = same ? from.place : 0;
      piece = {to.column, to.tile, to.begin + start, to.place - start, PieceEnd::published};
      if (piece.count > 0) return true;
    }
    if (turn == Turn::whole) {
      piece = {next.column, next.tile, next.begin, next.end - next.begin, PieceEnd::whole};
      if (next.before(to)) {
        step();
        return true;
      }
      turn = Turn::ended;
    }
    if (turn == Turn::over || from.place == 0 || same) return false;
    turn = Turn::over;
    piece = {from.column, from.tile, from.begin + from.place, from.end - from.begin - from.place, PieceEnd::joined};
    return true;
  }
};

}  // namespace lowprec
