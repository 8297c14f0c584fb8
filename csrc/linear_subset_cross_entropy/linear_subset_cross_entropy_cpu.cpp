#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/parallel.h"
#include "../common/subset_rows.h"
#include "linear_subset_cross_entropy.h"
#include "linear_subset_cross_entropy_check.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "linear_subset_cross_entropy";

// What every function makes of the tokens: labels to look up, ids of any broadcast as [B, T, K].
template <typename Acc>
struct Batch {
  Batch(const LinearTokens& args, const SubsetOptions& o)
      : tokens(args.target, args.token_weight, o), ids(args.ids), weight(args.weight.as<Acc>()), bias(args.bias.as<Acc>()) {
    if (ids) ids = broadcast_ids(ids, args.target.sizes[0], args.target.sizes[1]);
  }
  Tokens<Acc> tokens;
  Tensor ids;
  const Acc* weight;
  const Acc* bias;

  Acc bias_at(int64_t v) const { return bias ? bias[v] : Acc(0); }
};

int64_t row_token(const Tensor& rows, int64_t i) { return rows.as<int64_t>()[i]; }

// A panel of one dense row; columns count from the panel's first.
template <typename T>
Row<T> panel_row(const Tensor& logits, int64_t i, int64_t begin, const acc_t<T>* bias, double cap) {
  return {logits.as<T>() + i * logits.sizes[1], 1, static_cast<acc_t<T>>(cap), bias ? bias + begin : nullptr};
}

// [begin, begin + n) of a row's gradient, block by block, in place of its logits.
template <typename T>
void emit_row(const Row<T>& row, T* out, int64_t begin, int64_t n, int64_t y, const acc_t<T> (&stats)[kNumStats],
              const std::vector<int64_t>& excluded, const Columns<acc_t<T>>& columns, const acc_t<T>* weight) {
  using Acc = acc_t<T>;
  Acc buffer[simd::kBlock], dz[simd::kBlock], scratch[simd::kBlock];
  for (int64_t at = 0; at < n; at += simd::kBlock) {
    const int64_t count = std::min(simd::kBlock, n - at);
    const Acc* z = row.block(at, count, buffer);
    dense_gradient(z, dz, scratch, begin + at, count, y, stats, excluded, weight, row.cap);
    if (columns.cols) columns.add_to(dz, begin + at, count, Acc(1));
    if constexpr (std::is_same_v<T, Acc>)
      std::copy(dz, dz + count, out + at);
    else
      simd::from_float(dz, out + at, count);
  }
}

template <typename Acc>
void fill_stats(Acc (&stats)[kNumStats], const Token<Acc>& token, const Part<Acc>& full, const Part<Acc>& rest) {
  const Acc f = token.of_full, r = token.of_rest;
  const Acc values[kNumStats] = {full.lse, f * full.a, f * full.s, f * full.d, rest.lse, r * rest.a, r * rest.s, r * rest.d};
  std::copy(values, values + kNumStats, stats);
}

template <typename T>
void set(const LinearTokens& args, const Tensor& scores, const Tensor& score_y, const Tensor& loss, const Tensor& dset,
         const SubsetOptions& o, int threads) {
  using Acc = acc_t<T>;
  const Batch<Acc> batch(args, o);
  const int64_t N = args.target.numel(), K = scores.sizes[2], C = dset ? dset.sizes[2] : 0, shift = score_y ? 1 : 0;
  const Acc cap = static_cast<Acc>(o.logit_softcap);
  const auto tokens = [&](int64_t begin, int64_t end) {
    Ids ids;
    std::vector<Acc> gathered;
    for (int64_t i = begin; i < end; ++i) {
      Acc* dz = dset ? dset.as<Acc>() + i * C : nullptr;
      if (dz) std::fill(dz, dz + C, Acc(0));
      const Token<Acc> token = batch.tokens[i];
      if (!token.rest) continue;
      ids.refresh(batch.ids, o.ids_pad, token.b, token.t);
      const T* row = scores.as<T>() + i * K;
      const T* own = score_y ? score_y.as<T>() + i : row + token.t;
      const int64_t own_column = score_y ? 0 : token.t;
      const Acc part = set_part(
          capped(load(own) + batch.bias_at(token.y), cap), token.y, ids,
          [&](int64_t k) { return capped(load(row + k) + batch.bias_at(ids.values[k]), cap); }, batch.weight, token.of_rest,
          o, gathered, dz != nullptr, [&](int64_t k, Acc dx) { dz[k < 0 ? own_column : k + shift] = dx; });
      loss.as<Acc>()[i] = token.of_rest * part;
    }
  };
  parallel_for(N, 16, N * K < 8192 ? 1 : threads, tokens);
}

