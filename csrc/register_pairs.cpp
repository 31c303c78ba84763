// gcng_cpu::messages_*, gate_* and pair_*: passes over a tile of pairs, called by gcng/ops/native_pair_kernels.py.
#include "cpu/gates.h"
#include "cpu/messages.h"
#include "cpu/pair_storage.h"
#include "pair_access.h"

namespace gcng {
namespace {

void messages_forward_op(const Tensor& before, const std::optional<Tensor>& stash, int64_t n, int64_t r0, int64_t r1,
                         int64_t c0, int64_t c1, const Tensor& out) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = out.size(1);
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    messages_forward<T>(read<T>(before, "before", {tile.pairs(), d}),
                        write_if<T>(stash, "stash", {pair_rows(tile, true), d}), tile, d,
                        write<T>(out, "out", {n, d}), torch_threads());
  });
}

void messages_backward_op(const Tensor& grad, const Tensor& before, bool packed, int64_t n, int64_t r0, int64_t r1,
                          int64_t c0, int64_t c1, const Tensor& out, const Tensor& bias) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = bias.numel();
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    messages_backward<T>(read<T>(grad, "grad", {n, d}), read<T>(before, "before", {pair_rows(tile, packed), d}),
                         packed, tile, d, write<T>(out, "out", {tile.pairs(), d}), write<T>(bias, "bias", {d}),
                         torch_threads());
  });
}

void gates_forward_op(const Tensor& logits, const std::optional<Tensor>& stash, const std::optional<Tensor>& center,
                      const std::optional<Tensor>& row_sums, const std::optional<Tensor>& squares, int64_t n,
                      int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = logits.size(1);
  STD_TORCH_CHECK(center.has_value() == row_sums.has_value() && center.has_value() == squares.has_value(),
                  "center, row_sums and squares come together");
  with_float_type(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const GateSpread<T> spread{center.has_value() ? read<T>(*center, "center", {d}) : nullptr,
                               write_if<T>(row_sums, "row_sums", {n, d}), write_if<double>(squares, "squares", {})};
    gates_forward<T>(write<T>(logits, "logits", {tile.pairs(), d}),
                     write_if<T>(stash, "stash", {pair_rows(tile, true), d}), spread, tile, d, torch_threads());
  });
}

void gate_spread_gradient_op(const Tensor& gates, const Tensor& row_means, const Tensor& scale, int64_t n, int64_t r0,
                             int64_t r1, int64_t c0, int64_t c1, const Tensor& out) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = out.size(1);
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    gate_spread_gradient<T>(read<T>(gates, "gates", {tile.pairs(), d}), read<T>(row_means, "row_means", {n, d}),
                            *read<T>(scale, "scale", {}), tile, d, write<T>(out, "out", {tile.pairs(), d}),
                            torch_threads());
  });
}

void gate_logits_gradient_op(const Tensor& grad, const Tensor& gates, const Tensor& out,
                             const std::optional<Tensor>& bias) {
  const int64_t pairs = out.size(0), d = out.size(1);
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    gate_logits_gradient<T>(read<T>(grad, "grad", {pairs, d}), read<T>(gates, "gates", {pairs, d}), pairs, d,
                            write<T>(out, "out", {pairs, d}), write_if<T>(bias, "bias", {d}), torch_threads());
  });
}

void gate_center_op(const Tensor& values, const Tensor& mean, const Tensor& out) {
  const int64_t pairs = out.size(0), d = out.size(1);
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    gate_center<T>(read<T>(values, "values", {pairs, d}), read<T>(mean, "mean", {d}), pairs, d,
                   write<T>(out, "out", {pairs, d}), torch_threads());
  });
}

void gate_norm_gradient_op(const Tensor& grad, const Tensor& e, const Tensor& weights, const Tensor& mean,
                           const Tensor& constant, const Tensor& linear) {
  const int64_t pairs = grad.size(0), d = grad.size(1);
  with_float_type(grad, "grad", [&](auto zero) {
    using T = decltype(zero);
    gate_norm_gradient<T>(write<T>(grad, "grad", {pairs, d}), read<T>(e, "e", {pairs, d}),
                          read<T>(weights, "weights", {pairs, 1}), read<T>(mean, "mean", {d}),
                          read<T>(constant, "constant", {d}), read<T>(linear, "linear", {d}), pairs, d,
                          torch_threads());
  });
}

