#include "simd.h"

#include <cmath>
#include <limits>

#if defined(__GNUC__)
#define FASTCAP_INLINE inline __attribute__((always_inline))
#else
#define FASTCAP_INLINE inline
#endif

namespace fastcap {
namespace simd {
namespace {

// exp by range reduction to |r| <= ln(2)/2 and a polynomial of degree 7 on it; error about 1 ulp. Below -87.3 the result,
// subnormal at best, is 0; above 88.4 it is inf. NaN stays NaN.
FASTCAP_INLINE float exp_of(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
  const float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, 4);
  const float y = p * scale;
  return x < -87.3f ? 0.0f : (x > 88.72f ? std::numeric_limits<float>::infinity() : y);
}

// tanh: the odd Taylor-like polynomial where 1 - 2 / (exp(2x) + 1) would cancel
FASTCAP_INLINE float tanh_of(float x) {
  const float a = x < 0.0f ? -x : x;
  const float q = x * x;
  float p = -5.70498872745e-3f;
  p = p * q + 2.06390887954e-2f;
  p = p * q - 5.37397155531e-2f;
  p = p * q + 1.33314422036e-1f;
  p = p * q - 3.33332819422e-1f;
  const float small = p * q * x + x;
  const float large = 1.0f - 2.0f / (exp_of(a > 40.0f ? 80.0f : 2.0f * a) + 1.0f);
  const float big = x < 0.0f ? -large : large;
  return a < 0.625f ? small : (a == a ? big : x);
}

}  // namespace

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
