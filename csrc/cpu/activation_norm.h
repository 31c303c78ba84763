// A(x) = LN(gelu(x)) on one row, forward and backward: what (9)-(13) do at the start and at the end of an edge layer.
#pragma once

#include <cmath>

#include "cpu/pair_tile.h"

namespace gcng {

inline constexpr double kNormEps = 1e-5;

template <class T>
struct RowStatistics {
  T mean, rstd;
};

// Two passes over a row that lies in cache: no cancellation, whatever the mean.
template <class T>
GCNG_INLINE RowStatistics<T> row_statistics(const T* row, T sum, int64_t width) {
  const T mean = sum / static_cast<T>(width);
  RowSum<T, 4> squares;
  for_vectors<T, 4>(width, [&](auto at, auto k) {
    const Vector<T> centered = inside(at, load(row, at) - mean);
    squares.part[k] += centered * centered;
  });
  return {mean, T(1) / std::sqrt(squares.total() / static_cast<T>(width) + static_cast<T>(kNormEps))};
}

// out (width,) = LN(gelu(x)), x given by place: x_of(at). out may be where x comes from.
template <class T, class Values>
GCNG_INLINE void activation_norm(const Values& x_of, const T* weight, const T* bias, int64_t width, T* out) {
  RowSum<T, 2> sum;
  for_vectors<T, 2>(width, [&](auto at, auto k) {
    const Vector<T> value = gelu(x_of(at));
    store(out, at, value);
    sum.part[k] += value;
  });
  const auto [mean, rstd] = row_statistics(out, sum.total(), width);
  for_vectors<T, 2>(width, [&, mean = mean, rstd = rstd](auto at, auto) {
    store(out, at, (load(out, at) - mean) * rstd * load(weight, at) + load(bias, at));
  });
}

// Scratch (4, D) of one block of the backward of A; the sums are the caller's to start and to end.
template <class T>
struct ActivationNormBlock {
  T *normalized, *slope;     // of the row at hand
  T *weight_sum, *bias_sum;  // over rows

  ActivationNormBlock(T* memory, int64_t width)
      : normalized(memory), slope(memory + width), weight_sum(memory + 2 * width), bias_sum(memory + 3 * width) {}
};

// Backward of A on one row: calls result(at, k, grad_x) for every place, k of kUnroll, after all of grad (width,) was
// read, and adds to the sums of the block.
template <class T, int kUnroll, class Values, class Result>
GCNG_INLINE void activation_norm_backward(const Values& x_of, const T* grad, const T* weight, int64_t width,
                                          const ActivationNormBlock<T>& block, const Result& result) {
  RowSum<T, 2> sum;
  for_vectors<T, 2>(width, [&](auto at, auto k) {
    const auto [value, slope] = gelu_terms(x_of(at));
    store(block.normalized, at, value);
    store(block.slope, at, slope);
    sum.part[k] += value;
  });
  const auto statistics = row_statistics(block.normalized, sum.total(), width);
  const T mean = statistics.mean, rstd = statistics.rstd;
  RowSum<T, 2> gradients, products;
  for_vectors<T, 2>(width, [&](auto at, auto k) {
    const Vector<T> normalized = inside(at, (load(block.normalized, at) - mean) * rstd);
    const Vector<T> g = load(grad, at), q = g * load(weight, at);
    store(block.normalized, at, normalized);
    gradients.part[k] += q;
    products.part[k] += q * normalized;
    add_to(block.weight_sum, at, g * normalized);
    add_to(block.bias_sum, at, g);
  });
  const T mean_gradient = gradients.total() / static_cast<T>(width);
  const T mean_product = products.total() / static_cast<T>(width);
  for_vectors<T, kUnroll>(width, [&](auto at, auto k) {
    const Vector<T> centered = load(grad, at) * load(weight, at) - mean_gradient;
    const Vector<T> grad_value = (centered - load(block.normalized, at) * mean_product) * rstd;
    result(at, k, grad_value * load(block.slope, at));
  });
}

}  // namespace gcng
