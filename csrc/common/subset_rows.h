// Rows of logits under a loss over a subset of the vocabulary, on the CPU. Maths and names: subset.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "rows.h"
#include "simd.h"
#include "subset.h"

namespace fastcap {

// `ids` [B or 1, T or 1, K] as [B, T, K], by strides of 0.
inline Tensor broadcast_ids(Tensor ids, int64_t B, int64_t T) {
  if (ids.sizes[0] == 1) ids.strides[0] = 0;
  if (ids.sizes[1] == 1) ids.strides[1] = 0;
  ids.sizes[0] = B, ids.sizes[1] = T;
  return ids;
}

// Every id lies in [0, V) or is `pad`; dimensions of stride 0 are read once.
inline void check_ids(const char* op, const Tensor& ids, const char* name, int64_t pad, int64_t V) {
  const int64_t B = ids.strides[0] == 0 ? std::min<int64_t>(1, ids.sizes[0]) : ids.sizes[0];
  const int64_t T = ids.strides[1] == 0 ? std::min<int64_t>(1, ids.sizes[1]) : ids.sizes[1];
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0; k < ids.sizes[2]; ++k) {
        const int64_t id = at<int64_t>(ids, b, t, k);
        if (id != pad && (id < 0 || id >= V))
          bad(op, name, "lie in [0, " + std::to_string(V) + ") or be " + std::to_string(pad), id,
              "check the vocabulary size of the tokenizer and of the head");
      }
}

inline void check_target(const char* op, Tensor target, int64_t ignore_index, int64_t V) {
  target.ndim = 3, target.sizes[2] = 1, target.strides[2] = 0;
  check_ids(op, target, "target", ignore_index, V);
}

// One token: its place, its target, and how much of each part of the loss it takes.
template <typename Acc>
struct Token {
  int64_t b, t, y;
  bool valid, full, rest;  // whether it has the part F, and the part S
  Acc of_full, of_rest;    // times its token weight
};

template <typename Acc>
class Tokens {
 public:
  Tokens(const Tensor& target, const Tensor& token_weight, const SubsetOptions& o)
      : target_(target), token_weight_(token_weight), o_(o), first_(target.sizes[0], -1) {
    if (!o.first_full) return;
    for (int64_t b = 0; b < target.sizes[0]; ++b)
      for (int64_t t = 0; t < target.sizes[1] && first_[b] < 0; ++t)
        if (at<int64_t>(target, b, t) != o.ignore_index) first_[b] = t;
  }

  Token<Acc> operator[](int64_t i) const {
    const int64_t b = i / target_.sizes[1], t = i % target_.sizes[1], y = at<int64_t>(target_, b, t);
    if (y == o_.ignore_index) return {b, t, y, false, false, false, 0, 0};
    const bool all = o_.subset == Subset::kFull || (o_.first_full && t == first_[b]);
    const Acc scale = token_weight_ ? at<Acc>(token_weight_, b, t) : Acc(1);
    const Acc share = all ? Acc(1) : static_cast<Acc>(o_.mle_weight);
    return {b, t, y, true, all || o_.mle_weight > 0, !all, scale * share, scale * (all ? Acc(0) : Acc(1 - o_.mle_weight))};
  }

 private:
  Tensor target_, token_weight_;
  SubsetOptions o_;
  std::vector<int64_t> first_;  // of each caption: its first valid token
};

// The sum of the valid tokens' class weights: what "mean" divides by.
template <typename Acc>
double denominator(const Tensor& target, const Acc* weight, int64_t ignore_index) {
  double denom = 0;
  for (int64_t b = 0; b < target.sizes[0]; ++b)
    for (int64_t t = 0; t < target.sizes[1]; ++t) {
      const int64_t y = at<int64_t>(target, b, t);
      if (y != ignore_index) denom += weight ? weight[y] : Acc(1);
    }
  return denom;
}

// One part of one row's loss, and the coefficients of its gradient.
template <typename Acc>
struct Part {
  Acc lse = 0, loss = 0, a = 0, s = 0, d = 0;

  void finish(Acc lse_, Acc z_y, Acc w_y, double n, Acc sum_w, Acc sum_wz, const SubsetOptions& o) {
    lse = lse_;
    const Acc e = static_cast<Acc>(o.label_smoothing), c = static_cast<Acc>(o.z_loss);
    loss = (1 - e) * w_y * (lse - z_y);
    a = d = (1 - e) * w_y;
    if (e > 0) {
      s = static_cast<Acc>(o.label_smoothing / n);
      loss += s * (sum_w * lse - sum_wz);
      a += s * sum_w;
    }
    if (c > 0) {
      loss += c * w_y * lse * lse;
      a += 2 * c * w_y * lse;
    }
  }
};