void gate_moments_op(const Tensor& values, const Tensor& weights, const Tensor& shift, const Tensor& total,
                     const Tensor& squares) {
  const int64_t pairs = values.size(0), d = values.size(1);
  with_float_type(values, "values", [&](auto zero) {
    using T = decltype(zero);
    gate_moments<T>(read<T>(values, "values", {pairs, d}), read<T>(weights, "weights", {pairs, 1}),
                    read<T>(shift, "shift", {d}), pairs, d, write<double>(total, "total", {d}),
                    write<double>(squares, "squares", {d}), torch_threads());
  });
}

void pair_products_op(const Tensor& nodes, int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                      const Tensor& out) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = out.size(1);
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    pair_products<T>(read<T>(nodes, "nodes", {n, d}), tile, d, write<T>(out, "out", {tile.pairs(), d}),
                     torch_threads());
  });
}

void pair_store_op(const Tensor& values, int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                   const Tensor& packed) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = packed.size(1);
  with_float_type(packed, "packed", [&](auto zero) {
    using T = decltype(zero);
    pair_store<T>(read<T>(values, "values", {tile.pairs(), d}), tile, d,
                  write<T>(packed, "packed", {pair_rows(tile, true), d}), torch_threads());
  });
}

void pair_load_op(const Tensor& packed, int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1, bool symmetric,
                  const Tensor& out) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = out.size(1);
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    pair_load<T>(read<T>(packed, "packed", {pair_rows(tile, true), d}), tile, d, symmetric,
                 write<T>(out, "out", {tile.pairs(), d}), torch_threads());
  });
}

void pair_add_packed_op(const Tensor& values, int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                        const Tensor& packed) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = packed.size(1);
  with_float_type(packed, "packed", [&](auto zero) {
    using T = decltype(zero);
    pair_add_packed<T>(read<T>(values, "values", {tile.pairs(), d}), tile, d,
                       write<T>(packed, "packed", {pair_rows(tile, true), d}), torch_threads());
  });
}

void pair_add_product_op(const Tensor& nodes, const Tensor& grad, int64_t n, int64_t r0, int64_t r1, int64_t c0,
                         int64_t c1, const Tensor& out) {
  const PairTile tile = checked_tile(n, r0, r1, c0, c1);
  const int64_t d = out.size(1);
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    pair_add_product<T>(read<T>(nodes, "nodes", {n, d}), read<T>(grad, "grad", {tile.pairs(), d}), tile, d,
                        write<T>(out, "out", {n, d}), torch_threads());
  });
}

STABLE_TORCH_LIBRARY_IMPL(gcng_cpu, CPU, m) {
  m.impl("messages_forward", TORCH_BOX(&messages_forward_op));
  m.impl("messages_backward", TORCH_BOX(&messages_backward_op));
  m.impl("gates_forward", TORCH_BOX(&gates_forward_op));
  m.impl("gate_spread_gradient", TORCH_BOX(&gate_spread_gradient_op));
  m.impl("gate_logits_gradient", TORCH_BOX(&gate_logits_gradient_op));
  m.impl("gate_center", TORCH_BOX(&gate_center_op));
  m.impl("gate_norm_gradient", TORCH_BOX(&gate_norm_gradient_op));
  m.impl("gate_moments", TORCH_BOX(&gate_moments_op));
  m.impl("pair_products", TORCH_BOX(&pair_products_op));
  m.impl("pair_store", TORCH_BOX(&pair_store_op));
  m.impl("pair_load", TORCH_BOX(&pair_load_op));
  m.impl("pair_add_packed", TORCH_BOX(&pair_add_packed_op));
  m.impl("pair_add_product", TORCH_BOX(&pair_add_product_op));
}

}  // namespace
}  // namespace gcng
