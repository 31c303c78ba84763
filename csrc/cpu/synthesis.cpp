#include "cpu/synthesis.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/channels.h"
#include "cpu/parallel_for.h"
#include "cpu/synthesis_chain.h"
#include "synthesis_math.h"

namespace gcng {
namespace {

// Negatives whose distances are summed at once: one load of the anchor serves them.
constexpr int64_t GROUP = 4;

template <class T>
void distances(const T* anchor, const T* const (&negatives)[GROUP], int64_t width, T (&out)[GROUP]) {
  // What is left of two distances that nearly tie, the slope of a gate, is as good as their sums.
  SquareSum<T> sums[GROUP];
  for_channels<T>(width, [&]<class V>(int64_t d) {
    const V a = load<V>(anchor + d);
#pragma GCC unroll 4
    for (int64_t q = 0; q < GROUP; ++q) sums[q].add(distance_term<T>(load<V>(negatives[q] + d), a));
  });
  for (int64_t q = 0; q < GROUP; ++q) out[q] = static_cast<T>(std::sqrt(sums[q].total()));
}

template <class T>
void synthesize(const Chain<T>& chain, T* values, T* dots, T* squares) {
  ChannelSum<T> dot, square;
  for_channels<T>(chain.width, [&]<class V>(int64_t d) {
    const V a = load<V>(chain.anchor + d);
    V synthetic = a;
    for (int64_t k = 0; k < chain.count; ++k)
      synthetic += chain.template pull<V>(k, d) * (chain.template negative<V>(k, d) - a);
    if (values) store(values + d, synthetic);
    dot.add(a * synthetic);
    square.add(synthetic * synthetic);
  });
  if (dots) *dots = dot.total();
  if (squares) *squares = square.total();
}

// The gradient of the gates of one anchor and class, (count, D).
template <bool OVERWRITE, class T>
void gate_gradient_of_class(const SynthesisSide<T>& side, const Upstream<T>& upstream, const T* synthetic, int64_t i,
                            int64_t c, const T* slopes, const int64_t* columns, T* out) {
  const int64_t count = side.class_start[c + 1] - side.class_start[c], width = side.width;
  const T* const anchor = side.anchor(i);
  const T* const negatives = side.node(side.class_start[c]);
  for_channels<T>(width, [&]<class V>(int64_t d) {
    const V a = load<V>(anchor + d);
    const V grad = upstream.at(d, synthetic ? load<V>(synthetic + d) : V{}, a);
    for (int64_t k = 0; k < count; ++k) {
      T* const to = out + columns[k] + d;
      const V value = gate_gradient<T>(grad, load<V>(negatives + k * width + d), a, slopes[k]);
      if constexpr (OVERWRITE) store(to, value);
      else store(to, load<V>(to) + value);
    }
  });
}

}  // namespace

template <class T>
void synthesis_positive_distance(const T* z, const int64_t* positive, int64_t num_nodes, int64_t width, T* out,
                                 int num_threads) {
  const int64_t block = block_of(num_nodes, GROUP * width, BLOCK_CHANNELS);
  parallel_for(num_nodes, block, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const own = z + positive[i] * width;
      T distance[GROUP];
      distances<T>(z + i * width, {own, own, own, own}, width, distance);
      out[i] = distance[0];
    }
  });
}

template <class T>
void synthesis_geometry(const SynthesisSide<T>& side, const T* reach, const int64_t* positive, const int64_t* rank,
                        const T* weights, int64_t num_nodes, T kappa, const SynthesisGeometry<T, bool>& out,
                        int num_threads) {
  const int64_t first = side.first_negative(), negatives = side.num_negatives();
  const int64_t groups = num_blocks(negatives, GROUP), length = side.num_anchors * groups;
  const int64_t block = block_of(length, GROUP * side.width, BLOCK_CHANNELS);
  parallel_for(length, block, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t i = index / groups, start = index % groups * GROUP, anchor = side.first_anchor + i;
      const T* rows[GROUP];
      for (int64_t q = 0; q < GROUP; ++q) rows[q] = side.node(first + std::min(start + q, negatives - 1));
      T distance[GROUP];
      distances<T>(side.anchor(i), rows, side.width, distance);
      for (int64_t q = 0; q < std::min(GROUP, negatives - start); ++q) {
        const int64_t node = first + start + q, pair = i * negatives + start + q;
        const T weight = weights[rank[anchor] * num_nodes + node];
        const PairGeometry<T> found =
            pair_geometry(reach[anchor], distance[q], positive[anchor] == node, weight, kappa);
        out.distance[pair] = distance[q], out.near[pair] = found.near, out.ratio[pair] = found.ratio;
        out.weight[pair] = weight, out.offset[pair] = found.offset, out.slope[pair] = found.slope;
      }
    }
  });
}

