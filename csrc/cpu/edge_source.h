// One edge of a tile as a row of vectors, wherever it comes from.
#pragma once

#include "cpu/edge_layer.h"

namespace gcng {

template <class T>
struct ProductRow {
  const T *row, *column;
  template <class Place>
  GCNG_INLINE Vector<T> at(Place place) const {
    return load(row, place) * load(column, place);
  }
};

template <class T>
struct StoredRow {
  const T* row;
  template <class Place>
  GCNG_INLINE Vector<T> at(Place place) const {
    return load(row, place);
  }
};

// body(edge) for pair (i, j) of the tile, with edge.at(place) a vector of its channels.
template <class T, class Body>
GCNG_INLINE void with_edge(const EdgeSource<T>& source, const PairTile& tile, int64_t i, int64_t j, int64_t width,
                           const Body& body) {
  if (source.kind == EdgeKind::product)
    return body(ProductRow<T>{source.values + (tile.r0 + i) * width, source.values + (tile.c0 + j) * width});
  const int64_t at = source.kind == EdgeKind::packed ? tile.position(i, j) : i * tile.columns() + j;
  body(StoredRow<T>{source.values + at * width});
}

}  // namespace gcng
