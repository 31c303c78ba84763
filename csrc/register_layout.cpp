// gcng_cpu::class_layout, called by gcng/ops/layout.py.
#include "cpu/layout.h"
#include "tensor_access.h"

namespace gcng {
namespace {

void class_layout_op(const Tensor& labels, const Tensor& order, const Tensor& class_index, const Tensor& rank,
                     const Tensor& class_start) {
  const int64_t n = labels.numel();
  class_layout(read<int64_t>(labels, "labels", {n}), n, write<int64_t>(order, "order", {n}),
               write<int64_t>(class_index, "class_index", {n}), write<int64_t>(rank, "rank", {n}),
               write<int64_t>(class_start, "class_start", {n + 1}));
}

STABLE_TORCH_LIBRARY_IMPL(gcng_cpu, CPU, m) { m.impl("class_layout", TORCH_BOX(&class_layout_op)); }

}  // namespace
}  // namespace gcng
