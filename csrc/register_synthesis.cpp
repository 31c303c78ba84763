// gcng_cpu::synthesis_*, called by gcng/ops/native_synthesis_kernels.py.
#include <optional>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/synthesis.h"
#include "tensor_access.h"

namespace gcng {
namespace {

template <class T>
SynthesisSide<T> checked_side(const Tensor& z, const int64_t* class_start, int64_t m, int64_t first_anchor,
                              int64_t num_anchors) {
  const int64_t n = z.size(0), d = z.size(1);
  const SynthesisSide<T> side{read<T>(z, "z", {n, d}), d, first_anchor, num_anchors, class_start, m};
  STD_TORCH_CHECK(m >= 1 && first_anchor >= 0 && first_anchor + num_anchors <= n, "anchors are not nodes");
  STD_TORCH_CHECK(side.class_start[0] >= 0 && side.class_start[m] <= n, "negatives are not nodes");
  for (int64_t c = 0; c < m; ++c)
    STD_TORCH_CHECK(side.class_start[c] <= side.class_start[c + 1], "class_start is not ascending");
  return side;
}

template <class T>
SynthesisSide<T> side_of(const Tensor& z, const Tensor& class_start, int64_t first_anchor, int64_t num_anchors) {
  const int64_t m = class_start.size(0) - 1;
  return checked_side<T>(z, read<int64_t>(class_start, "class_start", {m + 1}), m, first_anchor, num_anchors);
}

const int64_t* read_nodes(const Tensor& nodes, const char* name, int64_t n) {
  const int64_t* const out = read<int64_t>(nodes, name, {n});
  for (int64_t i = 0; i < n; ++i) STD_TORCH_CHECK(out[i] >= 0 && out[i] < n, name, " of node ", i, " is no node");
  return out;
}

template <class T>
void check_channels(const Tensor& x, const char* name, const SynthesisSide<T>& side, int64_t n) {
  const int64_t a = side.order ? n : side.num_anchors, b = side.order ? n : side.num_negatives();
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == scalar_type<T>(), name, " has the wrong device or dtype");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == a && x.size(1) == b && x.size(2) == side.width &&
                      (x.stride(2) == 1 || side.width == 1),
                  name, " is not (", a, ", ", b, ", D) with consecutive channels");
}

// Gates and synthetic negatives are those of all nodes, in the caller's order.
template <class T>
void set_order(SynthesisSide<T>& side, const std::optional<Tensor>& order, const std::optional<Tensor>& is_anchor,
               int64_t n) {
  STD_TORCH_CHECK(order.has_value() == is_anchor.has_value(), "order and is_anchor come together");
  if (!order) return;
  side.order = read_nodes(*order, "order", n);
  std::vector<bool> seen(n);
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(!seen[side.order[i]], "order has row ", side.order[i], " twice");
    seen[side.order[i]] = true;
  }
  side.is_anchor = read<bool>(*is_anchor, "is_anchor", {n});
}

template <class T>
const T* read_optional(const std::optional<Tensor>& x, const char* name, std::initializer_list<int64_t> shape) {
  return x ? read<T>(*x, name, shape) : nullptr;
}

template <class T>
T* write_optional(const std::optional<Tensor>& x, const char* name, std::initializer_list<int64_t> shape) {
  return x ? write<T>(*x, name, shape) : nullptr;
}

template <class T>
int64_t rows_of(const SynthesisSide<T>& side, int64_t n) {
  return side.order ? n : side.num_anchors;
}

template <class T>
SyntheticGradients<T> gradients_of(const SynthesisSide<T>& side, int64_t n, const std::optional<Tensor>& values,
                                   const std::optional<Tensor>& dots, const std::optional<Tensor>& squares) {
  const int64_t a = side.num_anchors, m = side.num_classes;
  return {read_optional<T>(values, "grad_values", {rows_of(side, n), m, side.width}),
          read_optional<T>(dots, "grad_dots", {a, m}), read_optional<T>(squares, "grad_squares", {a, m})};
}

void positive_distance_op(const Tensor& z, const Tensor& positive, const Tensor& out) {
  with_float_type(z, "z", [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = z.size(0), d = z.size(1);
    synthesis_positive_distance<T>(read<T>(z, "z", {n, d}), read_nodes(positive, "positive", n), n, d,
                                   write<T>(out, "out", {n}), torch_threads());
  });
}

void geometry_op(const Tensor& z, int64_t first_anchor, int64_t first_negative, const Tensor& reach,
                 const Tensor& positive, const Tensor& rank, const Tensor& weights, const Tensor& kappa,
                 const Tensor& distance, const Tensor& near, const Tensor& ratio, const Tensor& weight,
                 const Tensor& offset, const Tensor& slope) {
  const int64_t n = z.size(0), a = distance.size(0), b = distance.size(1), k = weights.size(0);
  with_float_type(z, "z", [&](auto zero) {
    using T = decltype(zero);
    const int64_t bounds[] = {first_negative, first_negative + b};  // classes do not matter here: all as one
    const SynthesisSide<T> side = checked_side<T>(z, bounds, 1, first_anchor, a);
    const int64_t* const ranks = read<int64_t>(rank, "rank", {n});
    for (int64_t i = 0; i < n; ++i) STD_TORCH_CHECK(ranks[i] >= 0 && ranks[i] < k, "rank of node ", i, " is no rank");
    synthesis_geometry<T>(side, read<T>(reach, "reach", {n}), read_nodes(positive, "positive", n), ranks,
                          read<T>(weights, "weights", {k, n}), n, *read<T>(kappa, "kappa", {}),
                          {write<T>(distance, "distance", {a, b}), write<bool>(near, "near", {a, b}),
                           write<T>(ratio, "ratio", {a, b}), write<T>(weight, "weight", {a, b}),
                           write<T>(offset, "offset", {a, b}), write<T>(slope, "slope", {a, b})},
                          torch_threads());
  });
}

