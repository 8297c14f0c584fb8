#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/check.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "../common/simd_math.h"
#include "contrastive_reward.h"

namespace fastcap {
namespace score_block {

constexpr int64_t kRows = 64;  // of a strip, the work of one thread at a time

FASTCAP_INLINE float exponential(float x) { return simd::exp_of(x); }
FASTCAP_INLINE double exponential(double x) { return std::exp(x); }

template <typename Acc>
FASTCAP_INLINE void scores_of(Acc* x, const Acc* b, int64_t n, Acc a) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) x[c] = x[c] * a * b[c];
}

// x = products made scores
FASTCAP_CLONES void to_scores(float* x, const float* b, int64_t n, float a) { scores_of(x, b, n, a); }
FASTCAP_CLONES void to_scores(double* x, const double* b, int64_t n, double a) { scores_of(x, b, n, a); }

template <typename Acc>
FASTCAP_INLINE Acc tops_of(const Acc* x, Acc* tops, int64_t n) {
  Acc top = -std::numeric_limits<Acc>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < n; ++c) {
    top = x[c] > top ? x[c] : top;
    tops[c] = x[c] > tops[c] ? x[c] : tops[c];
  }
  return top;
}

// tops = max(tops, x); returns the largest x. NaN is passed over: it reaches the results through the sums.
FASTCAP_CLONES float raise_tops(const float* x, float* tops, int64_t n) { return tops_of(x, tops, n); }
FASTCAP_CLONES double raise_tops(const double* x, double* tops, int64_t n) { return tops_of(x, tops, n); }

template <typename Acc>
FASTCAP_INLINE void column_sums_of(const Acc* x, const Acc* shifts, Acc* sums, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) sums[c] += exponential(x[c] - shifts[c]);
}

// sums += exp(x - shifts)
FASTCAP_CLONES void add_exp(const float* x, const float* shifts, float* sums, int64_t n) {
  column_sums_of(x, shifts, sums, n);
}
void add_exp(const double* x, const double* shifts, double* sums, int64_t n) { column_sums_of(x, shifts, sums, n); }

template <typename Acc>
FASTCAP_INLINE Acc both_sums_of(const Acc* x, const Acc* shifts, Acc* sums, int64_t n, Acc shift) {
  Acc total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < n; ++c) {
    total += exponential(x[c] - shift);
    sums[c] += exponential(x[c] - shifts[c]);
  }
  return total;
}

// The same, and returns the sum of exp(x - shift)
FASTCAP_CLONES float add_both(const float* x, const float* shifts, float* sums, int64_t n, float shift) {
  return both_sums_of(x, shifts, sums, n, shift);
}
double add_both(const double* x, const double* shifts, double* sums, int64_t n, double shift) {
  return both_sums_of(x, shifts, sums, n, shift);
}

template <typename Acc>
FASTCAP_INLINE Acc first_larger_of(const Acc* x, int64_t row, Acc* tops, int64_t* index, int64_t n) {
  Acc broken = 0;
#pragma omp simd reduction(+ : broken)
  for (int64_t c = 0; c < n; ++c) {
    const bool better = x[c] > tops[c] || (x[c] != x[c] && tops[c] == tops[c]);
    index[c] = better ? row : index[c];
    tops[c] = better ? x[c] : tops[c];
    broken += x[c] != x[c] ? Acc(1) : Acc(0);
  }
  return broken;
}

// tops = max(tops, x) with the first row that has it; NaN is largest. Returns how many x are NaN.
FASTCAP_CLONES float raise_tops_first(const float* x, int64_t row, float* tops, int64_t* index, int64_t n) {
  return first_larger_of(x, row, tops, index, n);
}
FASTCAP_CLONES double raise_tops_first(const double* x, int64_t row, double* tops, int64_t* index, int64_t n) {
  return first_larger_of(x, row, tops, index, n);
}

// x = ds a b; ROWS, COLS: which of the two directions there are
template <bool ROWS, bool COLS, typename Acc>
FASTCAP_INLINE void gradients_of(Acc* x, const Acc* b, const Acc* col, const Acc* dcol, int64_t n, Acc a, Acc row,
                                 Acc drow) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const Acc factor = a * b[c];
    const Acc s = x[c] * factor;
    Acc ds = 0;
    if (ROWS) ds = drow * exponential(s - row);
    if (COLS) ds += dcol[c] * exponential(s - col[c]);
    x[c] = ds * factor;
  }
}

