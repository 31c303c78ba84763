#include "cpu/activation_norm.h"
#include "cpu/edge_layer.h"

namespace gcng {

template <class T>
void edge_epilogue(T* y, const T* x, const T* mean, const T* rstd, const HiddenNorm<T>& hidden_norm,
                   const NormWeights<T>& norm, const PairTile& tile, int64_t width, T* out, bool packed, T* stash,
                   int num_threads) {
  const int64_t columns = tile.columns();
  parallel_for(tile.pairs(), pairs_per_block(width), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t i = pair / columns, j = pair % columns, position = tile.position(i, j);
      const bool below = tile.below_diagonal(i, j);
      T* w2 = y + pair * width;
      const T *residual = x + pair * width, center = mean[pair], scale = rstd[pair];
      for_vectors<T, 2>(width, [&](auto at, auto) {
        const Vector<T> mapped = (load(w2, at) - load(hidden_norm.row_sums, at) * center) * scale;
        store(w2, at, mapped + load(hidden_norm.shift, at) + load(residual, at));
      });
      if (stash && !below) copy_row(w2, width, stash + position * width);
      if (packed && below) continue;
      const auto input = [&](auto at) __attribute__((always_inline)) { return load(w2, at); };
      activation_norm(input, norm.weight, norm.bias, width, out + (packed ? position : pair) * width);
    }
  });
}

template <class T>
void edge_epilogue_backward(const T* grad, bool packed, const T* w2, bool w2_packed, const T* x, const T* mean,
                            const T* rstd, const HiddenNorm<T>& hidden_norm, const T* norm_weight,
                            const PairTile& tile, int64_t width, int64_t hidden_width, const EpilogueSums<T>& sums,
                            T* out, T* scaled, T* mean_grad, T* mean_product, int num_threads) {
  const int64_t columns = tile.columns(), block_pairs = pairs_per_block(width);
  const int64_t blocks = num_blocks(tile.pairs(), block_pairs), size = 10 * width;
  const auto memory = scratch<T>(blocks * size), nothing = scratch<T>(width);
  set_zero(nothing.get(), width);
  parallel_for(tile.pairs(), block_pairs, num_threads, [&](int64_t begin, int64_t end) {
    T* block = memory.get() + begin / block_pairs * size;
    set_zero(block, size);
    T *shift_sum = block + 4 * width, *mean_sum = block + 5 * width, *totals = block + 6 * width;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t i = pair / columns, j = pair % columns, position = tile.position(i, j);
      const T* from = packed ? grad + position * width : grad + pair * width;
      // The whole gradient of an unordered pair belongs to its upper evaluation.
      if (packed && tile.below_diagonal(i, j)) from = nothing.get();
      const T *input = w2 + (w2_packed ? position : pair) * width, *residual = x + pair * width;
      T *to = out + pair * width, *to_scaled = scaled + pair * width;
      const T center = mean[pair], scale = rstd[pair];
      const auto input_at = [&](auto at) __attribute__((always_inline)) { return load(input, at); };
      RowSum<T, 2> grads, products;
      activation_norm_backward<T, 2>(
          input_at, from, norm_weight, width, ActivationNormBlock<T>(block, width),
          [&](auto at, auto k, Vector<T> grad_w2) __attribute__((always_inline)) {
            const Vector<T> grad_scaled = grad_w2 * scale;
            store(to, at, grad_w2);
            store(to_scaled, at, grad_scaled);
            add_to(shift_sum, at, grad_w2);
            add_to(mean_sum, at, grad_scaled * center);
            const Vector<T> mapped = load(input, at) - load(residual, at) - load(hidden_norm.shift, at);
            grads.part[k] += grad_w2 * load(hidden_norm.row_sums, at);
            products.part[k] += grad_w2 * mapped;
          });
      mean_grad[pair] = grads.total() / static_cast<T>(hidden_width);
      mean_product[pair] = products.total() / static_cast<T>(hidden_width);
      if (ends_short_sum(pair, begin, end)) move_sum(block + 2 * width, 4 * width, totals);
    }
  });
  T* const outputs[4] = {sums.ln_weight, sums.ln_bias, sums.shift, sums.folded_mean};
  for (int k = 0; k < 4; ++k) add_partial_sums(memory.get() + (6 + k) * width, blocks, size, width, outputs[k]);
}

template void edge_epilogue(float*, const float*, const float*, const float*, const HiddenNorm<float>&,
                            const NormWeights<float>&, const PairTile&, int64_t, float*, bool, float*, int);
template void edge_epilogue(double*, const double*, const double*, const double*, const HiddenNorm<double>&,
                            const NormWeights<double>&, const PairTile&, int64_t, double*, bool, double*, int);
template void edge_epilogue_backward(const float*, bool, const float*, bool, const float*, const float*,
                                     const float*, const HiddenNorm<float>&, const float*, const PairTile&, int64_t,
                                     int64_t, const EpilogueSums<float>&, float*, float*, float*, float*, int);
template void edge_epilogue_backward(const double*, bool, const double*, bool, const double*, const double*,
                                     const double*, const HiddenNorm<double>&, const double*, const PairTile&,
                                     int64_t, int64_t, const EpilogueSums<double>&, double*, double*, double*,
                                     double*, int);

}  // namespace gcng
