#include "cpu/gates.h"

namespace gcng {

template <class T>
void gates_forward(T* logits, T* stash, const GateSpread<T>& spread, const PairTile& tile, int64_t width,
                   int num_threads) {
  const int64_t rows = tile.rows(), columns = tile.columns(), block_columns = columns_per_block(tile, width);
  const int64_t blocks = num_blocks(columns, block_columns);
  const int64_t size = spread.center ? (rows + std::min(block_columns, columns)) * width : 0;
  const auto memory = scratch<T>(blocks * size);
  const auto squares = scratch<double>(blocks);
  parallel_for(columns, block_columns, num_threads, [&](int64_t begin, int64_t end) {
    T *row_sums = memory.get() + begin / block_columns * size, *column_sums = row_sums + rows * width;
    set_zero(row_sums, size);
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = begin; j < end; ++j) {
        T* gate = logits + (i * columns + j) * width;
        if (spread.center) {
          T *row_sum = row_sums + i * width, *column_sum = column_sums + (j - begin) * width;
          RowSum<T, 1> square;
          for_vectors<T>(width, [&](auto at, auto k) {
            const Vector<T> value = sigmoid(load(gate, at)), centered = inside(at, value - load(spread.center, at));
            store(gate, at, value);
            square.part[k] += centered * centered;
            add_to(row_sum, at, centered);
            add_to(column_sum, at, centered);
          });
          const double of_pair = static_cast<double>(square.total());
          total += j < tile.mirror() ? of_pair : 2 * of_pair;
        } else {
          for_vectors<T>(width, [&](auto at, auto) { store(gate, at, sigmoid(load(gate, at))); });
        }
        if (stash && !tile.below_diagonal(i, j)) copy_row(gate, width, stash + tile.position(i, j) * width);
      }
    }
    squares[begin / block_columns] = total;
    const int64_t first = std::max(begin, tile.mirror()), node = tile.c0 + first;
    if (spread.center && first < end)
      add_row(column_sums + (first - begin) * width, (end - first) * width, spread.row_sums + node * width);
  });
  if (!spread.center) return;
  // Rows may be columns of another block, so their turn is after all blocks.
  add_partial_sums(memory.get(), blocks, size, rows * width, spread.row_sums + tile.r0 * width);
  for (int64_t block = 0; block < blocks; ++block) *spread.squares += squares[block];
}

template <class T>
void gate_spread_gradient(const T* gates, const T* row_means, T scale, const PairTile& tile, int64_t width, T* out,
                          int num_threads) {
  const int64_t columns = tile.columns();
  parallel_for(columns, columns_per_block(tile, width), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < tile.rows(); ++i) {
      const T* of_row = row_means + (tile.r0 + i) * width;
      for (int64_t j = begin; j < end; ++j) {
        const T *gate = gates + (i * columns + j) * width, *of_column = row_means + (tile.c0 + j) * width;
        T* to = out + (i * columns + j) * width;
        if (j < tile.mirror())
          for_vectors<T>(width, [&](auto at, auto) { store(to, at, (load(gate, at) - load(of_row, at)) * scale); });
        else
          for_vectors<T>(width, [&](auto at, auto) {
            const Vector<T> value = load(gate, at);
            store(to, at, (value - load(of_row, at) + (value - load(of_column, at))) * scale);
          });
      }
    }
  });
}

