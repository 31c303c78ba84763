// Merges tiles of scores into the best k columns of every row: the kernel behind gcng/ops/nearest.py.
#pragma once

#include <cstdint>

namespace gcng {

// What is left out of a tile; null pointers leave out nothing.
struct Exclusions {
  const int64_t* self_index;     // (Q,) column that is the row itself, counted over all tiles
  const int64_t* labels;         // (Q,) and
  const int64_t* column_labels;  // (R,): columns of the row's class
};

// Rows are ordered by falling value, NaN first, ties by rising column. values and indices hold the best of the tiles
// before, in that order, or -inf and -1; columns of this tile lie behind all of theirs. A score of -inf never enters.
//
// A block of rows is read once, 4 or 8 bytes a score: scores that cannot enter cost one comparison, the others go to a
// buffer of 2k places that is cut back to the best k whenever it is full.
template <class T>
void topk_merge(const T* scores,  // (Q, R)
                int64_t num_rows, int64_t num_columns, int64_t first_column, const Exclusions& exclusions, int64_t k,
                T* values,         // (Q, k)
                int64_t* indices,  // (Q, k)
                int num_threads);

}  // namespace gcng
