// Passes of the synthesis against loops over pairs and channels in double.
#include <algorithm>
#include <cmath>

#include "cpu/huge_pages.h"
#include "cpu/synthesis.h"
#include "driver.h"

using namespace gcng;
using namespace gcng::driver;

namespace {

template <class T>
struct Problem {
  std::vector<int64_t> starts;  // class starts of the whole batch
  int64_t n, width, first_class;
  SynthesisSide<T> side;
  Buffer<T> z, weights, gate, reach;
  Buffer<int64_t> positive, rank;
  bool transposed;
  T kappa;

  int64_t anchors() const { return side.num_anchors; }
  int64_t negatives() const { return side.num_negatives(); }
  PairChannels<const T> view() const { return at(gate.data()); }
  const T* gates(int64_t i, int64_t b) const {
    const PairChannels<const T> channels = view();
    return channels.data + i * channels.anchor_stride + b * channels.negative_stride;
  }
  template <class U>
  PairChannels<U> at(U* data) const {
    if (transposed) return {data, width, anchors() * width};
    return {data, negatives() * width, width};
  }
};

template <class T>
void fill(Random& random, Buffer<T>& buffer) {
  for (int64_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<T>(random.real());
}

std::vector<int64_t> draw_starts(Random& random) {
  std::vector<int64_t> starts{0};
  const int64_t classes = random.integer(1, 9), uniform = random.integer(1, 5);
  for (int64_t c = 0; c < classes; ++c)
    starts.push_back(starts.back() + (random.integer(0, 1) ? uniform : random.integer(1, 5)));
  return starts;
}

template <class T>
Problem<T> draw_problem(Random& random) {
  std::vector<int64_t> starts = draw_starts(random);
  const int64_t n = starts.back(), classes = static_cast<int64_t>(starts.size()) - 1;
  // Blocks are several above 2^17 channels of pairs.
  const int64_t width = random.integer(0, 15) ? random.integer(1, 70) : random.integer(1000, 2000);
  const int64_t first_anchor = random.integer(0, n - 1), anchors = random.integer(0, n - first_anchor);
  const int64_t first_class = random.integer(0, classes - 1), m = random.integer(1, classes - first_class);
  const int64_t negatives = starts[first_class + m] - starts[first_class];
  Problem<T> p{std::move(starts), n, width, first_class, {}, Buffer<T>(n * width), Buffer<T>(5 * n),
               Buffer<T>(anchors * negatives * width), Buffer<T>(n), Buffer<int64_t>(n), Buffer<int64_t>(n),
               random.integer(0, 1) == 1, static_cast<T>(random.real())};
  fill(random, p.z), fill(random, p.weights), fill(random, p.gate);
  for (int64_t c = 0; c < classes; ++c) {
    const int64_t count = p.starts[c + 1] - p.starts[c];
    for (int64_t k = 0; k < count; ++k)
      p.rank[p.starts[c] + k] = k, p.positive[p.starts[c] + k] = p.starts[c] + (k + 1) % count;
  }
  if (random.integer(0, 3) == 0)  // copies
    for (int64_t i = 1; i < n; i += 2) std::copy_n(p.z.data(), width, p.z.data() + i * width);
  p.side = {p.z.data(), width, first_anchor, anchors, p.starts.data() + first_class, m};
  return p;
}

template <class T>
bool close(T got, double expected, double scale) {
  return std::abs(static_cast<double>(got) - expected) <= (sizeof(T) == 4 ? 2e-5 : 1e-13) * (scale + 1);
}

template <class T>
struct Made {
  Buffer<T> distance, ratio, weight, offset, slope;
  Buffer<bool> near;
  explicit Made(int64_t size)
      : distance(size), ratio(size), weight(size), offset(size), slope(size), near(size) {}
  SynthesisGeometry<T, bool> out() {
    return {distance.data(), near.data(), ratio.data(), weight.data(), offset.data(), slope.data()};
  }
  SynthesisGeometry<const T, const bool> in() const {
    return {distance.data(), near.data(), ratio.data(), weight.data(), offset.data(), slope.data()};
  }
};

template <class T>
void check_geometry(Problem<T>& p, Made<T>& made, int num_threads) {
  synthesis_positive_distance(p.z.data(), p.positive.data(), p.n, p.width, p.reach.data(), num_threads);
  synthesis_geometry(p.side, p.reach.data(), p.positive.data(), p.rank.data(), p.weights.data(), p.n, p.kappa,
                     made.out(), num_threads);
  for (int64_t i = 0; i < p.anchors(); ++i) {
    for (int64_t b = 0; b < p.negatives(); ++b) {
      const int64_t anchor = p.side.first_anchor + i, node = p.side.first_negative() + b, at = i * p.negatives() + b;
      double square = 0;
      for (int64_t d = 0; d < p.width; ++d) {
        const double term = double{p.z[anchor * p.width + d]} - p.z[node * p.width + d] + 1e-6;
        square += term * term;
      }
      GCNG_CHECK(close(made.distance[at], std::sqrt(square), std::sqrt(square)));
      const bool near = p.positive[anchor] == node || p.reach[anchor] >= made.distance[at];
      const double ratio = near ? 1 : p.reach[anchor] / double{made.distance[at]};
      const double weight = p.weights[p.rank[anchor] * p.n + node];
      GCNG_CHECK(made.near[at] == near && made.weight[at] == static_cast<T>(weight));
      GCNG_CHECK(close(made.ratio[at], ratio, 0) && close(made.offset[at], weight * ratio, 0));
      GCNG_CHECK(close(made.slope[at], weight * p.kappa * (1 - ratio), 0));
    }
  }
}

// Everything that follows from the geometry, one anchor and class at a time.
template <class T>
void check_passes(Random& random, Problem<T>& p, const Made<T>& g, int num_threads, Outputs& outputs) {
  const int64_t a = p.anchors(), b = p.negatives(), m = p.side.num_classes, width = p.width;
  Buffer<T> values(a * m * width), dots(a * m), squares(a * m);
  Buffer<T> out(a * b * width), grad_z(p.n * width), grad_reach(p.n);
  Buffer<T> grad_values(a * m * width), grad_dots(a * m), grad_squares(a * m);
  fill(random, grad_values), fill(random, grad_dots), fill(random, grad_squares), fill(random, out);
  fill(random, grad_z), fill(random, grad_reach);
  const bool has_values = random.integer(0, 1), has_dots = random.integer(0, 1), has_squares = random.integer(0, 1);
  const SyntheticGradients<T> grads{has_values ? grad_values.data() : nullptr, has_dots ? grad_dots.data() : nullptr,
                                    has_squares ? grad_squares.data() : nullptr};
  std::vector<double> z_wanted(grad_z.data(), grad_z.data() + p.n * width);
  std::vector<double> reach_wanted(grad_reach.data(), grad_reach.data() + p.n);
  const std::vector<T> before(out.data(), out.data() + out.size());
  synthesis_forward(p.side, p.view(), g.offset.data(), g.slope.data(), values.data(), dots.data(), squares.data(),
                    num_threads);
  synthesis_gate_gradient(p.side, g.slope.data(), values.data(), grads, p.at(out.data()), false, num_threads);
  synthesis_embedding_gradient(p.side, p.view(), g.in(), p.kappa, grads, grad_z.data(), grad_reach.data(), num_threads);

  std::vector<double> synthetic(width), upstream(width);
  double scale = 0;
  for (int64_t row = 0; row < a * m; ++row) {
    const int64_t i = row / m, c = row % m, anchor = p.side.first_anchor + i;
    const auto z = [&](int64_t node, int64_t d) { return double{p.z[node * width + d]}; };
    double dot = 0, square = 0;
    const int64_t first = p.side.class_start[c], last = p.side.class_start[c + 1];
    for (int64_t d = 0; d < width; ++d) {
      double value = z(anchor, d);
      for (int64_t node = first; node < last; ++node) {
        const int64_t column = node - p.side.first_negative(), at = i * b + column;
        value += (double{p.gates(i, column)[d]} * g.slope[at] + g.offset[at]) * (z(node, d) - z(anchor, d));
      }
      GCNG_CHECK(close(values[row * width + d], value, 5));
      synthetic[d] = value, dot += value * z(anchor, d), square += value * value;
      upstream[d] = (has_values ? grad_values[row * width + d] : 0) + (has_dots ? grad_dots[row] * z(anchor, d) : 0) +
                    (has_squares ? 2 * grad_squares[row] * value : 0);
      z_wanted[anchor * width + d] += upstream[d] + (has_dots ? grad_dots[row] * value : 0);
    }
    GCNG_CHECK(close(dots[row], dot, square + width) && close(squares[row], square, square + width));
    for (int64_t node = first; node < last; ++node) {
      const int64_t column = node - p.side.first_negative(), at = i * b + column;
      const T* const gate = p.gates(i, column);
      double pulled = 0, gated = 0;
      for (int64_t d = 0; d < width; ++d) {
        const double part = upstream[d] * (z(node, d) - z(anchor, d));
        pulled += part, gated += part * gate[d];
        const int64_t place = gate - p.gate.data() + d;
        GCNG_CHECK(close(out.data()[place], before[place] + part * g.slope[at], 10));
      }
      const double reach = g.near[at] ? 0 : g.weight[at] * (pulled - p.kappa * gated) / g.distance[at];
      const double drift = g.near[at] ? 0 : -reach * g.ratio[at] / g.distance[at];
      reach_wanted[anchor] += reach, scale += std::abs(reach) + std::abs(drift) + 5 + square;
      for (int64_t d = 0; d < width; ++d) {
        const double grad = upstream[d] * (gate[d] * double{g.slope[at]} + g.offset[at]) +
                            drift * (z(node, d) - z(anchor, d) - 1e-6);
        z_wanted[node * width + d] += grad, z_wanted[anchor * width + d] -= grad;
      }
    }
  }
  for (int64_t i = 0; i < p.n * width; ++i) GCNG_CHECK(close(grad_z[i], z_wanted[i], scale));
  for (int64_t i = 0; i < p.n; ++i) GCNG_CHECK(close(grad_reach[i], reach_wanted[i], scale));
  outputs.add(values), outputs.add(dots), outputs.add(squares), outputs.add(out), outputs.add(grad_z);
  outputs.add(grad_reach);
}

template <class T>
bool equal(const Buffer<T>& ours, const Buffer<T>& truth) {
  return std::equal(ours.data(), ours.data() + ours.size(), truth.data());
}

// The same passes on gates and synthetic negatives in the caller's order give the same numbers, and zeros where an
// anchor is not taken, which is as if nothing arrived there.
template <class T>
void check_order(Random& random, Problem<T>& p, const Made<T>& g, int num_threads, Outputs& outputs) {
  const int64_t a = p.anchors(), b = p.negatives(), m = p.side.num_classes, n = p.n, width = p.width;
  Buffer<T> wanted(a * m * width), dots(a * m), squares(a * m), grad_wanted(a * b * width);
  Buffer<T> grad_z_wanted(n * width), grad_reach_wanted(n), grad_z(n * width), grad_reach(n);
  Buffer<T> grad_side(a * m * width), grad_values(n * m * width), gate(n * n * width), values(n * m * width);
  Buffer<T> out(n * n * width);
  Buffer<int64_t> order(n);
  Buffer<bool> is_anchor(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i, is_anchor[i] = random.integer(0, 4) > 0;
  for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[random.integer(0, i)]);
  const auto to = [&](int64_t i) { return order[p.side.first_anchor + i]; };
  const auto pair = [&](int64_t i, int64_t column) {
    return (to(i) * n + order[p.side.first_negative() + column]) * width;
  };
  fill(random, grad_side), fill(random, grad_z), fill(random, grad_reach);
  std::copy_n(grad_z.data(), n * width, grad_z_wanted.data());
  std::copy_n(grad_reach.data(), n, grad_reach_wanted.data());
  for (int64_t i = 0; i < a; ++i) {
    const bool taken = is_anchor[p.side.first_anchor + i];
    std::copy_n(grad_side.data() + i * m * width, m * width, grad_values.data() + to(i) * m * width);
    if (!taken) std::fill_n(grad_side.data() + i * m * width, m * width, T(0));
    for (int64_t column = 0; column < b; ++column)
      std::copy_n(p.gates(i, column), width, gate.data() + pair(i, column));
  }
  const SyntheticGradients<T> plain{grad_side.data(), nullptr, nullptr}, moved{grad_values.data(), nullptr, nullptr};
  synthesis_forward(p.side, p.view(), g.offset.data(), g.slope.data(), wanted.data(), dots.data(), squares.data(), 1);
  std::fill_n(grad_wanted.data(), grad_wanted.size(), T(0));
  synthesis_gate_gradient(p.side, g.slope.data(), static_cast<const T*>(nullptr), plain,
                          PairChannels<T>{grad_wanted.data(), b * width, width}, false, 1);
  synthesis_embedding_gradient(p.side, p.view(), g.in(), p.kappa, plain, grad_z_wanted.data(),
                               grad_reach_wanted.data(), 1);

  SynthesisSide<T> side = p.side;
  side.order = order.data(), side.is_anchor = is_anchor.data();
  const PairChannels<const T> gates{gate.data(), n * width, width};
  prefer_huge_pages(out.data(), out.size() * static_cast<int64_t>(sizeof(T)));
  synthesis_forward(side, gates, g.offset.data(), g.slope.data(), values.data(), static_cast<T*>(nullptr),
                    static_cast<T*>(nullptr), num_threads);
  synthesis_gate_gradient(side, g.slope.data(), static_cast<const T*>(nullptr), moved,
                          PairChannels<T>{out.data(), n * width, width}, true, num_threads);
  synthesis_embedding_gradient(side, gates, g.in(), p.kappa, moved, grad_z.data(), grad_reach.data(), num_threads);

  for (int64_t i = 0; i < a; ++i) {
    const T* const got = values.data() + to(i) * m * width;
    for (int64_t x = 0; x < m * width; ++x)
      GCNG_CHECK(got[x] == (is_anchor[p.side.first_anchor + i] ? wanted[i * m * width + x] : T(0)));
    for (int64_t column = 0; column < b; ++column)
      GCNG_CHECK(std::equal(out.data() + pair(i, column), out.data() + pair(i, column) + width,
                            grad_wanted.data() + (i * b + column) * width));
  }
  // Nothing else was written.
  GCNG_CHECK(std::count_if(values.data(), values.data() + values.size(), [](T x) { return x == x; }) == a * m * width);
  GCNG_CHECK(std::count_if(out.data(), out.data() + out.size(), [](T x) { return x == x; }) == a * b * width);
  GCNG_CHECK(equal(grad_z, grad_z_wanted) && equal(grad_reach, grad_reach_wanted));
  outputs.add(values), outputs.add(out), outputs.add(grad_z), outputs.add(grad_reach);
}

template <class T>
void compare(Random& random, int num_threads, Outputs& outputs) {
  Problem<T> problem = draw_problem<T>(random);
  Made<T> made(problem.anchors() * problem.negatives());
  check_geometry(problem, made, num_threads);
  outputs.add(made.distance), outputs.add(made.slope), outputs.add(problem.reach);
  check_passes(random, problem, made, num_threads, outputs);
  // Several blocks from 2^17 channels of pairs; more would be slow.
  if (problem.n * problem.n * problem.width < 300'000) check_order(random, problem, made, num_threads, outputs);
}

}  // namespace

GCNG_CASE(synthesis_float) { compare<float>(random, num_threads, outputs); }
GCNG_CASE(synthesis_double) { compare<double>(random, num_threads, outputs); }
