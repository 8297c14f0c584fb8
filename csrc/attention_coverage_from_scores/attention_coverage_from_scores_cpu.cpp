#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../common/check.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "../common/simd_math.h"
#include "attention_coverage_from_scores.h"

namespace fastcap {
namespace score_rows {

constexpr int kGroup = 4;      // rows that are added at a time, so that sums are loaded and stored once for all of them
constexpr int64_t kRows = 64;  // of a piece, whose column sums are added to those of others: that keeps errors small
constexpr int64_t kWorthAThread = 1 << 14;  // elements

FASTCAP_INLINE float exponential(float x) { return simd::exp_of(x); }
FASTCAP_INLINE double exponential(double x) { return std::exp(x); }

template <typename Acc>
FASTCAP_INLINE Acc exponentials_of(Acc* x, int64_t n, Acc shift) {
  Acc total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t l = 0; l < n; ++l) {
    x[l] = exponential(x[l] - shift);
    total += x[l];
  }
  return total;
}

// x = exp(x - shift); returns their sum
FASTCAP_CLONES float exponentials(float* x, int64_t n, float shift) { return exponentials_of(x, n, shift); }
double exponentials(double* x, int64_t n, double shift) { return exponentials_of(x, n, shift); }

template <typename Acc>
FASTCAP_INLINE Acc weights_of(Acc* x, const Acc* g, int64_t n, Acc lse) {
  Acc delta = 0;
#pragma omp simd reduction(+ : delta)
  for (int64_t l = 0; l < n; ++l) {
    x[l] = exponential(x[l] - lse);
    delta += x[l] * g[l];
  }
  return delta;
}

// x = P = exp(x - lse); returns the sum of P g
FASTCAP_CLONES float weights(float* x, const float* g, int64_t n, float lse) { return weights_of(x, g, n, lse); }
double weights(double* x, const double* g, int64_t n, double lse) { return weights_of(x, g, n, lse); }

template <typename Acc>
FASTCAP_INLINE void gradients_of(Acc* x, const Acc* g, int64_t n, Acc delta) {
#pragma omp simd
  for (int64_t l = 0; l < n; ++l) x[l] = x[l] == 0 ? Acc(0) : x[l] * (g[l] - delta);
}

// x = P (g - delta), and 0 where P is, whatever g
FASTCAP_CLONES void gradients(float* x, const float* g, int64_t n, float delta) { gradients_of(x, g, n, delta); }
FASTCAP_CLONES void gradients(double* x, const double* g, int64_t n, double delta) { gradients_of(x, g, n, delta); }

template <typename Acc>
FASTCAP_INLINE void add_group_of(const Acc* const* rows, const Acc* w, Acc* sums, int64_t n) {
  const Acc *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  const Acc wa = w[0], wb = w[1], wc = w[2], wd = w[3];
#pragma omp simd
  for (int64_t l = 0; l < n; ++l) sums[l] += (wa * a[l] + wb * b[l]) + (wc * c[l] + wd * d[l]);
}

// sums += the sum of w[j] rows[j], for kGroup rows
FASTCAP_CLONES void add_group(const float* const* rows, const float* w, float* sums, int64_t n) {
  add_group_of(rows, w, sums, n);
}
FASTCAP_CLONES void add_group(const double* const* rows, const double* w, double* sums, int64_t n) {
  add_group_of(rows, w, sums, n);
}

template <typename Acc>
FASTCAP_INLINE void add_row_of(const Acc* row, Acc w, Acc* sums, int64_t n) {
#pragma omp simd
  for (int64_t l = 0; l < n; ++l) sums[l] += w * row[l];
}

FASTCAP_CLONES void add_row(const float* row, float w, float* sums, int64_t n) { add_row_of(row, w, sums, n); }
FASTCAP_CLONES void add_row(const double* row, double w, double* sums, int64_t n) { add_row_of(row, w, sums, n); }

template <typename Acc>
FASTCAP_INLINE void hide_of(Acc* x, const uint8_t* mask, int64_t n) {
  const Acc none = -std::numeric_limits<Acc>::infinity();
#pragma omp simd
  for (int64_t l = 0; l < n; ++l) x[l] = mask[l] ? x[l] : none;
}

// x = -inf where there is no location
FASTCAP_CLONES void hide(float* x, const uint8_t* mask, int64_t n) { hide_of(x, mask, n); }
FASTCAP_CLONES void hide(double* x, const uint8_t* mask, int64_t n) { hide_of(x, mask, n); }

namespace {

// The pairs of a caption and a head, and the pieces of at most kRows rows into which the rows of each are cut.
struct Block {
  int64_t n, m, R, L, pieces_of_pair;

  explicit Block(const Tensor& scores)
      : n(scores.sizes[0]),
        m(scores.sizes[1]),
        R(scores.sizes[2]),
        L(scores.sizes[3]),
        pieces_of_pair((R + kRows - 1) / kRows) {}
  int64_t pairs() const { return n * m; }
  int64_t pieces() const { return pairs() * pieces_of_pair; }
  // fn(piece, caption, head, first row, end of rows) for every piece
  template <typename Fn>
  void each(int threads, const Fn& fn) const {
    const int64_t per_piece = std::max<int64_t>(1, std::min(R, kRows) * L);
    const int64_t grain = (kWorthAThread + per_piece - 1) / per_piece;
    parallel_for(pieces(), grain, threads, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t pair = p / pieces_of_pair, first = p % pieces_of_pair * kRows;
        fn(p, pair / m, pair % m, first, std::min(R, first + kRows));
      }
    });
  }
};

