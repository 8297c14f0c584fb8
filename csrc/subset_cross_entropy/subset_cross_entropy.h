// Softmax cross-entropy over a subset of the vocabulary, from logits.
//
// The maths, the options and the kept statistics are in ../common/subset.h.
//
// Floor: forward 32 bytes (a sector) per gathered logit, and 1 read of the rows that use F or kReverse. Backward: 1 write of
// [B, T, V]; the set's gradient is formed in the forward and kept as (column, value) pairs, so that a loss without F
// never needs the logits again.
#pragma once
#include "../common/subset.h"
#include "../common/tensor.h"

namespace fastcap {

// acc is float, or double where input is double. K = ids.sizes[2]; C = K + 1 columns, the target's first.
struct SubsetCrossEntropyForward {
  Tensor input;         // [B, T, V] any strides; float, double, half or bfloat16
  Tensor target;        // [B, T] int64, any strides
  Tensor ids;           // [B, T, K] int64, any strides (0 where shared); kSet, kReverse (there [B, 1, K]: what is excluded)
  Tensor weight;        // [V] acc, contiguous; or absent
  Tensor token_weight;  // [B, T] acc, any strides; or absent
  Tensor out;           // [] for mean and sum, or [B, T]; acc
  Tensor inv_denom;     // [] acc: 1 / (sum of the valid tokens' class weights) for mean, 0 where that is 0; else 1
  Tensor stats;         // [kNumStats, B, T] acc; or absent: no gradient is wanted, or no dense part
  Tensor cols;          // [B, T, C] int32: columns of dset, -1 where there is none; or absent
  Tensor dset;          // [B, T, C] acc: d loss / d x of the set part at those columns
  Tensor scratch;       // [2, B, T] acc: each token's loss and denominator, before they are reduced (GPU)
};

struct SubsetCrossEntropyBackward {
  Tensor grad_out;   // [] or [B, T], acc, any strides
  Tensor inv_denom;  // [] acc
  Tensor input;      // [B, T, V]; absent where no dense part
  Tensor target;     // [B, T] int64
  Tensor ids;        // [B, 1, K] int64: what kReverse excludes; else absent
  Tensor weight;     // [V] acc; or absent
  Tensor stats;      // as the forward left them
  Tensor cols;
  Tensor dset;
  Tensor dinput;  // [B, T, V] contiguous; every element is written
};

void subset_cross_entropy_fwd_cpu(const SubsetCrossEntropyForward& args, const SubsetOptions& options, int threads);
void subset_cross_entropy_bwd_cpu(const SubsetCrossEntropyBackward& args, const SubsetOptions& options, int threads);

// `stream` is a cudaStream_t. `excluded` [B, V] uint8: 1 where kReverse excludes the id (the row's own target stays in).
void subset_cross_entropy_fwd_cuda(const SubsetCrossEntropyForward& args, const Tensor& excluded,
                                   const SubsetOptions& options, void* stream);
void subset_cross_entropy_bwd_cuda(const SubsetCrossEntropyBackward& args, const Tensor& excluded,
                                   const SubsetOptions& options, void* stream);

// Shapes, dtypes and options, checked before any pointer is followed.
void check_subset_cross_entropy(const SubsetCrossEntropyForward& args, const SubsetOptions& options);
void check_subset_cross_entropy(const SubsetCrossEntropyBackward& args, const SubsetOptions& options);

}  // namespace fastcap