void forward_op(const Tensor& z, const Tensor& class_start, int64_t first_anchor, const Tensor& gate,
                const Tensor& offset, const Tensor& slope, const std::optional<Tensor>& order,
                const std::optional<Tensor>& is_anchor, const std::optional<Tensor>& values,
                const std::optional<Tensor>& dots, const std::optional<Tensor>& squares) {
  with_float_type(z, "z", [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = z.size(0), a = offset.size(0), b = offset.size(1), m = class_start.size(0) - 1;
    SynthesisSide<T> side = side_of<T>(z, class_start, first_anchor, a);
    set_order(side, order, is_anchor, n);
    check_channels(gate, "gate", side, n);
    synthesis_forward<T>(side, {static_cast<const T*>(gate.const_data_ptr()), gate.stride(0), gate.stride(1)},
                         read<T>(offset, "offset", {a, b}), read<T>(slope, "slope", {a, b}),
                         write_optional<T>(values, "values", {rows_of(side, n), m, side.width}),
                         write_optional<T>(dots, "dots", {a, m}), write_optional<T>(squares, "squares", {a, m}),
                         torch_threads());
  });
}

void gate_gradient_op(const Tensor& z, const Tensor& class_start, int64_t first_anchor, const Tensor& slope,
                      const std::optional<Tensor>& values, const std::optional<Tensor>& grad_values,
                      const std::optional<Tensor>& grad_dots, const std::optional<Tensor>& grad_squares,
                      const std::optional<Tensor>& order, const std::optional<Tensor>& is_anchor, bool overwrite,
                      const Tensor& out) {
  with_float_type(z, "z", [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = z.size(0), a = slope.size(0), b = slope.size(1), m = class_start.size(0) - 1;
    SynthesisSide<T> side = side_of<T>(z, class_start, first_anchor, a);
    set_order(side, order, is_anchor, n);
    check_channels(out, "out", side, n);
    STD_TORCH_CHECK(values || !grad_squares, "a gradient of the squares needs values");
    synthesis_gate_gradient<T>(side, read<T>(slope, "slope", {a, b}),
                               read_optional<T>(values, "values", {rows_of(side, n), m, side.width}),
                               gradients_of(side, n, grad_values, grad_dots, grad_squares),
                               {static_cast<T*>(out.mutable_data_ptr()), out.stride(0), out.stride(1)}, overwrite,
                               torch_threads());
  });
}

void embedding_gradient_op(const Tensor& z, const Tensor& class_start, int64_t first_anchor, const Tensor& gate,
                           const Tensor& kappa, const Tensor& distance, const Tensor& near, const Tensor& ratio,
                           const Tensor& weight, const Tensor& offset, const Tensor& slope,
                           const std::optional<Tensor>& grad_values, const std::optional<Tensor>& grad_dots,
                           const std::optional<Tensor>& grad_squares, const std::optional<Tensor>& order,
                           const std::optional<Tensor>& is_anchor, const Tensor& grad_z, const Tensor& grad_reach) {
  with_float_type(z, "z", [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = z.size(0), a = distance.size(0), b = distance.size(1);
    SynthesisSide<T> side = side_of<T>(z, class_start, first_anchor, a);
    set_order(side, order, is_anchor, n);
    check_channels(gate, "gate", side, n);
    synthesis_embedding_gradient<T>(
        side, {static_cast<const T*>(gate.const_data_ptr()), gate.stride(0), gate.stride(1)},
        {read<T>(distance, "distance", {a, b}), read<bool>(near, "near", {a, b}), read<T>(ratio, "ratio", {a, b}),
         read<T>(weight, "weight", {a, b}), read<T>(offset, "offset", {a, b}), read<T>(slope, "slope", {a, b})},
        *read<T>(kappa, "kappa", {}), gradients_of(side, n, grad_values, grad_dots, grad_squares),
        write<T>(grad_z, "grad_z", {n, side.width}), write<T>(grad_reach, "grad_reach", {n}), torch_threads());
  });
}

void prefer_huge_pages_op(const Tensor& x) {
  prefer_huge_pages(x.mutable_data_ptr(), x.numel() * static_cast<int64_t>(x.element_size()));
}

STABLE_TORCH_LIBRARY_IMPL(gcng_cpu, CPU, m) {
  m.impl("prefer_huge_pages", TORCH_BOX(&prefer_huge_pages_op));
  m.impl("synthesis_positive_distance", TORCH_BOX(&positive_distance_op));
  m.impl("synthesis_geometry", TORCH_BOX(&geometry_op));
  m.impl("synthesis_forward", TORCH_BOX(&forward_op));
  m.impl("synthesis_gate_gradient", TORCH_BOX(&gate_gradient_op));
  m.impl("synthesis_embedding_gradient", TORCH_BOX(&embedding_gradient_op));
}

}  // namespace
}  // namespace gcng
