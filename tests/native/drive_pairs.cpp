// Passes over tiles of pairs beside the edge layer against loops in double: messages, gates, packed storage.
#include "cpu/gates.h"
#include "cpu/messages.h"
#include "cpu/pair_storage.h"
#include "pair_problem.h"

using namespace gcng;
using namespace gcng::driver;

namespace {

// body(i, j, pair, at, d) for every number of a tile.
template <class Body>
void for_all(const PairTile& tile, int64_t width, const Body& body) {
  for (int64_t pair = 0; pair < tile.pairs(); ++pair)
    for (int64_t d = 0; d < width; ++d)
      body(pair / tile.columns(), pair % tile.columns(), pair, pair * width + d, d);
}

bool above(const PairTile& tile, int64_t i, int64_t j) { return tile.c0 + j >= tile.r0 + i; }

template <class T>
void check_messages(Random& random, int num_threads, Outputs& outputs) {
  const PairTile tile = draw_tile(random);
  const int64_t width = draw_width(random, tile), pairs = tile.pairs(), all = packed_pairs(tile);
  const bool keeps = random.integer(0, 1) == 1, packed = random.integer(0, 1) == 1;
  const Buffer<T> before = draw<T>(random, pairs * width);
  Buffer<T> stash(all * width), out = draw<T>(random, tile.n * width);
  std::vector<double> expected = wide(out);
  for_all(tile, width, [&](int64_t i, int64_t j, int64_t, int64_t at, int64_t d) {
    const double message = naive_gelu(static_cast<double>(before[at]));
    expected[(tile.r0 + i) * width + d] += message;
    if (j >= tile.mirror()) expected[(tile.c0 + j) * width + d] += message;
  });
  messages_forward<T>(before.data(), keeps ? stash.data() : nullptr, tile, width, out.data(), num_threads);
  check_close(out, expected);
  for_all(tile, width, [&](int64_t i, int64_t j, int64_t, int64_t at, int64_t d) {
    if (keeps && above(tile, i, j)) GCNG_CHECK(stash[tile.position(i, j) * width + d] == before[at]);
  });
  const Buffer<T> grad = draw<T>(random, tile.n * width), kept = draw<T>(random, (packed ? all : pairs) * width);
  Buffer<T> to(pairs * width), bias = draw<T>(random, width);
  std::vector<double> expected_to, expected_bias = wide(bias);
  for_all(tile, width, [&](int64_t i, int64_t j, int64_t pair, int64_t, int64_t d) {
    double received = static_cast<double>(grad[(tile.r0 + i) * width + d]);
    if (j >= tile.mirror()) received += static_cast<double>(grad[(tile.c0 + j) * width + d]);
    const double x = static_cast<double>(kept[(packed ? tile.position(i, j) : pair) * width + d]);
    expected_to.push_back(received * naive_slope(x));
    expected_bias[d] += expected_to.back();
  });
  messages_backward<T>(grad.data(), kept.data(), packed, tile, width, to.data(), bias.data(), num_threads);
  check_close(to, expected_to), check_close(bias, expected_bias);
  outputs.add(out), outputs.add(to), outputs.add(bias);
}

template <class T>
void check_gates(Random& random, int num_threads, Outputs& outputs) {
  const PairTile tile = draw_tile(random);
  const int64_t width = draw_width(random, tile), pairs = tile.pairs(), all = packed_pairs(tile);
  const bool keeps = random.integer(0, 1) == 1, sums = random.integer(0, 1) == 1;
  Buffer<T> gates = draw<T>(random, pairs * width, 3), stash(all * width), row_sums = draw<T>(random, tile.n * width);
  const Buffer<T> center = draw<T>(random, width, 0.2, 0.5);
  Buffer<double> squares(1);
  squares[0] = 0.25;
  std::vector<double> expected = wide(gates), expected_sums = wide(row_sums), expected_squares{0.25};
  for_all(tile, width, [&](int64_t i, int64_t j, int64_t, int64_t at, int64_t d) {
    expected[at] = 1 / (1 + std::exp(-expected[at]));
    const double centered = expected[at] - static_cast<double>(center[d]);
    const bool mirrored = j >= tile.mirror();
    expected_sums[(tile.r0 + i) * width + d] += sums ? centered : 0;
    if (mirrored) expected_sums[(tile.c0 + j) * width + d] += sums ? centered : 0;
    expected_squares[0] += sums ? (mirrored ? 2 : 1) * centered * centered : 0;
  });
  const GateSpread<T> spread{sums ? center.data() : nullptr, row_sums.data(), squares.data()};
  gates_forward<T>(gates.data(), keeps ? stash.data() : nullptr, spread, tile, width, num_threads);
  check_close(gates, expected), check_close(row_sums, expected_sums);
  GCNG_CHECK(std::abs(squares[0] - expected_squares[0]) <= 1e-5 * expected_squares[0]);
  const Buffer<T> means = draw<T>(random, tile.n * width);
  Buffer<T> grad(pairs * width), bias = draw<T>(random, width);
  const T scale = static_cast<T>(random.real());
  std::vector<double> expected_grad, expected_logits, expected_bias = wide(bias);
  for_all(tile, width, [&](int64_t i, int64_t j, int64_t, int64_t at, int64_t d) {
    const double gate = static_cast<double>(gates[at]);
    if (keeps && above(tile, i, j)) GCNG_CHECK(stash[tile.position(i, j) * width + d] == gates[at]);
    double sum = gate - static_cast<double>(means[(tile.r0 + i) * width + d]);
    if (j >= tile.mirror()) sum += gate - static_cast<double>(means[(tile.c0 + j) * width + d]);
    expected_grad.push_back(sum * static_cast<double>(scale));
    expected_logits.push_back(expected_grad.back() * gate * (1 - gate));
    expected_bias[d] += expected_logits.back();
  });
  gate_spread_gradient<T>(gates.data(), means.data(), scale, tile, width, grad.data(), num_threads);
  check_close(grad, expected_grad);
  gate_logits_gradient<T>(grad.data(), gates.data(), pairs, width, grad.data(), keeps ? bias.data() : nullptr,
                          num_threads);
  check_close(grad, expected_logits);
  if (keeps) check_close(bias, expected_bias);
  outputs.add(gates), outputs.add(row_sums), outputs.add(squares), outputs.add(grad), outputs.add(bias);
}

template <class T>
void check_statistics(Random& random, int num_threads, Outputs& outputs) {
  const int64_t pairs = random.integer(0, random.integer(0, 7) ? 40 : 2500);
  const int64_t width = pairs > 40 ? random.integer(1, 3) : random.integer(1, 150);
  const Buffer<T> e = draw<T>(random, pairs * width), weights = draw<T>(random, pairs), mean = draw<T>(random, width);
  const Buffer<T> constant = draw<T>(random, width), linear = draw<T>(random, width);
  Buffer<T> centered(pairs * width), grad = draw<T>(random, pairs * width);
  Buffer<double> total = draw<double>(random, width), squares = draw<double>(random, width);
  std::vector<double> expected_centered = wide(e), expected_grad = wide(grad);
  std::vector<double> expected[2] = {wide(total), wide(squares)};
  for (int64_t at = 0; at < pairs * width; ++at) {
    const int64_t d = at % width;
    const double weight = static_cast<double>(weights[at / width]);
    const double c = expected_centered[at] -= static_cast<double>(mean[d]);
    expected_grad[at] -= weight * (static_cast<double>(constant[d]) + c * static_cast<double>(linear[d]));
    expected[0][d] += weight * c, expected[1][d] += weight * c * c;
  }
  gate_center<T>(e.data(), mean.data(), pairs, width, centered.data(), num_threads);
  gate_norm_gradient<T>(grad.data(), e.data(), weights.data(), mean.data(), constant.data(), linear.data(), pairs,
                        width, num_threads);
  gate_moments<T>(e.data(), weights.data(), mean.data(), pairs, width, total.data(), squares.data(), num_threads);
  check_close(centered, expected_centered), check_close(grad, expected_grad);
  for (int64_t d = 0; d < width; ++d) {
    GCNG_CHECK(std::abs(total[d] - expected[0][d]) <= 1e-6 * static_cast<double>(pairs + 1));
    GCNG_CHECK(std::abs(squares[d] - expected[1][d]) <= 1e-6 * static_cast<double>(pairs + 1));
  }
  outputs.add(centered), outputs.add(grad), outputs.add(total), outputs.add(squares);
}

template <class T>
void check_storage(Random& random, int num_threads, Outputs& outputs) {
  const PairTile tile = draw_tile(random);
  const int64_t width = draw_width(random, tile), pairs = tile.pairs();
  const Buffer<T> nodes = draw<T>(random, tile.n * width), values = draw<T>(random, pairs * width);
  Buffer<T> packed = draw<T>(random, packed_pairs(tile) * width), loaded(pairs * width), products(pairs * width);
  Buffer<T> grad = draw<T>(random, tile.n * width);
  std::vector<double> expected = wide(packed), expected_grad = wide(grad);
  const bool symmetric = random.integer(0, 1) == 1;
  pair_load<T>(packed.data(), tile, width, symmetric, loaded.data(), num_threads);
  pair_products<T>(nodes.data(), tile, width, products.data(), num_threads);
  for_all(tile, width, [&](int64_t i, int64_t j, int64_t, int64_t at, int64_t d) {
    const int64_t r = (tile.r0 + i) * width + d, c = (tile.c0 + j) * width + d, place = tile.position(i, j) * width + d;
    GCNG_CHECK(loaded[at] == (symmetric || above(tile, i, j) ? packed[place] : T(0)));
    GCNG_CHECK(products[at] == nodes[r] * nodes[c]);
    expected[place] += static_cast<double>(values[at]);
    expected_grad[r] += static_cast<double>(values[at]) * static_cast<double>(nodes[c]);
    expected_grad[c] += static_cast<double>(values[at]) * static_cast<double>(nodes[r]);
  });
  pair_add_packed<T>(values.data(), tile, width, packed.data(), num_threads);
  pair_add_product<T>(nodes.data(), values.data(), tile, width, grad.data(), num_threads);
  check_close(packed, expected), check_close(grad, expected_grad);
  pair_store<T>(values.data(), tile, width, packed.data(), num_threads);
  for_all(tile, width, [&](int64_t i, int64_t j, int64_t, int64_t at, int64_t d) {
    if (above(tile, i, j)) GCNG_CHECK(packed[tile.position(i, j) * width + d] == values[at]);
  });
  outputs.add(loaded), outputs.add(products), outputs.add(packed), outputs.add(grad);
}

}  // namespace

#define GCNG_BOTH(function) \
  random.integer(0, 1) ? function<float>(random, num_threads, outputs) : function<double>(random, num_threads, outputs)

GCNG_CASE(pair_messages) { GCNG_BOTH(check_messages); }
GCNG_CASE(pair_gates) { GCNG_BOTH(check_gates); }
GCNG_CASE(pair_statistics) { GCNG_BOTH(check_statistics); }
GCNG_CASE(pair_storage) { GCNG_BOTH(check_storage); }
