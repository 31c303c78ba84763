// The passes of an edge layer (9)-(13) over a tile of pairs, between its matrix products: what TorchPairKernels in
// gcng/ops/pair_kernels.py says of prologue, hidden and epilogue and their backwards.
//
// A tile has R rows and S columns; its pairs are R S vectors, row by row. P pairs are in packed storage. N nodes, D
// channels. Statistics and sums are in T.
#pragma once

#include <cstdint>

#include "cpu/pair_tile.h"
#include "philox.h"

namespace gcng {

enum class EdgeKind : int64_t { product = 0, packed = 1, tile = 2 };

// Where the edges of a tile come from.
template <class T>
struct EdgeSource {
  const T* values;  // (N, D) nodes whose products are the edges, (P, D) packed edges, or (R S, D) the edges
  EdgeKind kind;
};

template <class T>
struct AttentionNodes {
  const T* key_query;  // (N, D)
  const T* key_bias;   // (N,)
  const T* value;      // (N, D)
};

template <class T>
struct NormWeights {
  const T* weight;  // (D,)
  const T* bias;    // (D,), not read by a backward
};

// The two weights of (10)-(12), (R S,) each.
template <class T>
struct MixWeights {
  T* gate;    // sigmoid: the row endpoint's weight before dropout
  T* row;     // after dropout
  T* column;  // after dropout
};

// (9)-(12): attend, mix, gelu and norm, to x (R S, D). Reads the edges of a tile once.
template <class T>
void edge_prologue(const EdgeSource<T>& source, const AttentionNodes<T>& nodes, const NormWeights<T>& norm,
                   const int64_t* identity,       // (N,), or null: no dropout
                   const LayerDropout& dropout, const PairTile& tile, int64_t width, const MixWeights<T>& mix,
                   T* x, int num_threads);

// gelu of the hidden layer, its mean and 1/deviation by row.
template <class T>
void edge_hidden(const T* h0,            // (R S, H), or (P, H) if packed
                 bool packed,
                 const T* bias,          // (H,), still to be added to h0; or null
                 T* stash,               // (P, H), receives h0, bias included; or null
                 const PairTile& tile, int64_t hidden_width, T* out,  // (R S, H), may be h0
                 T* mean, T* rstd,                                    // (R S,)
                 int num_threads);

// What the epilogue and its backward read of the layer, (D,) each.
template <class T>
struct HiddenNorm {
  const T* row_sums;  // of the folded map
  const T* shift;
};

// (13) behind its products.
template <class T>
void edge_epilogue(T* y,                                           // (R S, D): becomes w2
                   const T* x, const T* mean, const T* rstd,       // (R S, D), (R S,), (R S,)
                   const HiddenNorm<T>& hidden_norm, const NormWeights<T>& norm, const PairTile& tile, int64_t width,
                   T* out, bool packed,                            // (R S, D) or (P, D)
                   T* stash,                                       // (P, D), receives w2; or null
                   int num_threads);

// Sums that the backward of the epilogue adds to, (D,) each.
template <class T>
struct EpilogueSums {
  T *ln_weight, *ln_bias, *shift, *folded_mean;
};

template <class T>
void edge_epilogue_backward(const T* grad, bool packed,                // (R S, D), may be out; or (P, D)
                            const T* w2, bool w2_packed,               // (R S, D) or (P, D)
                            const T* x, const T* mean, const T* rstd,  // (R S, D), (R S,), (R S,)
                            const HiddenNorm<T>& hidden_norm, const T* norm_weight, const PairTile& tile,
                            int64_t width, int64_t hidden_width, const EpilogueSums<T>& sums,
                            T* out, T* scaled,                         // (R S, D): gradient of w2, and that times rstd
                            T* mean_grad, T* mean_product,             // (R S,)
                            int num_threads);

// Gradient of gelu(h0), the product with the folded map, to that of h0, in place. The hidden layer is computed again
// from h0 and not read.
template <class T>
void edge_hidden_backward(T* grad,                                  // (R S, H)
                          const T* h0, bool packed,                 // (R S, H) or (P, H)
                          const T* mean, const T* rstd,             // (R S,)
                          const T* mean_grad, const T* mean_product,  // (R S,), of edge_epilogue_backward
                          const PairTile& tile, int64_t hidden_width,
                          T* bias,                                  // (H,): the column sums are added
                          int num_threads);

// Sums that the backward of the prologue adds to.
template <class T>
struct PrologueSums {
  T *ln_weight, *ln_bias;            // (D,)
  T *value, *key_query, *key_bias;   // (N, D), (N, D), (N,)
};

// Gradient of x to that of the edges, in place where need_input; else grad is left undefined. The mix is computed again
// from the edges.
template <class T>
void edge_prologue_backward(T* grad,  // (R S, D)
                            const EdgeSource<T>& source, const AttentionNodes<T>& nodes, const T* norm_weight,
                            const T* gate, const T* weight_row, const T* weight_column,  // (R S,)
                            const PairTile& tile, int64_t width, const PrologueSums<T>& sums, bool need_input,
                            int num_threads);

}  // namespace gcng
