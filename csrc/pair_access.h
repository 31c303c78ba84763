// What the registrations of passes over pairs share: tiles and optional tensors, checked.
#pragma once

#include <optional>

#include "cpu/pair_tile.h"
#include "tensor_access.h"

namespace gcng {

// A tile of gcng/ops/tiles.py; a wrong one would become a wild pointer.
inline PairTile checked_tile(int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  STD_TORCH_CHECK(0 <= r0 && r0 <= r1 && r1 <= n && 0 <= c0 && c0 <= c1 && c1 <= n && (c0 == r0 || c0 >= r1),
                  "no tile of ", n, " nodes: rows ", r0, " to ", r1, ", columns ", c0, " to ", c1);
  return {n, r0, r1, c0, c1};
}

// Vectors of a tensor over pairs: P in packed storage, R S in a tile.
inline int64_t pair_rows(const PairTile& tile, bool packed) {
  return packed ? tile.n * (tile.n + 1) / 2 : tile.pairs();
}

template <class T>
T* write_if(const std::optional<Tensor>& x, const char* name, std::initializer_list<int64_t> shape) {
  return x.has_value() ? write<T>(*x, name, shape) : nullptr;
}

}  // namespace gcng
