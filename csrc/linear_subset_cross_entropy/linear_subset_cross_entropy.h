// Softmax cross-entropy over a subset of the vocabulary, fused with the language-model head: what runs between the matrix
// products, which are torch's. Maths and options: ../common/subset.h; plans and costs:
// docs/math/linear_subset_cross_entropy.md.
//
// A token's loss needs scores of few words (`set`: its caption's, by a product with gathered rows of the head) or of all
// (`rows`, or `absorb`, `finish` and `emit`: n dense rows, in panels [n, P] of columns [begin, begin + P) of the logits).
//
//   rows    a panel of all V columns: the losses; then the logits become their gradient in place
//   absorb  a panel: its columns go into each row's running sums, and the set's logits are picked
//   finish  all panels absorbed: the losses, and what `emit` needs
//   emit    a panel, recomputed: the logits become their gradient, in place
//
// The gradient of the head is a sum over tokens by word: `group` numbers the words in order, `add_rows` adds rows of equal
// number in a fixed order, `write_rows` puts the sums where they belong.
#pragma once
#include <cstdint>

#include "../common/subset.h"
#include "../common/tensor.h"

namespace fastcap {

// The labels of a batch, and what its losses choose from. acc is double where the scores are double, else float.
struct LinearTokens {
  Tensor target;        // [B, T] int64
  Tensor ids;           // [B or 1, T or 1, K] int64 (kReverse: [B, 1, K], what is excluded); absent for kFull
  Tensor weight;        // [V] acc, contiguous; or absent
  Tensor token_weight;  // [B, T] acc; or absent
  Tensor bias;          // [V] acc, contiguous; or absent
  int64_t V;
};

// Running sums of a dense row, per part: largest logit, sum of exp(z - it), sum of w, sum of w z.
enum LinearState : int { kMaxF = 0, kSumF, kWF, kWzF, kMaxS, kSumS, kWS, kWzS, kNumLinearState };

// Checks the labels. rows [B * T or B] int64: the tokens that need all logits, in order, then -1. inv_denom [] acc: 1 / (sum
// of the valid tokens' class weights) for mean, 0 where that is 0; else 1. Returns how many rows there are.
int64_t linear_subset_cross_entropy_tokens_cpu(const LinearTokens& tokens, const Tensor& rows, const Tensor& inv_denom,
                                               const SubsetOptions& options);

// scores [B, T, K] contiguous: hidden states times the ids' rows of the head. score_y [B, T]: times the target's; absent
// where the target of token t is ids[t] (K = T). loss [B, T] acc: written for tokens with a set part. dset: d loss / d
// score, [B, T, K], or [B, T, K + 1] with the target's first where score_y is given, contiguous, every element written; or
// absent.
void linear_subset_cross_entropy_set_cpu(const LinearTokens& tokens, const Tensor& scores, const Tensor& score_y,
                                         const Tensor& loss, const Tensor& dset, const SubsetOptions& options, int threads);

// logits [n, V] contiguous, bias not yet added; rows [n] int64. loss [B, T]: written at these rows.
void linear_subset_cross_entropy_rows_cpu(const LinearTokens& tokens, const Tensor& logits, const Tensor& rows,
                                          const Tensor& loss, bool need_grad, const SubsetOptions& options, int threads);

// logits [n, P] contiguous; state [n, kNumLinearState] double, -inf maxima and zeros before the first panel;
// picks [n, K + 1] acc: the set's capped logits, the target's first.
void linear_subset_cross_entropy_absorb_cpu(const LinearTokens& tokens, const Tensor& logits, int64_t begin,
                                            const Tensor& rows, const Tensor& state, const Tensor& picks,
                                            const SubsetOptions& options, int threads);

// stats [kNumStats, n] acc; cols [n, K + 1] int32 and dset [n, K + 1] acc of a mixture's set part, or absent.
void linear_subset_cross_entropy_finish_cpu(const LinearTokens& tokens, const Tensor& rows, const Tensor& state,
                                            const Tensor& picks, const Tensor& loss, const Tensor& stats, const Tensor& cols,
                                            const Tensor& dset, const SubsetOptions& options);

void linear_subset_cross_entropy_emit_cpu(const LinearTokens& tokens, const Tensor& logits, int64_t begin,
                                          const Tensor& rows, const Tensor& stats, const Tensor& cols, const Tensor& dset,
                                          const SubsetOptions& options, int threads);

// ids [M] int64 contiguous -> group [M] int64: the place of each id among the distinct ones, in ascending order; -1 for
// `pad`. distinct [M] int64. Returns how many distinct ids there are.
int64_t linear_subset_cross_entropy_group_cpu(const Tensor& ids, int64_t pad, int64_t V, const Tensor& group,
                                              const Tensor& distinct);

// values[group[j]] += (factor ? factor[j] : 1) * source[j / share], j ascending. values [U, H] acc contiguous; group [M];
// factor [M] acc contiguous, or absent; source [M / share, H] contiguous, of any float type.
void linear_subset_cross_entropy_add_rows_cpu(const Tensor& values, const Tensor& group, const Tensor& factor,
                                              const Tensor& source, int64_t share, int threads);

// out[ids[u]] = values[u], or += where `add`. out [V, H], rows contiguous, of any float type. With `clear` every other row
// becomes 0.
void linear_subset_cross_entropy_write_rows_cpu(const Tensor& out, const Tensor& ids, const Tensor& values, bool add,
                                                bool clear, int threads);

}  // namespace fastcap
