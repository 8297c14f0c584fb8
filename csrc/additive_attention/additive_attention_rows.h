// Vector loops over a row of A keys or D values, compiled once per instruction set.
#pragma once
#include <cstdint>

#include "additive_attention.h"

namespace fastcap {
namespace additive {

// sum_a v_a act(k_a + q_a)
float score(const float* k, const float* q, const float* v, int64_t n, Activation activation);
double score(const double* k, const double* q, const double* v, int64_t n, Activation activation);

// With G_a = de v_a act'(k_a + q_a): dq += G, and, unless null, dk = G and dv += de act(k + q).
void add_gradient(const float* k, const float* q, const float* v, float de, int64_t n, Activation activation, float* dq,
                  float* dk, float* dv);
void add_gradient(const double* k, const double* q, const double* v, double de, int64_t n, Activation activation, double* dq,
                  double* dk, double* dv);

// Of T queries at once, row t of them at q + t * stride: dk = v sum_t de_t act'(k + q_t), dv += sum_t de_t act(k + q_t).
void gradients(const float* k, const float* q, int64_t stride, const float* v, const float* de, int64_t T, int64_t n,
               Activation activation, float* dk, float* dv);
void gradients(const double* k, const double* q, int64_t stride, const double* v, const double* de, int64_t T, int64_t n,
               Activation activation, double* dk, double* dv);

// out += sum of w[j] rows[j], for 4 rows
void add_rows(const float* const* rows, const float* w, int64_t n, float* out);
void add_rows(const double* const* rows, const double* w, int64_t n, double* out);

float dot(const float* x, const float* y, int64_t n);
double dot(const double* x, const double* y, int64_t n);

// out = w x
void scale(const float* x, float w, int64_t n, float* out);
void scale(const double* x, double w, int64_t n, double* out);

}  // namespace additive
}  // namespace fastcap
