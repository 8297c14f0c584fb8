// Rows of embeddings and their dot products in double, summed in one order.
#pragma once
#include <cmath>
#include <vector>

#include "../common/rows.h"
#include "retrieval_ranks.h"

namespace fastcap {

double retrieval_dot(const float* a, const float* b, int64_t n);
double retrieval_dot(const double* a, const double* b, int64_t n);
double retrieval_dot(const Half* a, const Half* b, int64_t n);
double retrieval_dot(const BFloat16* a, const BFloat16* b, int64_t n);

template <typename T>
struct EmbeddingRows {
  const Tensor& x;
  int64_t D = x.sizes[1];
  bool plain = x.strides[1] == 1 || x.sizes[1] < 2;

  // Row i side by side in memory: in place, or in the buffer. The same order of sums for any strides.
  const T* at(int64_t i, std::vector<T>& buffer) const {
    const T* row = x.as<T>() + i * x.strides[0];
    if (plain) return row;
    buffer.resize(D);
    for (int64_t d = 0; d < D; ++d) buffer[d] = row[d * x.strides[1]];
    return buffer.data();
  }
};

// What a row is multiplied by; NaN for a NaN norm.
inline double retrieval_factor(double norm, bool normalize) { return normalize ? 1 / (norm < 1e-12 ? 1e-12 : norm) : 1.0; }

// Exact scores of pairs, for one thread; the last text's row is kept.
template <typename T>
class ExactScores {
 public:
  explicit ExactScores(const RankPairs& pairs) : pairs_(pairs), text_{pairs.text}, image_{pairs.image} {}

  double operator()(int64_t p, int64_t q) {
    if (p != p_) row_ = text_.at(p, text_buffer_);
    p_ = p;
    const double d = retrieval_dot(row_, image_.at(q, image_buffer_), text_.D);
    const double r = retrieval_factor(pairs_.text_norm.as<double>()[p], pairs_.normalize);
    return d * r * retrieval_factor(pairs_.image_norm.as<double>()[q], pairs_.normalize);
  }

 private:
  const RankPairs& pairs_;
  EmbeddingRows<T> text_, image_;
  std::vector<T> text_buffer_, image_buffer_;
  const T* row_ = nullptr;
  int64_t p_ = -1;
};

}  // namespace fastcap
