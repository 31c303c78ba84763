// Gradients of the embeddings through the synthetic negatives: synthesis_embedding_gradient of cpu/synthesis.h.
#include <algorithm>
#include <vector>

#include "cpu/channels.h"
#include "cpu/parallel_for.h"
#include "cpu/synthesis.h"
#include "cpu/synthesis_chain.h"
#include "synthesis_math.h"

namespace gcng {
namespace {

// Channels of pairs of a block, which visits each three times.
constexpr int64_t GRADIENT_BLOCK_CHANNELS = 1 << 17;
// Blocks that leave partial sums.
constexpr int64_t MAX_PARTS = 16;

// Gradient of one anchor and class: adds to its anchor (D,) and its negatives (count, D), returns what reaches dp.
template <class T>
T gradient_of_class(const Chain<T>& chain, const Upstream<T>& upstream,
                    const SynthesisGeometry<const T, const bool>& geometry, int64_t pair, T kappa,
                    T* grad_synthetic,  // (D,) scratch
                    T* grad_anchor, T* grad_negatives) {
  const int64_t width = chain.width;
  for_channels<T>(width, [&]<class V>(int64_t d) {
    const V a = load<V>(chain.anchor + d);
    V synthetic = a, pull_sum{};
    for (int64_t k = 0; k < chain.count; ++k) {
      const V pull = chain.template pull<V>(k, d);
      synthetic += pull * (chain.template negative<V>(k, d) - a);
      pull_sum += pull;
    }
    const V grad = upstream.at(d, synthetic, a);
    store(grad_synthetic + d, grad);
    V sum = load<V>(grad_anchor + d) + anchor_gradient(grad, pull_sum);
    if (upstream.has_dot) sum += through_dot<T>(upstream.dot, synthetic);
    store(grad_anchor + d, sum);
  });
  T grad_reach = 0;
  for (int64_t k = 0; k < chain.count; ++k) {
    T* const grad_negative = grad_negatives + k * width;
    if (geometry.near[pair + k]) {
      for_channels<T>(width, [&]<class V>(int64_t d) {
        const V grad = load<V>(grad_synthetic + d) * chain.template pull<V>(k, d);
        store(grad_negative + d, load<V>(grad_negative + d) + grad);
      });
      continue;
    }
    ChannelSum<T> pulled, gated;
    for_channels<T>(width, [&]<class V>(int64_t d) {
      const V difference = chain.template negative<V>(k, d) - load<V>(chain.anchor + d);
      const V grad_pull = load<V>(grad_synthetic + d) * difference;
      pulled.add(grad_pull);
      gated.add(grad_pull * chain.template gate<V>(k, d));
    });
    const DistanceGradient<T> through = distance_gradient(pulled.total(), gated.total(), geometry.weight[pair + k],
                                                          kappa, geometry.ratio[pair + k], geometry.distance[pair + k]);
    grad_reach += through.reach;
    for_channels<T>(width, [&]<class V>(int64_t d) {
      const V drift =
          through.difference * distance_term<T>(chain.template negative<V>(k, d), load<V>(chain.anchor + d));
      const V grad = load<V>(grad_synthetic + d) * chain.template pull<V>(k, d) + drift;
      store(grad_negative + d, load<V>(grad_negative + d) + grad);
      store(grad_anchor + d, load<V>(grad_anchor + d) - drift);
    });
  }
  return grad_reach;
}

template <class T>
void add_row(T* to, const T* from, int64_t width) {
  for_channels<T>(width, [&]<class V>(int64_t d) { store(to + d, load<V>(to + d) + load<V>(from + d)); });
}

// Adds partial sums (parts, rows, D), in their order, to rows of grad_z.
template <class T>
void add_parts(const T* partial, int64_t num_parts, int64_t rows, int64_t width, T* grad_z, int num_threads) {
  const int64_t block = block_of(rows, num_parts * width, BLOCK_CHANNELS);
  parallel_for(rows, block, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for_channels<T>(width, [&]<class V>(int64_t d) {
        V sum{};
        for (int64_t part = 0; part < num_parts; ++part) sum += load<V>(partial + (part * rows + row) * width + d);
        store(grad_z + row * width + d, load<V>(grad_z + row * width + d) + sum);
      });
    }
  });
}

// The gradient of a side, cut along the longer of its dimensions: that one's rows have one owner, the sums of the
// other's rows are added block by block.
template <class T>
class EmbeddingGradient {
 public:
  EmbeddingGradient(const SynthesisSide<T>& side, const PairChannels<const T>& gate,
                    const SynthesisGeometry<const T, const bool>& geometry, T kappa,
                    const SyntheticGradients<T>& grads)
      : side_(side), gate_(gate), geometry_(geometry), kappa_(kappa), grads_(grads),
        columns_(column_offsets(side, gate)) {
    for (int64_t c = 0; c < side.num_classes; ++c)
      most_ = std::max(most_, side.class_start[c + 1] - side.class_start[c]);
  }

