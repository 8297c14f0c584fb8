// One block a token forward, one block a piece of a token's row backward; see the header for the maths and the floor, and
// kernels/subset_cross_entropy.py for the same algorithm in Triton.
#include "../common/check.h"
#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "subset_cross_entropy.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "subset_cross_entropy";
constexpr int kMaxPairedIds = 64;  // more are sorted before they come here, and repeats replaced by pads
constexpr int kThreads = 256;
constexpr int kSetThreads = 64;
constexpr int kReduceThreads = 1024;
constexpr int kPacksPerThread = 8;

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// The options as a kernel reads them.
template <typename Acc>
struct Params {
  int subset;
  bool first_full, per_token;
  Acc mle_weight, smoothing, cap, z_loss;
  int64_t ignore_index, ids_pad;
};

template <typename Acc>
Params<Acc> params_of(const SubsetOptions& o) {
  return {static_cast<int>(o.subset),
          o.first_full,
          o.reduction == 0,
          static_cast<Acc>(o.mle_weight),
          static_cast<Acc>(o.label_smoothing),
          static_cast<Acc>(o.logit_softcap),
          static_cast<Acc>(o.z_loss),
          o.ignore_index,
          o.ids_pad};
}

template <typename T>
__device__ T* at(const Tensor& t, int64_t i, int64_t j) {
  return static_cast<T*>(t.data) + i * t.strides[0] + j * t.strides[1];
}

template <typename Acc>
__device__ Acc capped(Acc z, Acc cap) {
  return cap > 0 ? cap * tanh(z / cap) : z;
}

template <typename Acc>
struct Part {
  Acc loss, a, s, d;
};

template <typename Acc>
__device__ Part<Acc> part_of(Acc lse, Acc z_y, Acc w_y, Acc n, Acc sum_w, Acc sum_wz, const Params<Acc>& o) {
  Part<Acc> part;
  part.d = (1 - o.smoothing) * w_y;
  part.s = o.smoothing / n;
  part.loss = part.d * (lse - z_y) + o.z_loss * w_y * lse * lse;
  if (o.smoothing > 0) part.loss += part.s * (sum_w * lse - sum_wz);
  part.a = part.d + part.s * sum_w + 2 * o.z_loss * w_y * lse;
  return part;
}

template <typename Acc>
__device__ void write_stats(Acc* stats, int64_t N, int64_t i, int first, Acc lse, const Part<Acc>& part, Acc factor) {
  if (threadIdx.x != 0) return;
  stats[(first + 0) * N + i] = lse;
  stats[(first + 1) * N + i] = factor * part.a;
  stats[(first + 2) * N + i] = factor * part.s;
  stats[(first + 3) * N + i] = factor * part.d;
}

