// Passes of an edge layer against loops over pairs and channels in double.
#include "cpu/edge_layer.h"
#include "pair_problem.h"

using namespace gcng;
using namespace gcng::driver;

namespace {

template <class T>
struct Layer {
  Buffer<T> key_query, key_bias, value, weight, bias;
  AttentionNodes<T> nodes() const { return {key_query.data(), key_bias.data(), value.data()}; }
};

template <class T>
Layer<T> draw_layer(Random& random, int64_t n, int64_t width) {
  return {draw<T>(random, n * width), draw<T>(random, n), draw<T>(random, n * width), draw<T>(random, width, 0.5, 1),
          draw<T>(random, width)};
}

// Edges of a tile from any source, and the same in double.
template <class T>
struct DrawnEdges {
  EdgeKind kind;
  Buffer<T> values;
  std::vector<std::vector<double>> rows;  // R S
};

template <class T>
DrawnEdges<T> draw_edges(Random& random, const PairTile& tile, int64_t width) {
  const auto kind = static_cast<EdgeKind>(random.integer(0, 2));
  const int64_t counts[] = {tile.n, packed_pairs(tile), tile.pairs()};
  DrawnEdges<T> edges{kind, draw<T>(random, counts[static_cast<int64_t>(kind)] * width), {}};
  const std::vector<double> values = wide(edges.values);
  for (int64_t i = 0; i < tile.rows(); ++i)
    for (int64_t j = 0; j < tile.columns(); ++j) {
      if (kind == EdgeKind::product) {
        std::vector<double> row = row_of(values, tile.r0 + i, width);
        const std::vector<double> column = row_of(values, tile.c0 + j, width);
        for (int64_t d = 0; d < width; ++d) row[d] *= column[d];
        edges.rows.push_back(row);
      } else {
        const int64_t at = kind == EdgeKind::packed ? tile.position(i, j) : i * tile.columns() + j;
        edges.rows.push_back(row_of(values, at, width));
      }
    }
  return edges;
}

// Element `at` in double.
template <class T>
double at(const Buffer<T>& values, int64_t at) {
  return static_cast<double>(values[at]);
}

template <class T>
std::vector<double> mix_of(const Layer<T>& layer, const std::vector<double>& e, int64_t r, int64_t c, double a,
                           double b) {
  const int64_t width = static_cast<int64_t>(e.size());
  std::vector<double> w(e);
  for (int64_t d = 0; d < width; ++d)
    w[d] += a * at(layer.value, r * width + d) + b * at(layer.value, c * width + d);
  return w;
}

template <class T>
void check_prologue(Random& random, int num_threads, Outputs& outputs) {
  const PairTile tile = draw_tile(random);
  const int64_t width = draw_width(random, tile), pairs = tile.pairs(), columns = tile.columns();
  const Layer<T> layer = draw_layer<T>(random, tile.n, width);
  const DrawnEdges<T> edges = draw_edges<T>(random, tile, width);
  Buffer<int64_t> identity(tile.n);
  for (int64_t i = 0; i < tile.n; ++i) identity[i] = static_cast<int64_t>(random.word());
  const LayerDropout dropout(static_cast<int64_t>(random.word()), random.integer(0, 5), 0.3);
  const bool drops = random.integer(0, 1) == 1;
  Buffer<T> gate(pairs), row(pairs), column(pairs), x(pairs * width);
  edge_prologue<T>({edges.values.data(), edges.kind}, layer.nodes(), {layer.weight.data(), layer.bias.data()},
                   drops ? identity.data() : nullptr, dropout, tile, width, {gate.data(), row.data(), column.data()},
                   x.data(), num_threads);
  std::vector<double> expected_gate, expected_x;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t r = tile.r0 + pair / columns, c = tile.c0 + pair % columns;
    const std::vector<double>& e = edges.rows[pair];
    double logit = at(layer.key_bias, r) - at(layer.key_bias, c);
    for (int64_t d = 0; d < width; ++d)
      logit += e[d] * (at(layer.key_query, r * width + d) - at(layer.key_query, c * width + d));
    expected_gate.push_back(1 / (1 + std::exp(-logit / std::sqrt(static_cast<double>(width)))));
    const double kept = 1 / 0.7, a = at(row, pair), b = at(column, pair), g = at(gate, pair);
    GCNG_CHECK(drops ? a == 0 || std::abs(a - g * kept) < 1e-6 : a == g);
    GCNG_CHECK(drops ? b == 0 || std::abs(b - (1 - g) * kept) < 1e-6 : std::abs(b - (1 - g)) < 1e-6);
    const std::vector<double> norm = naive_norm(mix_of(layer, e, r, c, a, b), wide(layer.weight), wide(layer.bias));
    expected_x.insert(expected_x.end(), norm.begin(), norm.end());
  }
  check_close(gate, expected_gate);
  check_close(x, expected_x);
  outputs.add(gate), outputs.add(row), outputs.add(column), outputs.add(x);
}

