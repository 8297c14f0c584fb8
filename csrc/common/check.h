// Bad input becomes a Python fastcap.errors.FastcapError; bindings.cpp translates it.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace fastcap {

struct BadInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename Got>
[[noreturn]] inline void bad(const char* op, const std::string& argument, const std::string& rule, const Got& got,
                             const std::string& remedy) {
  std::ostringstream message;
  message << "fastcap." << op << ": " << argument << " must " << rule << ", got " << got << "; " << remedy;
  throw BadInput(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int i = 0; i < tensor.ndim; ++i) text << (i ? ", " : "") << tensor.sizes[i];
  text << "]";
  return text.str();
}

// Every pointer that C++ or a kernel follows passes here first.
inline void check_shape(const char* op, const char* argument, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  bool same = tensor.ndim == static_cast<int>(sizes.size());
  std::ostringstream wanted;
  wanted << "have shape [";
  int i = 0;
  for (int64_t size : sizes) {
    if (same && tensor.sizes[i] != size) same = false;
    wanted << (i++ ? ", " : "") << size;
  }
  wanted << "]";
  if (same && tensor.data == nullptr && tensor.numel() > 0)
    bad(op, argument, "hold memory", "none", "pass a tensor on a real device");
  if (!same) bad(op, argument, wanted.str(), shape_of(tensor), "call the function in fastcap.functional, which shapes it");
}

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor, DType dtype) {
  if (tensor.dtype != dtype)
    bad(op, argument, "have dtype code " + std::to_string(static_cast<int>(dtype)), static_cast<int>(tensor.dtype),
        "call the function in fastcap.functional, which converts it");
}

inline void check_contiguous(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_contiguous()) bad(op, argument, "be contiguous", shape_of(tensor), "call .contiguous() on it");
}

}  // namespace fastcap
