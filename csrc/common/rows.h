// Rows of logits on the CPU: any float type and stride, read in blocks, summed as exponentials.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "check.h"
#include "simd.h"

namespace fastcap {

// What sums run in.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// fn(float{}), fn(double{}), fn(Half{}) or fn(BFloat16{}).
template <typename Fn>
inline void dispatch_floats(const char* op, DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kFloat64:
      return fn(double{});
    case DType::kFloat16:
      return fn(Half{});
    case DType::kBFloat16:
      return fn(BFloat16{});
    default:
      bad(op, "input", "be float32, float64, float16 or bfloat16", static_cast<int>(dtype), "convert it");
  }
}

template <typename T>
inline T at(const Tensor& tensor, int64_t i, int64_t j) {
  return tensor.as<T>()[i * tensor.strides[0] + j * tensor.strides[1]];
}

template <typename T>
inline T at(const Tensor& tensor, int64_t i, int64_t j, int64_t k) {
  return tensor.as<T>()[i * tensor.strides[0] + j * tensor.strides[1] + k * tensor.strides[2]];
}

inline double capped(double x, double cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }
inline float capped(float x, float cap) {
  if (cap > 0) simd::softcap(&x, 1, cap);  // the same tanh as a block's, so that a logit equals itself
  return x;
}

// The V logits of a row, plus a bias where there is one, capped, in blocks of simd::kBlock. Plain float rows are read in
// place.
template <typename T>
struct Row {
  using Acc = acc_t<T>;
  const T* data;
  int64_t stride;
  Acc cap;
  const Acc* bias = nullptr;

  Acc at(int64_t v) const { return capped(load(data + v * stride) + (bias ? bias[v] : Acc(0)), cap); }

  const Acc* block(int64_t begin, int64_t n, Acc* buffer) const {
    const T* p = data + begin * stride;
    if constexpr (std::is_same_v<T, Acc>) {
      if (stride == 1 && cap == 0 && !bias) return p;
      for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * stride];
    } else {
      if (stride == 1)
        simd::to_float(p, buffer, n);
      else
        for (int64_t i = 0; i < n; ++i) buffer[i] = load(p + i * stride);
    }
    if (bias)
      for (int64_t i = 0; i < n; ++i) buffer[i] += bias[begin + i];
    if (cap > 0) simd::softcap(buffer, n, cap);
    return buffer;
  }
};

template <typename T>
inline Row<T> row_of(const Tensor& input, int64_t b, int64_t t, double cap) {
  return {input.as<T>() + b * input.strides[0] + t * input.strides[1], input.strides[2], static_cast<acc_t<T>>(cap)};
}

// A running (max, sum of exp): -inf logits add nothing, and a row of nothing but -inf gives NaN, as torch does.
template <typename Acc>
struct LogSumExp {
  Acc max = -std::numeric_limits<Acc>::infinity();
  double sum = 0;

  void add(const Acc* x, int64_t n) {
    const Acc block_max = simd::max_of(x, n);
    if (block_max > max) {
      sum *= std::exp(static_cast<double>(max) - static_cast<double>(block_max));
      max = block_max;
    }
    sum += simd::sum_exp(x, n, std::isinf(max) && max < 0 ? Acc(0) : max);
  }
  Acc value() const { return static_cast<Acc>(max + std::log(sum)); }
};

}  // namespace fastcap
