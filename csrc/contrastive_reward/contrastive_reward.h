// Contrastive rewards: what lies between the matrix products of the CPU's blocks of similarities.
//
//   s_pq = a_p b_q <text_p, image_q>       <., .> a product, made into scratch by the caller; a, b are scale and 1 / norm
//   row_p = log sum of exp(s_pq) over q != positive_p               forward: running (top, sum), one block after another;
//   col_q = log sum of exp(s_pq) over p with positive_p != q        or the largest and its index
//   own_p = s_pq at q = positive_p
//   ds_pq = drow_p exp(s_pq - row_p) + dcol_q exp(s_pq - col_q)     backward: the scratch becomes ds_pq a_p b_q, in place,
//         = down_p                         at q = positive_p        and its products with text and image are the gradients
//
// The pair leaves the sums before they are formed, so nothing cancels however far it leads. Two exponentials an element
// cost little beside the 2 D operations of its product, and the [P, Q] scores are never in memory whole.
//
// Other texts of the same image ("others") are in no column: they are merged in afterwards, each text without itself.
//   value_p = log sum of exp(own_p') over p' != p with positive_p' = positive_p, or the largest and its index
#pragma once
#include "../common/tensor.h"

namespace fastcap {

// acc is float, or double. R rows and C columns of the scores; an absent row_top (col_top): rows (columns) are not wanted.
struct ScoreBlockForward {
  Tensor scores;      // [R, C] acc, contiguous; overwritten, and of no further use
  Tensor positive;    // [R] int64: of all columns; any value, and those outside the block have no pair in it
  Tensor row_factor;  // [R] acc
  Tensor col_factor;  // [C] acc
  Tensor own;         // out: [R] acc; written where the pair lies in the block
  Tensor row_top;     // in and out: [R] acc, -inf before the first block
  Tensor row_sum;     // in and out: [R] double, 0 before the first block; or absent: the largest is wanted
  Tensor row_index;   // in and out: [R] int64, -1 before the first block; with row_top and without row_sum
  Tensor col_top;     // [C], as for rows
  Tensor col_sum;
  Tensor col_index;
  int64_t first_row;  // of the block, in all rows
  int64_t first_col;
};

struct ScoreBlockBackward {
  Tensor scores;      // [R, C] acc, contiguous: products, then ds a b
  Tensor positive;    // [R] int64
  Tensor row_factor;  // [R] acc
  Tensor col_factor;  // [C] acc
  Tensor down;        // [R] acc
  Tensor row;         // [R] acc, or absent with drow
  Tensor drow;        // [R] acc
  Tensor col;         // [C] acc, or absent with dcol
  Tensor dcol;        // [C] acc
  int64_t first_col;
};

struct OthersForward {
  Tensor own;       // [P] acc
  Tensor positive;  // [P] int64; those outside [0, Q) have no others
  Tensor value;     // out: [P] acc; -inf where there are none
  Tensor index;     // out: [P] int64, -1 where there are none; or absent: the log-sum-exp is wanted, not the largest
  int64_t Q;
};

struct OthersBackward {
  Tensor dvalue;    // [P] acc
  Tensor value;     // [P] acc, the log-sum-exp
  Tensor own;       // [P] acc
  Tensor positive;  // [P] int64
  Tensor down;      // out: [P] acc
  int64_t Q;
};

void contrastive_reward_block_fwd_cpu(const ScoreBlockForward& args, int threads);
void contrastive_reward_block_bwd_cpu(const ScoreBlockBackward& args, int threads);
void contrastive_reward_others_fwd_cpu(const OthersForward& args);
void contrastive_reward_others_bwd_cpu(const OthersBackward& args);

// Shapes, dtypes and layouts, checked before any pointer is followed.
void check_score_block(const ScoreBlockForward& args);
void check_score_block(const ScoreBlockBackward& args);
void check_others(const OthersForward& args);
void check_others(const OthersBackward& args);

}  // namespace fastcap