template <class T>
void check_prologue_backward(Random& random, int num_threads, Outputs& outputs) {
  const PairTile tile = draw_tile(random);
  const int64_t width = draw_width(random, tile), n = tile.n, pairs = tile.pairs(), columns = tile.columns();
  const Layer<T> layer = draw_layer<T>(random, n, width);
  const DrawnEdges<T> edges = draw_edges<T>(random, tile, width);
  const Buffer<T> gate = draw<T>(random, pairs, 0.4, 0.5), row = draw<T>(random, pairs);
  const Buffer<T> column = draw<T>(random, pairs);
  Buffer<T> grad = draw<T>(random, pairs * width);
  Buffer<T> sums[5] = {draw<T>(random, width), draw<T>(random, width), draw<T>(random, n * width),
                       draw<T>(random, n * width), draw<T>(random, n)};
  std::vector<double> expected[5], expected_grad;
  for (int k = 0; k < 5; ++k) expected[k] = wide(sums[k]);
  const std::vector<double> grads = wide(grad), key = wide(layer.key_query), value = wide(layer.value);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t r = (tile.r0 + pair / columns), c = tile.c0 + pair % columns;
    const double a = at(row, pair), b = at(column, pair), g = at(gate, pair);
    const std::vector<double>& e = edges.rows[pair];
    std::vector<double> grad_mix = naive_norm_backward(row_of(grads, pair, width), mix_of(layer, e, r, c, a, b),
                                                       wide(layer.weight), expected[0], expected[1]);
    double along_row = 0, along_column = 0;
    for (int64_t d = 0; d < width; ++d) {
      along_row += grad_mix[d] * value[r * width + d], along_column += grad_mix[d] * value[c * width + d];
      expected[2][r * width + d] += a * grad_mix[d], expected[2][c * width + d] += b * grad_mix[d];
    }
    const double kappa = (a * (1 - g) * along_row - b * g * along_column) / std::sqrt(static_cast<double>(width));
    expected[4][r] += kappa, expected[4][c] -= kappa;
    for (int64_t d = 0; d < width; ++d) {
      expected[3][r * width + d] += kappa * e[d], expected[3][c * width + d] -= kappa * e[d];
      expected_grad.push_back(grad_mix[d] + kappa * (key[r * width + d] - key[c * width + d]));
    }
  }
  const bool need_input = random.integer(0, 1) == 1;
  edge_prologue_backward<T>(grad.data(), {edges.values.data(), edges.kind}, layer.nodes(), layer.weight.data(),
                            gate.data(), row.data(), column.data(), tile, width,
                            {sums[0].data(), sums[1].data(), sums[2].data(), sums[3].data(), sums[4].data()},
                            need_input, num_threads);
  if (need_input) check_close(grad, expected_grad), outputs.add(grad);
  for (int k = 0; k < 5; ++k) check_close(sums[k], expected[k]), outputs.add(sums[k]);
}