template <typename Args>
const uint8_t* mask_of(const Args& args, int64_t b) {
  return args.key_mask ? args.key_mask.template as<uint8_t>() + b * args.key_mask.strides[0] : nullptr;
}

template <typename Args>
bool counts(const Args& args, int64_t b, int64_t t) {
  return !args.valid || args.valid.template as<uint8_t>()[b * args.valid.strides[0] + t * args.valid.strides[1]];
}

template <typename Acc>
Acc* element(const Tensor& x, int64_t b, int64_t h, int64_t i) {
  return x.as<Acc>() + b * x.strides[0] + h * x.strides[1] + i * x.strides[2];
}

// sums [L] = the column sums of the softmax of the rows [begin, end), whose lse are written
template <typename Acc>
void sum_rows(const ScoreRowsForward& args, const Block& s, int64_t b, int64_t h, int64_t begin, int64_t end, Acc* sums) {
  const Acc inf = std::numeric_limits<Acc>::infinity();
  const uint8_t* mask = mask_of(args, b);
  const bool some = !mask || std::any_of(mask, mask + s.L, [](uint8_t one) { return one != 0; });
  std::fill(sums, sums + s.L, Acc(0));
  const Acc* rows[kGroup];
  Acc w[kGroup];
  int held = 0;
  for (int64_t t = begin; t < end; ++t) {
    Acc lse = inf;
    if (some && counts(args, b, t)) {
      Acc* x = args.scores.as<Acc>() + ((b * s.m + h) * s.R + t) * s.L;
      if (mask) hide(x, mask, s.L);
      const Acc top = simd::max_of(x, s.L);
      double total = 0;
      for (int64_t l = 0; l < s.L; l += simd::kBlock) total += exponentials(x + l, std::min(simd::kBlock, s.L - l), top);
      lse = static_cast<Acc>(top + std::log(total));
      rows[held] = x;
      w[held++] = static_cast<Acc>(1 / total);
      if (held == kGroup) add_group(rows, w, sums, s.L), held = 0;
    }
    if (args.lse) *element<Acc>(args.lse, b, h, t) = lse;
  }
  for (int i = 0; i < held; ++i) add_row(rows[i], w[i], sums, s.L);
}

template <typename Acc>
void forward(const ScoreRowsForward& args, int threads) {
  const Block s(args.scores);
  Acc* sums = args.sums.as<Acc>();
  if (s.pieces_of_pair == 1 && !args.add) {
    s.each(threads, [&](int64_t p, int64_t b, int64_t h, int64_t begin, int64_t end) {
      sum_rows(args, s, b, h, begin, end, sums + p * s.L);
    });
    return;
  }
  std::vector<Acc> parts(s.pieces() * s.L);
  s.each(threads, [&](int64_t p, int64_t b, int64_t h, int64_t begin, int64_t end) {
    sum_rows(args, s, b, h, begin, end, parts.data() + p * s.L);
  });
  if (!args.add) std::fill(sums, sums + s.pairs() * s.L, Acc(0));
  for (int64_t p = 0; p < s.pieces(); ++p) add_row(parts.data() + p * s.L, Acc(1), sums + p / s.pieces_of_pair * s.L, s.L);
}

template <typename Acc>
void backward(const ScoreRowsBackward& args, int threads) {
  const Block s(args.scores);
  const bool per_location = args.grad_out.ndim > 0;
  const Acc coefficient =
      static_cast<Acc>(args.coefficient * (per_location ? 1.0 : static_cast<double>(*args.grad_out.as<Acc>())));
  s.each(threads, [&](int64_t, int64_t b, int64_t h, int64_t begin, int64_t end) {
    const uint8_t* mask = mask_of(args, b);
    std::vector<Acc> g(s.L);
    for (int64_t l = 0; l < s.L; ++l) {
      if (mask && !mask[l]) continue;  // 0: its upstream gradient may be anything, for its weight is a constant
      g[l] = coefficient * *element<Acc>(args.residual, b, h, l);
      if (per_location) g[l] *= *element<Acc>(args.grad_out, b, h, l);
    }
    for (int64_t t = begin; t < end; ++t) {
      Acc* x = args.scores.as<Acc>() + ((b * s.m + h) * s.R + t) * s.L;
      if (!counts(args, b, t)) {
        std::memset(static_cast<void*>(x), 0, s.L * sizeof(Acc));
        continue;
      }
      if (mask) hide(x, mask, s.L);
      const Acc lse = *element<Acc>(args.lse, b, h, t);
      double delta = 0;
      for (int64_t l = 0; l < s.L; l += simd::kBlock)
        delta += weights(x + l, g.data() + l, std::min(simd::kBlock, s.L - l), lse);
      gradients(x, g.data(), s.L, static_cast<Acc>(delta));
    }
  });
}

}  // namespace
}  // namespace score_rows

void attention_coverage_from_scores_rows_fwd_cpu(const ScoreRowsForward& args, int threads) {
  check_score_rows(args);
  if (args.scores.dtype == DType::kFloat64)
    score_rows::forward<double>(args, threads);
  else
    score_rows::forward<float>(args, threads);
}

void attention_coverage_from_scores_rows_bwd_cpu(const ScoreRowsBackward& args, int threads) {
  check_score_rows(args);
  if (args.scores.dtype == DType::kFloat64)
    score_rows::backward<double>(args, threads);
  else
    score_rows::backward<float>(args, threads);
}

}  // namespace fastcap
