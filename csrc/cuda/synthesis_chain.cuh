// What the kernels of the synthesis share: a block of anchors against whole classes, and the chain (18) of one of each.
#pragma once

#include "cuda/vectors.cuh"
#include "synthesis_math.h"

namespace gcng::cuda {

// Anchors [first_anchor, first_anchor + A) against m classes with B samples; nodes are class-major.
struct Side {
  const float* z;              // (N, D)
  const int64_t* class_start;  // (m + 1,) first node of each class and the end of the last
  int64_t width;               // D
  int64_t first_anchor, num_anchors;
  int64_t num_classes, first_negative, num_negatives;

  __host__ __device__ int64_t rows() const { return num_anchors * num_classes; }
};

// Gates of every pair of a side: rows of D consecutive elements of a tile in its storage dtype.
template <class S>
struct Gates {
  using Storage = S;
  const S* data;
  int64_t anchor_stride, negative_stride;
};

// Gradients that arrive at synthetic negatives; null counts as 0.
struct Upstream {
  const float* values;   // (A, m, D)
  const float* dots;     // (A, m)
  const float* squares;  // (A, m)

  // The whole gradient of VEC channels from d on of synthetic negative row. What is absent multiplies nothing.
  template <int VEC>
  __device__ __forceinline__ void at(int64_t row, int64_t width, int64_t d, const float (&synthetic)[VEC],
                                     const float (&anchor)[VEC], float (&grad)[VEC]) const {
    if (values) {
      load<VEC>(values + row * width + d, grad);
    } else {
#pragma unroll
      for (int v = 0; v < VEC; ++v) grad[v] = 0.0f;
    }
    if (squares) {
      const float square = squares[row];
#pragma unroll
      for (int v = 0; v < VEC; ++v) grad[v] += through_square(square, synthetic[v]);
    }
    if (dots) {
      const float dot = dots[row];
#pragma unroll
      for (int v = 0; v < VEC; ++v) grad[v] += through_dot(dot, anchor[v]);
    }
  }
};

// The samples of class c: their place among the negatives of a side, and their rows.
struct ClassRows {
  int64_t first, count;  // first negative of the class
  const float* z;        // its row

  __device__ __forceinline__ ClassRows(const Side& side, int64_t c) {
    const int64_t start = side.class_start[c];
    first = start - side.first_negative, count = side.class_start[c + 1] - start, z = side.z + start * side.width;
  }
};

// The chain (18) of anchor i and a class.
template <class S>
struct Chain {
  const float* anchor;
  const float* negatives;
  const S* gates;
  const float* offset;
  const float* slope;
  int64_t count, width, gate_stride;

  __device__ __forceinline__ Chain(const Side& side, const Gates<S>& gate, const float* offsets, const float* slopes,
                                   int64_t i, const ClassRows& rows)
      : anchor(side.z + (side.first_anchor + i) * side.width),
        negatives(rows.z),
        gates(gate.data + i * gate.anchor_stride + rows.first * gate.negative_stride),
        offset(offsets + i * side.num_negatives + rows.first),
        slope(slopes + i * side.num_negatives + rows.first),
        count(rows.count),
        width(side.width),
        gate_stride(gate.negative_stride) {}

  // Pull w t and difference n - a of sample k.
  template <int VEC>
  __device__ __forceinline__ void sample(int64_t k, int64_t d, const float (&a)[VEC], float (&pull)[VEC],
                                         float (&difference)[VEC]) const {
    float gate[VEC];
    load<VEC>(gates + k * gate_stride + d, gate);
    load<VEC>(negatives + k * width + d, difference);
    const float s = slope[k], o = offset[k];
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      pull[v] = pull_of(gate[v], s, o);
      difference[v] -= a[v];
    }
  }

  // The synthetic negative's channels, and the sums of the pulls.
  template <int VEC>
  __device__ __forceinline__ void synthetic(int64_t d, const float (&a)[VEC], float (&out)[VEC],
                                            float (&pull_sum)[VEC]) const {
#pragma unroll
    for (int v = 0; v < VEC; ++v) out[v] = a[v], pull_sum[v] = 0.0f;
#pragma unroll 2
    for (int64_t k = 0; k < count; ++k) {
      float pull[VEC], difference[VEC];
      sample<VEC>(k, d, a, pull, difference);
#pragma unroll
      for (int v = 0; v < VEC; ++v) out[v] += pull[v] * difference[v], pull_sum[v] += pull[v];
    }
  }
};

// A compile-time number as a value.
template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// Storage dtypes of gates, as the launchers number them.
enum GateStorage : int { GATE_FLOAT = 0, GATE_HALF = 1, GATE_BFLOAT16 = 2 };

// Calls run(gates, Constant<VEC>) with the storage dtype, and VEC channels of 16 bytes where the gates and
// every one of the float rows allow it, else 1.
template <class Run>
int with_gates(const void* data, int storage, int64_t anchor_stride, int64_t negative_stride, const Side& side,
               const float* values, const Run& run) {
  const auto typed = [&](auto zero) {
    using S = decltype(zero);
    constexpr int VEC = 16 / static_cast<int>(sizeof(S));
    const Gates<S> gates{static_cast<const S*>(data), anchor_stride, negative_stride};
    const bool wide = in_pieces(gates.data, side.width, anchor_stride) &&
                      in_pieces(gates.data, side.width, negative_stride) && in_pieces(side.z, side.width) &&
                      in_pieces(values, side.width);
    return wide ? run(gates, Constant<VEC>{}) : run(gates, Constant<1>{});
  };
  switch (storage) {
    case GATE_FLOAT: return typed(float{});
    case GATE_HALF: return typed(__half{});
    case GATE_BFLOAT16: return typed(__nv_bfloat16{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace gcng::cuda
