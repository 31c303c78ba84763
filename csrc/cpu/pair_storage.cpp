#include "cpu/pair_storage.h"

namespace gcng {
namespace {

// body(i, j) for all pairs of a tile, in blocks of whole columns.
template <class Body>
void for_pairs(const PairTile& tile, int64_t width, int num_threads, const Body& body) {
  parallel_for(tile.columns(), columns_per_block(tile, width), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < tile.rows(); ++i)
      for (int64_t j = begin; j < end; ++j) body(i, j);
  });
}

}  // namespace

template <class T>
void pair_products(const T* nodes, const PairTile& tile, int64_t width, T* out, int num_threads) {
  for_pairs(tile, width, num_threads, [&](int64_t i, int64_t j) {
    const T *row = nodes + (tile.r0 + i) * width, *column = nodes + (tile.c0 + j) * width;
    T* to = out + (i * tile.columns() + j) * width;
    for_vectors<T, 2>(width, [&](auto at, auto) { store(to, at, load(row, at) * load(column, at)); });
  });
}

template <class T>
void pair_store(const T* values, const PairTile& tile, int64_t width, T* packed, int num_threads) {
  for_pairs(tile, width, num_threads, [&](int64_t i, int64_t j) {
    if (tile.below_diagonal(i, j)) return;
    copy_row(values + (i * tile.columns() + j) * width, width, packed + tile.position(i, j) * width);
  });
}

template <class T>
void pair_load(const T* packed, const PairTile& tile, int64_t width, bool symmetric, T* out, int num_threads) {
  for_pairs(tile, width, num_threads, [&](int64_t i, int64_t j) {
    T* to = out + (i * tile.columns() + j) * width;
    if (symmetric || !tile.below_diagonal(i, j)) copy_row(packed + tile.position(i, j) * width, width, to);
    else set_zero(to, width);
  });
}

template <class T>
void pair_add_packed(const T* values, const PairTile& tile, int64_t width, T* packed, int num_threads) {
  for_pairs(tile, width, num_threads, [&](int64_t i, int64_t j) {
    if (tile.below_diagonal(i, j)) return;
    const T* upper = values + (i * tile.columns() + j) * width;
    T* to = packed + tile.position(i, j) * width;
    if (j >= tile.mirror() || i == j) return add_row(upper, width, to);
    const T* lower = values + (j * tile.columns() + i) * width;
    for_vectors<T>(width, [&](auto at, auto) { add_to(to, at, load(upper, at) + load(lower, at)); });
  });
}

template <class T>
void pair_add_product(const T* nodes, const T* grad, const PairTile& tile, int64_t width, T* out, int num_threads) {
  const int64_t rows = tile.rows(), columns = tile.columns(), block_columns = columns_per_block(tile, width);
  const int64_t blocks = num_blocks(columns, block_columns);
  const int64_t size = (rows + std::min(block_columns, columns)) * width;
  const auto memory = scratch<T>(blocks * size);
  parallel_for(columns, block_columns, num_threads, [&](int64_t begin, int64_t end) {
    T *row_sums = memory.get() + begin / block_columns * size, *column_sums = row_sums + rows * width;
    set_zero(row_sums, size);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = begin; j < end; ++j) {
        const T *from = grad + (i * columns + j) * width;
        const T *row = nodes + (tile.r0 + i) * width, *column = nodes + (tile.c0 + j) * width;
        for_vectors<T>(width, [&](auto at, auto) {
          const Vector<T> g = load(from, at);
          add_to(row_sums + i * width, at, g * load(column, at));
          add_to(column_sums + (j - begin) * width, at, g * load(row, at));
        });
      }
    }
    // Every evaluation depends on both of its endpoints, mirrored or not.
    add_row(column_sums, (end - begin) * width, out + (tile.c0 + begin) * width);
  });
  // Rows may be columns of another block, so their turn is after all blocks.
  add_partial_sums(memory.get(), blocks, size, rows * width, out + tile.r0 * width);
}

#define GCNG_INSTANTIATE(T)                                                                     \
  template void pair_products(const T*, const PairTile&, int64_t, T*, int);                     \
  template void pair_store(const T*, const PairTile&, int64_t, T*, int);                        \
  template void pair_load(const T*, const PairTile&, int64_t, bool, T*, int);                   \
  template void pair_add_packed(const T*, const PairTile&, int64_t, T*, int);                   \
  template void pair_add_product(const T*, const T*, const PairTile&, int64_t, T*, int);
GCNG_INSTANTIATE(float)
GCNG_INSTANTIATE(double)

}  // namespace gcng
