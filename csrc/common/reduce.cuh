// Reductions over a block, and vector loads of rows at any alignment.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastcap {

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(__half x) { return __half2float(x); }
__device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void from_acc(float* p, float x) { *p = x; }
__device__ inline void from_acc(double* p, double x) { *p = x; }
__device__ inline void from_acc(__half* p, float x) { *p = __float2half(x); }
__device__ inline void from_acc(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }

// 16 bytes of T, as one load or store.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Stores `value`, of 16 bytes, at a multiple of 16, at once. An assignment becomes one store for each element where nvcc
// finds these stored one by one in another branch, or chosen between.
template <typename T>
__device__ inline void store_16(void* p, const T& value) {
  static_assert(sizeof(T) == 16, "one store of 16 bytes");
  const uint4 bits = *reinterpret_cast<const uint4*>(&value);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}

// The sum over the block, in every thread. Fixed order: lanes by shuffles, then warps by index. `shared` holds 32 values.
template <typename Acc>
__device__ Acc block_sum(Acc value, Acc* shared) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  Acc total = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) total += shared[warp];
  return total;
}

template <typename Acc>
__device__ Acc block_max(Acc value, Acc* shared) {
  for (int offset = 16; offset > 0; offset /= 2) value = fmax(value, __shfl_xor_sync(~0u, value, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  Acc top = shared[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; ++warp) top = fmax(top, shared[warp]);
  return top;
}

// A running (max, sum of exp(. - max)). -inf adds nothing; NaN reaches the sum.
template <typename Acc>
struct LogSumExp {
  Acc max = -INFINITY;
  Acc sum = 0;

  __device__ void add(Acc z) {
    const Acc top = fmax(max, z);
    const Acc shift = top == -INFINITY ? Acc(0) : top;
    sum = sum * exp(max - shift) + exp(z - shift);
    max = top;
  }
  __device__ Acc block_value(Acc* shared) const {
    const Acc top = block_max(max, shared);
    const Acc shift = top == -INFINITY ? Acc(0) : top;
    return top + log(block_sum(sum * exp(max - shift), shared));
  }
};

// visit(v, value) for v in [0, n), the block's threads side by side; 16-byte loads where the row is contiguous.
template <typename T, typename Visit>
__device__ void visit_row(const T* row, int64_t stride, int64_t n, const Visit& visit) {
  if (stride != 1) {
    for (int64_t v = threadIdx.x; v < n; v += blockDim.x) visit(v, row[v * stride]);
    return;
  }
  constexpr int kPack = Pack<T>::kSize;
  const int64_t misaligned = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
  const int64_t head = misaligned == 0 ? 0 : (kPack - misaligned < n ? kPack - misaligned : n);
  const int64_t packs = (n - head) / kPack;
  if (threadIdx.x < head) visit(threadIdx.x, row[threadIdx.x]);
  for (int64_t p = threadIdx.x; p < packs; p += blockDim.x) {
    const int64_t v = head + p * kPack;
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(row + v);
#pragma unroll
    for (int j = 0; j < kPack; ++j) visit(v + j, pack.values[j]);
  }
  for (int64_t v = head + packs * kPack + threadIdx.x; v < n; v += blockDim.x) visit(v, row[v]);
}

}  // namespace fastcap
