#include "cpu/activation_norm.h"
#include "cpu/edge_source.h"

namespace gcng {

template <class T>
void edge_prologue(const EdgeSource<T>& source, const AttentionNodes<T>& nodes, const NormWeights<T>& norm,
                   const int64_t* identity, const LayerDropout& dropout, const PairTile& tile, int64_t width,
                   const MixWeights<T>& mix, T* x, int num_threads) {
  const int64_t columns = tile.columns();
  const T scale = T(1) / std::sqrt(static_cast<T>(width));
  parallel_for(columns, columns_per_block(tile, width), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < tile.rows(); ++i) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t r = tile.r0 + i, c = tile.c0 + j, pair = i * columns + j;
        with_edge(source, tile, i, j, width, [&](const auto& edge) __attribute__((always_inline)) {
          const T *key_row = nodes.key_query + r * width, *key_column = nodes.key_query + c * width;
          RowSum<T, 4> logit;
          for_vectors<T, 4>(width, [&](auto at, auto k) {
            logit.part[k] += edge.at(at) * (load(key_row, at) - load(key_column, at));
          });
          const T gate = sigmoid((logit.total() + (nodes.key_bias[r] - nodes.key_bias[c])) * scale);
          T weight_row = gate, weight_column = T(1) - gate;
          if (identity) {
            const PairScales<T> scales = pair_scales<T>(dropout, identity[r], identity[c]);
            weight_row *= scales.row;
            weight_column *= scales.column;
          }
          mix.gate[pair] = gate;
          mix.row[pair] = weight_row;
          mix.column[pair] = weight_column;
          const T *value_row = nodes.value + r * width, *value_column = nodes.value + c * width;
          const auto mixed = [&](auto at) __attribute__((always_inline)) {
            return edge.at(at) + load(value_row, at) * weight_row + load(value_column, at) * weight_column;
          };
          activation_norm(mixed, norm.weight, norm.bias, width, x + pair * width);
        });
      }
    }
  });
}

template void edge_prologue(const EdgeSource<float>&, const AttentionNodes<float>&, const NormWeights<float>&,
                            const int64_t*, const LayerDropout&, const PairTile&, int64_t, const MixWeights<float>&,
                            float*, int);
template void edge_prologue(const EdgeSource<double>&, const AttentionNodes<double>&, const NormWeights<double>&,
                            const int64_t*, const LayerDropout&, const PairTile&, int64_t, const MixWeights<double>&,
                            double*, int);

}  // namespace gcng
