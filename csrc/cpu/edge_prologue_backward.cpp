#include "cpu/activation_norm.h"
#include "cpu/edge_source.h"

namespace gcng {
namespace {

// Where the parts of one block's scratch begin. A block has all R rows of a tile and some of its columns, so that its
// sums over rows are whole, while those over columns are added up over blocks.
struct Layout {
  int64_t norm_totals;                 // (2, D) partial sums
  int64_t value_rows, key_rows;        // (R, D) partial sums
  int64_t bias_rows;                   // (R,) partial sums
  int64_t value_columns, key_columns;  // (columns of a block, D)
  int64_t bias_columns;                // (columns of a block,)
  int64_t size;

  Layout(int64_t rows, int64_t columns, int64_t width)
      : norm_totals(4 * width),  // behind the scratch of the norm
        value_rows(norm_totals + 2 * width),
        key_rows(value_rows + rows * width),
        bias_rows(key_rows + rows * width),
        value_columns(bias_rows + rows),
        key_columns(value_columns + columns * width),
        bias_columns(key_columns + columns * width),
        size(bias_columns + columns) {}
};

template <class T>
struct Pass {
  const EdgeSource<T>& source;
  const AttentionNodes<T>& nodes;
  const T *norm_weight, *gate, *weight_row, *weight_column;
  const PairTile& tile;
  const int64_t width;
  const bool need_input;
  const T scale = T(1) / std::sqrt(static_cast<T>(width));

  // Pair (i, j), with the sums of its row and column at `row` and `column` of each part of the block's scratch.
  GCNG_INLINE void pair(T* grad, int64_t i, int64_t j, T* block, const Layout& at_part, int64_t column) const {
    const int64_t r = tile.r0 + i, c = tile.c0 + j, pair = i * tile.columns() + j;
    const T *value_row = nodes.value + r * width, *value_column = nodes.value + c * width;
    const T *key_row = nodes.key_query + r * width, *key_column = nodes.key_query + c * width;
    T *value_row_sum = block + at_part.value_rows + i * width, *key_row_sum = block + at_part.key_rows + i * width;
    T *value_column_sum = block + at_part.value_columns + column * width;
    T *key_column_sum = block + at_part.key_columns + column * width;
    const T a = weight_row[pair], b = weight_column[pair];
    with_edge(source, tile, i, j, width, [&](const auto& edge) __attribute__((always_inline)) {
      RowSum<T, 2> along_row, along_column;
      const auto mixed = [&](auto at) __attribute__((always_inline)) {
        return edge.at(at) + load(value_row, at) * a + load(value_column, at) * b;
      };
      const ActivationNormBlock<T> norm(block, width);
      activation_norm_backward<T, 2>(mixed, grad, norm_weight, width, norm, [&](auto at, auto k, Vector<T> grad_mix)
                                         __attribute__((always_inline)) {
        store(grad, at, grad_mix);
        along_row.part[k] += grad_mix * load(value_row, at);
        along_column.part[k] += grad_mix * load(value_column, at);
        add_to(value_row_sum, at, grad_mix * a);
        add_to(value_column_sum, at, grad_mix * b);
      });
      // (10): a two-way softmax is a sigmoid of the difference of logits.
      const T kappa =
          (a * (T(1) - gate[pair]) * along_row.total() - b * gate[pair] * along_column.total()) * scale;
      block[at_part.bias_rows + i] += kappa;
      block[at_part.bias_columns + column] -= kappa;
      for_vectors<T>(width, [&](auto at, auto) {
        const Vector<T> grad_key = edge.at(at) * kappa;
        add_to(key_row_sum, at, grad_key);
        add_to(key_column_sum, at, -grad_key);
      });
      if (!need_input) return;
      for_vectors<T>(width, [&](auto at, auto) {
        add_to(grad, at, (load(key_row, at) - load(key_column, at)) * kappa);
      });
    });
  }
};

}  // namespace

template <class T>
void edge_prologue_backward(T* grad, const EdgeSource<T>& source, const AttentionNodes<T>& nodes,
                            const T* norm_weight, const T* gate, const T* weight_row, const T* weight_column,
                            const PairTile& tile, int64_t width, const PrologueSums<T>& sums, bool need_input,
                            int num_threads) {
  const int64_t rows = tile.rows(), columns = tile.columns(), block_columns = columns_per_block(tile, width);
  const int64_t blocks = num_blocks(columns, block_columns);
  const Layout part(rows, std::min(block_columns, columns), width);
  const auto memory = scratch<T>(blocks * part.size);
  const Pass<T> pass{source, nodes, norm_weight, gate, weight_row, weight_column, tile, width, need_input};
  parallel_for(columns, block_columns, num_threads, [&](int64_t begin, int64_t end) {
    T* block = memory.get() + begin / block_columns * part.size;
    set_zero(block, part.size);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = begin; j < end; ++j)
        pass.pair(grad + (i * columns + j) * width, i, j, block, part, j - begin);
      move_sum(block + 2 * width, 2 * width, block + part.norm_totals);
    }
    const int64_t first = tile.c0 + begin, count = end - begin;
    add_row(block + part.value_columns, count * width, sums.value + first * width);
    add_row(block + part.key_columns, count * width, sums.key_query + first * width);
    add_row(block + part.bias_columns, count, sums.key_bias + first);
  });
  // Rows may be the nodes of columns, so their turn is after all blocks.
  T* block = memory.get();
  add_partial_sums(block + part.value_rows, blocks, part.size, rows * width, sums.value + tile.r0 * width);
  add_partial_sums(block + part.key_rows, blocks, part.size, rows * width, sums.key_query + tile.r0 * width);
  add_partial_sums(block + part.bias_rows, blocks, part.size, rows, sums.key_bias + tile.r0);
  add_partial_sums(block + part.norm_totals, blocks, part.size, width, sums.ln_weight);
  add_partial_sums(block + part.norm_totals + width, blocks, part.size, width, sums.ln_bias);
}

template void edge_prologue_backward(float*, const EdgeSource<float>&, const AttentionNodes<float>&, const float*,
                                     const float*, const float*, const float*, const PairTile&, int64_t,
                                     const PrologueSums<float>&, bool, int);
template void edge_prologue_backward(double*, const EdgeSource<double>&, const AttentionNodes<double>&,
                                     const double*, const double*, const double*, const double*, const PairTile&,
                                     int64_t, const PrologueSums<double>&, bool, int);

}  // namespace gcng