// unique[k] = 1 where ids[k] is an id, at its first occurrence.
inline void mark_first(const int64_t* ids, int64_t K, int64_t pad, std::vector<uint8_t>& unique) {
  constexpr int64_t kQuadraticIds = 64;
  unique.assign(K, 0);
  if (K <= kQuadraticIds) {
    for (int64_t k = 0; k < K; ++k) {
      bool repeated = ids[k] == pad;
      for (int64_t j = 0; j < k; ++j) repeated |= ids[j] == ids[k];
      unique[k] = !repeated;
    }
    return;
  }
  std::vector<int64_t> order(K);
  for (int64_t k = 0; k < K; ++k) order[k] = k;
  std::stable_sort(order.begin(), order.end(), [ids](int64_t i, int64_t j) { return ids[i] < ids[j]; });
  for (int64_t k = 0; k < K; ++k) unique[order[k]] = ids[order[k]] != pad && (k == 0 || ids[order[k - 1]] != ids[order[k]]);
}

// The ids of caption b, or of token (b, t) where they differ by token; per thread, refreshed when they change.
struct Ids {
  std::vector<int64_t> values;
  std::vector<uint8_t> unique;
  int64_t b = -1, t = -1;

  void refresh(const Tensor& ids, int64_t pad, int64_t b_, int64_t t_) {
    const bool shared_b = ids.strides[0] == 0 || ids.sizes[0] == 1, shared_t = ids.strides[1] == 0 || ids.sizes[1] == 1;
    if (t >= 0 && (shared_b || b_ == b) && (shared_t || t_ == t)) return;
    b = b_, t = t_;
    values.resize(ids.sizes[2]);
    for (int64_t k = 0; k < ids.sizes[2]; ++k) values[k] = at<int64_t>(ids, b, shared_t ? 0 : t, k);
    mark_first(values.data(), ids.sizes[2], pad, unique);
  }

  int64_t size() const { return static_cast<int64_t>(values.size()); }
  // whether column k is a candidate beside the target y
  bool counts(int64_t k, int64_t y) const { return unique[k] && values[k] != y; }

  // sorted and unique, without y
  void excluded_from(int64_t y, std::vector<int64_t>& out) const {
    out.clear();
    for (int64_t k = 0; k < size(); ++k)
      if (counts(k, y)) out.push_back(values[k]);
    std::sort(out.begin(), out.end());
  }
};

// What a dense part sums over columns, block by block; `n` is set by the caller.
template <typename Acc>
struct DenseSums {
  LogSumExp<Acc> lse;
  double w = 0, wz = 0;

  // Columns [begin, begin + n), without those in `excluded` (sorted, unique). May write `buffer` [kBlock], where z may lie.
  void add(const Acc* z, Acc* buffer, int64_t begin, int64_t n, const std::vector<int64_t>& excluded, const Acc* weight,
           bool smooth) {
    const auto first = std::lower_bound(excluded.begin(), excluded.end(), begin);
    if (first != excluded.end() && *first < begin + n) {
      if (z != buffer) std::copy(z, z + n, buffer);
      z = buffer;
      for (auto next = first; next != excluded.end() && *next < begin + n; ++next)
        buffer[*next - begin] = -std::numeric_limits<Acc>::infinity();
    }
    lse.add(z, n);
    if (!smooth) return;
    auto skip = first;
    for (int64_t i = 0; i < n; ++i) {
      if (skip != excluded.end() && *skip == begin + i) {
        ++skip;
        continue;
      }
      const double w_i = weight ? weight[begin + i] : 1.0;
      w += w_i;
      wz += w_i * z[i];
    }
  }

  Part<Acc> finish(Acc z_y, Acc w_y, double n, const SubsetOptions& o) const {
    Part<Acc> part;
    part.finish(lse.value(), z_y, w_y, n, static_cast<Acc>(w), static_cast<Acc>(wz), o);
    return part;
  }
};

// Whole vocabulary, or all but `excluded` (sorted, unique, without the target).
template <typename T>
Part<acc_t<T>> dense_part(const Row<T>& row, int64_t V, int64_t y, const std::vector<int64_t>& excluded,
                          const acc_t<T>* weight, const SubsetOptions& o) {
  using Acc = acc_t<T>;
  Acc buffer[simd::kBlock];
  DenseSums<Acc> sums;
  for (int64_t begin = 0; begin < V; begin += simd::kBlock) {
    const int64_t n = std::min(simd::kBlock, V - begin);
    sums.add(row.block(begin, n, buffer), buffer, begin, n, excluded, weight, o.label_smoothing > 0);
  }
  const auto candidates = static_cast<double>(V - static_cast<int64_t>(excluded.size()));
  return sums.finish(row.at(y), weight ? weight[y] : Acc(1), candidates, o);
}

