#include "../common/check.h"
#include "additive_attention.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "additive_attention";

DType acc_of(const Tensor& x) { return x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

void check_whole(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> sizes, DType dtype) {
  check_shape(kOp, argument, tensor, sizes);
  check_dtype(kOp, argument, tensor, dtype);
  check_contiguous(kOp, argument, tensor);
}

// Three dimensions, none but the first empty, of a float dtype; any strides.
void check_locations(const char* argument, const Tensor& x) {
  if (x.ndim != 3 || x.sizes[1] < 1 || x.sizes[2] < 1)
    bad(kOp, argument, "have shape [B, L, A or D] with L and A or D of at least 1", shape_of(x),
        "add the missing dimension");
  check_shape(kOp, argument, x, {x.sizes[0], x.sizes[1], x.sizes[2]});
  switch (x.dtype) {
    case DType::kFloat32:
    case DType::kFloat64:
    case DType::kFloat16:
    case DType::kBFloat16:
      return;
    default:
      bad(kOp, argument, "be float32, float64, float16 or bfloat16", static_cast<int>(x.dtype), "convert it");
  }
}

// The rows of `x` [n, *], which are at most those of keys or values.
int64_t check_rows(const char* argument, const Tensor& x, const Tensor& of) {
  if (x.ndim != 2 || x.sizes[0] > of.sizes[0])
    bad(kOp, argument, "have two dimensions, and at most the rows of keys and values", shape_of(x), "pass [n, *], n <= B");
  return x.sizes[0];
}

// A gradient of all of `x`, where there is one: of all its rows, then.
void check_gradient(const char* argument, const Tensor& dx, const Tensor& x, int64_t n) {
  if (!dx) return;
  if (n != x.sizes[0]) bad(kOp, argument, "be asked for with a query for each row", n, "pass as many queries as keys");
  check_whole(argument, dx, {x.sizes[0], x.sizes[1], x.sizes[2]}, x.dtype);
}

void check_steps(const char* argument, const Tensor& x, int64_t T, int64_t B, int64_t width, DType dtype) {
  check_shape(kOp, argument, x, {T, B, width});
  check_dtype(kOp, argument, x, dtype);
  if (x.strides[2] != 1 && width > 1)
    bad(kOp, argument, "have a last stride of 1", x.strides[2], "call .contiguous() on it");
}

}  // namespace

void check_additive_attention(const AdditiveWeightsForward& args) {
  check_locations("keys", args.keys);
  const int64_t L = args.keys.sizes[1], A = args.keys.sizes[2], n = check_rows("query", args.query, args.keys);
  const DType acc = acc_of(args.keys);
  check_whole("query", args.query, {n, A}, acc);
  check_whole("v", args.v, {A}, acc);
  if (args.mask) {
    check_rows("mask", args.mask, args.keys);
    if (args.mask.sizes[0] < n) bad(kOp, "mask", "have a row for each query", shape_of(args.mask), "pass [B, L]");
    check_whole("mask", args.mask, {args.mask.sizes[0], L}, DType::kUInt8);
  }
  check_whole("alpha", args.alpha, {n, L}, acc);
}

void check_additive_attention(const AdditiveWeightsBackward& args) {
  check_locations("keys", args.keys);
  const int64_t L = args.keys.sizes[1], A = args.keys.sizes[2], n = check_rows("query", args.query, args.keys);
  const DType acc = acc_of(args.keys);
  check_whole("query", args.query, {n, A}, acc);
  check_whole("v", args.v, {A}, acc);
  check_whole("dalpha", args.dalpha, {n, L}, acc);
  check_whole("alpha", args.alpha, {n, L}, acc);
  check_whole("dscore", args.dscore, {n, L}, acc);
  check_whole("dquery", args.dquery, {n, A}, acc);
  if (static_cast<bool>(args.dv) != static_cast<bool>(args.dkeys) && args.keys.numel() > 0)
    bad(kOp, "dv", "come with dkeys", args.dv ? "dv alone" : "dkeys alone", "pass both or neither");
  if (args.dv) check_whole("dv", args.dv, {A}, acc);
  check_gradient("dkeys", args.dkeys, args.keys, n);
}

void check_additive_attention(const AdditiveContextForward& args) {
  check_locations("values", args.values);
  const int64_t n = check_rows("weights", args.weights, args.values);
  check_whole("weights", args.weights, {n, args.values.sizes[1]}, acc_of(args.values));
  check_whole("context", args.context, {n, args.values.sizes[2]}, acc_of(args.values));
}

void check_additive_attention(const AdditiveContextBackward& args) {
  check_locations("values", args.values);
  const int64_t n = check_rows("weights", args.weights, args.values);
  const DType acc = acc_of(args.values);
  check_whole("weights", args.weights, {n, args.values.sizes[1]}, acc);
  check_whole("dcontext", args.dcontext, {n, args.values.sizes[2]}, acc);
  if (args.dweights) check_whole("dweights", args.dweights, {n, args.values.sizes[1]}, acc);
  check_gradient("dvalues", args.dvalues, args.values, n);
}

void check_additive_attention(const AdditiveMemoryBackward& args) {
  check_locations("keys", args.keys);
  const int64_t B = args.keys.sizes[0], L = args.keys.sizes[1], A = args.keys.sizes[2];
  const DType acc = acc_of(args.keys);
  if (args.dscores.ndim != 3) bad(kOp, "dscores", "have shape [T, B, L]", shape_of(args.dscores), "stack the steps");
  check_steps("dscores", args.dscores, args.dscores.sizes[0], B, L, acc);
  check_steps("queries", args.queries, args.dscores.sizes[0], B, A, acc);
  check_whole("v", args.v, {A}, acc);
  check_whole("dv", args.dv, {A}, acc);
  check_whole("dkeys", args.dkeys, {B, L, A}, args.keys.dtype);
}

}  // namespace fastcap
