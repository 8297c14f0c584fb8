#include "../common/check.h"
#include "retrieval_ranks.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "retrieval_ranks";
constexpr const char* kRemedy = "call the public function";

void check_embeddings(const char* name, const Tensor& x) {
  if (x.ndim != 2) bad(kOp, name, "have shape [N, D]", shape_of(x), kRemedy);
  check_shape(kOp, name, x, {x.sizes[0], x.sizes[1]});
  if (static_cast<int>(x.dtype) > static_cast<int>(DType::kBFloat16))
    bad(kOp, name, "be float32, float64, float16 or bfloat16", static_cast<int>(x.dtype), kRemedy);
}

void check_vector(const char* name, const Tensor& x, int64_t n, DType dtype) {
  check_shape(kOp, name, x, {n});
  check_dtype(kOp, name, x, dtype);
  check_contiguous(kOp, name, x);
}

}  // namespace

void check_rank_rows(const RankRows& args) {
  check_embeddings("x", args.x);
  check_vector("norm", args.norm, args.x.sizes[0], DType::kFloat64);
  check_vector("same", args.same, args.x.sizes[0], DType::kInt64);
}

void check_rank_pairs(const RankPairs& args) {
  check_embeddings("text", args.text);
  check_embeddings("image", args.image);
  check_dtype(kOp, "image", args.image, args.text.dtype);
  const int64_t P = args.text.sizes[0], Q = args.image.sizes[0];
  check_shape(kOp, "image", args.image, {Q, args.text.sizes[1]});
  check_vector("positive", args.positive, P, DType::kInt64);
  check_vector("text_norm", args.text_norm, P, DType::kFloat64);
  check_vector("image_norm", args.image_norm, Q, DType::kFloat64);
  check_vector("own", args.own, P, DType::kFloat64);
}

void check_rank_block(const RankBlock& args) {
  check_rank_pairs(args.pairs);
  const int64_t P = args.pairs.text.sizes[0], Q = args.pairs.image.sizes[0];
  const Tensor& s = args.scores;
  if (s.ndim != 2) bad(kOp, "scores", "have shape [R, C]", shape_of(s), kRemedy);
  const int64_t R = s.sizes[0], C = s.sizes[1];
  check_shape(kOp, "scores", s, {R, C});
  check_contiguous(kOp, "scores", s);
  if (s.dtype != DType::kFloat32 && s.dtype != DType::kFloat64)
    bad(kOp, "scores", "be float32 or float64", static_cast<int>(s.dtype), kRemedy);
  if (args.row < 0 || args.row > P - R) bad(kOp, "row", "leave R rows of P = " + std::to_string(P), args.row, kRemedy);
  if (args.col < 0 || args.col > Q - C) bad(kOp, "col", "leave C columns of Q = " + std::to_string(Q), args.col, kRemedy);
  check_vector("text_same", args.text_same, P, DType::kInt64);
  check_vector("image_same", args.image_same, Q, DType::kInt64);
  check_vector("above_images", args.above_images, R, DType::kInt64);
  check_vector("tied_images", args.tied_images, R, DType::kInt64);
  check_vector("above_texts", args.above_texts, P, DType::kInt64);
  check_vector("tied_texts", args.tied_texts, P, DType::kInt64);
  if (args.texts.ndim != 1) bad(kOp, "texts", "have shape [K]", shape_of(args.texts), kRemedy);
  const int64_t K = args.texts.sizes[0];
  check_vector("texts", args.texts, K, DType::kInt64);
  const int64_t *texts = args.texts.as<int64_t>(), *positive = args.pairs.positive.as<int64_t>();
  for (int64_t k = 0, before = args.col; k < K; ++k) {
    const int64_t p = texts[k];
    if (p < 0 || p >= P) bad(kOp, "texts", "lie in [0, P = " + std::to_string(P) + ")", p, kRemedy);
    if (positive[p] < before || positive[p] >= args.col + C)
      bad(kOp, "texts", "have images of the block, in their order", positive[p], kRemedy);
    before = positive[p];
  }
}

}  // namespace fastcap
