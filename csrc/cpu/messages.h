// (7) over a tile of pairs: what TorchPairKernels in gcng/ops/pair_kernels.py says of messages and messages_backward.
#pragma once

#include <cstdint>

#include "cpu/pair_tile.h"

namespace gcng {

// Adds gelu of `before`, summed over partners, to `out`; reads a tile once.
template <class T>
void messages_forward(const T* before,  // (R S, D)
                      T* stash,         // (P, D), receives before; or null
                      const PairTile& tile, int64_t width,
                      T* out,           // (N, D)
                      int num_threads);

// Gradient of `before` from that of the sums; its column sum is added to `bias`.
template <class T>
void messages_backward(const T* grad,                 // (N, D)
                       const T* before, bool packed,  // (R S, D) or (P, D)
                       const PairTile& tile, int64_t width,
                       T* out,                        // (R S, D)
                       T* bias,                       // (D,)
                       int num_threads);

}  // namespace gcng
