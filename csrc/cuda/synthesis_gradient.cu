// Launchers of the gradients of the embeddings through the synthetic negatives, the gates held constant. Sums have one
// owner and a fixed order: what reaches the distances first, then anchors and negatives, each walking over the other's
// nodes in order, cut into parts whose partial sums the caller adds. Every pass computes synthetic negatives again.
#include "cuda/synthesis_chain.cuh"

namespace gcng::cuda {
namespace {

// Samples of a class that are summed at once.
constexpr int GROUP = 4;

struct GeometryTensors {
  const float* distance;  // (A, B), as all
  const bool* near;
  const float* ratio;
  const float* weight;
  const float* offset;
  const float* slope;
};

// What reaches dp, and what (n - a - 1e-6) is multiplied by, of every pair; 0 where it is near. A warp owns one anchor
// and class. For up to GROUP samples it reads every gate once from memory and once from the cache, and writes 8 bytes a
// pair; every further GROUP samples take one more round over the channels.
template <class S, int VEC>
__global__ void __launch_bounds__(THREADS)
    distance_gradient_kernel(Side side, Gates<S> gates, GeometryTensors geometry, const float* __restrict__ kappa,
                             Upstream grads, float* __restrict__ grad_reach, float* __restrict__ grad_difference) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (row >= side.rows()) return;
  const int64_t i = row / side.num_classes;
  const ClassRows rows(side, row % side.num_classes);
  const Chain<S> chain(side, gates, geometry.offset, geometry.slope, i, rows);
  const int lane = threadIdx.x % WARP;
  for (int64_t first = 0; first < rows.count; first += GROUP) {
    float pulled[GROUP], gated[GROUP];
#pragma unroll
    for (int q = 0; q < GROUP; ++q) pulled[q] = gated[q] = 0.0f;
    for (int64_t d = lane * VEC; d < side.width; d += WARP * VEC) {
      float a[VEC], grad[VEC], scratch[VEC];
      load<VEC>(chain.anchor + d, a);
      chain.template synthetic<VEC>(d, a, grad, scratch);
      grads.at<VEC>(row, side.width, d, grad, a, scratch);
#pragma unroll
      for (int q = 0; q < GROUP; ++q) {
        if (first + q >= rows.count) break;
        float gate[VEC], n[VEC];
        load<VEC>(chain.gates + (first + q) * chain.gate_stride + d, gate);
        load<VEC>(chain.negatives + (first + q) * side.width + d, n);
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          const float part = scratch[v] * (n[v] - a[v]);
          pulled[q] += part, gated[q] += part * gate[v];
        }
      }
    }
#pragma unroll
    for (int q = 0; q < GROUP; ++q) pulled[q] = warp_sum(pulled[q]), gated[q] = warp_sum(gated[q]);
    if (lane != 0) continue;
#pragma unroll
    for (int q = 0; q < GROUP; ++q) {
      if (first + q >= rows.count) break;
      const int64_t pair = i * side.num_negatives + rows.first + first + q;
      const DistanceGradient<float> through = distance_gradient(
          pulled[q], gated[q], geometry.weight[pair], *kappa, geometry.ratio[pair], geometry.distance[pair]);
      const bool near = geometry.near[pair];
      grad_reach[pair] = near ? 0.0f : through.reach;
      grad_difference[pair] = near ? 0.0f : through.difference;
    }
  }
}

// Gradient of the anchors, (parts, A, D). A thread owns VEC channels of one anchor and walks over the classes of its
// part; reads every gate once.
template <class S, int VEC>
__global__ void __launch_bounds__(THREADS)
    anchor_gradient_kernel(Side side, Gates<S> gates, const float* __restrict__ offset, const float* __restrict__ slope,
                           Upstream grads, const float* __restrict__ grad_difference, int64_t classes_each,
                           float* __restrict__ out) {
  const int64_t vectors = (side.width + VEC - 1) / VEC;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= side.num_anchors * vectors) return;
  const int64_t i = index / vectors, d = index % vectors * VEC, part = blockIdx.y, begin = part * classes_each;
  const int64_t end = begin + classes_each < side.num_classes ? begin + classes_each : side.num_classes;
  float a[VEC], sum[VEC];
  load<VEC>(side.z + (side.first_anchor + i) * side.width + d, a);
#pragma unroll
  for (int v = 0; v < VEC; ++v) sum[v] = 0.0f;
  for (int64_t c = begin; c < end; ++c) {
    const ClassRows rows(side, c);
    const Chain<S> chain(side, gates, offset, slope, i, rows);
    const float* const drifts = grad_difference + i * side.num_negatives + rows.first;
    const int64_t row = i * side.num_classes + c;
    float synthetic[VEC], pull_sum[VEC], grad[VEC];
#pragma unroll
    for (int v = 0; v < VEC; ++v) synthetic[v] = a[v], pull_sum[v] = 0.0f;
    for (int64_t k = 0; k < rows.count; ++k) {
      float pull[VEC], difference[VEC];
      chain.template sample<VEC>(k, d, a, pull, difference);
      const float drift = drifts[k];
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        synthetic[v] += pull[v] * difference[v], pull_sum[v] += pull[v];
        sum[v] -= drift * (difference[v] - DISTANCE_OFFSET<float>);
      }
    }
    grads.at<VEC>(row, side.width, d, synthetic, a, grad);
