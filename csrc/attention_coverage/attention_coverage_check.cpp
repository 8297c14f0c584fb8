#include "../common/check.h"
#include "attention_coverage.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "attention_coverage";

void check_reduction(CoverageReduction reduction) {
  const int code = static_cast<int>(reduction);
  if (code < 0 || code > 3)
    bad(kOp, "reduction", "be 0 (none), 1 (mean), 2 (batchmean) or 3 (sum)", code, "call the public function");
}

// alpha or dalpha: [B, T, L] or [B, heads, T, L]
void check_weights(const char* name, const Tensor& x) {
  if (x.ndim == 3)
    check_shape(kOp, name, x, {x.sizes[0], x.sizes[1], x.sizes[2]});
  else if (x.ndim == 4)
    check_shape(kOp, name, x, {x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3]});
  else
    bad(kOp, name, "have shape [B, T, L] or [B, heads, T, L]", shape_of(x), "pass the attention weights");
  if (x.sizes[x.ndim - 1] < 1)
    bad(kOp, name, "have at least one location", shape_of(x), "pass the attention weights, locations last");
}

// [B, L] or [B, heads, L]
void check_sums(const char* name, const Tensor& x, const Tensor& like, DType acc) {
  if (like.ndim == 4)
    check_shape(kOp, name, x, {like.sizes[0], like.sizes[1], like.sizes[3]});
  else
    check_shape(kOp, name, x, {like.sizes[0], like.sizes[2]});
  check_dtype(kOp, name, x, acc);
}

DType acc_of(const Tensor& x) { return x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

}  // namespace

void check_attention_coverage(const AttentionCoverageForward& args) {
  check_reduction(args.reduction);
  check_weights("alpha", args.alpha);
  const CoverageShape s(args.alpha);
  const DType acc = acc_of(args.alpha);
  if (args.valid) {
    check_shape(kOp, "valid", args.valid, {s.B, s.T});
    check_dtype(kOp, "valid", args.valid, DType::kUInt8);
  }
  if (args.tau) {
    check_shape(kOp, "tau", args.tau, {s.B});
    check_dtype(kOp, "tau", args.tau, acc);
  }
  if (args.reduction == CoverageReduction::kNone) {
    check_sums("out", args.out, args.alpha, acc);
  } else {
    check_shape(kOp, "out", args.out, {});
    check_dtype(kOp, "out", args.out, acc);
    if (!args.out) bad(kOp, "out", "hold memory", "none", "call the public function");
  }
  check_contiguous(kOp, "out", args.out);
  if (args.residual) {
    check_sums("residual", args.residual, args.alpha, acc);
    check_contiguous(kOp, "residual", args.residual);
  }
}

void check_attention_coverage(const AttentionCoverageBackward& args) {
  check_reduction(args.reduction);
  check_weights("dalpha", args.dalpha);
  check_contiguous(kOp, "dalpha", args.dalpha);
  const CoverageShape s(args.dalpha);
  const DType acc = acc_of(args.dalpha);
  if (args.valid) {
    check_shape(kOp, "valid", args.valid, {s.B, s.T});
    check_dtype(kOp, "valid", args.valid, DType::kUInt8);
  } else if (s.T != 1) {
    bad(kOp, "dalpha", "have one step where all are valid", shape_of(args.dalpha), "expand it over the steps");
  }
  check_sums("residual", args.residual, args.dalpha, acc);
  check_contiguous(kOp, "residual", args.residual);
  if (args.reduction == CoverageReduction::kNone) {
    check_sums("grad_out", args.grad_out, args.dalpha, acc);
  } else {
    check_shape(kOp, "grad_out", args.grad_out, {});
    check_dtype(kOp, "grad_out", args.grad_out, acc);
    if (!args.grad_out) bad(kOp, "grad_out", "hold memory", "none", "call the public function");
  }
}

}  // namespace fastcap
