// Counts of one block of products.
#include <algorithm>
#include <atomic>
#include <limits>

#include "../common/parallel.h"
#include "../common/simd_math.h"
#include "retrieval_ranks_exact.h"

namespace fastcap {
namespace ranks {

constexpr int64_t kChunk = 128;  // columns that are looked at one by one where one of them may need a decision
constexpr int64_t kRows = 64;    // of a piece
constexpr int64_t kLevels = 6;  // texts of an image that are compared row by row; images with more of them, column by column
constexpr int64_t kDotsShare = 64;  // a 64th of the elements may take a dot product of its own: little beside the products

template <typename Acc>
FASTCAP_INLINE int64_t row_of(Acc* x, const Acc* c, Acc r, Acc lo, Acc hi, int64_t n, int32_t* near) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    int32_t above = 0, from = 0;
#pragma omp simd reduction(+ : above, from)
    for (int64_t i = begin; i < end; ++i) {
      const Acc s = x[i] * r * c[i];
      x[i] = s;
      above += s > hi ? 1 : 0;
      from += s >= lo ? 1 : 0;
    }
    near[begin / kChunk] = from - above;
    total += above;
  }
  return total;
}

// x = the scores of a row; returns how many lie above hi. near = how many of each chunk lie in [lo, hi]
FASTCAP_CLONES int64_t row(float* x, const float* c, float r, float lo, float hi, int64_t n, int32_t* near) {
  return row_of(x, c, r, lo, hi, n, near);
}
FASTCAP_CLONES int64_t row(double* x, const double* c, double r, double lo, double hi, int64_t n, int32_t* near) {
  return row_of(x, c, r, lo, hi, n, near);
}

template <typename Acc>
FASTCAP_INLINE void level_of(const Acc* x, const Acc* lo, const Acc* hi, int64_t n, int32_t* above, int32_t* near) {
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    int32_t in = 0;
#pragma omp simd reduction(+ : in)
    for (int64_t i = begin; i < end; ++i) {
      const int32_t higher = x[i] > hi[i] ? 1 : 0;
      above[i] += higher;
      in += (x[i] >= lo[i] ? 1 : 0) - higher;
    }
    near[begin / kChunk] += in;
  }
}

// Adds to `above` where a score lies above its column's hi, and to near how many of each chunk lie in [lo, hi].
FASTCAP_CLONES void level(const float* x, const float* lo, const float* hi, int64_t n, int32_t* above, int32_t* near) {
  level_of(x, lo, hi, n, above, near);
}
FASTCAP_CLONES void level(const double* x, const double* lo, const double* hi, int64_t n, int32_t* above, int32_t* near) {
  level_of(x, lo, hi, n, above, near);
}

template <typename Acc>
FASTCAP_INLINE int32_t column_of(const Acc* x, Acc lo, Acc hi, int64_t n, int32_t& near) {
  int32_t above = 0, from = 0;
#pragma omp simd reduction(+ : above, from)
  for (int64_t i = 0; i < n; ++i) {
    above += x[i] > hi ? 1 : 0;
    from += x[i] >= lo ? 1 : 0;
  }
  near = from - above;
  return above;
}

FASTCAP_CLONES int32_t column(const float* x, float lo, float hi, int64_t n, int32_t& near) {
  return column_of(x, lo, hi, n, near);
}
FASTCAP_CLONES int32_t column(const double* x, double lo, double hi, int64_t n, int32_t& near) {
  return column_of(x, lo, hi, n, near);
}

namespace {

// Elements of [lo, hi] are decided one by one; NaN is in no such interval, and above none.
template <typename Acc>
struct Interval {
  Acc lo, hi;
};

// The lengths of rows as they enter scores, and their factors; the largest of the finite ones.
struct Lengths {
  const double* norm;
  bool normalize;
  double raw = 0, length = 0, factor = 1;  // the largest

  Lengths(const Tensor& norms, int64_t begin, int64_t n, bool normalize) : norm(norms.as<double>()), normalize(normalize) {
    for (int64_t i = begin; i < begin + n; ++i) {
      if (!std::isfinite(norm[i])) continue;
      raw = std::max(raw, norm[i]);
      length = std::max(length, of(i));
      factor = std::max(factor, factor_of(i));
    }
  }
  double factor_of(int64_t i) const { return retrieval_factor(norm[i], normalize); }
  double of(int64_t i) const { return norm[i] * factor_of(i); }
};

// How far a score from a product in Acc may lie from the one in double: the bound of a dot product in any order, |error| <=
// n u / (1 - n u) sum |a b|, for both, with some roundings for factors; and what underflow loses.
template <typename Acc>
struct Margin {
  double relative, absolute;