#pragma unroll
    for (int v = 0; v < VEC; ++v) sum[v] += anchor_gradient(grad[v], pull_sum[v]);
    if (grads.dots) {
      const float dot = grads.dots[row];
#pragma unroll
      for (int v = 0; v < VEC; ++v) sum[v] += through_dot(dot, synthetic[v]);
    }
  }
  store<VEC>(out + (part * side.num_anchors + i) * side.width + d, sum);
}

// Gradient of the negatives, (parts, B, D). A thread owns VEC channels of up to GROUP samples of a class and walks over
// the anchors of its part; reads every gate of the class once from memory and once from the cache.
template <class S, int VEC>
__global__ void __launch_bounds__(THREADS)
    negative_gradient_kernel(Side side, Gates<S> gates, const float* __restrict__ offset,
                             const float* __restrict__ slope, Upstream grads,
                             const float* __restrict__ grad_difference, int64_t groups, int64_t anchors_each,
                             float* __restrict__ out) {
  const int64_t vectors = (side.width + VEC - 1) / VEC;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= side.num_classes * groups * vectors) return;
  const int64_t d = index % vectors * VEC, first = index / vectors % groups * GROUP, c = index / vectors / groups;
  const ClassRows rows(side, c);
  if (first >= rows.count) return;
  const int64_t part = blockIdx.y, begin = part * anchors_each;
  const int64_t end = begin + anchors_each < side.num_anchors ? begin + anchors_each : side.num_anchors;
  float sum[GROUP][VEC];
#pragma unroll
  for (int q = 0; q < GROUP; ++q)
#pragma unroll
    for (int v = 0; v < VEC; ++v) sum[q][v] = 0.0f;
  for (int64_t i = begin; i < end; ++i) {
    const Chain<S> chain(side, gates, offset, slope, i, rows);
    const float* const drifts = grad_difference + i * side.num_negatives + rows.first;
    float a[VEC], synthetic[VEC], grad[VEC];
    load<VEC>(chain.anchor + d, a);
    chain.template synthetic<VEC>(d, a, synthetic, grad);
    grads.at<VEC>(i * side.num_classes + c, side.width, d, synthetic, a, grad);
#pragma unroll
    for (int q = 0; q < GROUP; ++q) {
      if (first + q >= rows.count) break;
      float pull[VEC], difference[VEC];
      chain.template sample<VEC>(first + q, d, a, pull, difference);
      const float drift = drifts[first + q];
#pragma unroll
      for (int v = 0; v < VEC; ++v)
        sum[q][v] += grad[v] * pull[v] + drift * (difference[v] - DISTANCE_OFFSET<float>);
    }
  }
#pragma unroll
  for (int q = 0; q < GROUP; ++q) {
    if (first + q >= rows.count) break;
    store<VEC>(out + (part * side.num_negatives + rows.first + first + q) * side.width + d, sum[q]);
  }
}

}  // namespace
}  // namespace gcng::cuda

using namespace gcng::cuda;

// grad_reach, grad_difference: (A, B), written. grad_anchors: (anchor_parts, A, D) and grad_negatives: (negative_parts,
// B, D), written: partial sums over classes_each classes and anchors_each anchors a part. most: samples of the largest
// class.
extern "C" int gcng_synthesis_embedding_gradient(
    const float* z, const int64_t* class_start, int64_t width, int64_t first_anchor, int64_t num_anchors,
    int64_t num_classes, int64_t first_negative, int64_t num_negatives, int64_t most, const void* gate,
    int gate_storage, int64_t anchor_stride, int64_t negative_stride, const float* kappa, const float* distance,
    const bool* near, const float* ratio, const float* weight, const float* offset, const float* slope,
    const float* grad_values, const float* grad_dots, const float* grad_squares, float* grad_reach,
    float* grad_difference, float* grad_anchors, int64_t classes_each, float* grad_negatives, int64_t anchors_each,
    cudaStream_t stream) {
  const Side side{z, class_start, width, first_anchor, num_anchors, num_classes, first_negative, num_negatives};
  const GeometryTensors geometry{distance, near, ratio, weight, offset, slope};
  const Upstream grads{grad_values, grad_dots, grad_squares};
  return with_gates(gate, gate_storage, anchor_stride, negative_stride, side, grad_values, [&](auto gates, auto vec) {
    using S = typename decltype(gates)::Storage;
    constexpr int VEC = decltype(vec)::value;
    const int64_t vectors = quotient_up(width, VEC), groups = quotient_up(most, GROUP);
    int error = launch(distance_gradient_kernel<S, VEC>, quotient_up(side.rows(), WARPS), 1, stream, side, gates,
                       geometry, kappa, grads, grad_reach, grad_difference);
    if (error != cudaSuccess) return error;
    error = launch(anchor_gradient_kernel<S, VEC>, quotient_up(num_anchors * vectors, THREADS),
                   quotient_up(num_classes, classes_each), stream, side, gates, offset, slope, grads, grad_difference,
                   classes_each, grad_anchors);
    if (error != cudaSuccess) return error;
    return launch(negative_gradient_kernel<S, VEC>, quotient_up(num_classes * groups * vectors, THREADS),
                  quotient_up(num_anchors, anchors_each), stream, side, gates, offset, slope, grads, grad_difference,
                  groups, anchors_each, grad_negatives);
  });
}
