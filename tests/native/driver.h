// Frame of the stand-alone tests of csrc/cpu: cases are drawn from a seed, run on several numbers of threads, and must
// give the same bytes on each. No torch: sanitizers see all the code that runs, and threads are std::thread.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

namespace gcng::driver {

// splitmix64: the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t word() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  // Integer in [low, high].
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(word() % static_cast<uint64_t>(high - low + 1));
  }
  // Real number in [-1, 1).
  double real() { return static_cast<double>(word() >> 11) * 0x1p-52 - 1.0; }

 private:
  uint64_t state_;
};

// Exactly size elements on the heap, so that the next byte is forbidden; NaN or the largest integer until written.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), data_(new T[size]) {
    for (int64_t i = 0; i < size; ++i) {
      if constexpr (std::is_floating_point_v<T>) data_[i] = std::numeric_limits<T>::quiet_NaN();
      else data_[i] = std::numeric_limits<T>::max();
    }
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

// The bytes of a case's outputs, compared between numbers of threads.
class Outputs {
 public:
  template <class T>
  void add(const Buffer<T>& buffer) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(buffer.data());
    bytes_.insert(bytes_.end(), bytes, bytes + buffer.size() * sizeof(T));
  }
  bool operator==(const Outputs&) const = default;

 private:
  std::vector<unsigned char> bytes_;
};

// Draws inputs from random, calls a kernel with num_threads, checks the result, adds every output.
using Run = void (*)(Random& random, int num_threads, Outputs& outputs);

struct Case {
  const char* name;
  Run run;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registration {
  Registration(const char* name, Run run) { cases().push_back({name, run}); }
};

}  // namespace gcng::driver

// GCNG_CASE(topk) { ... } with random, num_threads and outputs in scope.
#define GCNG_CASE(name)                                                                                \
  static void name##_case(gcng::driver::Random&, int, gcng::driver::Outputs&);                         \
  static const gcng::driver::Registration name##_registration(#name, name##_case);                     \
  static void name##_case(gcng::driver::Random& random, [[maybe_unused]] int num_threads, gcng::driver::Outputs& outputs)

#define GCNG_CHECK(condition)                                                         \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);  \
      std::exit(3);                                                                   \
    }                                                                                 \
  } while (false)
