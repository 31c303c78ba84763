// What the passes of cpu/synthesis.h share: the chain (18) of one anchor and class, and what arrives at its end.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/channels.h"
#include "cpu/synthesis.h"
#include "synthesis_math.h"

namespace gcng {

// Channels of pairs that a block visits, about 50 us.
constexpr int64_t BLOCK_CHANNELS = 1 << 18;

// Rows of a block of about target channels, where each row has channels_each.
inline int64_t block_of(int64_t length, int64_t channels_each, int64_t target) {
  return std::clamp<int64_t>(target / std::max<int64_t>(channels_each, 1), 1, std::max<int64_t>(length, 1));
}

// Where the channels of every negative of a side begin in the channels of an anchor, (B,).
template <class T, class U>
std::vector<int64_t> column_offsets(const SynthesisSide<T>& side, const PairChannels<U>& channels) {
  std::vector<int64_t> offsets(side.num_negatives());
  for (int64_t b = 0; b < side.num_negatives(); ++b) offsets[b] = side.column(b) * channels.negative_stride;
  return offsets;
}

// Synthetic negative of one anchor and class, channel by channel, and the sum of its pulls.
template <class T>
struct Chain {
  const T* anchor;
  const T* negatives;  // first sample of the class
  const T* gates;      // of the anchor
  const T* offset;     // of the first sample
  const T* slope;
  const int64_t* columns;  // of the first sample: where its gates begin
  int64_t count, width;

  Chain(const SynthesisSide<T>& side, const PairChannels<const T>& gate, const int64_t* column_offsets,
        const T* offsets, const T* slopes, int64_t i, int64_t c) {
    const int64_t first = side.class_start[c] - side.first_negative();
    const int64_t pair = i * side.num_negatives() + first;
    anchor = side.anchor(i), negatives = side.node(side.class_start[c]);
    gates = gate.data + side.row(i) * gate.anchor_stride, columns = column_offsets + first;
    offset = offsets + pair, slope = slopes + pair;
    count = side.class_start[c + 1] - side.class_start[c];
    width = side.width;
  }

  template <class V>
  V gate(int64_t k, int64_t d) const {
    return load<V>(gates + columns[k] + d);
  }

  template <class V>
  V pull(int64_t k, int64_t d) const {
    return pull_of<T>(gate<V>(k, d), slope[k], offset[k]);
  }

  template <class V>
  V negative(int64_t k, int64_t d) const {
    return load<V>(negatives + k * width + d);
  }
};

// Gradients that arrive at one synthetic negative. One that is absent multiplies nothing: 0 times NaN would be NaN.
template <class T>
struct Upstream {
  const T* values;  // (D,) or null
  bool has_dot, has_square;
  T dot, square;

  Upstream(const SyntheticGradients<T>& grads, const SynthesisSide<T>& side, int64_t i, int64_t c)
      : values(grads.values ? grads.values + (side.row(i) * side.num_classes + c) * side.width : nullptr),
        has_dot(grads.dots != nullptr),
        has_square(grads.squares != nullptr),
        dot(has_dot ? grads.dots[i * side.num_classes + c] : T(0)),
        square(has_square ? grads.squares[i * side.num_classes + c] : T(0)) {}

  template <class V>
  V at(int64_t d, V synthetic, V anchor) const {
    V grad{};
    if (has_square) grad = through_square<T>(square, synthetic);
    if (values) grad += load<V>(values + d);
    if (has_dot) grad += through_dot<T>(dot, anchor);
    return grad;
  }
};

}  // namespace gcng
