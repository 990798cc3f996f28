// The operands of a matrix product on the CPU, whatever their strides.
#pragma once

#include <cstdint>
#include <utility>

namespace lowprec {

/// One operand of a product, seen as lines of terms: rows of the left one, columns of the right one.
template <class C>
struct Lines {
  const typename C::Bits* data;
  int64_t stride;  // from line to line
  int64_t step;    // from term to term
};

/// A product: [rows] × [columns] outputs of `terms` terms, for each of a batch.
template <class C>
struct Product {
  Lines<C> left;
  Lines<C> right;
  int64_t left_batch;  // strides of the batch
  int64_t right_batch;
  int64_t batch;
  int64_t rows;
  int64_t columns;
  int64_t terms;
  int64_t origin;          // of the outputs
  int64_t row_step;        // from row to row of them
  int64_t column_step;     // from column to column
  int64_t left_shift = 0;  // of the left lines from column to column, where a row has many
  int64_t roundings = 0;   // by which random words are numbered, where that is more than each output has
  // Columns that lie side by side among the outputs, and from one such piece to the next; 0: all of them do.
  int64_t piece = 0;
  int64_t piece_step = 0;

  /// The place of an output.
  int64_t output(int64_t row, int64_t column) const {
    if (piece == 0) return origin + row * row_step + column * column_step;
    return origin + row * row_step + column % piece * column_step + column / piece * piece_step;
  }

  /// One of the batch.
  Product at(int64_t i) const {
    Product one = *this;
    one.left.data += i * left_batch;
    one.right.data += i * right_batch;
    one.origin += i * rows * columns;
    return one;
  }

  /// The left lines of a row, one for each column.
  Lines<C> left_of_row(int64_t row) const { return {left.data + row * left.stride, left_shift, left.step}; }

  /// A batch of single outputs as one row of them.
  void join_batch() {
    left_shift = left_batch;
    right.stride = right_batch;
    columns = batch;
    column_step = 1;
    batch = 1;
  }

  /// Columns become rows; they must be in one piece.
  void transpose() {
    std::swap(left, right);
    std::swap(left_batch, right_batch);
    std::swap(rows, columns);
    std::swap(row_step, column_step);
  }
};

}  // namespace lowprec
