// Launchers of the channel-weighted synthesis (15)-(18): distances, synthetic negatives, gradient of the gates. Called
// by gcng/ops/cuda_synthesis_kernels.py; each returns a cudaError_t. A anchors, m classes, B negatives, D channels.
#include "cuda/synthesis_chain.cuh"

namespace gcng::cuda {
namespace {

// Negatives whose distances a warp sums at once: one load of the anchor serves them.
constexpr int GROUP = 4;

// sqrt sum_d (n - a - 1e-6)^2 of GROUP negatives, by one warp; the order of the sums depends on D alone.
template <int VEC>
__device__ __forceinline__ void distances(const float* anchor, const float* const (&negatives)[GROUP], int64_t width,
                                          float (&out)[GROUP]) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int q = 0; q < GROUP; ++q) out[q] = 0.0f;
  for (int64_t d = lane * VEC; d < width; d += WARP * VEC) {
    float a[VEC];
    load<VEC>(anchor + d, a);
#pragma unroll
    for (int q = 0; q < GROUP; ++q) {
      float n[VEC];
      load<VEC>(negatives[q] + d, n);
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const float term = distance_term<float>(n[v], a[v]);
        out[q] = fmaf(term, term, out[q]);
      }
    }
  }
#pragma unroll
  for (int q = 0; q < GROUP; ++q) out[q] = sqrtf(warp_sum(out[q]));
}

// dp of (15). A warp owns a node; reads its row once and the positive's from the cache.
template <int VEC>
__global__ void __launch_bounds__(THREADS)
    positive_distance_kernel(const float* __restrict__ z, const int64_t* __restrict__ positive, int64_t num_nodes,
                             int64_t width, float* __restrict__ out) {
  const int64_t node = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (node >= num_nodes) return;
  const float* const own = z + positive[node] * width;
  float distance[GROUP];
  distances<VEC>(z + node * width, {own, own, own, own}, width, distance);
  if (threadIdx.x % WARP == 0) out[node] = distance[0];
}

struct GeometryTensors {
  const float* reach;       // (N,) dp
  const int64_t* positive;  // (N,)
  const int64_t* rank;      // (N,)
  const float* weights;     // (K, N) of (18), by the anchor's rank
  int64_t num_nodes;        // N
  const float* kappa;       // 0-dim
  float* distance;          // (A, B), as all that follow
  bool* near;
  float* ratio;
  float* weight;
  float* offset;
  float* slope;
};

// (15)-(17). A warp owns GROUP pairs of one anchor; reads 20 D bytes of rows from the cache, writes 21 bytes a pair.
template <int VEC>
__global__ void __launch_bounds__(THREADS) geometry_kernel(Side side, GeometryTensors t) {
  const int64_t groups = (side.num_negatives + GROUP - 1) / GROUP;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (index >= side.num_anchors * groups) return;
  const int64_t i = index / groups, start = index % groups * GROUP, anchor = side.first_anchor + i;
  const float* rows[GROUP];
#pragma unroll
  for (int q = 0; q < GROUP; ++q) {
    const int64_t b = start + q < side.num_negatives ? start + q : side.num_negatives - 1;
    rows[q] = side.z + (side.first_negative + b) * side.width;
  }
  float distance[GROUP];
  distances<VEC>(side.z + anchor * side.width, {rows[0], rows[1], rows[2], rows[3]}, side.width, distance);
  if (threadIdx.x % WARP != 0) return;
#pragma unroll
  for (int q = 0; q < GROUP; ++q) {
    const int64_t b = start + q;
    if (b >= side.num_negatives) return;
    const int64_t node = side.first_negative + b, pair = i * side.num_negatives + b;
    const float weight = t.weights[t.rank[anchor] * t.num_nodes + node];
    const PairGeometry<float> found =
        pair_geometry(t.reach[anchor], distance[q], t.positive[anchor] == node, weight, *t.kappa);
    t.distance[pair] = distance[q], t.near[pair] = found.near, t.ratio[pair] = found.ratio;
    t.weight[pair] = weight, t.offset[pair] = found.offset, t.slope[pair] = found.slope;
  }
}

// a + sum_g pull_g (n_g - a) over the samples of a class, its product with the anchor and its squared norm. A warp owns
// one anchor and class; reads every gate once, and writes 4 D bytes where values are wanted.
template <class S, int VEC>
__global__ void __launch_bounds__(THREADS, 5)  // left free, ptxas takes fewer registers for sm_100a and spills one
    forward_kernel(Side side, Gates<S> gates, const float* __restrict__ offset, const float* __restrict__ slope,
                   float* __restrict__ values, float* __restrict__ dots, float* __restrict__ squares) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (row >= side.rows()) return;
  const ClassRows rows(side, row % side.num_classes);
  const Chain<S> chain(side, gates, offset, slope, row / side.num_classes, rows);
  const int lane = threadIdx.x % WARP;
  float dot = 0.0f, square = 0.0f;
  for (int64_t d = lane * VEC; d < side.width; d += WARP * VEC) {
    float a[VEC], synthetic[VEC], pull_sum[VEC];
    load<VEC>(chain.anchor + d, a);
    chain.template synthetic<VEC>(d, a, synthetic, pull_sum);
    if (values) store<VEC>(values + row * side.width + d, synthetic);
#pragma unroll
    for (int v = 0; v < VEC; ++v) dot += a[v] * synthetic[v], square += synthetic[v] * synthetic[v];
  }
  dot = warp_sum(dot), square = warp_sum(square);
  if (lane == 0) dots[row] = dot, squares[row] = square;
}

