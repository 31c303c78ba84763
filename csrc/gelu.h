// gelu, its slope and the sigmoid, without a branch or a call in float32; for CPU and CUDA.
//
// gelu(x) = x Phi(x) with the normal distribution function from its scaled tail, Phi(m) = exp(-m^2 / 2) R(m), m <= 0:
// R rises smoothly from about -0.4 / m to 1/2, a ratio of polynomials holds it to 6e-9, and the density in the slope
// needs the same exponential. The tail keeps its relative precision, which 1 + erf loses.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GCNG_HOST_DEVICE __host__ __device__
#else
#define GCNG_HOST_DEVICE
#endif
#define GCNG_INLINE GCNG_HOST_DEVICE inline __attribute__((always_inline))

namespace gcng {

// What the formulas need of a number beside its operators; csrc/cpu/vector.h adds vectors of float.
template <class V>
struct Arithmetic;

template <>
struct Arithmetic<float> {
  using Bits = uint32_t;
  static GCNG_INLINE float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
  }
};

template <class To, class From>
GCNG_INLINE To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
GCNG_INLINE V absolute(V x) {
  using Bits = typename Arithmetic<V>::Bits;
  return reinterpret<V>(reinterpret<Bits>(x) & 0x7FFFFFFFu);
}

// Like the instruction: the second operand where either is NaN.
template <class V>
GCNG_INLINE V smaller(V x, V y) {
  return x < y ? x : y;
}

template <class V>
GCNG_INLINE V larger(V x, V y) {
  return x > y ? x : y;
}

// exp(a b) for a b <= 0 in float32, to about 1 ulp of the exact product: the exponent is not rounded. Exactly 0 below
// 2^-126, NaN for NaN.
template <class V>
GCNG_INLINE V exp_of_product(V a, V b) {
  using Bits = typename Arithmetic<V>::Bits;
  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
  const V shifted = a * b * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  // log 2 in two parts, n times the first is exact.
  V r = Arithmetic<V>::fused(a, b, -(n * 0.693359375f));
  r = r + n * 2.12194440e-4f;
  V y = r * 1.3814321e-03f + 8.3688507e-03f;
  y = y * r + 4.1668400e-02f;
  y = y * r + 1.6666520e-01f;
  y = y * r + 4.9999994e-01f;
  y = y * (r * r) + r + 1.0f;
  const V scale = reinterpret<V>((reinterpret<Bits>(shifted) << 23) + 0x3F800000u);
  return shifted < 12582912.0f - 126.0f ? V{} : y * scale;
}

// What gelu and its slope are made of: m = -|x|, cut at -14 where q is 0, q = Phi(m), and exp(-x^2 / 2).
template <class V>
struct NormalTail {
  V m, q, e;
};

template <class V>
GCNG_INLINE NormalTail<V> normal_tail(V x) {
  using Bits = typename Arithmetic<V>::Bits;
  const V negative = reinterpret<V>(reinterpret<Bits>(x) | 0x80000000u);
  const V e = exp_of_product(negative, negative * -0.5f);
  const V m = larger(negative, V{} - 14.0f);  // farther out the quotient would become inf / inf
  V numerator = m * 4.0073976e-03f - 3.9911923e-02f;
  numerator = numerator * m + 1.8111325e-01f;
  numerator = numerator * m - 4.3545794e-01f;
  numerator = numerator * m + 0.5f;
  V denominator = m * -1.0044914e-02f + 1.0005171e-01f;
  denominator = denominator * m - 4.6386330e-01f;
  denominator = denominator * m + 1.1937333e+00f;
  denominator = denominator * m - 1.6688007e+00f;
  denominator = denominator * m + 1.0f;
  return {m, e * numerator / denominator, e};
}

// max(x, 0) - |x| q. As in torch, -inf gives NaN: x itself stands for m there, and -inf times 0 is NaN.
template <class V>
GCNG_INLINE V gelu_of(V x, const NormalTail<V>& tail) {
  return smaller(x, tail.m) * tail.q + larger(x, V{});
}

template <class V>
GCNG_INLINE V gelu_slope_of(V x, const NormalTail<V>& tail) {
  return (x > 0.0f ? 1.0f - tail.q : tail.q) + x * (tail.e * 0.39894228f);
}

template <class V>
struct GeluTerms {
  V value, slope;
};

template <class V>
GCNG_INLINE V gelu_float(V x) {
  return gelu_of(x, normal_tail(x));
}

template <class V>
GCNG_INLINE GeluTerms<V> gelu_terms_float(V x) {
  const NormalTail<V> tail = normal_tail(x);
  return {gelu_of(x, tail), gelu_slope_of(x, tail)};
}

template <class V>
GCNG_INLINE V sigmoid_float(V x) {
  const V e = exp_of_product(absolute(x), V{} - 1.0f);
  const V upper = 1.0f / (e + 1.0f);
  return x < 0.0f ? e * upper : upper;
}

GCNG_INLINE float gelu(float x) { return gelu_float(x); }

GCNG_INLINE double gelu(double x) { return 0.5 * x * erfc(x * -0.70710678118654752440); }

GCNG_INLINE GeluTerms<float> gelu_terms(float x) { return gelu_terms_float(x); }

GCNG_INLINE GeluTerms<double> gelu_terms(double x) {
  const double cdf = 0.5 * erfc(x * -0.70710678118654752440);
  return {x * cdf, x * (exp(-0.5 * x * x) * 0.39894228040143267794) + cdf};
}

GCNG_INLINE float sigmoid(float x) { return sigmoid_float(x); }

GCNG_INLINE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

}  // namespace gcng
