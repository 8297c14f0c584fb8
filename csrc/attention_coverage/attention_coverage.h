// Attention coverage (the doubly stochastic penalty of Show, Attend and Tell).
//
//   S_bhl = sum of alpha_bhtl over the valid steps t of caption b     how much attention location l got
//   r_bhl = tau_b - S_bhl                                             the residual, kept for the backward
//   out   = sum of r^2 / divisor, or r^2 itself                       mean: B heads L; batchmean: B heads; sum: 1
//   d out / d alpha_bhtl = -2 g r_bhl / divisor at valid steps, 0 at others: the same for every valid t
//
// Floor: forward, one read of the valid rows of alpha and one write of r [B, heads, L]. Backward: one read of r, and one
// write of a row per caption and head where all steps are valid (the caller expands it over T), else of [B, heads, T, L].
#pragma once
#include "../common/tensor.h"

namespace fastcap {

enum class CoverageReduction : int { kNone = 0, kMean, kBatchMean, kSum };

// acc is float, or double where alpha is double. Without heads alpha is [B, T, L], and out, residual and dalpha have no
// heads.
struct AttentionCoverageForward {
  Tensor alpha;     // [B, heads, T, L] any strides; float, double, half or bfloat16
  Tensor valid;     // [B, T] uint8, any strides: 0 where the step does not count; or absent: all do
  Tensor tau;       // [B] acc, any stride; or absent: `target` for all captions
  Tensor out;       // [], or [B, heads, L] for kNone; acc, contiguous
  Tensor residual;  // [B, heads, L] acc, contiguous; or absent: no gradient is wanted
  Tensor scratch;   // [n] acc: what each block sums (GPU); n from attention_coverage_blocks_cuda
  double target;
  CoverageReduction reduction;
};

struct AttentionCoverageBackward {
  Tensor grad_out;  // [], or [B, heads, L] for kNone; acc, any strides
  Tensor residual;  // as the forward left it
  Tensor valid;     // [B, T] uint8; or absent
  Tensor dalpha;    // [B, heads, T, L] contiguous, or [B, heads, 1, L] without `valid`; every element is written
  CoverageReduction reduction;
};

void attention_coverage_fwd_cpu(const AttentionCoverageForward& args, int threads);
void attention_coverage_bwd_cpu(const AttentionCoverageBackward& args, int threads);

// `stream` is a cudaStream_t.
int64_t attention_coverage_blocks_cuda(const Tensor& alpha);
void attention_coverage_fwd_cuda(const AttentionCoverageForward& args, void* stream);
void attention_coverage_bwd_cuda(const AttentionCoverageBackward& args, void* stream);

// alpha or dalpha, with heads of 1 and stride 0 where it has none. Column l of the captions' and heads' N = B heads rows.
struct CoverageShape {
  int64_t B, heads, T, L;
  int64_t stride_b, stride_h, stride_t, stride_l;

  explicit CoverageShape(const Tensor& x) {
    const bool has_heads = x.ndim == 4;
    const int t = has_heads ? 2 : 1;
    B = x.sizes[0], heads = has_heads ? x.sizes[1] : 1, T = x.sizes[t], L = x.sizes[t + 1];
    stride_b = x.strides[0], stride_h = has_heads ? x.strides[1] : 0, stride_t = x.strides[t], stride_l = x.strides[t + 1];
  }
  int64_t rows() const { return B * heads; }
  double scale(CoverageReduction reduction) const {
    const int64_t divisor = reduction == CoverageReduction::kMean        ? B * heads * L
                            : reduction == CoverageReduction::kBatchMean ? B * heads
                                                                         : 1;
    return divisor == 0 ? 0.0 : 1.0 / static_cast<double>(divisor);
  }
};

// Shapes, dtypes and options, checked before any pointer is followed.
void check_attention_coverage(const AttentionCoverageForward& args);
void check_attention_coverage(const AttentionCoverageBackward& args);

}  // namespace fastcap
