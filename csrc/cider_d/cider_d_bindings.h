// What fastcap._C has of CIDEr-D.
#pragma once
#include <pybind11/pybind11.h>

namespace fastcap {

void bind_cider_d(pybind11::module_& m);

}  // namespace fastcap