  // Every block owns anchors.
  void by_anchor(T* grad_z, T* grad_reach, int num_threads) {
    const int64_t width = side_.width, anchors = side_.num_anchors, negatives = side_.num_negatives();
    const int64_t block = block_size(anchors, negatives), parts = num_blocks(anchors, block);
    std::vector<T> rows(parts * 2 * width), partial(parts * negatives * width);
    parallel_for(anchors, block, num_threads, [&](int64_t begin, int64_t end) {
      T* const scratch = rows.data() + begin / block * 2 * width;
      T* const grad_anchor = scratch + width;
      T* const grad_negatives = partial.data() + begin / block * negatives * width;
      for (int64_t i = begin; i < end; ++i) {
        if (!side_.taken(i)) continue;
        std::fill_n(grad_anchor, width, T(0));
        T reach = 0;
        for (int64_t c = 0; c < side_.num_classes; ++c)
          reach += add(i, c, scratch, grad_anchor, grad_negatives + local(c) * width);
        add_row(grad_z + (side_.first_anchor + i) * width, grad_anchor, width);
        grad_reach[side_.first_anchor + i] += reach;
      }
    });
    add_parts(partial.data(), parts, negatives, width, grad_z + side_.first_negative() * width, num_threads);
  }

  // Every block owns the negatives of whole classes.
  void by_class(T* grad_z, T* grad_reach, int num_threads) {
    const int64_t width = side_.width, anchors = side_.num_anchors, classes = side_.num_classes;
    const int64_t block = block_size(classes, anchors * side_.num_negatives() / classes);
    const int64_t parts = num_blocks(classes, block);
    std::vector<T> rows(parts * (1 + most_) * width), partial(parts * anchors * width), reach(parts * anchors);
    parallel_for(classes, block, num_threads, [&](int64_t begin, int64_t end) {
      const int64_t part = begin / block;
      T* const scratch = rows.data() + part * (1 + most_) * width;
      T* const grad_negatives = scratch + width;
      for (int64_t c = begin; c < end; ++c) {
        const int64_t count = side_.class_start[c + 1] - side_.class_start[c];
        std::fill_n(grad_negatives, count * width, T(0));
        for (int64_t i = 0; i < anchors; ++i) {
          if (!side_.taken(i)) continue;
          const int64_t row = part * anchors + i;
          reach[row] += add(i, c, scratch, partial.data() + row * width, grad_negatives);
        }
        for (int64_t k = 0; k < count; ++k)
          add_row(grad_z + (side_.class_start[c] + k) * width, grad_negatives + k * width, width);
      }
    });
    add_parts(partial.data(), parts, anchors, width, grad_z + side_.first_anchor * width, num_threads);
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < anchors; ++i) grad_reach[side_.first_anchor + i] += reach[part * anchors + i];
  }

 private:
  int64_t local(int64_t c) const { return side_.class_start[c] - side_.first_negative(); }

  int64_t block_size(int64_t length, int64_t pairs_each) const {
    return std::max(num_blocks(length, MAX_PARTS), block_of(length, pairs_each * side_.width, GRADIENT_BLOCK_CHANNELS));
  }

  T add(int64_t i, int64_t c, T* scratch, T* grad_anchor, T* grad_negatives) const {
    const Chain<T> chain(side_, gate_, columns_.data(), geometry_.offset, geometry_.slope, i, c);
    const Upstream<T> upstream(grads_, side_, i, c);
    const int64_t pair = i * side_.num_negatives() + local(c);
    return gradient_of_class(chain, upstream, geometry_, pair, kappa_, scratch, grad_anchor, grad_negatives);
  }

  const SynthesisSide<T>& side_;
  const PairChannels<const T>& gate_;
  const SynthesisGeometry<const T, const bool>& geometry_;
  const T kappa_;
  const SyntheticGradients<T>& grads_;
  const std::vector<int64_t> columns_;
  int64_t most_ = 0;
};

}  // namespace

template <class T>
void synthesis_embedding_gradient(const SynthesisSide<T>& side, const PairChannels<const T>& gate,
                                  const SynthesisGeometry<const T, const bool>& geometry, T kappa,
                                  const SyntheticGradients<T>& grads, T* grad_z, T* grad_reach, int num_threads) {
  if (side.num_anchors == 0 || side.num_negatives() == 0) return;
  EmbeddingGradient<T> gradient(side, gate, geometry, kappa, grads);
  if (side.num_anchors >= side.num_negatives()) gradient.by_anchor(grad_z, grad_reach, num_threads);
  else gradient.by_class(grad_z, grad_reach, num_threads);
}

#define GCNG_INSTANTIATE(T)                                                                                            \
  template void synthesis_embedding_gradient(const SynthesisSide<T>&, const PairChannels<const T>&,                    \
                                             const SynthesisGeometry<const T, const bool>&, T,                         \
                                             const SyntheticGradients<T>&, T*, T*, int);
GCNG_INSTANTIATE(float)
GCNG_INSTANTIATE(double)

}  // namespace gcng
