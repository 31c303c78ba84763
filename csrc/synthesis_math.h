// Channel-weighted synthetic negatives, (15)-(18) of docs/maths.md: the arithmetic of one pair and of one channel, for
// host and device. V is one channel (T) or a vector of channels; T is float or double.
#pragma once

#ifndef GCNG_HOST_DEVICE
#ifdef __CUDACC__
#define GCNG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GCNG_HOST_DEVICE inline
#endif
#endif

namespace gcng {

// (15): added to every channel of anchor minus negative before the norm.
template <class T>
constexpr T DISTANCE_OFFSET = static_cast<T>(1e-6);

// What the norm of (15) is taken of, with the sign turned: n - a - 1e-6.
template <class T, class V>
GCNG_HOST_DEVICE V distance_term(V negative, V anchor) {
  return negative - anchor - DISTANCE_OFFSET<T>;
}

// What a synthetic negative takes of one negative: Geometry of gcng/ops/synthesis_tiles.py.
template <class T>
struct PairGeometry {
  bool near;
  T ratio, offset, slope;
};

// (16), (17): near where dp >= dn; rho = dp / dn, else 1; offset = w rho, slope = w kappa (1 - rho). A NaN is not near.
// 1 - rho is (dn - dp) / dn: where the distances nearly tie, their difference is exact and that from a rounded rho is not.
template <class T>
GCNG_HOST_DEVICE PairGeometry<T> pair_geometry(T reach, T distance, bool is_positive, T weight, T kappa) {
  const bool near = reach >= distance || is_positive;
  const T ratio = near ? T(1) : reach / distance;
  const T rest = near ? T(0) : (distance - reach) / distance;
  return {near, ratio, weight * ratio, weight * kappa * rest};
}

// w t of (17) and (18): how far a negative's channel pulls the anchor's towards itself.
template <class T, class V>
GCNG_HOST_DEVICE V pull_of(V gate, T slope, T offset) {
  return gate * slope + offset;
}

// Gradient of a synthetic negative's channel through its squared norm.
template <class T, class V>
GCNG_HOST_DEVICE V through_square(T grad_square, V synthetic) {
  return T(2) * grad_square * synthetic;
}

// Gradient of one factor's channel through the product of anchor and synthetic negative.
template <class T, class V>
GCNG_HOST_DEVICE V through_dot(T grad_dot, V other) {
  return grad_dot * other;
}

// Gradient of the gate of (17).
template <class T, class V>
GCNG_HOST_DEVICE V gate_gradient(V grad_synthetic, V negative, V anchor, T slope) {
  return grad_synthetic * (negative - anchor) * slope;
}

// Gradient of the anchor that the synthetic negative a + sum_n pull_n (n - a) starts from, pulls held constant.
template <class V>
GCNG_HOST_DEVICE V anchor_gradient(V grad_synthetic, V pull_sum) {
  return grad_synthetic - grad_synthetic * pull_sum;
}

// What reaches the two distances of a pair that is not near: that of dp, and that of dn over dn, the factor of
// (n - a - 1e-6).
template <class T>
struct DistanceGradient {
  T reach, difference;
};

// From grad_pull = sum_d grad_syn (n - a) and grad_gated = sum_d grad_syn (n - a) gate: t = rho + kappa (1 - rho) gate,
// so grad rho = w (grad_pull - kappa grad_gated), d rho / d dp = 1 / dn, d rho / d dn = -rho / dn.
template <class T>
GCNG_HOST_DEVICE DistanceGradient<T> distance_gradient(T grad_pull, T grad_gated, T weight, T kappa, T ratio,
                                                       T distance) {
  const T reach = weight * (grad_pull - kappa * grad_gated) / distance;
  return {reach, -reach * ratio / distance};
}

}  // namespace gcng
