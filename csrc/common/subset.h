// Softmax cross-entropy over a subset of the vocabulary: the maths and the options that its operations share.
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
#pragma once
#include <cstdint>

namespace fastcap {

enum class Subset : int { kSet = 0, kReverse = 1, kFull = 2 };

// The dense parts' log-sum-exp and coefficients, kept for the backward; A, S and D times the part's coefficient.
enum Stat : int { kLseF = 0, kAF, kSF, kDF, kLseS, kAS, kSS, kDS, kNumStats };

struct SubsetOptions {
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

}  // namespace fastcap
