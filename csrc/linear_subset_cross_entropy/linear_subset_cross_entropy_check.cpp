#include "linear_subset_cross_entropy_check.h"

#include <limits>

#include "../common/subset_rows.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "linear_subset_cross_entropy";

DType acc_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

void check_whole(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, DType dtype) {
  check_shape(kOp, name, tensor, sizes);
  check_dtype(kOp, name, tensor, dtype);
  check_contiguous(kOp, name, tensor);
}

void check_factor(const char* name, const Tensor& tensor, int64_t V) {
  if (!tensor) return;
  check_shape(kOp, name, tensor, {V});
  check_contiguous(kOp, name, tensor);
  if (tensor.dtype != DType::kFloat32) check_dtype(kOp, name, tensor, DType::kFloat64);
}

int64_t candidates(const LinearTokens& args) { return args.ids ? args.ids.sizes[2] : 0; }

}  // namespace

void check_linear_tokens(const LinearTokens& args, const SubsetOptions& o) {
  if (args.V < 1 || args.V > std::numeric_limits<int32_t>::max())
    bad(kOp, "linear_weight", "have 1 to 2^31 - 1 rows", args.V, "check its shape, [V, H]");
  if (args.target.ndim != 2) bad(kOp, "target", "have shape [B, T]", shape_of(args.target), "add a batch dimension");
  const int64_t B = args.target.sizes[0], T = args.target.sizes[1];
  check_shape(kOp, "target", args.target, {B, T});
  check_dtype(kOp, "target", args.target, DType::kInt64);
  if (o.subset != Subset::kFull) {
    const Tensor& ids = args.ids;
    const bool fits = ids.ndim == 3 && (ids.sizes[0] == B || ids.sizes[0] == 1) && (ids.sizes[1] == T || ids.sizes[1] == 1);
    if (!fits || (o.subset == Subset::kReverse && ids.sizes[1] != 1))
      bad(kOp, "subset", "have shape [B or 1, T or 1, K]", shape_of(ids), "pass ids of shape [K] or [B, K]");
    check_shape(kOp, "subset", ids, {ids.sizes[0], ids.sizes[1], ids.sizes[2]});
    check_dtype(kOp, "subset", ids, DType::kInt64);
  }
  check_factor("weight", args.weight, args.V);
  check_factor("linear_bias", args.bias, args.V);
  if (args.token_weight) check_shape(kOp, "token_weight", args.token_weight, {B, T});
}

void check_linear_values(const LinearTokens& args, const SubsetOptions& o) {
  check_target(kOp, args.target, o.ignore_index, args.V);
  if (o.subset == Subset::kFull) return;
  check_ids(kOp, broadcast_ids(args.ids, args.target.sizes[0], args.target.sizes[1]), "subset", o.ids_pad, args.V);
}

void check_linear_sums(const LinearTokens& args, DType dtype) {
  const DType acc = acc_of(dtype);
  if (args.weight) check_dtype(kOp, "weight", args.weight, acc);
  if (args.bias) check_dtype(kOp, "linear_bias", args.bias, acc);
  if (args.token_weight) check_dtype(kOp, "token_weight", args.token_weight, acc);
}

void check_linear_loss(const LinearTokens& args, const Tensor& loss, DType dtype) {
  check_whole("loss", loss, {args.target.sizes[0], args.target.sizes[1]}, acc_of(dtype));
  check_linear_sums(args, dtype);
}

void check_linear_set(const LinearTokens& args, const Tensor& scores, const Tensor& score_y, const Tensor& loss,
                      const Tensor& dset) {
  const int64_t B = args.target.sizes[0], T = args.target.sizes[1], K = candidates(args);
  check_whole("scores", scores, {B, T, K}, scores.dtype);
  if (score_y)
    check_whole("score_y", score_y, {B, T}, scores.dtype);
  else if (K != T)
    bad(kOp, "scores", "have a column a token where the target's own are not given", shape_of(scores), "pass score_y");
  check_linear_loss(args, loss, scores.dtype);
  if (dset) check_whole("dset", dset, {B, T, K + (score_y ? 1 : 0)}, acc_of(scores.dtype));
}

void check_linear_rows(const Tensor& rows, int64_t N) {
  if (!rows) return;
  if (rows.ndim != 1 || rows.sizes[0] > N)
    bad(kOp, "rows", "have at most B * T elements", shape_of(rows), "pass the forward's");
  check_whole("rows", rows, {rows.sizes[0]}, DType::kInt64);
}

void check_linear_places(const Tensor& rows, int64_t N) {
  check_linear_rows(rows, N);
  for (int64_t i = 0; i < (rows ? rows.sizes[0] : 0); ++i)
    if (rows.as<int64_t>()[i] < 0 || rows.as<int64_t>()[i] >= N)
      bad(kOp, "rows", "be tokens, in [0, " + std::to_string(N) + ")", rows.as<int64_t>()[i], "pass the forward's");
}

void check_linear_panel(const LinearTokens& args, const Tensor& logits, int64_t begin, const Tensor& rows) {
  check_linear_places(rows, args.target.numel());
  check_linear_sums(args, logits.dtype);
  if (logits.ndim != 2) bad(kOp, "logits", "have shape [n, P]", shape_of(logits), "pass a panel");
  check_whole("logits", logits, {rows ? rows.sizes[0] : 0, logits.sizes[1]}, logits.dtype);
  if (begin < 0 || begin > args.V - logits.sizes[1])
    bad(kOp, "begin", "be the first column of a panel inside the vocabulary", begin, "pass a panel within [0, V)");
}

void check_linear_state(const LinearTokens& args, const Tensor& rows, const Tensor& state, const Tensor& picks, DType dtype,
                        const SubsetOptions& o) {
  const int64_t n = rows ? rows.sizes[0] : 0;
  check_whole("state", state, {n, kNumLinearState}, DType::kFloat64);
  check_whole("picks", picks, {n, 1 + (o.subset == Subset::kSet ? candidates(args) : 0)}, acc_of(dtype));
}

void check_linear_gradient(const LinearTokens& args, const Tensor& rows, const Tensor& stats, const Tensor& cols,
                           const Tensor& dset, DType dtype) {
  const int64_t n = rows ? rows.sizes[0] : 0;
  if (stats) check_whole("stats", stats, {kNumStats, n}, acc_of(dtype));
  if (!cols) return;
  check_whole("cols", cols, {n, candidates(args) + 1}, DType::kInt32);
  check_whole("dset", dset, {n, candidates(args) + 1}, acc_of(dtype));
}

}  // namespace fastcap
