// Attention coverage from queries and keys: what lies between the matrix products of the CPU's blocks.
//
//   s_tl = scale q_t . k_l                 a product, made into scratch by the caller
//   P_tl = exp(s_tl - lse_t)               the softmax over the locations that there are
//   S_l  = sum of P_tl over valid steps    `fwd` makes lse and S of a block of rows
//   G_l  = coefficient r_l g_l             r = tau - S, g the upstream gradient, per location or one for all
//   W_tl = P_tl (G_l - sum_m P_tm G_m)     `bwd` turns s into W, in place; then dq = W k and dk = W^T q are products
//
// A block is n captions x m heads x R steps. A pass over a row of L scores that a product has just left in a cache costs
// little beside that product: the [T, L] weights are never in memory whole.
#pragma once
#include "../common/tensor.h"

namespace fastcap {

// acc is float, or double.
struct ScoreRowsForward {
  Tensor scores;    // [n, m, R, L] acc, contiguous; overwritten, and of no further use
  Tensor key_mask;  // [n, L] uint8, the last stride 1: 0 where there is no location (any score, NaN too); or absent: all are
  Tensor valid;     // [n, R] uint8: 0 where the step does not count (any scores); or absent: all do
  Tensor lse;       // out: [n, m, R] acc, any strides; inf where a step does not count or has no location; or absent
  Tensor sums;      // out: [n, m, L] acc, contiguous
  bool add;         // to what `sums` holds, for a block whose captions have had earlier steps
};

struct ScoreRowsBackward {
  Tensor scores;    // [n, m, R, L] acc, contiguous: s, then W
  Tensor key_mask;  // as in the forward
  Tensor valid;     // as in the forward
  Tensor lse;       // [n, m, R] acc, any strides
  Tensor residual;  // [n, m, L] acc, any strides
  Tensor grad_out;  // [] or [n, m, L] acc, any strides
  double coefficient;
};

void attention_coverage_from_scores_rows_fwd_cpu(const ScoreRowsForward& args, int threads);
void attention_coverage_from_scores_rows_bwd_cpu(const ScoreRowsBackward& args, int threads);

// Shapes, dtypes and layouts, checked before any pointer is followed.
void check_score_rows(const ScoreRowsForward& args);
void check_score_rows(const ScoreRowsBackward& args);

}  // namespace fastcap