  explicit Margin(int64_t D)
      : relative(1.02 * (gamma<Acc>(D + 8) + gamma<double>(D + 8))),
        absolute(2.0 * static_cast<double>(D + 8) * static_cast<double>(std::numeric_limits<Acc>::min())) {}
  template <typename U>
  static double gamma(int64_t n) {
    const double nu = static_cast<double>(n) * static_cast<double>(std::numeric_limits<U>::epsilon()) / 2;
    return nu < 0.5 ? nu / (1 - nu) : std::numeric_limits<double>::infinity();
  }
  // around `own`, for rows of these lengths and factors
  Interval<Acc> around(double own, double length, double other, double factor, double other_factor) const {
    constexpr Acc inf = std::numeric_limits<Acc>::infinity();
    if (std::isnan(own)) return {static_cast<Acc>(own), static_cast<Acc>(own)};
    const double reach = relative * length * other + absolute * std::max(1.0, factor) * std::max(1.0, other_factor);
    if (!std::isfinite(own) || !std::isfinite(reach)) return {-inf, inf};
    Acc lo = static_cast<Acc>(own - reach), hi = static_cast<Acc>(own + reach);
    if (static_cast<double>(lo) > own - reach) lo = std::nextafter(lo, -inf);
    if (static_cast<double>(hi) < own + reach) hi = std::nextafter(hi, inf);
    return {lo, hi};
  }
};

template <typename Acc, typename T>
struct Block {
  const RankBlock& args;
  const RankPairs& pairs = args.pairs;
  const int64_t R = args.scores.sizes[0], C = args.scores.sizes[1], K = args.texts.sizes[0];
  const int64_t Q = pairs.image.sizes[0];
  const int64_t chunks = (C + kChunk - 1) / kChunk, pieces = (R + kRows - 1) / kRows;
  const int64_t *texts = args.texts.template as<int64_t>(), *positive = pairs.positive.template as<int64_t>();
  const int64_t *text_same = args.text_same.template as<int64_t>(), *image_same = args.image_same.template as<int64_t>();
  const double* own = pairs.own.template as<double>();
  const Lengths rows{pairs.text_norm, args.row, R, pairs.normalize}, cols{pairs.image_norm, args.col, C, pairs.normalize};
  const Margin<Acc> margin{pairs.text.sizes[1]};

  std::vector<Acc> col_factor;         // [C]
  std::vector<int64_t> first;          // [C + 1]: the texts of a column, as slots of `texts`
  std::vector<Interval<Acc>> of_text;  // [K]
  int64_t levels = 0;
  std::vector<Acc> lo, hi;                         // [levels, C]; NaN where there is no such text
  std::vector<int64_t> deep;                       // columns with more than kLevels texts
  std::vector<int64_t> above_images, tied_images;  // [R]
  std::vector<int32_t> above_levels;               // [pieces, levels, C]
  std::vector<int32_t> above_texts, tied_texts;    // [pieces, K]
  std::atomic<bool> coarse{false};

  explicit Block(const RankBlock& args) : args(args) {}

