// Softmax cross-entropy over a subset of the vocabulary, from logits.
//
// A row is one token (b, t) with target y. z = x, or cap * tanh(x / cap). A part of the loss is a candidate set C and a
// coefficient; with class weights w, label smoothing e and z-loss c, n = |C| and W = sum_{k in C} w_k,
//
//   lse  = log sum_{k in C} exp z_k
//   part = (1 - e) w_y (lse - z_y) + e / n * sum_{k in C} w_k (lse - z_k) + c w_y lse^2
//   d part / d z_k = A p_k - S w_k - D [k = y],   p_k = exp(z_k - lse),  k in C
//   A = (1 - e) w_y + e / n W + 2 c w_y lse,   S = e / n,   D = (1 - e) w_y
//
//   loss = token_weight * (coefficient_F part_F + (1 - coefficient_F) part_S)
//
// F is the whole vocabulary: its coefficient is 1 for Subset::kFull and for the first valid token of a caption when
// `first_full`, else mle_weight. S is {y} and the row's ids (kSet), or all ids but the excluded, and y (kReverse).
// Repeated ids count once.
//
// Floor: forward 32 bytes (a sector) per gathered logit, and 1 read of the rows that use F or kReverse. Backward: 1 write of
// [B, T, V]; the set's gradient is formed in the forward and kept as (column, value) pairs, so that a loss without F
// never needs the logits again.
#pragma once
#include <cstdint>

#include "../common/tensor.h"

namespace fastcap {

enum class Subset : int { kSet = 0, kReverse = 1, kFull = 2 };

enum Stat : int { kLseF = 0, kAF, kSF, kDF, kLseS, kAS, kSS, kDS, kNumStats };

struct SubsetCrossEntropyOptions {
  Subset subset;
  bool first_full;
  double mle_weight;
  double label_smoothing;
  double logit_softcap;  // 0: none
  double z_loss;
  int64_t ignore_index;
  int64_t ids_pad;  // this value in `ids` means "no id"
  int reduction;    // 0 none, 1 mean, 2 sum

  // The rows' dense parts: whether the backward must read the logits.
  bool has_full() const { return subset == Subset::kFull || first_full || mle_weight > 0; }
  bool is_dense() const { return has_full() || subset == Subset::kReverse; }
};

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

void subset_cross_entropy_fwd_cpu(const SubsetCrossEntropyForward& args, const SubsetCrossEntropyOptions& options,
                                  int threads);
void subset_cross_entropy_bwd_cpu(const SubsetCrossEntropyBackward& args, const SubsetCrossEntropyOptions& options,
                                  int threads);

// `stream` is a cudaStream_t. `excluded` [B, V] uint8: 1 where kReverse excludes the id (the row's own target stays in).
void subset_cross_entropy_fwd_cuda(const SubsetCrossEntropyForward& args, const Tensor& excluded,
                                   const SubsetCrossEntropyOptions& options, void* stream);
void subset_cross_entropy_bwd_cuda(const SubsetCrossEntropyBackward& args, const Tensor& excluded,
                                   const SubsetCrossEntropyOptions& options, void* stream);

// Shapes, dtypes and options, checked before any pointer is followed.
void check_subset_cross_entropy(const SubsetCrossEntropyForward& args, const SubsetCrossEntropyOptions& options);
void check_subset_cross_entropy(const SubsetCrossEntropyBackward& args, const SubsetCrossEntropyOptions& options);

}  // namespace fastcap
