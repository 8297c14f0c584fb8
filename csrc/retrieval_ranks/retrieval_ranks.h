// Ranks of pairs among the similarities of P texts and Q images: what lies around the matrix products of the CPU's blocks.
//
//   d_pq = <text_p, image_q>                    a product, made into scratch by the caller, in float or double
//   r_p  = 1 / max(|text_p|, 1e-12), or 1       c_q likewise of the images
//   s_pq = (d_pq r_p) c_q                       own_p = s at q = positive_p
//   above_images_p = #{q  : s_pq > own_p}       tied_images_p = #{q  : s_pq = own_p}, q  != positive_p
//   above_texts_p  = #{p' : s_p'q > own_p}      tied_texts_p  = #{p' : s_p'q = own_p}, p' != p, q = positive_p
//
// s and own mean float64, each dot product summed in one order whatever the rows: equal embeddings have equal scores.
// Products are rounded, and in another order; an element that lies so near to own that this could matter is decided by a dot
// product of its own, or by none where the two rows are known to be the same. NaN is above nothing and equal to nothing.
#pragma once
#include "../common/tensor.h"

namespace fastcap {

struct RankRows {
  Tensor x;     // [N, D] float32, float64, float16 or bfloat16, any strides
  Tensor norm;  // out: [N] double, contiguous
  Tensor same;  // out: [N] int64, contiguous: the first row that equals this one
};

struct RankPairs {
  Tensor text;        // [P, D] float32, float64, float16 or bfloat16, any strides
  Tensor image;       // [Q, D], of the dtype of text
  Tensor positive;    // [P] int64, contiguous
  Tensor text_norm;   // [P] double, contiguous
  Tensor image_norm;  // [Q] double, contiguous
  Tensor own;         // [P] double, contiguous; NaN where positive is out of range
  bool normalize;
};

struct RankBlock {
  RankPairs pairs;
  Tensor scores;  // [R, C] float or double, contiguous: d of rows from `row` and columns from `col`; overwritten
  int64_t row, col;
  Tensor text_same;     // [P] int64, contiguous
  Tensor image_same;    // [Q] int64, contiguous
  Tensor texts;         // [K] int64, contiguous: the texts whose image is one of the block's, in the order of images
  Tensor above_images;  // [R] int64, contiguous, added to; so are those below
  Tensor tied_images;   // [R]
  Tensor above_texts;   // [P]
  Tensor tied_texts;    // [P]
  bool last;            // decide all, however many dot products that takes
};

void retrieval_ranks_rows_cpu(const RankRows& args, int threads);
void retrieval_ranks_own_cpu(const RankPairs& args, int threads);

// Adds the counts of a block. False, and nothing added, where the scores are too coarse: too many elements lie within the
// rounding of products in float, or products may overflow. The caller then makes them in double, with `last`.
bool retrieval_ranks_block_cpu(const RankBlock& args, int threads);

// Shapes, dtypes, layouts and the indices that are followed, checked before any pointer is.
void check_rank_rows(const RankRows& args);
void check_rank_pairs(const RankPairs& args);
void check_rank_block(const RankBlock& args);

}  // namespace fastcap
