// gcng_cpu::topk_merge, called by gcng/ops/nearest.py.
#include <optional>

#include "cpu/topk.h"
#include "tensor_access.h"

namespace gcng {
namespace {

void topk_merge_op(const Tensor& scores, int64_t first_column, const std::optional<Tensor>& self_index,
                   const std::optional<Tensor>& labels, const std::optional<Tensor>& column_labels,
                   const Tensor& values, const Tensor& indices) {
  const int64_t q = scores.size(0), r = scores.size(1), k = values.size(1);
  const Exclusions exclusions{
      self_index ? read<int64_t>(*self_index, "self_index", {q}) : nullptr,
      labels ? read<int64_t>(*labels, "labels", {q}) : nullptr,
      column_labels ? read<int64_t>(*column_labels, "column_labels", {r}) : nullptr,
  };
  STD_TORCH_CHECK(labels.has_value() == column_labels.has_value(), "labels and column_labels come together");
  with_float_type(scores, "scores", [&](auto zero) {
    using T = decltype(zero);
    topk_merge(read<T>(scores, "scores", {q, r}), q, r, first_column, exclusions, k,
               write<T>(values, "values", {q, k}), write<int64_t>(indices, "indices", {q, k}), torch_threads());
  });
}

STABLE_TORCH_LIBRARY_IMPL(gcng_cpu, CPU, m) { m.impl("topk_merge", TORCH_BOX(&topk_merge_op)); }

}  // namespace
}  // namespace gcng