template <typename T>
__global__ void forward_kernel(SubsetCrossEntropyForward args, Tensor excluded, Params<typename AccOf<T>::type> o) {
  using Acc = typename AccOf<T>::type;
  __shared__ Acc shared[32];
  __shared__ int64_t ids[kMaxPairedIds];
  const int64_t T_ = args.input.sizes[1], V = args.input.sizes[2], N = args.input.sizes[0] * T_;
  const int64_t i = blockIdx.x, b = i / T_, t = i % T_;
  const T* row = at<T>(args.input, b, t);
  const int64_t stride = args.input.strides[2];
  const Acc* weight = static_cast<const Acc*>(args.weight.data);
  Acc* stats = static_cast<Acc*>(args.stats.data);
  const bool is_set = o.subset == static_cast<int>(Subset::kSet),
             is_reverse = o.subset == static_cast<int>(Subset::kReverse);

  const int64_t label = *at<int64_t>(args.target, b, t);
  const bool valid = label != o.ignore_index, in_range = label >= 0 && label < V;
  const int64_t y = valid && in_range ? label : 0;
  Acc scale = !valid ? Acc(0) : args.token_weight.data ? *at<Acc>(args.token_weight, b, t) : Acc(1);
  if (valid && !in_range) scale = NAN;  // loud, and never a wrong read
  Acc of_full = o.subset == static_cast<int>(Subset::kFull) ? Acc(1) : o.mle_weight;
  if (o.first_full) {
    int earlier = 0;
    for (int64_t past = threadIdx.x; past < t; past += blockDim.x)
      earlier |= *at<int64_t>(args.target, b, past) != o.ignore_index;
    if (!__syncthreads_or(earlier)) of_full = 1;
  }
  const Acc of_rest = 1 - of_full;
  const bool wants_full = valid && of_full > 0, wants_rest = valid && of_rest > 0;
  const Acc w_y = weight ? weight[y] : Acc(1);
  const Acc z_y = valid ? capped(to_acc(row[y * stride]), o.cap) : Acc(0);
  Acc loss = 0;

  if (wants_full || (is_reverse && wants_rest)) {
    const uint8_t* gone = is_reverse ? static_cast<const uint8_t*>(excluded.data) + b * V : nullptr;
    LogSumExp<Acc> full, rest;
    Acc sum_w = 0, sum_wz = 0, rest_w = 0, rest_wz = 0, rest_n = 0;
    visit_row(row, stride, V, [&](int64_t v, T x) {
      const Acc z = capped(to_acc(x), o.cap);
      full.add(z);
      const bool kept = is_reverse && (gone[v] == 0 || v == y);
      if (kept) rest.add(z);
      if (o.smoothing > 0) {
        const Acc w = weight ? weight[v] : Acc(1);
        sum_w += w, sum_wz += w * z;
        if (kept) rest_w += w, rest_wz += w * z, rest_n += 1;
      }
    });
    if (o.smoothing > 0) {
      sum_w = block_sum(sum_w, shared), sum_wz = block_sum(sum_wz, shared);
      if (is_reverse) {
        rest_w = block_sum(rest_w, shared), rest_wz = block_sum(rest_wz, shared);
        rest_n = block_sum(rest_n, shared);
      }
    }
    if (wants_full) {
      const Acc lse = full.block_value(shared);
      const Part<Acc> part = part_of(lse, z_y, w_y, static_cast<Acc>(V), sum_w, sum_wz, o);
      loss += of_full * part.loss;
      if (stats) write_stats(stats, N, i, kLseF, lse, part, scale * of_full);
    }
    if (is_reverse && wants_rest) {
      const Acc lse = rest.block_value(shared);
      const Part<Acc> part = part_of(lse, z_y, w_y, fmax(rest_n, Acc(1)), rest_w, rest_wz, o);
      loss += of_rest * part.loss;
      if (stats) write_stats(stats, N, i, kLseS, lse, part, scale * of_rest);
    }
  }
  if (stats) {
    const Part<Acc> none = {0, 0, 0, 0};
    if (!wants_full) write_stats(stats, N, i, kLseF, Acc(0), none, Acc(0));
    if (!(is_reverse && wants_rest)) write_stats(stats, N, i, kLseS, Acc(0), none, Acc(0));
  }

  if (is_set) {
    const int64_t K = args.ids.sizes[2], C = K + 1;
    const int64_t* p_ids = at<int64_t>(args.ids, b, t);
    const bool paired = K <= kMaxPairedIds;
    if (paired)
      for (int64_t k = threadIdx.x; k < K; k += blockDim.x) ids[k] = p_ids[k * args.ids.strides[2]];
    __syncthreads();
    const auto candidate = [&](int64_t k, int64_t id) {
      bool used = wants_rest && id != o.ids_pad && id != y && id >= 0 && id < V;
      if (paired)
        for (int64_t j = 0; j < k && used; ++j) used = ids[j] != id;
      return used;
    };
    LogSumExp<Acc> set;
    Acc sum_w = 0, sum_wz = 0, n = 0;
    int bad_id = 0;
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x) {
      const int64_t id = paired ? ids[k] : p_ids[k * args.ids.strides[2]];
      bad_id |= wants_rest && id != o.ids_pad && id != y && (id < 0 || id >= V);
      if (!candidate(k, id)) continue;
      const Acc z = capped(to_acc(row[id * stride]), o.cap);
      const Acc w = weight ? weight[id] : Acc(1);
      set.add(z);
      sum_w += w, sum_wz += w * z, n += 1;
    }
    if (threadIdx.x == 0) set.add(z_y), sum_w += w_y, sum_wz += w_y * z_y, n += 1;
    if (__syncthreads_or(bad_id)) scale = NAN;
    const Acc lse = set.block_value(shared);
    if (o.smoothing > 0) {
      sum_w = block_sum(sum_w, shared), sum_wz = block_sum(sum_wz, shared);
    }
    n = block_sum(n, shared);
    const Part<Acc> part = part_of(lse, z_y, w_y, n, o.smoothing > 0 ? sum_w : Acc(0), sum_wz, o);
    if (wants_rest) loss += of_rest * part.loss;
    if (args.cols.data) {
      int32_t* cols = static_cast<int32_t*>(args.cols.data) + i * C;
      Acc* dset = static_cast<Acc*>(args.dset.data) + i * C;
      for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
        const int64_t id = c == 0 ? y : paired ? ids[c - 1] : p_ids[(c - 1) * args.ids.strides[2]];
        const bool used = c == 0 ? wants_rest : candidate(c - 1, id);
        Acc dz = 0;
        if (used) {
          const Acc z = capped(to_acc(row[id * stride]), o.cap);
          dz = part.a * exp(z - lse) - part.s * (weight ? weight[id] : Acc(1)) - (c == 0 ? part.d : Acc(0));
          if (o.cap > 0) dz *= 1 - (z / o.cap) * (z / o.cap);
        }
        cols[c] = used ? static_cast<int32_t>(id) : -1;
        dset[c] = used ? scale * of_rest * dz : Acc(0);
      }
    }
  }
  if (threadIdx.x != 0) return;
  const Acc token_loss = valid ? scale * loss : Acc(0);
  if (o.per_token) {
    static_cast<Acc*>(args.out.data)[i] = token_loss;
    if (i == 0) *static_cast<Acc*>(args.inv_denom.data) = 1;
  } else {
    Acc* scratch = static_cast<Acc*>(args.scratch.data);
    scratch[i] = token_loss;
    scratch[N + i] = valid ? w_y : Acc(0);
  }
}