  bool run(int threads) {
    // Finite norms in double are square roots of finite sums: only products in float can overflow.
    if (std::is_same_v<Acc, float> && rows.raw * cols.raw * 1.1 > std::numeric_limits<float>::max()) return false;
    find_columns();
    above_images.assign(R, 0);
    tied_images.assign(R, 0);
    above_levels.assign(pieces * levels * C, 0);
    above_texts.assign(pieces * K, 0);
    tied_texts.assign(pieces * K, 0);
    parallel_for(pieces, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) count(piece);
    });
    if (coarse) return false;
    add();
    return true;
  }

  void find_columns() {
    col_factor.resize(C);
    for (int64_t j = 0; j < C; ++j) col_factor[j] = static_cast<Acc>(cols.factor_of(args.col + j));
    first.assign(C + 1, 0);
    of_text.resize(K);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t p = texts[k], q = positive[p];
      ++first[q - args.col + 1];
      of_text[k] = margin.around(own[p], rows.length, cols.of(q), rows.factor, cols.factor_of(q));
    }
    for (int64_t j = 0; j < C; ++j) {
      if (first[j + 1] > kLevels)
        deep.push_back(j);
      else
        levels = std::max(levels, first[j + 1]);
      first[j + 1] += first[j];
    }
    lo.assign(levels * C, std::numeric_limits<Acc>::quiet_NaN());
    hi = lo;
    for (int64_t j = 0; j < C; ++j) {
      const int64_t n = first[j + 1] - first[j];
      for (int64_t l = 0; l < n && n <= kLevels; ++l) {
        lo[l * C + j] = of_text[first[j] + l].lo;
        hi[l * C + j] = of_text[first[j] + l].hi;
      }
    }
  }

  Interval<Acc> of_row(int64_t p) const {
    const bool none = positive[p] < 0 || positive[p] >= Q;
    const double mine = none ? std::numeric_limits<double>::quiet_NaN() : own[p];
    return margin.around(mine, rows.of(p), cols.length, rows.factor_of(p), cols.factor);
  }

  void count(int64_t piece) {
    if (coarse) return;
    const int64_t begin = piece * kRows, end = std::min(R, begin + kRows);
    int64_t dots = args.last ? std::numeric_limits<int64_t>::max() : (end - begin) * C / kDotsShare + 1;  // left
    ExactScores<T> exact(pairs);
    std::vector<int32_t> near(chunks);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = args.row + i;
      Acc* x = args.scores.template as<Acc>() + i * C;
      const Interval<Acc> mine = of_row(p);
      above_images[i] = row(x, col_factor.data(), static_cast<Acc>(rows.factor_of(p)), mine.lo, mine.hi, C, near.data());
      for (int64_t l = 0; l < levels; ++l)
        level(x, lo.data() + l * C, hi.data() + l * C, C, above_levels.data() + (piece * levels + l) * C, near.data());
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        if (near[chunk]) decide(piece, i, chunk * kChunk, std::min(C, (chunk + 1) * kChunk), mine, exact, dots);
      if (dots < 0) {
        coarse = true;
        return;
      }
    }
    for (int64_t j : deep) count_column(piece, begin, end, j, exact, dots);
    if (dots < 0) coarse = true;
  }

  static bool inside(Acc s, Acc lo, Acc hi) { return s >= lo && !(s > hi); }

  // The elements [begin, end) of row i that lie in an interval.
  void decide(int64_t piece, int64_t i, int64_t begin, int64_t end, Interval<Acc> mine, ExactScores<T>& exact,
              int64_t& dots) {
    const int64_t p = args.row + i;
    const Acc* x = args.scores.template as<Acc>() + i * C;
    for (int64_t j = begin; j < end && dots >= 0; ++j) {
      const int64_t q = args.col + j;
      double score = 0;
      bool known = false;
      const auto compare = [&](double with, auto& above, auto& tied) {
        if (!known) score = exact(p, q), known = true, --dots;
        above += score > with;
        tied += score == with;
      };
      if (inside(x[j], mine.lo, mine.hi) && q != positive[p]) {
        if (image_same[q] == image_same[positive[p]])
          ++tied_images[i];
        else
          compare(own[p], above_images[i], tied_images[i]);
      }
      const int64_t n = first[j + 1] - first[j];
      for (int64_t l = 0; l < n && n <= kLevels; ++l) {
        const int64_t k = first[j] + l;
        if (!inside(x[j], of_text[k].lo, of_text[k].hi) || texts[k] == p) continue;
        if (text_same[p] == text_same[texts[k]])
          ++tied_texts[piece * K + k];
        else
          compare(own[texts[k]], above_texts[piece * K + k], tied_texts[piece * K + k]);
      }
    }
  }

  // A column with many texts: its scores side by side, once for all of them.
  void count_column(int64_t piece, int64_t begin, int64_t end, int64_t j, ExactScores<T>& exact, int64_t& dots) {
    const int64_t n = end - begin;
    Acc x[kRows];
    double score[kRows];
    bool known[kRows] = {};
    for (int64_t i = 0; i < n; ++i) x[i] = args.scores.template as<Acc>()[(begin + i) * C + j];
    for (int64_t k = first[j]; k < first[j + 1] && dots >= 0; ++k) {
      int32_t near = 0, &above = above_texts[piece * K + k], &tied = tied_texts[piece * K + k];
      above += column(x, of_text[k].lo, of_text[k].hi, n, near);
      for (int64_t i = 0; i < n && near > 0 && dots >= 0; ++i) {
        const int64_t p = args.row + begin + i;
        if (!inside(x[i], of_text[k].lo, of_text[k].hi)) continue;
        --near;
        if (texts[k] == p) continue;
        if (text_same[p] == text_same[texts[k]]) {
          ++tied;
          continue;
        }
        if (!known[i]) score[i] = exact(p, args.col + j), known[i] = true, --dots;
        above += score[i] > own[texts[k]];
        tied += score[i] == own[texts[k]];
      }
    }
  }

  void add() {
    for (int64_t i = 0; i < R; ++i) {
      args.above_images.template as<int64_t>()[i] += above_images[i];
      args.tied_images.template as<int64_t>()[i] += tied_images[i];
    }
    for (int64_t piece = 0; piece < pieces; ++piece) {
      for (int64_t k = 0; k < K; ++k) {
        args.above_texts.template as<int64_t>()[texts[k]] += above_texts[piece * K + k];
        args.tied_texts.template as<int64_t>()[texts[k]] += tied_texts[piece * K + k];
      }
      for (int64_t j = 0; j < C; ++j) {
        const int64_t n = first[j + 1] - first[j];
        for (int64_t l = 0; l < n && n <= kLevels; ++l)
          args.above_texts.template as<int64_t>()[texts[first[j] + l]] += above_levels[(piece * levels + l) * C + j];
      }
    }
  }
};

}  // namespace
}  // namespace ranks

bool retrieval_ranks_block_cpu(const RankBlock& args, int threads) {
  check_rank_block(args);
  if (args.scores.numel() == 0) return true;
  bool counted = false;
  dispatch_floats("retrieval_ranks", args.pairs.text.dtype, [&](auto type) {
    using T = decltype(type);
    counted = args.scores.dtype == DType::kFloat64 ? ranks::Block<double, T>(args).run(threads)
                                                   : ranks::Block<float, T>(args).run(threads);
  });
  return counted;
}

}  // namespace fastcap