template <typename T>
void rows(const LinearTokens& args, const Tensor& logits, const Tensor& rows_, const Tensor& loss, bool need_grad,
          const SubsetOptions& o, int threads) {
  using Acc = acc_t<T>;
  const Batch<Acc> batch(args, o);
  const int64_t V = args.V, n = logits.sizes[0];
  const auto piece = [&](int64_t first, int64_t last) {
    Ids ids;
    std::vector<int64_t> excluded;
    const std::vector<int64_t> none;
    std::vector<Acc> gathered, values;
    std::vector<int32_t> cols;
    for (int64_t i = first; i < last; ++i) {
      const int64_t place = row_token(rows_, i);
      const Token<Acc> token = batch.tokens[place];
      const Row<T> row = panel_row<T>(logits, i, 0, batch.bias, o.logit_softcap);
      Columns<Acc> columns{nullptr, nullptr, 0};
      Part<Acc> full, rest;
      Acc sum = 0;
      excluded.clear();
      if (token.full) {
        full = dense_part(row, V, token.y, none, batch.weight, o);
        sum += token.of_full * full.loss;
      }
      if (token.rest) ids.refresh(batch.ids, o.ids_pad, token.b, token.t);
      if (token.rest && o.subset == Subset::kReverse) {
        ids.excluded_from(token.y, excluded);
        rest = dense_part(row, V, token.y, excluded, batch.weight, o);
        sum += token.of_rest * rest.loss;
      } else if (token.rest) {
        cols.resize(ids.size() + 1), values.resize(ids.size() + 1);
        columns = {cols.data(), values.data(), ids.size() + 1};
        columns.clear();
        sum += token.of_rest * set_part(
                                   row.at(token.y), token.y, ids, [&](int64_t k) { return row.at(ids.values[k]); },
                                   batch.weight, token.of_rest, o, gathered, need_grad,
                                   [&](int64_t k, Acc dx) { columns.set(k + 1, k < 0 ? token.y : ids.values[k], dx); });
      }
      if (token.valid) loss.as<Acc>()[place] = sum;
      if (need_grad) {
        Acc stats[kNumStats];
        fill_stats(stats, token, full, rest);
        emit_row(row, logits.as<T>() + i * V, 0, V, token.y, stats, excluded, columns, batch.weight);
      }
    }
  };
  parallel_for(n, 2, n * V < 16384 ? 1 : threads, piece);
}

template <typename Acc>
DenseSums<Acc> load_sums(const double* state) {
  DenseSums<Acc> sums;
  sums.lse.max = static_cast<Acc>(state[0]), sums.lse.sum = state[1], sums.w = state[2], sums.wz = state[3];
  return sums;
}

template <typename Acc>
void store_sums(const DenseSums<Acc>& sums, double* state) {
  state[0] = sums.lse.max, state[1] = sums.lse.sum, state[2] = sums.w, state[3] = sums.wz;
}

template <typename T>
void absorb(const LinearTokens& args, const Tensor& logits, int64_t begin, const Tensor& rows_, const Tensor& state,
            const Tensor& picks, const SubsetOptions& o, int threads) {
  using Acc = acc_t<T>;
  const Batch<Acc> batch(args, o);
  const int64_t n = logits.sizes[0], P = logits.sizes[1], C = picks.sizes[1];
  const auto piece = [&](int64_t first, int64_t last) {
    Ids ids;
    std::vector<int64_t> excluded;
    const std::vector<int64_t> none;
    Acc buffer[simd::kBlock];
    for (int64_t i = first; i < last; ++i) {
      const Token<Acc> token = batch.tokens[row_token(rows_, i)];
      const Row<T> row = panel_row<T>(logits, i, begin, batch.bias, o.logit_softcap);
      double* sums = state.as<double>() + i * kNumLinearState;
      DenseSums<Acc> full = load_sums<Acc>(sums + kMaxF), rest = load_sums<Acc>(sums + kMaxS);
      const bool reverse = token.rest && o.subset == Subset::kReverse;
      if (token.rest) ids.refresh(batch.ids, o.ids_pad, token.b, token.t);
      if (reverse) ids.excluded_from(token.y, excluded);
      for (int64_t at = 0; at < P; at += simd::kBlock) {
        const int64_t count = std::min(simd::kBlock, P - at);
        const Acc* z = row.block(at, count, buffer);
        if (token.full) full.add(z, buffer, begin + at, count, none, batch.weight, o.label_smoothing > 0);
        if (reverse) rest.add(z, buffer, begin + at, count, excluded, batch.weight, o.label_smoothing > 0);
      }
      store_sums(full, sums + kMaxF);
      store_sums(rest, sums + kMaxS);
      Acc* picked = picks.as<Acc>() + i * C;
      const auto inside = [&](int64_t id) { return id >= begin && id < begin + P; };
      if (token.valid && inside(token.y)) picked[0] = row.at(token.y - begin);
      if (token.rest && !reverse)
        for (int64_t k = 0; k < ids.size(); ++k)
          if (ids.counts(k, token.y) && inside(ids.values[k])) picked[k + 1] = row.at(ids.values[k] - begin);
    }
  };
  parallel_for(n, 4, n * P < 16384 ? 1 : threads, piece);
}

