// What every registration file needs: checked pointers into tensors, the number of threads, a switch over dtypes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace gcng {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  else if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  else if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  else if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  else if constexpr (std::is_same_v<T, uint8_t>) return ScalarType::Byte;
  else return ScalarType::Bool;
}

// The ops in gcng/ops validate what users pass; these checks keep a mistake between Python and C++ from becoming a wild
// pointer.
template <class T>
void check_tensor(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == scalar_type<T>(), name, " has the wrong dtype");
  STD_TORCH_CHECK(x.is_contiguous(), name, " is not contiguous");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(shape.size()), name, " has ", x.dim(), " dimensions; expected ",
                  shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(x.size(d) == size, name, " has size ", x.size(d), " in dimension ", d, "; expected ", size);
    ++d;
  }
}

// Pointer to a contiguous CPU tensor of exactly this dtype and shape.
template <class T>
const T* read(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  check_tensor<T>(x, name, shape);
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* write(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  check_tensor<T>(x, name, shape);
  return static_cast<T*>(x.mutable_data_ptr());
}

// Number of threads that torch uses, for the num_threads of a kernel.
inline int torch_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// Calls function(T{}) with T = float or double, whichever x holds.
template <class Function>
void with_float_type(const Tensor& x, const char* name, const Function& function) {
  if (x.scalar_type() == ScalarType::Float) return function(float{});
  if (x.scalar_type() == ScalarType::Double) return function(double{});
  STD_TORCH_CHECK(false, name, " must be float32 or float64");
}

}  // namespace gcng
