// Tiles of pairs to and from packed storage, and products of nodes: edges, store, load, add_packed and add_product of
// TorchPairKernels in gcng/ops/pair_kernels.py.
#pragma once

#include <cstdint>

#include "cpu/pair_tile.h"

namespace gcng {

// out (R S, C) = nodes (N, C) of the rows times nodes of the columns.
template <class T>
void pair_products(const T* nodes, const PairTile& tile, int64_t width, T* out, int num_threads);

// Writes the pairs on and above the diagonal of a tile (R S, C) to packed storage (P, C).
template <class T>
void pair_store(const T* values, const PairTile& tile, int64_t width, T* packed, int num_threads);

// Reads a tile (R S, C) from packed storage (P, C); below the diagonal the mirrored values, or 0 if not symmetric.
template <class T>
void pair_load(const T* packed, const PairTile& tile, int64_t width, bool symmetric, T* out, int num_threads);

// Adds a tile's gradients (R S, C) to packed storage; both orders of a pair in the square are summed.
template <class T>
void pair_add_packed(const T* values, const PairTile& tile, int64_t width, T* packed, int num_threads);

// Adds the gradient of the nodes (N, C), given that of their products in a tile (R S, C).
template <class T>
void pair_add_product(const T* nodes, const T* grad, const PairTile& tile, int64_t width, T* out, int num_threads);

}  // namespace gcng
