#include "cpu/topk.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel_for.h"

namespace gcng {
namespace {

// Scores that are compared at once: a cache line of float32, whole vectors of either type.
constexpr int64_t CHUNK = 16;
// Scores of a block of rows; and no more blocks than that, so that their buffers stay small for a large k.
constexpr int64_t BLOCK_SCORES = 1 << 14;
constexpr int64_t MAX_BLOCKS = 16;

template <class T>
struct Candidate {
  T value;
  int64_t column;
};

template <class T>
bool ranks_before(const Candidate<T>& a, const Candidate<T>& b) {
  const bool a_nan = std::isnan(a.value), b_nan = std::isnan(b.value);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.column < b.column;
}

template <class T>
bool any_above(const T* scores, T threshold) {
  int above = 0;
  for (int64_t c = 0; c < CHUNK; ++c) above |= !(scores[c] <= threshold);  // true for NaN
  return above != 0;
}

// The best k of one row, in a buffer of at least 2k + CHUNK places.
template <class T>
class Best {
 public:
  Best(Candidate<T>* buffer, int64_t capacity, int64_t k) : buffer_(buffer), capacity_(capacity), k_(k) {}

  void start(const T* values, const int64_t* indices) {
    for (size_ = 0; size_ < k_ && indices[size_] >= 0; ++size_) buffer_[size_] = {values[size_], indices[size_]};
    threshold_ = values[k_ - 1];
  }

  // A later column needs a larger value than the k-th: with equal ones the lower index stays.
  bool may_enter(T value) const { return !(value <= threshold_); }
  // The k-th is NaN: nothing ranks before it any more.
  bool closed() const { return std::isnan(threshold_); }
  T threshold() const { return threshold_; }

  void add(T value, int64_t column) {
    buffer_[size_++] = {value, column};
    if (size_ == capacity_) cut();
  }

  void finish(T* values, int64_t* indices) {
    if (size_ > k_) cut();
    std::sort(buffer_, buffer_ + size_, ranks_before<T>);
    for (int64_t place = 0; place < size_; ++place) {
      values[place] = buffer_[place].value;
      indices[place] = buffer_[place].column;
    }
  }

 private:
  void cut() {
    std::nth_element(buffer_, buffer_ + k_ - 1, buffer_ + size_, ranks_before<T>);
    size_ = k_;
    threshold_ = buffer_[k_ - 1].value;
  }

  Candidate<T>* buffer_;
  int64_t capacity_, k_;
  int64_t size_ = 0;
  T threshold_{};
};

template <class T>
void merge_row(const T* scores, int64_t num_columns, int64_t first_column, int64_t self, const int64_t* label,
               const int64_t* column_labels, Best<T>& best) {
  const auto consider = [&](int64_t c) {
    if (best.closed() || !best.may_enter(scores[c]) || first_column + c == self) return;
    if (label && *label == column_labels[c]) return;
    best.add(scores[c], first_column + c);
  };
  int64_t c = 0;
  for (; c + CHUNK <= num_columns && !best.closed(); c += CHUNK)
    if (any_above(scores + c, best.threshold()))
      for (int64_t lane = 0; lane < CHUNK; ++lane) consider(c + lane);
  for (; c < num_columns && !best.closed(); ++c) consider(c);
}

}  // namespace

template <class T>
void topk_merge(const T* scores, int64_t num_rows, int64_t num_columns, int64_t first_column,
                const Exclusions& exclusions, int64_t k, T* values, int64_t* indices, int num_threads) {
  if (num_rows == 0 || num_columns == 0 || k == 0) return;
  const int64_t capacity = 2 * k + CHUNK;
  const int64_t block_rows = std::max(num_blocks(num_rows, MAX_BLOCKS), num_blocks(BLOCK_SCORES, num_columns));
  std::vector<Candidate<T>> buffers(num_blocks(num_rows, block_rows) * capacity);
  parallel_for(num_rows, block_rows, num_threads, [&](int64_t begin, int64_t end) {
    Best<T> best(buffers.data() + begin / block_rows * capacity, capacity, k);
    for (int64_t row = begin; row < end; ++row) {
      best.start(values + row * k, indices + row * k);
      merge_row(scores + row * num_columns, num_columns, first_column,
                exclusions.self_index ? exclusions.self_index[row] : -1,
                exclusions.labels ? exclusions.labels + row : nullptr, exclusions.column_labels, best);
      best.finish(values + row * k, indices + row * k);
    }
  });
}

template void topk_merge(const float*, int64_t, int64_t, int64_t, const Exclusions&, int64_t, float*, int64_t*, int);
template void topk_merge(const double*, int64_t, int64_t, int64_t, const Exclusions&, int64_t, double*, int64_t*, int);

}  // namespace gcng
