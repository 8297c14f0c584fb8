// Vector loops over contiguous memory. Compiled once per instruction set (FASTCAP_CLONES) and chosen at load time, so one
// wheel runs on any CPU and uses AVX-512 where there is one. Each loop is plain C++ under `omp simd`.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTCAP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTCAP_CLONES
#endif

namespace fastcap {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace simd {

// Row sums are kept in double across blocks of this many elements; within a block the lanes' own float sums are short.
constexpr int64_t kBlock = 2048;

// largest element (NaN is passed over; it reaches the result through sum_exp), -inf for n = 0
float max_of(const float* x, int64_t n);
double max_of(const double* x, int64_t n);

// sum_i exp(x_i - shift)
float sum_exp(const float* x, int64_t n, float shift);
double sum_exp(const double* x, int64_t n, double shift);

// out_i += scale * exp(x_i - shift)
void add_scaled_exp(const float* x, float* out, int64_t n, float shift, float scale);
void add_scaled_exp(const double* x, double* out, int64_t n, double shift, double scale);

// x_i = cap * tanh(x_i / cap)
void softcap(float* x, int64_t n, float cap);
void softcap(double* x, int64_t n, double cap);

// out_i *= 1 - (z_i / cap)^2: the chain rule of softcap, z being capped
void softcap_chain(const float* z, float* out, int64_t n, float cap);
void softcap_chain(const double* z, double* out, int64_t n, double cap);

void to_float(const Half* x, float* out, int64_t n);
void to_float(const BFloat16* x, float* out, int64_t n);
void from_float(const float* x, Half* out, int64_t n);
void from_float(const float* x, BFloat16* out, int64_t n);

}  // namespace simd

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }

inline float load(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Branch-free: shifting the exponent field and multiplying by 2^112 makes subnormals right too; inf and NaN are patched.
inline float load(const Half* p) {
  const uint32_t half = p->bits;
  uint32_t bits = (half & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 5.192296858534828e+33f;
  std::memcpy(&bits, &value, 4);
  bits |= (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  bits |= (half & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void store(float* p, float value) { *p = value; }
inline void store(double* p, double value) { *p = value; }

inline void store(BFloat16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Round to nearest even. Normal results round on the float's own bits; subnormal ones let the adder do it (value + 0.5
// has one half-ulp of a half subnormal as its last place).
inline void store(Half* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  float shifted;
  std::memcpy(&shifted, &magnitude, 4);
  shifted += 0.5f;
  uint32_t subnormal;
  std::memcpy(&subnormal, &shifted, 4);
  subnormal -= 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  p->bits = static_cast<uint16_t>(half | sign);
}

}  // namespace fastcap