// The sum or mean over tokens by one block, so in a fixed order.
template <typename Acc>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const Acc* scratch, int64_t N, Acc* out, Acc* inv_denom, bool mean) {
  __shared__ Acc shared[32];
  Acc loss = 0, denom = 0;
  for (int64_t i = threadIdx.x; i < N; i += blockDim.x) loss += scratch[i], denom += scratch[N + i];
  loss = block_sum(loss, shared), denom = block_sum(denom, shared);
  if (threadIdx.x != 0) return;
  const Acc inverse = !mean ? Acc(1) : denom != 0 ? 1 / denom : Acc(0);
  *inv_denom = inverse;
  *out = mean && denom == 0 ? Acc(0) : loss * inverse;
}

template <typename T>
__global__ void backward_kernel(SubsetCrossEntropyBackward args, Tensor excluded, Params<typename AccOf<T>::type> o,
                                int64_t pieces) {
  using Acc = typename AccOf<T>::type;
  constexpr int kPack = Pack<T>::kSize;
  constexpr int64_t kPiece = static_cast<int64_t>(kThreads) * kPacksPerThread * kPack;
  const int64_t T_ = args.dinput.sizes[1], V = args.dinput.sizes[2], N = args.dinput.sizes[0] * T_;
  const int64_t i = blockIdx.x / pieces, b = i / T_, t = i % T_;
  // A piece starts at a multiple of 16 bytes of the whole gradient: a little before column 0 where the row does not.
  const int64_t begin = i * V, base = begin / kPack * kPack + blockIdx.x % pieces * kPiece, before = base - begin;
  T* dx = static_cast<T*>(args.dinput.data) + begin;
  const Acc* grad_out = static_cast<const Acc*>(args.grad_out.data);
  const Acc g = (o.per_token ? *at<Acc>(args.grad_out, b, t) : *grad_out) * *static_cast<const Acc*>(args.inv_denom.data);
  const Acc* weight = static_cast<const Acc*>(args.weight.data);

  Acc stats[kNumStats] = {};
  int64_t y = -1;
  if (args.stats.data) {
#pragma unroll
    for (int j = 0; j < kNumStats; ++j) stats[j] = static_cast<const Acc*>(args.stats.data)[j * N + i];
    y = *at<int64_t>(args.target, b, t);
  }
  const bool full = stats[kAF] != 0 || stats[kSF] != 0 || stats[kDF] != 0;
  const bool rest = stats[kAS] != 0 || stats[kSS] != 0 || stats[kDS] != 0;
  const T* row = full || rest ? at<T>(args.input, b, t) : nullptr;
  const uint8_t* gone = rest ? static_cast<const uint8_t*>(excluded.data) + b * V : nullptr;
  const auto dense = [&](int64_t v) {
    const Acc z = capped(to_acc(row[v * args.input.strides[2]]), o.cap);
    const Acc w = o.smoothing > 0 && weight ? weight[v] : Acc(1);
    Acc dz = 0;
    if (full) dz += stats[kAF] * exp(z - stats[kLseF]) - stats[kSF] * w - (v == y ? stats[kDF] : Acc(0));
    if (rest && (gone[v] == 0 || v == y))
      dz += stats[kAS] * exp(z - stats[kLseS]) - stats[kSS] * w - (v == y ? stats[kDS] : Acc(0));
    return o.cap > 0 ? dz * (1 - (z / o.cap) * (z / o.cap)) : dz;
  };

  for (int p = 0; p < kPacksPerThread; ++p) {
    const int64_t v = before + (static_cast<int64_t>(p) * kThreads + threadIdx.x) * kPack;
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const bool inside = v + j >= 0 && v + j < V;
      from_acc(&pack.values[j], row && inside ? g * dense(v + j) : Acc(0));
    }
    if (v >= 0 && v + kPack <= V) {
      store_16(dx + v, pack);
    } else {
      for (int j = 0; j < kPack; ++j)
        if (v + j >= 0 && v + j < V) dx[v + j] = pack.values[j];
    }
  }
  if (!args.cols.data) return;
  __syncthreads();  // the piece is written before its candidates are written over it
  const int64_t C = args.cols.sizes[2];
  for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
    const int64_t v = static_cast<const int32_t*>(args.cols.data)[i * C + c];
    if (v < 0 || v < before || v >= before + kPiece) continue;
    const Acc dz = static_cast<const Acc*>(args.dset.data)[i * C + c] + (row ? dense(v) : Acc(0));
    from_acc(dx + v, g * dz);
  }
}

