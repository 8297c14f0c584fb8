// Lets a bound function take a torch.Tensor (or None) as fastcap::Tensor, with no torch header: the caster asks the Python
// object for data_ptr(), shape, stride() and dtype.
#pragma once
#include <pybind11/pybind11.h>

#include "tensor.h"

namespace pybind11 {
namespace detail {

template <>
struct type_caster<fastcap::Tensor> {
  PYBIND11_TYPE_CASTER(fastcap::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    object shape = source.attr("shape"), stride = source.attr("stride")(), dtype = source.attr("dtype");
    const auto ndim = len(shape);
    if (ndim > fastcap::kMaxDims || !find_dtype(dtype, value.dtype)) return false;
    value.ndim = static_cast<int>(ndim);
    for (int i = 0; i < value.ndim; ++i) {
      value.sizes[i] = shape[int_(i)].cast<int64_t>();
      value.strides[i] = stride[int_(i)].cast<int64_t>();
    }
    value.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
    return true;
  }

 private:
  static bool find_dtype(handle dtype, fastcap::DType& out) {
    static const char* kNames[] = {"float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8"};
    static PyObject* known[7] = {};
    if (known[0] == nullptr) {
      module_ torch = module_::import("torch");
      for (int i = 6; i >= 0; --i) known[i] = torch.attr(kNames[i]).ptr();  // dtypes live as long as torch
    }
    for (int i = 0; i < 7; ++i)
      if (dtype.ptr() == known[i]) {
        out = static_cast<fastcap::DType>(i);
        return true;
      }
    return false;
  }
};

}  // namespace detail
}  // namespace pybind11
