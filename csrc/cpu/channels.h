// Loops over channels in whole vectors with a scalar rest, and sums over them in a fixed order.
#pragma once

#include <cstdint>
#include <cstring>

namespace gcng {

#if defined(__AVX512F__)
constexpr int64_t PACK_BYTES = 64;
#elif defined(__AVX__)
constexpr int64_t PACK_BYTES = 32;
#else
constexpr int64_t PACK_BYTES = 16;
#endif

template <class T>
struct PackOf {
  typedef T type __attribute__((vector_size(PACK_BYTES)));
};

// One vector register of T; + - * work on it and between it and a T.
template <class T>
using Pack = typename PackOf<T>::type;

template <class T>
constexpr int64_t LANES = PACK_BYTES / static_cast<int64_t>(sizeof(T));

// V is T or Pack<T>; no alignment is asked for.
template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// body.operator()<V>(d) for d = 0, LANES, ... with V = Pack<T>, then for every channel that is left with V = T.
template <class T, class Body>
[[gnu::always_inline]] inline void for_channels(int64_t width, const Body& body) {
  int64_t d = 0;
  for (; d + LANES<T> <= width; d += LANES<T>) body.template operator()<Pack<T>>(d);
  for (; d < width; ++d) body.template operator()<T>(d);
}

// A sum over channels inside for_channels: a partial sum a lane, then the lanes by halves, then the scalar rest.
template <class T>
class ChannelSum {
 public:
  void add(Pack<T> value) { lanes_ += value; }
  void add(T value) { rest_ += value; }

  T total() const {
    T parts[LANES<T>];
    std::memcpy(parts, &lanes_, sizeof(parts));
    for (int64_t half = LANES<T> / 2; half > 0; half /= 2)
      for (int64_t lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    return parts[0] + rest_;
  }

 private:
  Pack<T> lanes_{};
  T rest_{};
};

// A sum of squares over channels inside for_channels, in double: rounded once, when it is taken for a T.
template <class T>
class SquareSum {
 public:
  void add(Pack<float> value) {
    typedef float Half __attribute__((vector_size(PACK_BYTES / 2)));
    Half halves[2];
    std::memcpy(halves, &value, sizeof(halves));
    for (int half = 0; half < 2; ++half) {
      const Pack<double> wide = __builtin_convertvector(halves[half], Pack<double>);
      sums_[half].add(wide * wide);
    }
  }
  void add(Pack<double> value) { sums_[0].add(value * value); }
  void add(T value) {
    const double wide = value;
    sums_[0].add(wide * wide);
  }

  double total() const { return sums_[0].total() + sums_[1].total(); }

 private:
  ChannelSum<double> sums_[2];
};

}  // namespace gcng
