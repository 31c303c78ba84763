#include "cpu/layout.h"

#include <bit>
#include <vector>

namespace gcng {
namespace {

// splitmix64's finalizer: labels that share low bits must not share a place.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

void class_layout(const int64_t* labels, int64_t n, int64_t* order, int64_t* class_index, int64_t* rank,
                  int64_t* class_start) {
  const uint64_t capacity = std::bit_ceil(static_cast<uint64_t>(2 * n + 1));
  struct Place {
    int64_t label, class_of;
  };
  std::vector<Place> table(capacity, Place{0, -1});
  std::vector<int64_t> class_of(n), rank_of(n), count;
  for (int64_t i = 0; i < n; ++i) {
    uint64_t at = mix(static_cast<uint64_t>(labels[i])) & (capacity - 1);
    while (table[at].class_of >= 0 && table[at].label != labels[i]) at = (at + 1) & (capacity - 1);
    if (table[at].class_of < 0) {
      table[at] = {labels[i], static_cast<int64_t>(count.size())};
      count.push_back(0);
    }
    class_of[i] = table[at].class_of;
    rank_of[i] = count[class_of[i]]++;
  }
  const int64_t num_classes = static_cast<int64_t>(count.size());
  int64_t start = 0;
  for (int64_t c = 0; c <= n; ++c) {
    class_start[c] = start;
    if (c < num_classes) start += count[c];
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = class_start[class_of[i]] + rank_of[i];
    order[slot] = i;
    class_index[slot] = class_of[i];
    rank[slot] = rank_of[i];
  }
}

}  // namespace gcng
