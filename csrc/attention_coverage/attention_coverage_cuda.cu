// Forward: a block sums some columns of one caption and head over the steps, its 256 threads laid out as rows of packs of 16
// bytes; a second kernel of one block adds what the blocks found, in a fixed order. Backward: the same layout, written. See
// the header for the maths and the floor, and kernels/attention_coverage.py for the same algorithm in Triton.
#include "../common/check.h"
#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "attention_coverage.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "attention_coverage";
constexpr int kThreads = 256;
constexpr int kReduceThreads = 1024;

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// kPack elements of a row, as one load or store.
template <typename T, int kPack>
struct alignas(sizeof(T) * kPack) Columns {
  T values[kPack];
};

// How a block's threads lie: kLanes packs side by side, kRows steps at a time.
template <int kPack>
struct Layout {
  static constexpr int kLanes = kPack == 1 ? 32 : 16;
  static constexpr int kRows = kThreads / kLanes;
  static constexpr int kColumns = kLanes * kPack;
};

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(AttentionCoverageForward args, CoverageShape s, int64_t blocks, typename AccOf<T>::type target) {
  using Acc = typename AccOf<T>::type;
  using L = Layout<kPack>;
  __shared__ Acc partial[L::kRows][L::kColumns];
  __shared__ Acc shared[32];
  const int64_t i = blockIdx.x / blocks, first = blockIdx.x % blocks * L::kColumns;
  const int64_t b = i / s.heads, h = i % s.heads;
  const int lane = threadIdx.x % L::kLanes, row = threadIdx.x / L::kLanes;
  const T* base = static_cast<const T*>(args.alpha.data) + b * s.stride_b + h * s.stride_h;
  const uint8_t* valid =
      args.valid.data ? static_cast<const uint8_t*>(args.valid.data) + b * args.valid.strides[0] : nullptr;

  Acc sums[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) sums[j] = 0;
  const int64_t l = first + lane * kPack;
  if (l < s.L) {
#pragma unroll 4
    for (int64_t t = row; t < s.T; t += L::kRows) {
      if (valid && !valid[t * args.valid.strides[1]]) continue;
      const Columns<T, kPack> x = *reinterpret_cast<const Columns<T, kPack>*>(base + t * s.stride_t + l * s.stride_l);
#pragma unroll
      for (int j = 0; j < kPack; ++j) sums[j] += to_acc(x.values[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kPack; ++j) partial[row][lane * kPack + j] = sums[j];
  __syncthreads();

  const Acc tau = args.tau.data ? static_cast<const Acc*>(args.tau.data)[b * args.tau.strides[0]] : target;
  Acc squares = 0;
  for (int c = threadIdx.x; c < L::kColumns; c += kThreads) {
    if (first + c >= s.L) continue;
    Acc sum = 0;
#pragma unroll
    for (int k = 0; k < L::kRows; ++k) sum += partial[k][c];
    const Acc r = tau - sum;
    const int64_t at = i * s.L + first + c;
    if (args.residual.data) static_cast<Acc*>(args.residual.data)[at] = r;
    if (args.reduction == CoverageReduction::kNone) static_cast<Acc*>(args.out.data)[at] = r * r;
    squares += r * r;
  }
  if (args.reduction == CoverageReduction::kNone) return;
  squares = block_sum(squares, shared);
  if (threadIdx.x == 0) static_cast<Acc*>(args.scratch.data)[blockIdx.x] = squares;
}

template <typename Acc>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const Acc* parts, int64_t n, Acc scale, Acc* out) {
  __shared__ Acc shared[32];
  Acc total = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) total += parts[i];
  total = block_sum(total, shared);
  if (threadIdx.x == 0) *out = total * scale;
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(AttentionCoverageBackward args, CoverageShape s, int64_t blocks, typename AccOf<T>::type scale) {
  using Acc = typename AccOf<T>::type;
  using L = Layout<kPack>;
  const int64_t i = blockIdx.x / blocks, b = i / s.heads, h = i % s.heads;
  const int lane = threadIdx.x % L::kLanes, row = threadIdx.x / L::kLanes;
  const int64_t l = blockIdx.x % blocks * L::kColumns + lane * kPack;
  if (l >= s.L) return;
  const bool none = args.reduction == CoverageReduction::kNone;
  const Acc* up = static_cast<const Acc*>(args.grad_out.data);
  if (none) up += b * args.grad_out.strides[0] + (args.grad_out.ndim == 3 ? h * args.grad_out.strides[1] : 0);
  const int64_t up_stride = none ? args.grad_out.strides[args.grad_out.ndim - 1] : 0;
  const Acc* r = static_cast<const Acc*>(args.residual.data) + i * s.L;
  const uint8_t* valid =
      args.valid.data ? static_cast<const uint8_t*>(args.valid.data) + b * args.valid.strides[0] : nullptr;

  Columns<T, kPack> gradient;
#pragma unroll
  for (int j = 0; j < kPack; ++j) from_acc(&gradient.values[j], scale * r[l + j] * up[(l + j) * up_stride]);
  T* out = static_cast<T*>(args.dalpha.data) + i * s.T * s.L + l;
#pragma unroll 4
  for (int64_t t = row; t < s.T; t += L::kRows) {
    const bool counts = !valid || valid[t * args.valid.strides[1]];
    if constexpr (sizeof(gradient) == 16)
      store_16(out + t * s.L, counts ? *reinterpret_cast<const uint4*>(&gradient) : make_uint4(0, 0, 0, 0));
    else
      from_acc(out + t * s.L, counts ? to_acc(gradient.values[0]) : Acc(0));
  }
}

// Whether each row of x can be read or written by 16 bytes.
bool packs(const Tensor& x, const CoverageShape& s) {
  const int64_t pack = 16 / item_size(x.dtype);
  const auto whole = [&](int64_t size, int64_t stride) { return size == 1 || stride % pack == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && s.stride_l == 1 && s.L % pack == 0 && whole(s.B, s.stride_b) &&
         whole(s.heads, s.stride_h) && whole(s.T, s.stride_t);
}

int64_t blocks_of_row(const Tensor& x, const CoverageShape& s, bool packed) {
  const int64_t columns = packed ? 16 * (16 / item_size(x.dtype)) : Layout<1>::kColumns;
  return (s.L + columns - 1) / columns;
}

template <typename T>
void forward(const AttentionCoverageForward& args, cudaStream_t stream) {
  using Acc = typename AccOf<T>::type;
  constexpr int kPack = 16 / sizeof(T);
  const CoverageShape s(args.alpha);
  const bool packed = packs(args.alpha, s);
  const int64_t blocks = blocks_of_row(args.alpha, s, packed), n = s.rows() * blocks;
  const unsigned grid = grid_of(kOp, "alpha", n);
  if (packed)
    forward_kernel<T, kPack><<<grid, kThreads, 0, stream>>>(args, s, blocks, static_cast<Acc>(args.target));
  else
    forward_kernel<T, 1><<<grid, kThreads, 0, stream>>>(args, s, blocks, static_cast<Acc>(args.target));
  check_launch(kOp);
  if (args.reduction == CoverageReduction::kNone) return;
  reduce_kernel<Acc><<<1, kReduceThreads, 0, stream>>>(static_cast<const Acc*>(args.scratch.data), n,
                                                       static_cast<Acc>(s.scale(args.reduction)),
                                                       static_cast<Acc*>(args.out.data));
  check_launch(kOp);
}

template <typename T>
void backward(const AttentionCoverageBackward& args, cudaStream_t stream) {
  using Acc = typename AccOf<T>::type;
  constexpr int kPack = 16 / sizeof(T);
  const CoverageShape s(args.dalpha);
  const bool packed = packs(args.dalpha, s);
  const int64_t blocks = blocks_of_row(args.dalpha, s, packed);
  const unsigned grid = grid_of(kOp, "alpha", s.rows() * blocks);
  const Acc scale = static_cast<Acc>(-2.0 * s.scale(args.reduction));
  if (packed)
    backward_kernel<T, kPack><<<grid, kThreads, 0, stream>>>(args, s, blocks, scale);
  else
    backward_kernel<T, 1><<<grid, kThreads, 0, stream>>>(args, s, blocks, scale);
  check_launch(kOp);
}

template <typename Fn>
void dispatch(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kFloat64:
      return fn(double{});
    case DType::kFloat16:
      return fn(__half{});
    case DType::kBFloat16:
      return fn(__nv_bfloat16{});
    default:
      bad(kOp, "alpha", "be float32, float64, float16 or bfloat16", static_cast<int>(dtype), "convert it");
  }
}

}  // namespace

int64_t attention_coverage_blocks_cuda(const Tensor& alpha) {
  if (alpha.ndim != 3 && alpha.ndim != 4)
    bad(kOp, "alpha", "have shape [B, T, L] or [B, heads, T, L]", shape_of(alpha), "pass the attention weights");
  const CoverageShape s(alpha);
  return s.rows() * blocks_of_row(alpha, s, packs(alpha, s));
}

void attention_coverage_fwd_cuda(const AttentionCoverageForward& args, void* stream) {
  check_attention_coverage(args);
  if (args.reduction != CoverageReduction::kNone) {
    check_shape(kOp, "scratch", args.scratch, {attention_coverage_blocks_cuda(args.alpha)});
    check_dtype(kOp, "scratch", args.scratch, args.out.dtype);
    check_contiguous(kOp, "scratch", args.scratch);
  }
  dispatch(args.alpha.dtype, [&](auto t) { forward<decltype(t)>(args, static_cast<cudaStream_t>(stream)); });
}

void attention_coverage_bwd_cuda(const AttentionCoverageBackward& args, void* stream) {
  check_attention_coverage(args);
  dispatch(args.dalpha.dtype, [&](auto t) { backward<decltype(t)>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace fastcap
