// (14) and (26) over a tile of pairs, and what batch statistics need of packed edges: gates, spread_gradient,
// gate_logits_gradient, center, norm_gradient and moments of TorchPairKernels in gcng/ops/pair_kernels.py.
#pragma once

#include <cstdint>

#include "cpu/pair_tile.h"

namespace gcng {

// Sums of gates around a center, that of an average edge; all null where they are not wanted.
template <class T>
struct GateSpread {
  const T* center;  // (D,)
  T* row_sums;      // (N, D), added to
  double* squares;  // one number, added to
};

// Sigmoid in place.
template <class T>
void gates_forward(T* logits,  // (R S, D)
                   T* stash,   // (P, D), receives the gates; or null
                   const GateSpread<T>& spread, const PairTile& tile, int64_t width, int num_threads);

// Gradient of (26): scale times the deviations of both orders of a pair from their row's mean.
template <class T>
void gate_spread_gradient(const T* gates,      // (R S, D)
                          const T* row_means,  // (N, D)
                          T scale, const PairTile& tile, int64_t width,
                          T* out,              // (R S, D)
                          int num_threads);

// out = grad gate (1 - gate); its column sum is added to `bias`.
template <class T>
void gate_logits_gradient(const T* grad, const T* gates, int64_t pairs, int64_t width,  // (pairs, D)
                          T* out,                                                       // (pairs, D), may be grad
                          T* bias,                                                      // (D,) or null
                          int num_threads);

// out = values - mean.
template <class T>
void gate_center(const T* values, const T* mean, int64_t pairs, int64_t width, T* out, int num_threads);

// grad -= weight (constant + (e - mean) linear): what batch statistics send back.
template <class T>
void gate_norm_gradient(T* grad, const T* e,      // (pairs, D)
                        const T* weights,         // (pairs,)
                        const T* mean, const T* constant, const T* linear,  // (D,)
                        int64_t pairs, int64_t width, int num_threads);

// Adds the sums of weight (value - shift) and of weight (value - shift)^2.
template <class T>
void gate_moments(const T* values,   // (pairs, D)
                  const T* weights,  // (pairs,)
                  const T* shift,    // (D,)
                  int64_t pairs, int64_t width,
                  double* total, double* squares,  // (D,)
                  int num_threads);

}  // namespace gcng
