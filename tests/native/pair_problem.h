// What the drivers of the passes over pairs share: tiles, random tensors, and their formulas in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/pair_tile.h"
#include "driver.h"

namespace gcng::driver {

// A tile on the diagonal or off it; one round in eight it is long, with several blocks of pairs and of columns.
inline PairTile draw_tile(Random& random) {
  const bool large = random.integer(0, 7) == 0;
  const int64_t n = large ? random.integer(60, 100) : random.integer(1, 12);
  const int64_t r0 = random.integer(0, large ? n / 4 : n - 1), r1 = random.integer(r0 + 1, n);
  if (r1 == n || random.integer(0, 1)) return {n, r0, r1, r0, random.integer(r1, n)};
  const int64_t c0 = random.integer(r1, n - 1);
  return {n, r0, r1, c0, random.integer(c0 + 1, n)};
}

inline int64_t draw_width(Random& random, const PairTile& tile) {
  return tile.pairs() > 200 ? random.integer(1, 3) : random.integer(1, random.integer(0, 3) ? 40 : 150);
}

inline int64_t packed_pairs(const PairTile& tile) { return tile.n * (tile.n + 1) / 2; }

template <class T>
Buffer<T> draw(Random& random, int64_t size, double scale = 1, double offset = 0) {
  Buffer<T> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = static_cast<T>(offset + scale * random.real());
  return values;
}

template <class T>
std::vector<double> wide(const Buffer<T>& values) {
  return std::vector<double>(values.data(), values.data() + values.size());
}

// Behind a norm of few channels a rounding counts up to 1 / sqrt(1e-5) times.
template <class T>
void check_close(const Buffer<T>& got, const std::vector<double>& expected) {
  GCNG_CHECK(got.size() == static_cast<int64_t>(expected.size()));
  double scale = 1;
  for (const double value : expected) scale = std::max(scale, std::abs(value));
  for (int64_t i = 0; i < got.size(); ++i)
    GCNG_CHECK(std::abs(static_cast<double>(got[i]) - expected[i]) <= (sizeof(T) == 4 ? 2e-3 : 1e-10) * scale);
}

inline double naive_gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

inline double naive_slope(double x) {
  return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0));
}

// Mean and 1 / deviation of a row.
inline std::pair<double, double> naive_statistics(const std::vector<double>& row) {
  double mean = 0, variance = 0;
  for (const double value : row) mean += value / static_cast<double>(row.size());
  for (const double value : row) variance += (value - mean) * (value - mean) / static_cast<double>(row.size());
  return {mean, 1 / std::sqrt(variance + 1e-5)};
}

// Row i of (.., width).
inline std::vector<double> row_of(const std::vector<double>& values, int64_t i, int64_t width) {
  return {values.begin() + i * width, values.begin() + (i + 1) * width};
}

// LN(gelu(x)) of one row.
inline std::vector<double> naive_norm(const std::vector<double>& x, const std::vector<double>& weight,
                                      const std::vector<double>& bias) {
  std::vector<double> value(x.size());
  std::transform(x.begin(), x.end(), value.begin(), naive_gelu);
  const auto [mean, rstd] = naive_statistics(value);
  for (size_t d = 0; d < x.size(); ++d) value[d] = (value[d] - mean) * rstd * weight[d] + bias[d];
  return value;
}

// Its backward; adds to the gradients of weight and bias.
inline std::vector<double> naive_norm_backward(const std::vector<double>& grad, const std::vector<double>& x,
                                               const std::vector<double>& weight, std::vector<double>& weight_sum,
                                               std::vector<double>& bias_sum) {
  const double width = static_cast<double>(x.size());
  std::vector<double> value(x.size());
  std::transform(x.begin(), x.end(), value.begin(), naive_gelu);
  const auto [mean, rstd] = naive_statistics(value);
  double gradients = 0, products = 0;
  for (size_t d = 0; d < x.size(); ++d) {
    value[d] = (value[d] - mean) * rstd;
    weight_sum[d] += grad[d] * value[d], bias_sum[d] += grad[d];
    gradients += grad[d] * weight[d] / width, products += grad[d] * weight[d] * value[d] / width;
  }
  std::vector<double> out(x.size());
  for (size_t d = 0; d < x.size(); ++d)
    out[d] = rstd * (grad[d] * weight[d] - gradients - value[d] * products) * naive_slope(x[d]);
  return out;
}

}  // namespace gcng::driver