template <typename Acc>
void finish(const LinearTokens& args, const Tensor& rows_, const Tensor& state, const Tensor& picks, const Tensor& loss,
            const Tensor& stats, const Tensor& cols, const Tensor& dset, const SubsetOptions& o) {
  const Batch<Acc> batch(args, o);
  const int64_t n = state.sizes[0], C = picks.sizes[1];
  Ids ids;
  std::vector<int64_t> excluded;
  std::vector<Acc> gathered;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t place = row_token(rows_, i);
    const Token<Acc> token = batch.tokens[place];
    const double* sums = state.as<double>() + i * kNumLinearState;
    const Acc* picked = picks.as<Acc>() + i * C;
    const Columns<Acc> columns{cols ? cols.as<int32_t>() + i * C : nullptr, cols ? dset.as<Acc>() + i * C : nullptr, C};
    columns.clear();
    Part<Acc> full, rest;
    Acc sum = 0;
    if (token.full) {
      const Acc w_y = batch.weight ? batch.weight[token.y] : Acc(1);
      full = load_sums<Acc>(sums + kMaxF).finish(picked[0], w_y, static_cast<double>(args.V), o);
      sum += token.of_full * full.loss;
    }
    if (token.rest) ids.refresh(batch.ids, o.ids_pad, token.b, token.t);
    if (token.rest && o.subset == Subset::kReverse) {
      ids.excluded_from(token.y, excluded);
      const Acc w_y = batch.weight ? batch.weight[token.y] : Acc(1);
      const auto candidates = static_cast<double>(args.V - static_cast<int64_t>(excluded.size()));
      rest = load_sums<Acc>(sums + kMaxS).finish(picked[0], w_y, candidates, o);
      sum += token.of_rest * rest.loss;
    } else if (token.rest) {
      sum += token.of_rest * set_part(
                                 picked[0], token.y, ids, [&](int64_t k) { return picked[k + 1]; }, batch.weight,
                                 token.of_rest, o, gathered, columns.cols != nullptr,
                                 [&](int64_t k, Acc dx) { columns.set(k + 1, k < 0 ? token.y : ids.values[k], dx); });
    }
    if (token.valid) loss.as<Acc>()[place] = sum;
    if (stats) {
      Acc values[kNumStats];
      fill_stats(values, token, full, rest);
      for (int j = 0; j < kNumStats; ++j) stats.as<Acc>()[j * n + i] = values[j];
    }
  }
}

template <typename T>
void emit(const LinearTokens& args, const Tensor& logits, int64_t begin, const Tensor& rows_, const Tensor& stats,
          const Tensor& cols, const Tensor& dset, const SubsetOptions& o, int threads) {
  using Acc = acc_t<T>;
  const Batch<Acc> batch(args, o);
  const int64_t n = logits.sizes[0], P = logits.sizes[1], C = cols ? cols.sizes[1] : 0;
  const auto piece = [&](int64_t first, int64_t last) {
    Ids ids;
    std::vector<int64_t> excluded;
    for (int64_t i = first; i < last; ++i) {
      const Token<Acc> token = batch.tokens[row_token(rows_, i)];
      excluded.clear();
      if (token.rest && o.subset == Subset::kReverse) {
        ids.refresh(batch.ids, o.ids_pad, token.b, token.t);
        ids.excluded_from(token.y, excluded);
      }
      Acc values[kNumStats];
      for (int j = 0; j < kNumStats; ++j) values[j] = stats.as<Acc>()[j * n + i];
      const Columns<Acc> columns{cols ? cols.as<int32_t>() + i * C : nullptr, cols ? dset.as<Acc>() + i * C : nullptr, C};
      const Row<T> row = panel_row<T>(logits, i, begin, batch.bias, o.logit_softcap);
      emit_row(row, logits.as<T>() + i * P, begin, P, token.y, values, excluded, columns, batch.weight);
    }
  };
  parallel_for(n, 4, n * P < 16384 ? 1 : threads, piece);
}

}  // namespace