template <class T>
void check_hidden(Random& random, int num_threads, Outputs& outputs) {
  const PairTile tile = draw_tile(random);
  const int64_t width = draw_width(random, tile), pairs = tile.pairs(), all = packed_pairs(tile);
  const bool packed = random.integer(0, 1) == 1, keeps = random.integer(0, 1) == 1;
  const bool in_place = !packed && random.integer(0, 1) == 1, biased = in_place && random.integer(0, 1) == 1;
  const Buffer<T> offset = draw<T>(random, width);
  Buffer<T> h0 = draw<T>(random, (packed ? all : pairs) * width), stash(all * width), hidden(pairs * width);
  const std::vector<double> before = wide(h0);
  Buffer<T> mean(pairs), rstd(pairs), grad = draw<T>(random, pairs * width), bias = draw<T>(random, width);
  const Buffer<T> mean_grad = draw<T>(random, pairs), mean_product = draw<T>(random, pairs);
  std::vector<double> expected, expected_mean, expected_rstd, expected_grad, expected_bias = wide(bias);
  Buffer<T>& out = in_place ? h0 : hidden;
  edge_hidden<T>(h0.data(), packed, biased ? offset.data() : nullptr, keeps ? stash.data() : nullptr, tile, width,
                 out.data(), mean.data(), rstd.data(), num_threads);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t i = pair / tile.columns(), j = pair % tile.columns();
    std::vector<double> x = row_of(before, packed ? tile.position(i, j) : pair, width);
    // Rounded as the sum is stored.
    for (int64_t d = 0; biased && d < width; ++d) x[d] = static_cast<T>(static_cast<T>(x[d]) + offset[d]);
    std::vector<double> value(x);
    std::transform(x.begin(), x.end(), value.begin(), naive_gelu);
    expected.insert(expected.end(), value.begin(), value.end());
    const auto [m, s] = naive_statistics(value);
    // Where a row hardly varies, a variance from sums of squares is rounding.
    expected_mean.push_back(m), expected_rstd.push_back(s < 30 ? s : at(rstd, pair));
    const double scale = at(rstd, pair), slope = scale * scale * at(mean_product, pair);
    for (int64_t d = 0; d < width; ++d) {
      const double centered = value[d] - at(mean, pair), g = at(grad, pair * width + d) - scale * at(mean_grad, pair);
      expected_grad.push_back((g - centered * slope) * naive_slope(x[d]));
      expected_bias[d] += expected_grad.back();
      const bool stored = keeps && tile.c0 + j >= tile.r0 + i;
      if (stored) GCNG_CHECK(static_cast<double>(stash[tile.position(i, j) * width + d]) == x[d]);
    }
  }
  check_close(out, expected), check_close(mean, expected_mean), check_close(rstd, expected_rstd);
  if (!in_place) {
    edge_hidden_backward<T>(grad.data(), h0.data(), packed, mean.data(), rstd.data(), mean_grad.data(),
                            mean_product.data(), tile, width, bias.data(), num_threads);
    check_close(grad, expected_grad), check_close(bias, expected_bias);
  }
  outputs.add(out), outputs.add(mean), outputs.add(rstd), outputs.add(grad), outputs.add(bias);
}

template <class T>
void check_epilogue(Random& random, int num_threads, Outputs& outputs) {
  const PairTile tile = draw_tile(random);
  const int64_t width = draw_width(random, tile), pairs = tile.pairs(), all = packed_pairs(tile);
  const bool packed = random.integer(0, 1) == 1, keeps = random.integer(0, 1) == 1;
  Buffer<T> y = draw<T>(random, pairs * width), out((packed ? all : pairs) * width), stash(all * width);
  const Buffer<T> x = draw<T>(random, pairs * width), mean = draw<T>(random, pairs);
  const Buffer<T> rstd = draw<T>(random, pairs, 0.5, 1);
  const Buffer<T> row_sums = draw<T>(random, width), shift = draw<T>(random, width);
  const Buffer<T> weight = draw<T>(random, width, 0.5, 1), bias = draw<T>(random, width);
  std::vector<double> expected;
  for (int64_t k = 0; k < pairs * width; ++k) {
    const int64_t pair = k / width, d = k % width;
    const double mapped = at(y, k) - at(mean, pair) * at(row_sums, d);
    expected.push_back(mapped * at(rstd, pair) + at(shift, d) + at(x, k));
  }
  edge_epilogue<T>(y.data(), x.data(), mean.data(), rstd.data(), {row_sums.data(), shift.data()},
                   {weight.data(), bias.data()}, tile, width, out.data(), packed, keeps ? stash.data() : nullptr,
                   num_threads);
  check_close(y, expected);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t i = pair / tile.columns(), j = pair % tile.columns();
    if (packed && tile.c0 + j < tile.r0 + i) continue;
    const std::vector<double> norm = naive_norm(row_of(expected, pair, width), wide(weight), wide(bias));
    for (int64_t d = 0; d < width; ++d) {
      const double got = at(out, (packed ? tile.position(i, j) : pair) * width + d);
      GCNG_CHECK(std::abs(got - norm[d]) <= (sizeof(T) == 4 ? 2e-3 : 1e-10) * 10);
      const bool stored = keeps && tile.c0 + j >= tile.r0 + i;
      if (stored) GCNG_CHECK(stash[tile.position(i, j) * width + d] == y[pair * width + d]);
    }
  }
  outputs.add(y), outputs.add(out), outputs.add(stash);
}