FASTCAP_CLONES void gradients_rows(float* x, const float* b, int64_t n, float a, float row, float drow) {
  gradients_of<true, false, float>(x, b, nullptr, nullptr, n, a, row, drow);
}
void gradients_rows(double* x, const double* b, int64_t n, double a, double row, double drow) {
  gradients_of<true, false, double>(x, b, nullptr, nullptr, n, a, row, drow);
}
FASTCAP_CLONES void gradients_cols(float* x, const float* b, const float* col, const float* dcol, int64_t n, float a) {
  gradients_of<false, true, float>(x, b, col, dcol, n, a, 0, 0);
}
void gradients_cols(double* x, const double* b, const double* col, const double* dcol, int64_t n, double a) {
  gradients_of<false, true, double>(x, b, col, dcol, n, a, 0, 0);
}
FASTCAP_CLONES void gradients_both(float* x, const float* b, const float* col, const float* dcol, int64_t n, float a,
                                   float row, float drow) {
  gradients_of<true, true, float>(x, b, col, dcol, n, a, row, drow);
}
void gradients_both(double* x, const double* b, const double* col, const double* dcol, int64_t n, double a, double row,
                    double drow) {
  gradients_of<true, true, double>(x, b, col, dcol, n, a, row, drow);
}

namespace {

// What exponentials are taken relative to: the largest score, but nothing infinite.
template <typename Acc>
Acc shift_of(Acc top) {
  return std::isinf(top) ? Acc(0) : top;
}

// A running sum of exp(s - old) becomes one of exp(s - top), top >= old.
template <typename Acc>
void move_sum(double& sum, Acc old, Acc top) {
  if (sum != 0 && shift_of(old) != shift_of(top)) sum *= std::exp(static_cast<double>(shift_of(old)) - shift_of(top));
}

// The scores of strip rows [begin, end): products times factors, the pairs taken out into `own` and set to -inf.
template <typename Acc>
void make_scores(const ScoreBlockForward& args, int64_t C, int64_t begin, int64_t end) {
  const Acc *a = args.row_factor.as<Acc>(), *b = args.col_factor.as<Acc>();
  for (int64_t r = begin; r < end; ++r) {
    Acc* x = args.scores.as<Acc>() + r * C;
    to_scores(x, b, C, a[r]);
    const int64_t pair = args.positive.as<int64_t>()[r] - args.first_col;
    if (pair >= 0 && pair < C) {
      args.own.as<Acc>()[r] = x[pair];
      x[pair] = -std::numeric_limits<Acc>::infinity();
    }
  }
}

template <typename Acc>
void log_sum_exps(const ScoreBlockForward& args, int threads) {
  const int64_t R = args.scores.sizes[0], C = args.scores.sizes[1], strips = (R + kRows - 1) / kRows;
  Acc *x = args.scores.as<Acc>(), *row_top = args.row_top.as<Acc>(), *col_top = args.col_top.as<Acc>();
  std::vector<Acc> tops(strips * C, -std::numeric_limits<Acc>::infinity()), sums(args.col_top ? strips * C : 0), shifts(C);
  parallel_for(R, kRows, threads, [&](int64_t begin, int64_t end) {
    make_scores<Acc>(args, C, begin, end);
    for (int64_t r = begin; r < end; ++r) {
      const Acc top = raise_tops(x + r * C, tops.data() + begin / kRows * C, C);
      if (!row_top || !(top > row_top[r])) continue;
      move_sum(args.row_sum.as<double>()[r], row_top[r], top);
      row_top[r] = top;
    }
  });
  if (col_top) {
    for (int64_t i = 1; i < strips; ++i) raise_tops(tops.data() + i * C, tops.data(), C);
    for (int64_t c = 0; c < C; ++c) {
      if (tops[c] > col_top[c]) {
        move_sum(args.col_sum.as<double>()[c], col_top[c], tops[c]);
        col_top[c] = tops[c];
      }
      shifts[c] = shift_of(col_top[c]);
    }
  }
  parallel_for(R, kRows, threads, [&](int64_t begin, int64_t end) {
    Acc* sum = sums.data() + begin / kRows * C;
    for (int64_t r = begin; r < end; ++r) {
      if (!row_top)
        add_exp(x + r * C, shifts.data(), sum, C);
      else if (!col_top)
        args.row_sum.as<double>()[r] += simd::sum_exp(x + r * C, C, shift_of(row_top[r]));
      else
        args.row_sum.as<double>()[r] += add_both(x + r * C, shifts.data(), sum, C, shift_of(row_top[r]));
    }
  });
  if (col_top)
    for (int64_t i = 0; i < strips; ++i)
      for (int64_t c = 0; c < C; ++c) args.col_sum.as<double>()[c] += sums[i * C + c];
}

template <typename Acc>
void largest(const ScoreBlockForward& args, int threads) {
  const int64_t R = args.scores.sizes[0], C = args.scores.sizes[1], strips = (R + kRows - 1) / kRows;
  Acc *row_top = args.row_top.as<Acc>(), *col_top = args.col_top.as<Acc>();
  std::vector<Acc> tops(strips * C, -std::numeric_limits<Acc>::infinity());
  std::vector<int64_t> index(strips * C, -1);
  parallel_for(R, kRows, threads, [&](int64_t begin, int64_t end) {
    make_scores<Acc>(args, C, begin, end);
    Acc* strip_tops = tops.data() + begin / kRows * C;
    int64_t* strip_index = index.data() + begin / kRows * C;
    for (int64_t r = begin; r < end; ++r) {
      const Acc* x = args.scores.as<Acc>() + r * C;
      const bool broken = raise_tops_first(x, args.first_row + r, strip_tops, strip_index, C) > 0;
      if (!row_top || row_top[r] != row_top[r]) continue;
      const Acc top = simd::max_of(x, C);
      if (!broken && !(top > row_top[r])) continue;
      const Acc* found = broken ? std::find_if(x, x + C, [](Acc s) { return s != s; }) : std::find(x, x + C, top);
      row_top[r] = *found;
      args.row_index.as<int64_t>()[r] = args.first_col + (found - x);
    }
  });
  if (!col_top) return;
  int64_t* col_index = args.col_index.as<int64_t>();
  for (int64_t i = 0; i < strips; ++i)
    for (int64_t c = 0; c < C; ++c) {
      const Acc top = tops[i * C + c];
      if (top > col_top[c] || (top != top && col_top[c] == col_top[c])) col_top[c] = top, col_index[c] = index[i * C + c];
    }
}

template <typename Acc>
void forward(const ScoreBlockForward& args, int threads) {
  if (args.row_index || args.col_index)
    largest<Acc>(args, threads);
  else
    log_sum_exps<Acc>(args, threads);
}

template <typename Acc>
void backward(const ScoreBlockBackward& args, int threads) {
  const int64_t R = args.scores.sizes[0], C = args.scores.sizes[1];
  const Acc *a = args.row_factor.as<Acc>(), *b = args.col_factor.as<Acc>();
  const Acc *row = args.row.as<Acc>(), *drow = args.drow.as<Acc>(), *col = args.col.as<Acc>(), *dcol = args.dcol.as<Acc>();
  parallel_for(R, kRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Acc* x = args.scores.as<Acc>() + r * C;
      if (row && col)
        gradients_both(x, b, col, dcol, C, a[r], row[r], drow[r]);
      else if (row)
        gradients_rows(x, b, C, a[r], row[r], drow[r]);
      else if (col)
        gradients_cols(x, b, col, dcol, C, a[r]);
      const int64_t pair = args.positive.as<int64_t>()[r] - args.first_col;
      if (pair >= 0 && pair < C) x[pair] = args.down.as<Acc>()[r] * a[r] * b[pair];
    }
  });
}

}  // namespace
}  // namespace score_block

void contrastive_reward_block_fwd_cpu(const ScoreBlockForward& args, int threads) {
  check_score_block(args);
  if (args.scores.dtype == DType::kFloat64)
    score_block::forward<double>(args, threads);
  else
    score_block::forward<float>(args, threads);
}

void contrastive_reward_block_bwd_cpu(const ScoreBlockBackward& args, int threads) {
  check_score_block(args);
  if (args.scores.dtype == DType::kFloat64)
    score_block::backward<double>(args, threads);
  else
    score_block::backward<float>(args, threads);
}

}  // namespace fastcap
