// topk_merge over several tiles against a stable sort of each whole row.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/topk.h"
#include "driver.h"

using namespace gcng;
using namespace gcng::driver;

namespace {

template <class T>
void compare(Random& random, int num_threads, Outputs& outputs) {
  const T inf = std::numeric_limits<T>::infinity();
  // Rows are split into blocks above 2^14 scores.
  const bool several_blocks = random.integer(0, 7) == 0;
  const int64_t num_rows = several_blocks ? random.integer(30, 60) : random.integer(0, 20);
  const int64_t num_columns = several_blocks ? random.integer(900, 1200) : random.integer(0, 120);
  const int64_t k = random.integer(1, 40);
  const bool exclude_self = random.integer(0, 1), exclude_class = random.integer(0, 1);
  const int64_t levels = random.integer(1, 30), oddity = random.integer(0, 3);
  std::vector<T> scores(num_rows * num_columns);
  for (T& score : scores) {
    score = static_cast<T>(random.integer(-levels, levels)) / 8;  // few levels: many ties
    const int64_t kind = random.integer(0, 9);
    if (kind == 0 && oddity == 1) score = std::numeric_limits<T>::quiet_NaN();
    if (kind == 1 && oddity == 2) score = -inf;
    if (kind == 2 && oddity == 3) score = inf;
    if (kind == 3) score = static_cast<T>(-0.0);
  }
  Buffer<int64_t> self(num_rows), labels(num_rows), column_labels(num_columns);
  for (int64_t i = 0; i < num_rows; ++i) self[i] = random.integer(-1, num_columns), labels[i] = random.integer(0, 3);
  for (int64_t c = 0; c < num_columns; ++c) column_labels[c] = random.integer(0, 3);

  Buffer<T> values(num_rows * k);
  Buffer<int64_t> indices(num_rows * k);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = -inf, indices[i] = -1;
  for (int64_t first = 0; first < num_columns;) {
    const int64_t width = std::min(num_columns - first, random.integer(1, several_blocks ? 800 : 70));
    Buffer<T> tile(num_rows * width);
    Buffer<int64_t> tile_labels(width);
    for (int64_t i = 0; i < num_rows; ++i)
      std::copy_n(scores.data() + i * num_columns + first, width, tile.data() + i * width);
    std::copy_n(column_labels.data() + first, width, tile_labels.data());
    const Exclusions exclusions{exclude_self ? self.data() : nullptr, exclude_class ? labels.data() : nullptr,
                                exclude_class ? tile_labels.data() : nullptr};
    topk_merge(tile.data(), num_rows, width, first, exclusions, k, values.data(), indices.data(), num_threads);
    first += width;
  }

  for (int64_t i = 0; i < num_rows; ++i) {
    std::vector<int64_t> order;
    for (int64_t c = 0; c < num_columns; ++c) {
      const bool out = (exclude_self && self[i] == c) || (exclude_class && labels[i] == column_labels[c]);
      if (!out && scores[i * num_columns + c] != -inf) order.push_back(c);
    }
    const T* row = scores.data() + i * num_columns;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::isnan(row[a]) ? !std::isnan(row[b]) : row[a] > row[b];
    });
    for (int64_t place = 0; place < k; ++place) {
      const bool filled = place < static_cast<int64_t>(order.size());
      const T value = filled ? row[order[place]] : -inf;
      GCNG_CHECK(indices[i * k + place] == (filled ? order[place] : -1));
      GCNG_CHECK(std::memcmp(&values[i * k + place], &value, sizeof value) == 0);
    }
  }
  outputs.add(values);
  outputs.add(indices);
}

}  // namespace

GCNG_CASE(topk_float) { compare<float>(random, num_threads, outputs); }
GCNG_CASE(topk_double) { compare<double>(random, num_threads, outputs); }
