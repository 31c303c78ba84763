// Counter-based dropout of (11), bit for bit as gcng/reference/dropout.py; for CPU and CUDA.
//
// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include <cmath>
#include <cstdint>

#include "gelu.h"

namespace gcng {

struct PhiloxWords {
  uint32_t first, second;
};

// The first two words of a block.
GCNG_INLINE PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

// Dropout of one layer: key, threshold and scale from the seed, the layer and the probability p in [0, 1).
struct LayerDropout {
  uint32_t key0, key1;
  uint64_t threshold;  // words below it drop
  double scale;        // 1 / (1 - p)

  LayerDropout(int64_t seed, int64_t layer, double p)
      : key0(static_cast<uint32_t>(seed)),
        key1(static_cast<uint32_t>((static_cast<uint64_t>(seed) >> 32) + static_cast<uint64_t>(layer))),
        threshold(static_cast<uint64_t>(std::nearbyint(p * 4294967296.0))),
        scale(1.0 / (1.0 - p)) {}
};

template <class T>
struct PairScales {
  T row, column;  // 0 or 1 / (1 - p)
};

// Scales of the weights of a pair's row and column endpoint, from the identities of its two nodes.
template <class T>
GCNG_INLINE PairScales<T> pair_scales(const LayerDropout& drop, int64_t row, int64_t column) {
  const uint64_t small = static_cast<uint64_t>(row < column ? row : column);
  const uint64_t large = static_cast<uint64_t>(row < column ? column : row);
  const PhiloxWords words =
      philox(static_cast<uint32_t>(small), static_cast<uint32_t>(small >> 32), static_cast<uint32_t>(large),
             static_cast<uint32_t>(large >> 32), drop.key0, drop.key1);
  const T kept = static_cast<T>(drop.scale);
  const T of_small = words.first >= drop.threshold ? kept : T(0);
  const T of_large = words.second >= drop.threshold ? kept : T(0);
  if (row == column) return {of_small, of_small};
  return row < column ? PairScales<T>{of_small, of_large} : PairScales<T>{of_large, of_small};
}

}  // namespace gcng
