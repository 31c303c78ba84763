#include "cpu/messages.h"

namespace gcng {

template <class T>
void messages_forward(const T* before, T* stash, const PairTile& tile, int64_t width, T* out, int num_threads) {
  const int64_t rows = tile.rows(), columns = tile.columns(), block_columns = columns_per_block(tile, width);
  const int64_t blocks = num_blocks(columns, block_columns);
  const int64_t size = (rows + std::min(block_columns, columns)) * width;
  const auto memory = scratch<T>(blocks * size);
  parallel_for(columns, block_columns, num_threads, [&](int64_t begin, int64_t end) {
    T *row_sums = memory.get() + begin / block_columns * size, *column_sums = row_sums + rows * width;
    set_zero(row_sums, size);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = begin; j < end; ++j) {
        const T* from = before + (i * columns + j) * width;
        if (stash && !tile.below_diagonal(i, j)) copy_row(from, width, stash + tile.position(i, j) * width);
        T *row_sum = row_sums + i * width, *column_sum = column_sums + (j - begin) * width;
        for_vectors<T>(width, [&](auto at, auto) {
          const Vector<T> message = gelu(load(from, at));
          add_to(row_sum, at, message);
          add_to(column_sum, at, message);
        });
      }
    }
    const int64_t first = std::max(begin, tile.mirror()), node = tile.c0 + first;
    if (first < end) add_row(column_sums + (first - begin) * width, (end - first) * width, out + node * width);
  });
  // Rows may be columns of another block, so their turn is after all blocks.
  add_partial_sums(memory.get(), blocks, size, rows * width, out + tile.r0 * width);
}

template <class T>
void messages_backward(const T* grad, const T* before, bool packed, const PairTile& tile, int64_t width, T* out,
                       T* bias, int num_threads) {
  const int64_t rows = tile.rows(), columns = tile.columns(), block_columns = columns_per_block(tile, width);
  const int64_t blocks = num_blocks(columns, block_columns);
  const auto memory = scratch<T>(blocks * 2 * width);
  parallel_for(columns, block_columns, num_threads, [&](int64_t begin, int64_t end) {
    T *total = memory.get() + begin / block_columns * 2 * width, *sum = total + width;
    set_zero(total, 2 * width);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t pair = i * columns + j;
        const T* from = before + (packed ? tile.position(i, j) : pair) * width;
        const T *grad_row = grad + (tile.r0 + i) * width, *grad_column = grad + (tile.c0 + j) * width;
        T* to = out + pair * width;
        const auto each = [&](auto received) __attribute__((always_inline)) {
          for_vectors<T>(width, [&](auto at, auto) __attribute__((always_inline)) {
            const Vector<T> grad_before = received(at) * gelu_terms(load(from, at)).slope;
            store(to, at, grad_before);
            add_to(sum, at, grad_before);
          });
        };
        if (j >= tile.mirror())
          each([&](auto at) __attribute__((always_inline)) { return load(grad_row, at) + load(grad_column, at); });
        else
          each([&](auto at) __attribute__((always_inline)) { return load(grad_row, at); });
      }
      move_sum(sum, width, total);
    }
  });
  add_partial_sums(memory.get(), blocks, 2 * width, width, bias);
}

template void messages_forward(const float*, float*, const PairTile&, int64_t, float*, int);
template void messages_forward(const double*, double*, const PairTile&, int64_t, double*, int);
template void messages_backward(const float*, const float*, bool, const PairTile&, int64_t, float*, float*, int);
template void messages_backward(const double*, const double*, bool, const PairTile&, int64_t, double*, double*, int);

}  // namespace gcng
