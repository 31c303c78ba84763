#include <cmath>

#include "cpu/activation_norm.h"
#include "cpu/edge_layer.h"

namespace gcng {

template <class T>
void edge_hidden(const T* h0, bool packed, const T* bias, T* stash, const PairTile& tile, int64_t hidden_width,
                 T* out, T* mean, T* rstd, int num_threads) {
  const int64_t columns = tile.columns();
  parallel_for(tile.pairs(), pairs_per_block(hidden_width), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t i = pair / columns, j = pair % columns, position = tile.position(i, j);
      const T* from = h0 + (packed ? position : pair) * hidden_width;
      T* const kept = stash && !tile.below_diagonal(i, j) ? stash + position * hidden_width : nullptr;
      T* to = out + pair * hidden_width;
      if (bias) {  // into the place that is read next: the row stays in cache
        for_vectors<T>(hidden_width, [&](auto at, auto) { store(to, at, load(from, at) + load(bias, at)); });
        from = to;
      }
      if (kept) copy_row(from, hidden_width, kept);
      RowSum<T, 2> sum, squares;
      for_vectors<T, 2>(hidden_width, [&](auto at, auto k) {
        const Vector<T> value = gelu(load(from, at));
        store(to, at, value);
        sum.part[k] += value;
        squares.part[k] += value * value;
      });
      // A variance from sums of squares is safe: the mean of a gelu is of the size of its deviation.
      const double center = static_cast<double>(sum.total()) / static_cast<double>(hidden_width);
      const double square = static_cast<double>(squares.total()) / static_cast<double>(hidden_width);
      const double variance = square - center * center;
      mean[pair] = static_cast<T>(center);
      rstd[pair] = static_cast<T>(1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + kNormEps));
    }
  });
}

template <class T>
void edge_hidden_backward(T* grad, const T* h0, bool packed, const T* mean, const T* rstd, const T* mean_grad,
                          const T* mean_product, const PairTile& tile, int64_t hidden_width, T* bias,
                          int num_threads) {
  const int64_t columns = tile.columns(), block_pairs = pairs_per_block(hidden_width);
  const int64_t blocks = num_blocks(tile.pairs(), block_pairs);
  const auto memory = scratch<T>(blocks * 2 * hidden_width);
  parallel_for(tile.pairs(), block_pairs, num_threads, [&](int64_t begin, int64_t end) {
    T *total = memory.get() + begin / block_pairs * 2 * hidden_width, *sum = total + hidden_width;
    set_zero(total, 2 * hidden_width);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t place = packed ? tile.position(pair / columns, pair % columns) : pair;
      const T* from = h0 + place * hidden_width;
      T* to = grad + pair * hidden_width;
      const T slope = rstd[pair] * rstd[pair] * mean_product[pair];
      const T constant = slope * mean[pair] - rstd[pair] * mean_grad[pair];
      for_vectors<T>(hidden_width, [&](auto at, auto) {
        const auto [value, gelu_slope] = gelu_terms(load(from, at));
        const Vector<T> grad_x = (load(to, at) + constant - value * slope) * gelu_slope;
        store(to, at, grad_x);
        add_to(sum, at, grad_x);
      });
      if (ends_short_sum(pair, begin, end)) move_sum(sum, hidden_width, total);
    }
  });
  add_partial_sums(memory.get(), blocks, 2 * hidden_width, hidden_width, bias);
}

template void edge_hidden(const float*, bool, const float*, float*, const PairTile&, int64_t, float*, float*, float*,
                          int);
template void edge_hidden(const double*, bool, const double*, double*, const PairTile&, int64_t, double*, double*,
                          double*, int);
template void edge_hidden_backward(float*, const float*, bool, const float*, const float*, const float*,
                                   const float*, const PairTile&, int64_t, float*, int);
template void edge_hidden_backward(double*, const double*, bool, const double*, const double*, const double*,
                                   const double*, const PairTile&, int64_t, double*, int);

}  // namespace gcng