// d loss / d x of the dense parts at columns [begin, begin + n), whose capped logits are z; `stats` are a row's, times its
// upstream gradient. `scratch` has n elements.
template <typename Acc>
void dense_gradient(const Acc* z, Acc* dz, Acc* scratch, int64_t begin, int64_t n, int64_t y, const Acc (&stats)[kNumStats],
                    const std::vector<int64_t>& excluded, const Acc* weight, Acc cap) {
  const auto add_part = [&](Acc* out, const Acc* of) {
    const Acc lse = of[0], a = of[1], s = of[2], d = of[3];
    simd::add_scaled_exp(z, out, n, lse, a);
    if (s != 0)
      for (int64_t j = 0; j < n; ++j) out[j] -= s * (weight ? weight[begin + j] : Acc(1));
    if (y >= begin && y < begin + n) out[y - begin] -= d;
  };
  std::fill(dz, dz + n, Acc(0));
  if (stats[kAF] != 0 || stats[kSF] != 0 || stats[kDF] != 0) add_part(dz, stats + kLseF);
  if (stats[kAS] != 0 || stats[kSS] != 0 || stats[kDS] != 0) {
    std::fill(scratch, scratch + n, Acc(0));
    add_part(scratch, stats + kLseS);
    for (auto next = std::lower_bound(excluded.begin(), excluded.end(), begin); next != excluded.end() && *next < begin + n;
         ++next)
      scratch[*next - begin] = 0;
    for (int64_t j = 0; j < n; ++j) dz[j] += scratch[j];
  }
  if (cap > 0) simd::softcap_chain(z, dz, n, cap);
}

// {y} and the row's ids: z_of(k) is the capped logit of ids.values[k]. Where a gradient is wanted, emit(k, dx) is called for
// each candidate, k = -1 being the target.
template <typename Acc, typename ZOf, typename Emit>
Acc set_part(Acc z_y, int64_t y, const Ids& ids, const ZOf& z_of, const Acc* weight, Acc scale, const SubsetOptions& o,
             std::vector<Acc>& z, bool wants_gradient, const Emit& emit) {
  z.assign(1, z_y);
  const Acc w_y = weight ? weight[y] : Acc(1);
  double sum_w = w_y, sum_wz = sum_w * z_y;
  for (int64_t k = 0; k < ids.size(); ++k) {
    if (!ids.counts(k, y)) continue;
    z.push_back(z_of(k));
    const double w = weight ? weight[ids.values[k]] : 1.0;
    sum_w += w;
    sum_wz += w * z.back();
  }
  const int64_t n = static_cast<int64_t>(z.size());
  LogSumExp<Acc> lse;
  lse.add(z.data(), n);
  Part<Acc> part;
  part.finish(lse.value(), z_y, w_y, static_cast<double>(n), static_cast<Acc>(sum_w), static_cast<Acc>(sum_wz), o);
  if (wants_gradient) {
    const Acc cap = static_cast<Acc>(o.logit_softcap);
    int64_t i = 0;
    for (int64_t k = -1; k < ids.size(); ++k) {
      if (k >= 0 && !ids.counts(k, y)) continue;
      const Acc w = k < 0 ? w_y : weight ? weight[ids.values[k]] : Acc(1);
      Acc dz = part.a * std::exp(z[i] - part.lse) - part.s * w - (k < 0 ? part.d : Acc(0));
      if (cap > 0) dz *= 1 - (z[i] / cap) * (z[i] / cap);
      emit(k, scale * dz);
      ++i;
    }
  }
  return part.loss;
}

// The set part's gradient of one row, kept as (column, value) pairs; column 0 is the target's, -1 marks none.
template <typename Acc>
struct Columns {
  int32_t* cols;  // [C], or null: not wanted
  Acc* values;
  int64_t C;

  void clear() const {
    if (cols) std::fill(cols, cols + C, -1), std::fill(values, values + C, Acc(0));
  }
  void set(int64_t column, int64_t id, Acc value) const {
    cols[column] = static_cast<int32_t>(id);
    values[column] = value;
  }
  // adds those in [begin, begin + n) to dz
  void add_to(Acc* dz, int64_t begin, int64_t n, Acc g) const {
    for (int64_t c = 0; c < C; ++c)
      if (cols[c] >= begin && cols[c] < begin + n) dz[cols[c] - begin] += g * values[c];
  }
};

}  // namespace fastcap