template <class T>
void synthesis_forward(const SynthesisSide<T>& side, const PairChannels<const T>& gate, const T* offset, const T* slope,
                       T* values, T* dots, T* squares, int num_threads) {
  const int64_t classes = side.num_classes, length = side.num_anchors * classes;
  if (length == 0) return;
  const int64_t block = block_of(length, side.num_negatives() * side.width / classes, BLOCK_CHANNELS);
  const std::vector<int64_t> columns = column_offsets(side, gate);
  parallel_for(length, block, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row / classes, c = row % classes;
      T* const out = values ? values + (side.row(i) * classes + c) * side.width : nullptr;
      if (side.taken(i)) {
        const Chain<T> chain(side, gate, columns.data(), offset, slope, i, c);
        synthesize(chain, out, dots ? dots + row : nullptr, squares ? squares + row : nullptr);
        continue;
      }
      if (out) std::fill_n(out, side.width, T(0));
      if (dots) dots[row] = T(0);
      if (squares) squares[row] = T(0);
    }
  });
}

template <class T>
void synthesis_gate_gradient(const SynthesisSide<T>& side, const T* slope, const T* values,
                             const SyntheticGradients<T>& grads, const PairChannels<T>& out, bool overwrite,
                             int num_threads) {
  const int64_t classes = side.num_classes, length = side.num_anchors * classes, width = side.width;
  if (length == 0) return;
  const int64_t block = block_of(length, side.num_negatives() * width / classes, BLOCK_CHANNELS);
  const std::vector<int64_t> columns = column_offsets(side, out);
  parallel_for(length, block, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row / classes, c = row % classes, first = side.class_start[c] - side.first_negative();
      const int64_t* const to = columns.data() + first;
      T* const gates = out.data + side.row(i) * out.anchor_stride;
      if (!side.taken(i)) {
        const int64_t count = side.class_start[c + 1] - side.class_start[c];
        for (int64_t k = 0; overwrite && k < count; ++k) std::fill_n(gates + to[k], width, T(0));
        continue;
      }
      const Upstream<T> upstream(grads, side, i, c);
      const T* const synthetic = values && grads.squares ? values + (side.row(i) * classes + c) * width : nullptr;
      const T* const slopes = slope + i * side.num_negatives() + first;
      if (overwrite) gate_gradient_of_class<true>(side, upstream, synthetic, i, c, slopes, to, gates);
      else gate_gradient_of_class<false>(side, upstream, synthetic, i, c, slopes, to, gates);
    }
  });
}

#define GCNG_INSTANTIATE(T)                                                                                            \
  template void synthesis_positive_distance(const T*, const int64_t*, int64_t, int64_t, T*, int);                      \
  template void synthesis_geometry(const SynthesisSide<T>&, const T*, const int64_t*, const int64_t*, const T*,        \
                                   int64_t, T, const SynthesisGeometry<T, bool>&, int);                                \
  template void synthesis_forward(const SynthesisSide<T>&, const PairChannels<const T>&, const T*, const T*, T*, T*,   \
                                  T*, int);                                                                            \
  template void synthesis_gate_gradient(const SynthesisSide<T>&, const T*, const T*, const SyntheticGradients<T>&,     \
                                        const PairChannels<T>&, bool, int);
GCNG_INSTANTIATE(float)
GCNG_INSTANTIATE(double)

}  // namespace gcng