int64_t linear_subset_cross_entropy_tokens_cpu(const LinearTokens& args, const Tensor& rows_, const Tensor& inv_denom,
                                               const SubsetOptions& o) {
  check_linear_tokens(args, o);
  check_linear_values(args, o);
  check_linear_rows(rows_, rows_.sizes[0]);
  const bool is_double = inv_denom.dtype == DType::kFloat64;
  check_shape(kOp, "inv_denom", inv_denom, {});
  if (!is_double) check_dtype(kOp, "inv_denom", inv_denom, DType::kFloat32);
  check_linear_sums(args, inv_denom.dtype);
  const auto run = [&](auto acc) {
    using Acc = decltype(acc);
    const Tokens<Acc> tokens(args.target, args.token_weight, o);
    const double denom = o.reduction == 1 ? denominator(args.target, args.weight.as<Acc>(), o.ignore_index) : 1;
    *inv_denom.as<Acc>() = denom != 0 ? static_cast<Acc>(1 / denom) : Acc(0);
    int64_t n = 0;
    for (int64_t i = 0; rows_ && i < args.target.numel(); ++i) {
      const Token<Acc> token = tokens[i];
      const bool dense = token.full || (token.rest && o.subset == Subset::kReverse);
      if (dense && n < rows_.sizes[0]) rows_.as<int64_t>()[n++] = i;
    }
    for (int64_t i = n; rows_ && i < rows_.sizes[0]; ++i) rows_.as<int64_t>()[i] = -1;
    return n;
  };
  return is_double ? run(double{}) : run(float{});
}

void linear_subset_cross_entropy_set_cpu(const LinearTokens& args, const Tensor& scores, const Tensor& score_y,
                                         const Tensor& loss, const Tensor& dset, const SubsetOptions& o, int threads) {
  check_linear_tokens(args, o);
  check_linear_values(args, o);
  check_linear_set(args, scores, score_y, loss, dset);
  dispatch_floats(kOp, scores.dtype, [&](auto t) { set<decltype(t)>(args, scores, score_y, loss, dset, o, threads); });
}

void linear_subset_cross_entropy_rows_cpu(const LinearTokens& args, const Tensor& logits, const Tensor& rows_,
                                          const Tensor& loss, bool need_grad, const SubsetOptions& o, int threads) {
  check_linear_tokens(args, o);
  check_linear_values(args, o);
  check_linear_panel(args, logits, 0, rows_);
  check_shape(kOp, "logits", logits, {rows_.sizes[0], args.V});
  check_linear_loss(args, loss, logits.dtype);
  dispatch_floats(kOp, logits.dtype, [&](auto t) { rows<decltype(t)>(args, logits, rows_, loss, need_grad, o, threads); });
}

void linear_subset_cross_entropy_absorb_cpu(const LinearTokens& args, const Tensor& logits, int64_t begin,
                                            const Tensor& rows_, const Tensor& state, const Tensor& picks,
                                            const SubsetOptions& o, int threads) {
  check_linear_tokens(args, o);
  check_linear_values(args, o);
  check_linear_panel(args, logits, begin, rows_);
  check_linear_state(args, rows_, state, picks, logits.dtype, o);
  dispatch_floats(kOp, logits.dtype,
                  [&](auto t) { absorb<decltype(t)>(args, logits, begin, rows_, state, picks, o, threads); });
}

void linear_subset_cross_entropy_finish_cpu(const LinearTokens& args, const Tensor& rows_, const Tensor& state,
                                            const Tensor& picks, const Tensor& loss, const Tensor& stats, const Tensor& cols,
                                            const Tensor& dset, const SubsetOptions& o) {
  check_linear_tokens(args, o);
  check_linear_values(args, o);
  check_linear_places(rows_, args.target.numel());
  check_linear_state(args, rows_, state, picks, picks.dtype, o);
  check_linear_loss(args, loss, picks.dtype);
  check_linear_gradient(args, rows_, stats, cols, dset, picks.dtype);
  if (picks.dtype == DType::kFloat64)
    finish<double>(args, rows_, state, picks, loss, stats, cols, dset, o);
  else
    finish<float>(args, rows_, state, picks, loss, stats, cols, dset, o);
}

void linear_subset_cross_entropy_emit_cpu(const LinearTokens& args, const Tensor& logits, int64_t begin, const Tensor& rows_,
                                          const Tensor& stats, const Tensor& cols, const Tensor& dset,
                                          const SubsetOptions& o, int threads) {
  check_linear_tokens(args, o);
  check_linear_values(args, o);
  check_linear_panel(args, logits, begin, rows_);
  if (!stats) bad(kOp, "stats", "be the forward's", "none", "pass the forward's stats");
  check_linear_gradient(args, rows_, stats, cols, dset, logits.dtype);
  dispatch_floats(kOp, logits.dtype,
                  [&](auto t) { emit<decltype(t)>(args, logits, begin, rows_, stats, cols, dset, o, threads); });
}

}  // namespace fastcap
