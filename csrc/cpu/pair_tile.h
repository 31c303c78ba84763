// A tile of pairs, the packed storage of gcng/ops/tiles.py, and how the passes over a tile are cut into blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/parallel_for.h"
#include "cpu/vector.h"

namespace gcng {

// Rows [r0, r1) against columns [c0, c1) of n class-major nodes, where c0 == r0 or c0 >= r1.
struct PairTile {
  int64_t n, r0, r1, c0, c1;

  int64_t rows() const { return r1 - r0; }
  int64_t columns() const { return c1 - c0; }
  int64_t pairs() const { return rows() * columns(); }
  // The first column that stands for both orders of its pairs.
  int64_t mirror() const { return std::max<int64_t>(r1 - c0, 0); }
  bool below_diagonal(int64_t i, int64_t j) const { return c0 + j < r0 + i; }

  // Packed position of row i and column j of the tile; both orders of a pair have the same.
  int64_t position(int64_t i, int64_t j) const {
    const int64_t r = std::min(r0 + i, c0 + j), c = std::max(r0 + i, c0 + j);
    return r * n - r * (r - 1) / 2 + c - r;
  }
};

// Numbers that one block of a pass touches in each of its tensors: about 25 us of work, so that a tile of 256 pairs still
// keeps eight threads busy, and its rows stay in cache.
inline constexpr int64_t kBlockNumbers = 1 << 14;

// Terms that are added one after another before their sum joins a longer one: rounding errors of a sum in float32 grow
// with the square root of its terms, and torch adds in a cascade.
inline constexpr int64_t kShortSum = 16;

// Pairs in a block of a pass that owns whole pairs, in vectors of `width`.
inline int64_t pairs_per_block(int64_t width) {
  return std::clamp<int64_t>(kBlockNumbers / std::max<int64_t>(width, 1), 8, 1024);
}

// Columns in a block of a pass that also sums over rows or columns: a block holds all rows, so that it owns the sums of
// its columns, is wide enough that its partial sums of the rows are few, and narrow enough that they are short.
inline int64_t columns_per_block(const PairTile& tile, int64_t width) {
  return std::clamp<int64_t>(2 * pairs_per_block(width) / std::max<int64_t>(tile.rows(), 1), 8, 32);
}

// Scratch numbers, uninitialized.
template <class T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::make_unique_for_overwrite<T[]>(static_cast<size_t>(std::max<int64_t>(count, 1)));
}

template <class T>
void set_zero(T* row, int64_t width) {
  std::fill(row, row + width, T(0));
}

template <class T>
void copy_row(const T* values, int64_t width, T* out) {
  std::memcpy(out, values, static_cast<size_t>(width) * sizeof(T));
}

template <class T>
void add_row(const T* values, int64_t width, T* out) {
  for_vectors<T>(width, [&](auto at, auto) { add_to(out, at, load(values, at)); });
}

// Whether a short sum over the pairs of a block ends with this one.
inline bool ends_short_sum(int64_t pair, int64_t begin, int64_t end) {
  return (pair - begin) % kShortSum == kShortSum - 1 || pair == end - 1;
}

// Ends a short sum (width,): adds it to a longer one and starts it again.
template <class T>
void move_sum(T* sum, int64_t width, T* total) {
  add_row(sum, width, total);
  set_zero(sum, width);
}

// Adds `count` partial sums, `stride` numbers apart, to out (width,): neighbors first, then neighboring sums. They are
// overwritten.
template <class T>
void add_partial_sums(T* partial, int64_t count, int64_t stride, int64_t width, T* out) {
  for (int64_t step = 1; step < count; step *= 2)
    for (int64_t block = 0; block + step < count; block += 2 * step)
      add_row(partial + (block + step) * stride, width, partial + block * stride);
  if (count > 0) add_row(partial, width, out);
}

}  // namespace gcng