// out += grad_syn (n - a) slope. A thread owns VEC channels of one anchor and class; reads and writes 8 K D bytes for
// each of them, and values and their gradients once.
template <int VEC>
__global__ void __launch_bounds__(THREADS)
    gate_gradient_kernel(Side side, const float* __restrict__ slope, const float* __restrict__ values, Upstream grads,
                         float* __restrict__ out, int64_t anchor_stride, int64_t negative_stride) {
  const int64_t vectors = (side.width + VEC - 1) / VEC;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= side.rows() * vectors) return;
  const int64_t row = index / vectors, d = index % vectors * VEC, i = row / side.num_classes;
  const ClassRows rows(side, row % side.num_classes);
  float a[VEC], synthetic[VEC], grad[VEC];
  load<VEC>(side.z + (side.first_anchor + i) * side.width + d, a);
  if (values) {
    load<VEC>(values + row * side.width + d, synthetic);
  } else {
#pragma unroll
    for (int v = 0; v < VEC; ++v) synthetic[v] = 0.0f;
  }
  grads.at<VEC>(row, side.width, d, synthetic, a, grad);
  for (int64_t k = 0; k < rows.count; ++k) {
    const float s = slope[i * side.num_negatives + rows.first + k];
    float* const to = out + i * anchor_stride + (rows.first + k) * negative_stride + d;
    float n[VEC], sum[VEC];
    load<VEC>(rows.z + k * side.width + d, n);
    load<VEC>(to, sum);
#pragma unroll
    for (int v = 0; v < VEC; ++v) sum[v] += gate_gradient(grad[v], n[v], a[v], s);
    store<VEC>(to, sum);
  }
}

}  // namespace
}  // namespace gcng::cuda

using namespace gcng::cuda;

extern "C" int gcng_synthesis_positive_distance(const float* z, const int64_t* positive, int64_t num_nodes,
                                                int64_t width, float* out, cudaStream_t stream) {
  const int64_t blocks = quotient_up(num_nodes, WARPS);
  const auto kernel = in_pieces(z, width) ? positive_distance_kernel<4> : positive_distance_kernel<1>;
  return launch(kernel, blocks, 1, stream, z, positive, num_nodes, width, out);
}

extern "C" int gcng_synthesis_geometry(const float* z, int64_t num_nodes, int64_t width, int64_t first_anchor,
                                       int64_t num_anchors, int64_t first_negative, int64_t num_negatives,
                                       const float* reach, const int64_t* positive, const int64_t* rank,
                                       const float* weights, const float* kappa, float* distance, bool* near,
                                       float* ratio, float* weight, float* offset, float* slope, cudaStream_t stream) {
  const Side side{z, nullptr, width, first_anchor, num_anchors, 0, first_negative, num_negatives};
  const GeometryTensors tensors{reach, positive, rank,  weights, num_nodes, kappa,
                                distance, near, ratio, weight, offset, slope};
  const int64_t blocks = quotient_up(num_anchors * quotient_up(num_negatives, GROUP), WARPS);
  return launch(in_pieces(z, width) ? geometry_kernel<4> : geometry_kernel<1>, blocks, 1, stream, side, tensors);
}

extern "C" int gcng_synthesis_forward(const float* z, const int64_t* class_start, int64_t width, int64_t first_anchor,
                                      int64_t num_anchors, int64_t num_classes, int64_t first_negative,
                                      int64_t num_negatives, const void* gate, int gate_storage, int64_t anchor_stride,
                                      int64_t negative_stride, const float* offset, const float* slope, float* values,
                                      float* dots, float* squares, cudaStream_t stream) {
  const Side side{z, class_start, width, first_anchor, num_anchors, num_classes, first_negative, num_negatives};
  return with_gates(gate, gate_storage, anchor_stride, negative_stride, side, values, [&](auto gates, auto vec) {
    const auto kernel = forward_kernel<typename decltype(gates)::Storage, decltype(vec)::value>;
    const int64_t blocks = quotient_up(side.rows(), WARPS);
    return launch(kernel, blocks, 1, stream, side, gates, offset, slope, values, dots, squares);
  });
}

extern "C" int gcng_synthesis_gate_gradient(const float* z, const int64_t* class_start, int64_t width,
                                            int64_t first_anchor, int64_t num_anchors, int64_t num_classes,
                                            int64_t first_negative, int64_t num_negatives, const float* slope,
                                            const float* values, const float* grad_values, const float* grad_dots,
                                            const float* grad_squares, float* out, int64_t anchor_stride,
                                            int64_t negative_stride, cudaStream_t stream) {
  const Side side{z, class_start, width, first_anchor, num_anchors, num_classes, first_negative, num_negatives};
  const Upstream grads{grad_values, grad_dots, grad_squares};
  const bool wide = in_pieces(z, width) && in_pieces(values, width) && in_pieces(grad_values, width) &&
                    in_pieces(out, width, anchor_stride) && in_pieces(out, width, negative_stride);
  const int64_t blocks = quotient_up(side.rows() * quotient_up(width, wide ? 4 : 1), THREADS);
  return launch(wide ? gate_gradient_kernel<4> : gate_gradient_kernel<1>, blocks, 1, stream, side, slope, values, grads,
                out, anchor_stride, negative_stride);
}
