#include "../common/check.h"
#include "contrastive_reward.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "contrastive_reward";

void check_acc(const char* name, const Tensor& x) {
  if (x.dtype != DType::kFloat32 && x.dtype != DType::kFloat64)
    bad(kOp, name, "be float32 or float64", static_cast<int>(x.dtype), "call the public function");
}

void check_vector(const char* name, const Tensor& x, int64_t n, DType dtype) {
  check_shape(kOp, name, x, {n});
  check_dtype(kOp, name, x, dtype);
  check_contiguous(kOp, name, x);
}

void check_scores(const Tensor& x) {
  if (x.ndim != 2) bad(kOp, "scores", "have shape [R, C]", shape_of(x), "call the public function");
  check_shape(kOp, "scores", x, {x.sizes[0], x.sizes[1]});
  check_contiguous(kOp, "scores", x);
  check_acc("scores", x);
}

template <typename Args>
void check_factors(const Args& args) {
  check_scores(args.scores);
  const DType acc = args.scores.dtype;
  check_vector("positive", args.positive, args.scores.sizes[0], DType::kInt64);
  check_vector("row_factor", args.row_factor, args.scores.sizes[0], acc);
  check_vector("col_factor", args.col_factor, args.scores.sizes[1], acc);
  if (args.first_col < 0) bad(kOp, "first_col", "be at least 0", args.first_col, "call the public function");
}

void check_running(const Tensor& top, const Tensor& sum, const Tensor& index, int64_t n, DType acc) {
  if (!top) {
    if (sum || index) bad(kOp, "top", "be given with sum or index", "none", "call the public function");
    return;
  }
  check_vector("top", top, n, acc);
  if (static_cast<bool>(sum) == static_cast<bool>(index))
    bad(kOp, "sum", "be given or index, one of them", sum ? "both" : "neither", "call the public function");
  if (sum) check_vector("sum", sum, n, DType::kFloat64);
  if (index) check_vector("index", index, n, DType::kInt64);
}

}  // namespace

void check_score_block(const ScoreBlockForward& args) {
  check_factors(args);
  const DType acc = args.scores.dtype;
  check_vector("own", args.own, args.scores.sizes[0], acc);
  check_running(args.row_top, args.row_sum, args.row_index, args.scores.sizes[0], acc);
  check_running(args.col_top, args.col_sum, args.col_index, args.scores.sizes[1], acc);
  if (!args.row_top && !args.col_top)
    bad(kOp, "row_top", "be given, or col_top, or both", "neither", "call the public function");
  if (args.row_top && args.col_top && static_cast<bool>(args.row_sum) != static_cast<bool>(args.col_sum))
    bad(kOp, "sum", "be given for both or neither", "one", "call the public function");
}

void check_score_block(const ScoreBlockBackward& args) {
  check_factors(args);
  const DType acc = args.scores.dtype;
  check_vector("down", args.down, args.scores.sizes[0], acc);
  if (static_cast<bool>(args.row) != static_cast<bool>(args.drow) ||
      static_cast<bool>(args.col) != static_cast<bool>(args.dcol))
    bad(kOp, "drow and dcol", "come with row and col", "one without the other", "call the public function");
  if (args.row) {
    check_vector("row", args.row, args.scores.sizes[0], acc);
    check_vector("drow", args.drow, args.scores.sizes[0], acc);
  }
  if (args.col) {
    check_vector("col", args.col, args.scores.sizes[1], acc);
    check_vector("dcol", args.dcol, args.scores.sizes[1], acc);
  }
}

void check_others(const OthersForward& args) {
  if (args.own.ndim != 1) bad(kOp, "own", "have shape [P]", shape_of(args.own), "call the public function");
  check_acc("own", args.own);
  const int64_t P = args.own.sizes[0];
  check_vector("own", args.own, P, args.own.dtype);
  check_vector("positive", args.positive, P, DType::kInt64);
  check_vector("value", args.value, P, args.own.dtype);
  if (args.index) check_vector("index", args.index, P, DType::kInt64);
  if (args.Q < 0) bad(kOp, "Q", "be at least 0", args.Q, "call the public function");
}

void check_others(const OthersBackward& args) {
  check_others(OthersForward{args.own, args.positive, args.value, Tensor{}, args.Q});
  const int64_t P = args.own.sizes[0];
  check_vector("dvalue", args.dvalue, P, args.own.dtype);
  check_vector("down", args.down, P, args.own.dtype);
}

}  // namespace fastcap
