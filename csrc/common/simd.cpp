#include "simd.h"

#include <cmath>
#include <limits>

#include "simd_math.h"

namespace fastcap {
namespace simd {
FASTCAP_CLONES float max_of(const float* x, int64_t n) {
  float m = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

FASTCAP_CLONES double max_of(const double* x, int64_t n) {
  double m = -std::numeric_limits<double>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

FASTCAP_CLONES float sum_exp(const float* x, int64_t n, float shift) {
  float s = 0.0f;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += exp_of(x[i] - shift);
  return s;
}

double sum_exp(const double* x, int64_t n, double shift) {
  double s = 0.0;
  for (int64_t i = 0; i < n; ++i) s += std::exp(x[i] - shift);
  return s;
}

FASTCAP_CLONES void add_scaled_exp(const float* x, float* out, int64_t n, float shift, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += scale * exp_of(x[i] - shift);
}

void add_scaled_exp(const double* x, double* out, int64_t n, double shift, double scale) {
  for (int64_t i = 0; i < n; ++i) out[i] += scale * std::exp(x[i] - shift);
}

FASTCAP_CLONES void softcap(float* x, int64_t n, float cap) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = cap * tanh_of(x[i] / cap);
}

void softcap(double* x, int64_t n, double cap) {
  for (int64_t i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

FASTCAP_CLONES void softcap_chain(const float* z, float* out, int64_t n, float cap) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] *= 1.0f - (z[i] / cap) * (z[i] / cap);
}

void softcap_chain(const double* z, double* out, int64_t n, double cap) {
  for (int64_t i = 0; i < n; ++i) out[i] *= 1.0 - (z[i] / cap) * (z[i] / cap);
}

FASTCAP_CLONES void to_float(const Half* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = load(x + i);
}

FASTCAP_CLONES void to_float(const BFloat16* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = load(x + i);
}

FASTCAP_CLONES void from_float(const float* x, Half* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out + i, x[i]);
}

FASTCAP_CLONES void from_float(const float* x, BFloat16* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out + i, x[i]);
}

}  // namespace simd
}  // namespace fastcap