template <class T>
void check_epilogue_backward(Random& random, int num_threads, Outputs& outputs) {
  const PairTile tile = draw_tile(random);
  const int64_t width = draw_width(random, tile), pairs = tile.pairs(), all = packed_pairs(tile);
  const int64_t hidden_width = 4 * width;
  const bool packed = random.integer(0, 1) == 1, kept = random.integer(0, 1) == 1;
  Buffer<T> grad = draw<T>(random, (packed ? all : pairs) * width), scaled(pairs * width), fresh(pairs * width);
  const Buffer<T> w2 = draw<T>(random, (kept ? all : pairs) * width), x = draw<T>(random, pairs * width);
  const Buffer<T> mean = draw<T>(random, pairs), rstd = draw<T>(random, pairs, 0.5, 1);
  const Buffer<T> row_sums = draw<T>(random, width), shift = draw<T>(random, width);
  const Buffer<T> weight = draw<T>(random, width, 0.5, 1);
  Buffer<T> sums[4] = {draw<T>(random, width), draw<T>(random, width), draw<T>(random, width), draw<T>(random, width)};
  Buffer<T> mean_grad(pairs), mean_product(pairs);
  std::vector<double> expected[4], expected_grad, expected_scaled, expected_mean_grad, expected_mean_product;
  for (int k = 0; k < 4; ++k) expected[k] = wide(sums[k]);
  const std::vector<double> grads = wide(grad), inputs = wide(w2);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t i = pair / tile.columns(), j = pair % tile.columns(), position = tile.position(i, j);
    std::vector<double> g = row_of(grads, packed ? position : pair, width);
    if (packed && tile.c0 + j < tile.r0 + i) std::fill(g.begin(), g.end(), 0.0);
    const std::vector<double> input = row_of(inputs, kept ? position : pair, width);
    g = naive_norm_backward(g, input, wide(weight), expected[0], expected[1]);
    double m1 = 0, m2 = 0;
    for (int64_t d = 0; d < width; ++d) {
      expected_grad.push_back(g[d]), expected_scaled.push_back(g[d] * at(rstd, pair));
      expected[2][d] += g[d], expected[3][d] += expected_scaled.back() * at(mean, pair);
      m1 += g[d] * at(row_sums, d) / static_cast<double>(hidden_width);
      m2 += g[d] * (input[d] - at(x, pair * width + d) - at(shift, d)) / static_cast<double>(hidden_width);
    }
    expected_mean_grad.push_back(m1), expected_mean_product.push_back(m2);
  }
  Buffer<T>& out = !packed && random.integer(0, 1) ? grad : fresh;
  edge_epilogue_backward<T>(grad.data(), packed, w2.data(), kept, x.data(), mean.data(), rstd.data(),
                            {row_sums.data(), shift.data()}, weight.data(), tile, width, hidden_width,
                            {sums[0].data(), sums[1].data(), sums[2].data(), sums[3].data()}, out.data(),
                            scaled.data(), mean_grad.data(), mean_product.data(), num_threads);
  check_close(out, expected_grad), check_close(scaled, expected_scaled);
  check_close(mean_grad, expected_mean_grad), check_close(mean_product, expected_mean_product);
  for (int k = 0; k < 4; ++k) check_close(sums[k], expected[k]), outputs.add(sums[k]);
  outputs.add(out), outputs.add(scaled), outputs.add(mean_grad), outputs.add(mean_product);
}

}  // namespace

#define GCNG_BOTH(function) \
  random.integer(0, 1) ? function<float>(random, num_threads, outputs) : function<double>(random, num_threads, outputs)

GCNG_CASE(edge_prologue) { GCNG_BOTH(check_prologue); }
GCNG_CASE(edge_prologue_backward) { GCNG_BOTH(check_prologue_backward); }
GCNG_CASE(edge_hidden) { GCNG_BOTH(check_hidden); }
GCNG_CASE(edge_epilogue) { GCNG_BOTH(check_epilogue); }
GCNG_CASE(edge_epilogue_backward) { GCNG_BOTH(check_epilogue_backward); }
