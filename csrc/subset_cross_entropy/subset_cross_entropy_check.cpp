#include <limits>

#include "../common/check.h"
#include "subset_cross_entropy.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "subset_cross_entropy";

}  // namespace

void check_subset_cross_entropy(const SubsetCrossEntropyForward& args, const SubsetOptions& o) {
  if (args.input.ndim != 3) bad(kOp, "input", "have shape [B, T, V]", shape_of(args.input), "add a batch dimension");
  const int64_t B = args.input.sizes[0], T = args.input.sizes[1], V = args.input.sizes[2];
  const DType acc = args.input.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check_shape(kOp, "input", args.input, {B, T, V});
  if (V < 1 || V > std::numeric_limits<int32_t>::max())
    bad(kOp, "input", "have a vocabulary of 1 to 2^31 - 1 words", V, "check its last dimension");
  check_shape(kOp, "target", args.target, {B, T});
  check_dtype(kOp, "target", args.target, DType::kInt64);
  if (o.subset != Subset::kFull) {
    const bool reverse = o.subset == Subset::kReverse;
    if (args.ids.ndim != 3 || args.ids.sizes[0] != B || args.ids.sizes[1] != (reverse ? 1 : T))
      bad(kOp, "subset", reverse ? "have shape [B, 1, K]" : "have shape [B, T, K]", shape_of(args.ids),
          "pass ids of shape [K] or [B, K]");
    check_shape(kOp, "subset", args.ids, {B, args.ids.sizes[1], args.ids.sizes[2]});
    check_dtype(kOp, "subset", args.ids, DType::kInt64);
  }
  if (args.weight) {
    check_shape(kOp, "weight", args.weight, {V});
    check_dtype(kOp, "weight", args.weight, acc);
    check_contiguous(kOp, "weight", args.weight);
  }
  if (args.token_weight) {
    check_shape(kOp, "token_weight", args.token_weight, {B, T});
    check_dtype(kOp, "token_weight", args.token_weight, acc);
  }
  if (o.reduction == 0)
    check_shape(kOp, "out", args.out, {B, T});
  else
    check_shape(kOp, "out", args.out, {});
  check_dtype(kOp, "out", args.out, acc);
  check_contiguous(kOp, "out", args.out);
  check_shape(kOp, "inv_denom", args.inv_denom, {});
  check_dtype(kOp, "inv_denom", args.inv_denom, acc);
  if (args.stats) {
    check_shape(kOp, "stats", args.stats, {kNumStats, B, T});
    check_dtype(kOp, "stats", args.stats, acc);
    check_contiguous(kOp, "stats", args.stats);
  }
  if (args.cols) {
    check_shape(kOp, "cols", args.cols, {B, T, args.ids.sizes[2] + 1});
    check_shape(kOp, "dset", args.dset, {B, T, args.ids.sizes[2] + 1});
    check_dtype(kOp, "cols", args.cols, DType::kInt32);
    check_dtype(kOp, "dset", args.dset, acc);
    check_contiguous(kOp, "cols", args.cols);
    check_contiguous(kOp, "dset", args.dset);
  }
}

void check_subset_cross_entropy(const SubsetCrossEntropyBackward& args, const SubsetOptions& o) {
  if (args.dinput.ndim != 3) bad(kOp, "dinput", "have shape [B, T, V]", shape_of(args.dinput), "add a batch dimension");
  const int64_t B = args.dinput.sizes[0], T = args.dinput.sizes[1], V = args.dinput.sizes[2];
  const DType acc = args.dinput.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check_shape(kOp, "dinput", args.dinput, {B, T, V});
  check_contiguous(kOp, "dinput", args.dinput);
  if (o.is_dense() && B * T > 0 && !args.stats)
    bad(kOp, "stats", "be the forward's, for rows that use the whole vocabulary", "none", "pass the forward's stats");
  if (o.reduction == 0)
    check_shape(kOp, "grad_out", args.grad_out, {B, T});
  else
    check_shape(kOp, "grad_out", args.grad_out, {});
  check_dtype(kOp, "grad_out", args.grad_out, acc);
  check_shape(kOp, "inv_denom", args.inv_denom, {});
  check_dtype(kOp, "inv_denom", args.inv_denom, acc);
  if (args.stats) {
    check_shape(kOp, "stats", args.stats, {kNumStats, B, T});
    check_dtype(kOp, "stats", args.stats, acc);
    check_contiguous(kOp, "stats", args.stats);
    check_shape(kOp, "input", args.input, {B, T, V});
    check_dtype(kOp, "input", args.input, args.dinput.dtype);
    check_shape(kOp, "target", args.target, {B, T});
    check_dtype(kOp, "target", args.target, DType::kInt64);
    if (o.subset == Subset::kReverse) {
      if (args.ids.ndim != 3 || args.ids.sizes[0] != B)
        bad(kOp, "subset", "have shape [B, 1, K]", shape_of(args.ids), "pass the forward's ids");
      check_shape(kOp, "subset", args.ids, {B, args.ids.sizes[1], args.ids.sizes[2]});
      check_dtype(kOp, "subset", args.ids, DType::kInt64);
    }
  }
  if (args.weight) {
    check_shape(kOp, "weight", args.weight, {V});
    check_dtype(kOp, "weight", args.weight, acc);
    check_contiguous(kOp, "weight", args.weight);
  }
  if (args.cols) {
    if (args.cols.ndim != 3) bad(kOp, "cols", "have shape [B, T, C]", shape_of(args.cols), "pass the forward's cols");
    const int64_t C = args.cols.sizes[2];
    check_shape(kOp, "cols", args.cols, {B, T, C});
    check_shape(kOp, "dset", args.dset, {B, T, C});
    check_dtype(kOp, "cols", args.cols, DType::kInt32);
    check_dtype(kOp, "dset", args.dset, acc);
    check_contiguous(kOp, "cols", args.cols);
    check_contiguous(kOp, "dset", args.dset);
  }
}

}  // namespace fastcap