template <class T>
void gate_logits_gradient(const T* grad, const T* gates, int64_t pairs, int64_t width, T* out, T* bias,
                          int num_threads) {
  const int64_t block_pairs = pairs_per_block(width), blocks = num_blocks(pairs, block_pairs);
  const auto memory = scratch<T>(bias ? blocks * 2 * width : 0);
  parallel_for(pairs, block_pairs, num_threads, [&](int64_t begin, int64_t end) {
    T *total = memory.get() + begin / block_pairs * 2 * width, *sum = total + width;
    if (bias) set_zero(total, 2 * width);
    for (int64_t pair = begin; pair < end; ++pair) {
      for_vectors<T>(width, [&](auto at, auto) {
        const Vector<T> gate = load(gates + pair * width, at);
        const Vector<T> grad_logit = load(grad + pair * width, at) * ((T(1) - gate) * gate);
        store(out + pair * width, at, grad_logit);
        if (bias) add_to(sum, at, grad_logit);
      });
      if (bias && ends_short_sum(pair, begin, end)) move_sum(sum, width, total);
    }
  });
  if (bias) add_partial_sums(memory.get(), blocks, 2 * width, width, bias);
}

template <class T>
void gate_center(const T* values, const T* mean, int64_t pairs, int64_t width, T* out, int num_threads) {
  parallel_for(pairs, pairs_per_block(width), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair)
      for_vectors<T>(width, [&](auto at, auto) {
        store(out + pair * width, at, load(values + pair * width, at) - load(mean, at));
      });
  });
}

template <class T>
void gate_norm_gradient(T* grad, const T* e, const T* weights, const T* mean, const T* constant, const T* linear,
                        int64_t pairs, int64_t width, int num_threads) {
  parallel_for(pairs, pairs_per_block(width), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair)
      for_vectors<T>(width, [&](auto at, auto) {
        const Vector<T> centered = load(e + pair * width, at) - load(mean, at);
        const Vector<T> sent = centered * load(linear, at) + load(constant, at);
        store(grad + pair * width, at, load(grad + pair * width, at) - sent * weights[pair]);
      });
  });
}

template <class T>
void gate_moments(const T* values, const T* weights, const T* shift, int64_t pairs, int64_t width, double* total,
                  double* squares, int num_threads) {
  const int64_t block_pairs = pairs_per_block(width), blocks = num_blocks(pairs, block_pairs);
  const auto memory = scratch<T>(blocks * 2 * width);
  const auto totals = scratch<double>(blocks * 2 * width);
  parallel_for(pairs, block_pairs, num_threads, [&](int64_t begin, int64_t end) {
    const int64_t place = begin / block_pairs * 2 * width;
    T *sum = memory.get() + place, *square_sum = sum + width;
    set_zero(sum, 2 * width);
    set_zero(totals.get() + place, 2 * width);
    for (int64_t pair = begin; pair < end; ++pair) {
      for_vectors<T>(width, [&](auto at, auto) {
        const Vector<T> centered = load(values + pair * width, at) - load(shift, at);
        const Vector<T> weighted = centered * weights[pair];
        add_to(sum, at, weighted);
        add_to(square_sum, at, weighted * centered);
      });
      if (!ends_short_sum(pair, begin, end)) continue;
      for (int64_t d = 0; d < 2 * width; ++d) totals[place + d] += static_cast<double>(sum[d]);
      set_zero(sum, 2 * width);
    }
  });
  add_partial_sums(totals.get(), blocks, 2 * width, width, total);
  add_partial_sums(totals.get() + width, blocks, 2 * width, width, squares);
}

#define GCNG_INSTANTIATE(T)                                                                                         \
  template void gates_forward(T*, T*, const GateSpread<T>&, const PairTile&, int64_t, int);                         \
  template void gate_spread_gradient(const T*, const T*, T, const PairTile&, int64_t, T*, int);                     \
  template void gate_logits_gradient(const T*, const T*, int64_t, int64_t, T*, T*, int);                            \
  template void gate_center(const T*, const T*, int64_t, int64_t, T*, int);                                         \
  template void gate_norm_gradient(T*, const T*, const T*, const T*, const T*, const T*, int64_t, int64_t, int);    \
  template void gate_moments(const T*, const T*, const T*, int64_t, int64_t, double*, double*, int);
GCNG_INSTANTIATE(float)
GCNG_INSTANTIATE(double)

}  // namespace gcng
