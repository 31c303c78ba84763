// class_layout against the definition, written with searches over all earlier samples.
#include "cpu/layout.h"
#include "driver.h"

using namespace gcng;
using namespace gcng::driver;

GCNG_CASE(class_layout) {
  const int64_t n = random.integer(0, 60), num_labels = random.integer(1, 40);
  Buffer<int64_t> labels(n), order(n), class_index(n), rank(n), class_start(n + 1);
  for (int64_t i = 0; i < n; ++i) {
    // Labels that share their low bits, negative ones, and both ends of the range.
    const int64_t drawn = random.integer(0, num_labels - 1);
    labels[i] = drawn == 0 ? INT64_MIN : drawn == 1 ? INT64_MAX : (drawn - num_labels / 2) * (int64_t{1} << 40);
  }
  class_layout(labels.data(), n, order.data(), class_index.data(), rank.data(), class_start.data());
  std::vector<int64_t> class_of(n), rank_of(n), size;
  for (int64_t i = 0; i < n; ++i) {
    int64_t same = 0, earlier = -1;
    for (int64_t j = 0; j < i; ++j)
      if (labels[j] == labels[i]) earlier = j, ++same;
    class_of[i] = earlier < 0 ? static_cast<int64_t>(size.size()) : class_of[earlier];
    if (earlier < 0) size.push_back(0);
    rank_of[i] = same;
    ++size[class_of[i]];
  }
  int64_t slot = 0;
  for (size_t c = 0; c < size.size(); ++c) {
    GCNG_CHECK(class_start[static_cast<int64_t>(c)] == slot);
    for (int64_t i = 0; i < n; ++i) {
      if (class_of[i] != static_cast<int64_t>(c)) continue;
      GCNG_CHECK(order[slot] == i && class_index[slot] == class_of[i] && rank[slot] == rank_of[i]);
      ++slot;
    }
  }
  GCNG_CHECK(slot == n);
  for (int64_t c = static_cast<int64_t>(size.size()); c <= n; ++c) GCNG_CHECK(class_start[c] == n);
  outputs.add(order);
  outputs.add(class_index);
  outputs.add(rank);
  outputs.add(class_start);
}
