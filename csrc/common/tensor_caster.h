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
    static PyObject *kShape = PyUnicode_InternFromString("shape"), *kStride = PyUnicode_InternFromString("stride"),
                    *kDtype = PyUnicode_InternFromString("dtype"), *kData = PyUnicode_InternFromString("data_ptr");
    const auto take = [](PyObject* got) {
      if (!got) throw error_already_set();
      return reinterpret_steal<object>(got);
    };
    object shape = take(PyObject_GetAttr(source.ptr(), kShape)), dtype = take(PyObject_GetAttr(source.ptr(), kDtype));
    object stride = take(PyObject_CallMethodNoArgs(source.ptr(), kStride));
    if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr())) return false;
    const auto ndim = PyTuple_GET_SIZE(shape.ptr());
    if (ndim > fastcap::kMaxDims || PyTuple_GET_SIZE(stride.ptr()) != ndim || !find_dtype(dtype, value.dtype)) return false;
    value.ndim = static_cast<int>(ndim);
    for (int i = 0; i < value.ndim; ++i) {
      value.sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    if (PyErr_Occurred()) throw error_already_set();
    value.data = PyLong_AsVoidPtr(take(PyObject_CallMethodNoArgs(source.ptr(), kData)).ptr());
    if (PyErr_Occurred()) throw error_already_set();
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
