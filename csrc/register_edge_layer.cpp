// gcng_cpu::edge_*: the passes of an edge layer, called by gcng/ops/native_pair_kernels.py.
#include "cpu/edge_layer.h"
#include "pair_access.h"

namespace gcng {
namespace {

template <class T>
EdgeSource<T> edge_source(const Tensor& values, int64_t kind, const PairTile& tile, int64_t width) {
  STD_TORCH_CHECK(0 <= kind && kind <= 2, "kind must be 0, 1 or 2, got ", kind);
  const auto edge_kind = static_cast<EdgeKind>(kind);
  const int64_t count = edge_kind == EdgeKind::product ? tile.n : pair_rows(tile, edge_kind == EdgeKind::packed);
  return {read<T>(values, "source", {count, width}), edge_kind};
}

template <class T>
AttentionNodes<T> attention_nodes(const Tensor& key_query, const Tensor& key_bias, const Tensor& value, int64_t n,
                                  int64_t width) {
  return {read<T>(key_query, "key_query", {n, width}), read<T>(key_bias, "key_bias", {n}),
          read<T>(value, "value", {n, width})};
}

void edge_prologue_op(const Tensor& source, int64_t kind, const Tensor& key_query, const Tensor& key_bias,
                      const Tensor& value, const Tensor& norm_weight, const Tensor& norm_bias,
                      const std::optional<Tensor>& identity, const std::optional<Tensor>& seed, int64_t layer,
                      double p, int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1, const Tensor& gate,
                      const Tensor& weight_row, const Tensor& weight_column, const Tensor& x) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = norm_weight.numel(), r = tile.rows(), s = tile.columns();
  STD_TORCH_CHECK(identity.has_value() == seed.has_value() && 0 <= p && p < 1, "dropout wants identity, seed, p");
  const LayerDropout dropout(seed.has_value() ? *read<int64_t>(*seed, "seed", {}) : 0, layer, p);
  with_float_type(x, "x", [&](auto zero) {
    using T = decltype(zero);
    edge_prologue<T>(edge_source<T>(source, kind, tile, d), attention_nodes<T>(key_query, key_bias, value, n, d),
                     {read<T>(norm_weight, "norm_weight", {d}), read<T>(norm_bias, "norm_bias", {d})},
                     identity.has_value() ? read<int64_t>(*identity, "identity", {n}) : nullptr, dropout, tile, d,
                     {write<T>(gate, "gate", {r, s}), write<T>(weight_row, "weight_row", {r, s}),
                      write<T>(weight_column, "weight_column", {r, s})},
                     write<T>(x, "x", {r * s, d}), torch_threads());
  });
}

void edge_hidden_op(const Tensor& h0, bool packed, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& stash, int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                    const Tensor& out, const Tensor& mean, const Tensor& rstd) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t h = out.size(1), pairs = tile.pairs();
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    edge_hidden<T>(read<T>(h0, "h0", {pair_rows(tile, packed), h}), packed,
                   bias.has_value() ? read<T>(*bias, "bias", {h}) : nullptr,
                   write_if<T>(stash, "stash", {pair_rows(tile, true), h}), tile, h,
                   write<T>(out, "out", {pairs, h}), write<T>(mean, "mean", {pairs}),
                   write<T>(rstd, "rstd", {pairs}), torch_threads());
  });
}

void edge_epilogue_op(const Tensor& y, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                      const Tensor& row_sums, const Tensor& shift, const Tensor& norm_weight,
                      const Tensor& norm_bias, int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                      const Tensor& out, bool packed, const std::optional<Tensor>& stash) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = norm_weight.numel(), pairs = tile.pairs(), all = pair_rows(tile, true);
  with_float_type(y, "y", [&](auto zero) {
    using T = decltype(zero);
    edge_epilogue<T>(write<T>(y, "y", {pairs, d}), read<T>(x, "x", {pairs, d}), read<T>(mean, "mean", {pairs}),
                     read<T>(rstd, "rstd", {pairs}),
                     {read<T>(row_sums, "row_sums", {d}), read<T>(shift, "shift", {d})},
                     {read<T>(norm_weight, "norm_weight", {d}), read<T>(norm_bias, "norm_bias", {d})}, tile, d,
                     write<T>(out, "out", {packed ? all : pairs, d}), packed,
                     write_if<T>(stash, "stash", {all, d}), torch_threads());
  });
}

