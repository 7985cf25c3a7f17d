// Checks of the operators' tensors: Python has explained misuse to the user, here they keep every access inside its
// tensor.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace xentile {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_vector(const Tensor& t, ScalarType dtype, int64_t size) {
  return t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && t.numel() == size;
}

// The data of a contiguous CPU tensor of `size` elements.
template <class T>
const T* read(const Tensor& t, ScalarType dtype, int64_t size, const char* name) {
  STD_TORCH_CHECK(is_vector(t, dtype, size), "xentile: ", name, " has the wrong device, dtype, strides or size");
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* read(const std::optional<Tensor>& t, ScalarType dtype, int64_t size, const char* name) {
  return t ? read<T>(*t, dtype, size, name) : nullptr;
}

template <class T>
T* write(const Tensor& t, ScalarType dtype, int64_t size, const char* name) {
  STD_TORCH_CHECK(is_vector(t, dtype, size), "xentile: ", name, " has the wrong device, dtype, strides or size");
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
T* write(const std::optional<Tensor>& t, ScalarType dtype, int64_t size, const char* name) {
  return t ? write<T>(*t, dtype, size, name) : nullptr;
}

template <class Acc>
constexpr ScalarType kAccType = sizeof(Acc) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

}  // namespace xentile
