// Rows of numbers in vectors as wide as the instruction set that a file is compiled for; rows may have any length.
//
// Sums keep a fixed number of partial sums for each width of vectors and add them in a fixed order.
#pragma once

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "gelu.h"

namespace gcng {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t BitsVector __attribute__((vector_size(kVectorBytes)));

template <class T>
struct VectorType;
template <>
struct VectorType<float> {
  using Type = FloatVector;
};
template <>
struct VectorType<double> {
  using Type = DoubleVector;
};
template <class T>
using Vector = typename VectorType<T>::Type;
template <class T>
inline constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <>
struct Arithmetic<FloatVector> {
  using Bits = BitsVector;
  static GCNG_INLINE FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
  }
};

GCNG_INLINE FloatVector gelu(FloatVector x) { return gelu_float(x); }

GCNG_INLINE DoubleVector gelu(DoubleVector x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = gelu(static_cast<double>(x[lane]));
  return x;
}

GCNG_INLINE GeluTerms<FloatVector> gelu_terms(FloatVector x) { return gelu_terms_float(x); }

GCNG_INLINE GeluTerms<DoubleVector> gelu_terms(DoubleVector x) {
  GeluTerms<DoubleVector> terms;
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) {
    const GeluTerms<double> one = gelu_terms(static_cast<double>(x[lane]));
    terms.value[lane] = one.value;
    terms.slope[lane] = one.slope;
  }
  return terms;
}

GCNG_INLINE FloatVector sigmoid(FloatVector x) { return sigmoid_float(x); }

GCNG_INLINE DoubleVector sigmoid(DoubleVector x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = sigmoid(static_cast<double>(x[lane]));
  return x;
}

// ------------------------------------------------------------------------------------------- places in a row

struct Whole {  // a full vector that starts at element `at`
  int64_t at;
};

struct Part {  // the last `count` elements of a row, fewer than a vector has
  int64_t at, count;
};

template <class T>
GCNG_INLINE Vector<T> load(const T* row, Whole place) {
  Vector<T> v;
  memcpy(&v, row + place.at, sizeof v);
  return v;
}

// Lanes beyond the row are 0.
template <class T>
GCNG_INLINE Vector<T> load(const T* row, Part place) {
  Vector<T> v{};
  memcpy(&v, row + place.at, static_cast<size_t>(place.count) * sizeof(T));
  return v;
}

template <class T>
GCNG_INLINE void store(T* row, Whole place, Vector<T> v) {
  memcpy(row + place.at, &v, sizeof v);
}

template <class T>
GCNG_INLINE void store(T* row, Part place, Vector<T> v) {
  memcpy(row + place.at, &v, static_cast<size_t>(place.count) * sizeof(T));
}

template <class T, class Place>
GCNG_INLINE void add_to(T* row, Place place, Vector<T> v) {
  store(row, place, load(row, place) + v);
}

// v with 0 in the lanes beyond the row.
template <class V>
GCNG_INLINE V inside(Whole, V v) {
  return v;
}

template <class V>
GCNG_INLINE V inside(Part place, V v) {
  for (size_t lane = static_cast<size_t>(place.count); lane < sizeof(V) / sizeof(v[0]); ++lane) v[lane] = 0;
  return v;
}

// body(place, k) for all vectors of a row; k is a constant that runs through 0 .. kUnroll - 1, for partial sums.
template <class T, int kUnroll = 1, class Body>
GCNG_INLINE void for_vectors(int64_t width, const Body& body) {
  constexpr int64_t kStep = kLanes<T>;
  int64_t at = 0;
  for (; at + kUnroll * kStep <= width; at += kUnroll * kStep)
    [&]<int... k>(std::integer_sequence<int, k...>) __attribute__((always_inline)) {
      (body(Whole{at + k * kStep}, std::integral_constant<int, k>{}), ...);
    }(std::make_integer_sequence<int, kUnroll>{});
  if constexpr (kUnroll > 1)
    for (; at + kStep <= width; at += kStep) body(Whole{at}, std::integral_constant<int, 0>{});
  if (at < width) body(Part{at, width - at}, std::integral_constant<int, 0>{});
}

// A sum over a row in kUnroll vectors.
template <class T, int kUnroll>
struct RowSum {
  Vector<T> part[kUnroll] = {};

  T total() const {
    Vector<T> all = part[0];
    for (int k = 1; k < kUnroll; ++k) all += part[k];
    T lane[kLanes<T>];
    memcpy(lane, &all, sizeof all);
    for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }
};

}  // namespace gcng