void edge_epilogue_backward_op(const Tensor& grad, bool packed, const Tensor& w2, bool w2_packed, const Tensor& x,
                               const Tensor& mean, const Tensor& rstd, const Tensor& row_sums, const Tensor& shift,
                               const Tensor& norm_weight, int64_t hidden_width, int64_t n, int64_t r0, int64_t r1,
                               int64_t c0, int64_t c1, const Tensor& sum_ln_weight, const Tensor& sum_ln_bias,
                               const Tensor& sum_shift, const Tensor& sum_folded_mean, const Tensor& out,
                               const Tensor& scaled, const Tensor& mean_grad, const Tensor& mean_product) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = norm_weight.numel(), pairs = tile.pairs();
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    const EpilogueSums<T> sums{write<T>(sum_ln_weight, "sum_ln_weight", {d}),
                               write<T>(sum_ln_bias, "sum_ln_bias", {d}), write<T>(sum_shift, "sum_shift", {d}),
                               write<T>(sum_folded_mean, "sum_folded_mean", {d})};
    edge_epilogue_backward<T>(
        read<T>(grad, "grad", {pair_rows(tile, packed), d}), packed,
        read<T>(w2, "w2", {pair_rows(tile, w2_packed), d}), w2_packed, read<T>(x, "x", {pairs, d}),
        read<T>(mean, "mean", {pairs}), read<T>(rstd, "rstd", {pairs}),
        {read<T>(row_sums, "row_sums", {d}), read<T>(shift, "shift", {d})},
        read<T>(norm_weight, "norm_weight", {d}), tile, d, hidden_width, sums, write<T>(out, "out", {pairs, d}),
        write<T>(scaled, "scaled", {pairs, d}), write<T>(mean_grad, "mean_grad", {pairs}),
        write<T>(mean_product, "mean_product", {pairs}), torch_threads());
  });
}

void edge_hidden_backward_op(const Tensor& grad, const Tensor& h0, bool packed, const Tensor& mean,
                             const Tensor& rstd, const Tensor& mean_grad, const Tensor& mean_product, int64_t n,
                             int64_t r0, int64_t r1, int64_t c0, int64_t c1, const Tensor& bias) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t h = bias.numel(), pairs = tile.pairs();
  with_float_type(grad, "grad", [&](auto zero) {
    using T = decltype(zero);
    edge_hidden_backward<T>(write<T>(grad, "grad", {pairs, h}), read<T>(h0, "h0", {pair_rows(tile, packed), h}),
                            packed, read<T>(mean, "mean", {pairs}), read<T>(rstd, "rstd", {pairs}),
                            read<T>(mean_grad, "mean_grad", {pairs}),
                            read<T>(mean_product, "mean_product", {pairs}), tile, h, write<T>(bias, "bias", {h}),
                            torch_threads());
  });
}

void edge_prologue_backward_op(const Tensor& grad, const Tensor& source, int64_t kind, const Tensor& key_query,
                               const Tensor& key_bias, const Tensor& value, const Tensor& norm_weight,
                               const Tensor& gate, const Tensor& weight_row, const Tensor& weight_column, int64_t n,
                               int64_t r0, int64_t r1, int64_t c0, int64_t c1, const Tensor& sum_ln_weight,
                               const Tensor& sum_ln_bias, const Tensor& sum_value, const Tensor& sum_key_query,
                               const Tensor& sum_key_bias, bool need_input) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = norm_weight.numel(), r = tile.rows(), s = tile.columns();
  with_float_type(grad, "grad", [&](auto zero) {
    using T = decltype(zero);
    const PrologueSums<T> sums{write<T>(sum_ln_weight, "sum_ln_weight", {d}),
                               write<T>(sum_ln_bias, "sum_ln_bias", {d}), write<T>(sum_value, "sum_value", {n, d}),
                               write<T>(sum_key_query, "sum_key_query", {n, d}),
                               write<T>(sum_key_bias, "sum_key_bias", {n})};
    edge_prologue_backward<T>(write<T>(grad, "grad", {r * s, d}), edge_source<T>(source, kind, tile, d),
                              attention_nodes<T>(key_query, key_bias, value, n, d),
                              read<T>(norm_weight, "norm_weight", {d}), read<T>(gate, "gate", {r, s}),
                              read<T>(weight_row, "weight_row", {r, s}),
                              read<T>(weight_column, "weight_column", {r, s}), tile, d, sums, need_input,
                              torch_threads());
  });
}

STABLE_TORCH_LIBRARY_IMPL(gcng_cpu, CPU, m) {
  m.impl("edge_prologue", TORCH_BOX(&edge_prologue_op));
  m.impl("edge_hidden", TORCH_BOX(&edge_hidden_op));
  m.impl("edge_epilogue", TORCH_BOX(&edge_epilogue_op));
  m.impl("edge_epilogue_backward", TORCH_BOX(&edge_epilogue_backward_op));
  m.impl("edge_hidden_backward", TORCH_BOX(&edge_hidden_backward_op));
  m.impl("edge_prologue_backward", TORCH_BOX(&edge_prologue_backward_op));
}

}  // namespace
}  // namespace gcng