template <typename T>
void forward(const SubsetCrossEntropyForward& args, const Tensor& excluded, const SubsetOptions& o, cudaStream_t stream) {
  using Acc = typename AccOf<T>::type;
  const int64_t N = args.input.sizes[0] * args.input.sizes[1];
  const int threads = o.is_dense() ? kThreads : kSetThreads;
  forward_kernel<T><<<grid_of(kOp, "input", N), threads, 0, stream>>>(args, excluded, params_of<Acc>(o));
  check_launch(kOp);
  Acc* scratch = static_cast<Acc*>(args.scratch.data);
  if (o.reduction != 0) {
    reduce_kernel<Acc><<<1, kReduceThreads, 0, stream>>>(scratch, N, static_cast<Acc*>(args.out.data),
                                                         static_cast<Acc*>(args.inv_denom.data), o.reduction == 1);
    check_launch(kOp);
  }
}

template <typename T>
void backward(const SubsetCrossEntropyBackward& args, const Tensor& excluded, const SubsetOptions& o, cudaStream_t stream) {
  using Acc = typename AccOf<T>::type;
  constexpr int64_t kPack = Pack<T>::kSize, kPiece = static_cast<int64_t>(kThreads) * kPacksPerThread * kPack;
  const int64_t N = args.dinput.sizes[0] * args.dinput.sizes[1], V = args.dinput.sizes[2];
  const int64_t pieces = (V + kPack - 1 + kPiece - 1) / kPiece;
  backward_kernel<T><<<grid_of(kOp, "input", N * pieces), kThreads, 0, stream>>>(args, excluded, params_of<Acc>(o), pieces);
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
      bad(kOp, "input", "be float32, float64, float16 or bfloat16", static_cast<int>(dtype), "convert the logits");
  }
}

void check_excluded(const Tensor& excluded, int64_t B, int64_t V, const SubsetOptions& o) {
  if (o.subset != Subset::kReverse) return;
  check_shape(kOp, "excluded", excluded, {B, V});
  check_dtype(kOp, "excluded", excluded, DType::kUInt8);
  check_contiguous(kOp, "excluded", excluded);
}

}  // namespace

void subset_cross_entropy_fwd_cuda(const SubsetCrossEntropyForward& args, const Tensor& excluded,
                                   const SubsetOptions& options, void* stream) {
  check_subset_cross_entropy(args, options);
  check_excluded(excluded, args.input.sizes[0], args.input.sizes[2], options);
  if (options.reduction != 0) {
    check_shape(kOp, "scratch", args.scratch, {2, args.input.sizes[0], args.input.sizes[1]});
    check_dtype(kOp, "scratch", args.scratch, args.out.dtype);
    check_contiguous(kOp, "scratch", args.scratch);
  }
  dispatch(args.input.dtype,
           [&](auto t) { forward<decltype(t)>(args, excluded, options, static_cast<cudaStream_t>(stream)); });
}

void subset_cross_entropy_bwd_cuda(const SubsetCrossEntropyBackward& args, const Tensor& excluded,
                                   const SubsetOptions& options, void* stream) {
  check_subset_cross_entropy(args, options);
  check_excluded(excluded, args.dinput.sizes[0], args.dinput.sizes[2], options);
  if (const auto offset = reinterpret_cast<uintptr_t>(args.dinput.data) % 16)  // it is written by 16 bytes
    bad(kOp, "dinput", "start at a multiple of 16 bytes", offset, "pass a fresh tensor");
  dispatch(args.dinput.dtype,
           [&](auto t) { backward<decltype(t)>(args, excluded, options, static_cast<cudaStream_t>(stream)); });
}

}  // namespace fastcap
