// Class structure of a batch: the kernel behind gcng/ops/layout.py.
#pragma once

#include <cstdint>

namespace gcng {

// Orders samples by class, classes by first appearance (docs/maths.md 9b), in O(N) with a hash table.
void class_layout(const int64_t* labels,  // (N,)
                  int64_t n,
                  int64_t* order,         // (N,) sample of each class-major slot
                  int64_t* class_index,   // (N,) class of each slot
                  int64_t* rank,          // (N,) rank in the class, by order of appearance
                  int64_t* class_start);  // (N + 1,) first slot of each class, padded with N

}  // namespace gcng
