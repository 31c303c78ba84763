// Passes of the channel-weighted synthesis (15)-(18) over a block of anchors and whole classes: the kernels behind
// gcng/ops/native_synthesis_kernels.py. T is float or double. A anchors, m classes, B negatives, D channels, N nodes.
#pragma once

#include <cstdint>

namespace gcng {

// Anchors [first_anchor, first_anchor + A) against the classes that class_start names; nodes are class-major. Gates and
// synthetic negatives are those of the side, (A, B, D) and (A, m, D), or, with order, of all nodes where the caller has
// them, (N, N, D) and (N, m, D).
template <class T>
struct SynthesisSide {
  const T* z;                  // (N, D)
  int64_t width;               // D
  int64_t first_anchor, num_anchors;
  const int64_t* class_start;  // (m + 1,) first node of each class and the end of the last
  int64_t num_classes;
  const int64_t* order = nullptr;   // (N,) the caller's row of every node, or null
  const bool* is_anchor = nullptr;  // (N,) with order: what others would have as anchors is 0

  int64_t row(int64_t i) const { return order ? order[first_anchor + i] : i; }
  int64_t column(int64_t b) const { return order ? order[first_negative() + b] : b; }
  bool taken(int64_t i) const { return !is_anchor || is_anchor[first_anchor + i]; }
  int64_t first_negative() const { return class_start[0]; }
  int64_t num_negatives() const { return class_start[num_classes] - class_start[0]; }
  const T* anchor(int64_t i) const { return z + (first_anchor + i) * width; }
  const T* node(int64_t n) const { return z + n * width; }
};

// Channels of every pair, as a view: rows of D consecutive elements.
template <class T>
struct PairChannels {
  T* data;
  int64_t anchor_stride, negative_stride;
};

// Geometry of gcng/ops/synthesis_tiles.py, each (A, B). Const is T to write it, const T to read it.
template <class Value, class Flag>
struct SynthesisGeometry {
  Value* distance;
  Flag* near;
  Value* ratio;
  Value* weight;
  Value* offset;
  Value* slope;
};

// Gradients that arrive at synthetic negatives; null counts as 0.
template <class T>
struct SyntheticGradients {
  const T* values;   // (A, m, D), with order (N, m, D)
  const T* dots;     // (A, m)
  const T* squares;  // (A, m)
};

// dp of (15) for every node, summed as the distances of synthesis_geometry are, so that equal vectors tie.
template <class T>
void synthesis_positive_distance(const T* z,               // (N, D)
                                 const int64_t* positive,  // (N,)
                                 int64_t num_nodes, int64_t width,
                                 T* out,  // (N,)
                                 int num_threads);

// (15)-(17) for every pair. Reads z from the cache, an anchor once for four negatives; writes six numbers a pair.
template <class T>
void synthesis_geometry(const SynthesisSide<T>& side,
                        const T* reach,           // (N,) dp
                        const int64_t* positive,  // (N,)
                        const int64_t* rank,      // (N,)
                        const T* weights,         // (K, N) of (18), by the anchor's rank
                        int64_t num_nodes, T kappa, const SynthesisGeometry<T, bool>& out, int num_threads);

// a + sum_g pull_g (n_g - a) over the samples of every class; reads every gate once.
template <class T>
void synthesis_forward(const SynthesisSide<T>& side, const PairChannels<const T>& gate, const T* offset, const T* slope,
                       T* values,   // (A, m, D), with order (N, m, D), or null
                       T* dots,     // (A, m) or null
                       T* squares,  // (A, m) or null
                       int num_threads);

// Gradient of the gates, added to out, or written to an out that holds nothing yet; values (A, m, D) may be null where
// no gradient arrives at the squares, and is with order.
template <class T>
void synthesis_gate_gradient(const SynthesisSide<T>& side, const T* slope, const T* values,
                             const SyntheticGradients<T>& grads, const PairChannels<T>& out, bool overwrite,
                             int num_threads);

// Adds the gradients of anchors, negatives and positive distances, the gates held constant. Computes the synthetic
// negatives again; reads every gate once from memory and twice from the cache.
template <class T>
void synthesis_embedding_gradient(const SynthesisSide<T>& side, const PairChannels<const T>& gate,
                                  const SynthesisGeometry<const T, const bool>& geometry, T kappa,
                                  const SyntheticGradients<T>& grads,
                                  T* grad_z,      // (N, D)
                                  T* grad_reach,  // (N,) of the positive distances
                                  int num_threads);

}  // namespace gcng
