#include "../common/check.h"
#include "attention_coverage_from_scores.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "attention_coverage_from_scores";

void check_scores(const Tensor& x) {
  if (x.ndim != 4) bad(kOp, "scores", "have shape [n, m, R, L]", shape_of(x), "call the public function");
  check_shape(kOp, "scores", x, {x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3]});
  check_contiguous(kOp, "scores", x);
  if (x.dtype != DType::kFloat32 && x.dtype != DType::kFloat64)
    bad(kOp, "scores", "be float32 or float64", static_cast<int>(x.dtype), "call the public function");
  if (x.sizes[3] < 1) bad(kOp, "scores", "have at least one location", shape_of(x), "call the public function");
}

template <typename Args>
void check_masks(const Args& args) {
  const int64_t n = args.scores.sizes[0], R = args.scores.sizes[2], L = args.scores.sizes[3];
  if (args.key_mask) {
    check_shape(kOp, "key_mask", args.key_mask, {n, L});
    check_dtype(kOp, "key_mask", args.key_mask, DType::kUInt8);
    if (L > 1 && args.key_mask.strides[1] != 1)
      bad(kOp, "key_mask", "have locations side by side", args.key_mask.strides[1], "call .contiguous() on it");
  }
  if (args.valid) {
    check_shape(kOp, "valid", args.valid, {n, R});
    check_dtype(kOp, "valid", args.valid, DType::kUInt8);
  }
}

void check_of(const char* name, const Tensor& x, const Tensor& scores, int last) {
  check_shape(kOp, name, x, {scores.sizes[0], scores.sizes[1], scores.sizes[last]});
  check_dtype(kOp, name, x, scores.dtype);
}

}  // namespace

void check_score_rows(const ScoreRowsForward& args) {
  check_scores(args.scores);
  check_masks(args);
  if (args.lse) check_of("lse", args.lse, args.scores, 2);
  check_of("sums", args.sums, args.scores, 3);
  check_contiguous(kOp, "sums", args.sums);
}

void check_score_rows(const ScoreRowsBackward& args) {
  check_scores(args.scores);
  check_masks(args);
  check_of("lse", args.lse, args.scores, 2);
  check_of("residual", args.residual, args.scores, 3);
  if (args.grad_out.ndim > 0) {
    check_of("grad_out", args.grad_out, args.scores, 3);
    return;
  }
  check_shape(kOp, "grad_out", args.grad_out, {});
  check_dtype(kOp, "grad_out", args.grad_out, args.scores.dtype);
  if (!args.grad_out) bad(kOp, "grad_out", "hold memory", "none", "call the public function");
}

}  // namespace fastcap
