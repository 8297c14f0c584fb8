#include "additive_attention_rows.h"

#include <cmath>

#include "../common/simd.h"
#include "../common/simd_math.h"

namespace fastcap {
namespace additive {
namespace {

FASTCAP_INLINE float tanh_of(float x) { return simd::fast_tanh(x); }
FASTCAP_INLINE double tanh_of(double x) { return std::tanh(x); }

// The loops, for any Acc; the functions below give the ones of float their instruction sets.
template <typename Acc, bool kTanh>
FASTCAP_INLINE Acc score_of(const Acc* k, const Acc* q, const Acc* v, int64_t n) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Acc x = k[i] + q[i];
    sum += v[i] * (kTanh ? tanh_of(x) : (x < 0 ? Acc(0) : x));
  }
  return sum;
}

template <typename Acc, bool kTanh, bool kKeys>
FASTCAP_INLINE void gradient_of(const Acc* k, const Acc* q, const Acc* v, Acc de, int64_t n, Acc* dq, Acc* dk, Acc* dv) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Acc x = k[i] + q[i];
    const Acc act = kTanh ? tanh_of(x) : (x < 0 ? Acc(0) : x);
    const Acc g = de * v[i] * (kTanh ? 1 - act * act : (x > 0 ? Acc(1) : Acc(0)));
    dq[i] += g;
    if (kKeys) {
      dk[i] = g;
      dv[i] += de * act;
    }
  }
}

// A stretch of the row at a time, whose sums stay in registers over all queries.
template <typename Acc, bool kTanh>
FASTCAP_INLINE void gradients_of(const Acc* k, const Acc* q, int64_t stride, const Acc* v, const Acc* de, int64_t T,
                                 int64_t n, Acc* dk, Acc* dv) {
  constexpr int64_t kStretch = 64;
  int64_t begin = 0;
  for (; begin + kStretch <= n; begin += kStretch) {
    Acc slope[kStretch] = {}, sum[kStretch] = {};
    for (int64_t t = 0; t < T; ++t) {
      if (de[t] == 0) continue;
      const Acc* row = q + t * stride + begin;
#pragma omp simd
      for (int64_t i = 0; i < kStretch; ++i) {
        const Acc x = k[begin + i] + row[i];
        const Acc act = kTanh ? tanh_of(x) : (x < 0 ? Acc(0) : x);
        slope[i] += de[t] * (kTanh ? 1 - act * act : (x > 0 ? Acc(1) : Acc(0)));
        sum[i] += de[t] * act;
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kStretch; ++i) {
      dk[begin + i] = v[begin + i] * slope[i];
      dv[begin + i] += sum[i];
    }
  }
  for (; begin < n; ++begin) {
    Acc slope = 0, sum = 0;
    for (int64_t t = 0; t < T; ++t) {
      if (de[t] == 0) continue;
      const Acc x = k[begin] + q[t * stride + begin];
      const Acc act = kTanh ? tanh_of(x) : (x < 0 ? Acc(0) : x);
      slope += de[t] * (kTanh ? 1 - act * act : (x > 0 ? Acc(1) : Acc(0)));
      sum += de[t] * act;
    }
    dk[begin] = v[begin] * slope;
    dv[begin] += sum;
  }
}

template <typename Acc>
FASTCAP_INLINE void add_rows_of(const Acc* const* rows, const Acc* w, int64_t n, Acc* out) {
  const Acc *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  const Acc wa = w[0], wb = w[1], wc = w[2], wd = w[3];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += (wa * a[i] + wb * b[i]) + (wc * c[i] + wd * d[i]);
}

template <typename Acc>
FASTCAP_INLINE Acc dot_of(const Acc* x, const Acc* y, int64_t n) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

template <typename Acc>
FASTCAP_INLINE void scale_of(const Acc* x, Acc w, int64_t n, Acc* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = w * x[i];
}

}  // namespace

FASTCAP_CLONES float score(const float* k, const float* q, const float* v, int64_t n, Activation activation) {
  return activation == Activation::kTanh ? score_of<float, true>(k, q, v, n) : score_of<float, false>(k, q, v, n);
}
double score(const double* k, const double* q, const double* v, int64_t n, Activation activation) {
  return activation == Activation::kTanh ? score_of<double, true>(k, q, v, n) : score_of<double, false>(k, q, v, n);
}

FASTCAP_CLONES void add_gradient(const float* k, const float* q, const float* v, float de, int64_t n, Activation activation,
                                 float* dq, float* dk, float* dv) {
  if (activation == Activation::kTanh)
    dk ? gradient_of<float, true, true>(k, q, v, de, n, dq, dk, dv)
       : gradient_of<float, true, false>(k, q, v, de, n, dq, dk, dv);
  else
    dk ? gradient_of<float, false, true>(k, q, v, de, n, dq, dk, dv)
       : gradient_of<float, false, false>(k, q, v, de, n, dq, dk, dv);
}
void add_gradient(const double* k, const double* q, const double* v, double de, int64_t n, Activation activation, double* dq,
                  double* dk, double* dv) {
  if (activation == Activation::kTanh)
    dk ? gradient_of<double, true, true>(k, q, v, de, n, dq, dk, dv)
       : gradient_of<double, true, false>(k, q, v, de, n, dq, dk, dv);
  else
    dk ? gradient_of<double, false, true>(k, q, v, de, n, dq, dk, dv)
       : gradient_of<double, false, false>(k, q, v, de, n, dq, dk, dv);
}

FASTCAP_CLONES void gradients(const float* k, const float* q, int64_t stride, const float* v, const float* de, int64_t T,
                              int64_t n, Activation activation, float* dk, float* dv) {
  if (activation == Activation::kTanh)
    gradients_of<float, true>(k, q, stride, v, de, T, n, dk, dv);
  else
    gradients_of<float, false>(k, q, stride, v, de, T, n, dk, dv);
}
void gradients(const double* k, const double* q, int64_t stride, const double* v, const double* de, int64_t T, int64_t n,
               Activation activation, double* dk, double* dv) {
  if (activation == Activation::kTanh)
    gradients_of<double, true>(k, q, stride, v, de, T, n, dk, dv);
  else
    gradients_of<double, false>(k, q, stride, v, de, T, n, dk, dv);
}

FASTCAP_CLONES void add_rows(const float* const* rows, const float* w, int64_t n, float* out) {
  add_rows_of(rows, w, n, out);
}
void add_rows(const double* const* rows, const double* w, int64_t n, double* out) { add_rows_of(rows, w, n, out); }

FASTCAP_CLONES float dot(const float* x, const float* y, int64_t n) { return dot_of(x, y, n); }
double dot(const double* x, const double* y, int64_t n) { return dot_of(x, y, n); }

FASTCAP_CLONES void scale(const float* x, float w, int64_t n, float* out) { scale_of(x, w, n, out); }
void scale(const double* x, double w, int64_t n, double* out) { scale_of(x, w, n, out); }

}  // namespace additive
}  // namespace fastcap
