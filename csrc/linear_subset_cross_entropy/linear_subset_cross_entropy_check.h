// Shapes, dtypes and ranges, checked before any pointer is followed.
#pragma once
#include "../common/check.h"
#include "linear_subset_cross_entropy.h"

namespace fastcap {

void check_linear_tokens(const LinearTokens& args, const SubsetOptions& o);
// every label and id is a word, or marks none
void check_linear_values(const LinearTokens& args, const SubsetOptions& o);
// the dtypes of factors and biases, for scores of `dtype`
void check_linear_sums(const LinearTokens& args, DType dtype);
void check_linear_set(const LinearTokens& args, const Tensor& scores, const Tensor& score_y, const Tensor& loss,
                      const Tensor& dset);
void check_linear_rows(const Tensor& rows, int64_t N);
void check_linear_places(const Tensor& rows, int64_t N);
void check_linear_panel(const LinearTokens& args, const Tensor& logits, int64_t begin, const Tensor& rows);
void check_linear_state(const LinearTokens& args, const Tensor& rows, const Tensor& state, const Tensor& picks, DType dtype,
                        const SubsetOptions& o);
void check_linear_loss(const LinearTokens& args, const Tensor& loss, DType dtype);
void check_linear_gradient(const LinearTokens& args, const Tensor& rows, const Tensor& stats, const Tensor& cols,
                           const Tensor& dset, DType dtype);

}  // namespace fastcap
