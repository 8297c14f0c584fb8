#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/check.h"
#include "../common/parallel.h"
#include "../common/rows.h"
#include "../common/simd.h"
#include "subset_cross_entropy.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "subset_cross_entropy";
constexpr int64_t kRowsPerPiece = 8;
constexpr int64_t kQuadraticIds = 64;

// One part of one row's loss, and the coefficients of its gradient (see the header).
template <typename Acc>
struct Part {
  Acc lse = 0, loss = 0, a = 0, s = 0, d = 0;

  void finish(Acc lse_, Acc z_y, Acc w_y, double n, Acc sum_w, Acc sum_wz, const SubsetCrossEntropyOptions& o) {
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

// Whole vocabulary, or all but `excluded` (sorted, unique, without the target).
template <typename T>
Part<acc_t<T>> dense_part(const Row<T>& row, int64_t V, int64_t y, const std::vector<int64_t>& excluded,
                          const acc_t<T>* weight, const SubsetCrossEntropyOptions& o) {
  using Acc = acc_t<T>;
  Acc buffer[simd::kBlock];
  LogSumExp<Acc> lse;
  double sum_w = 0, sum_wz = 0;
  auto next = excluded.begin();
  for (int64_t begin = 0; begin < V; begin += simd::kBlock) {
    const int64_t n = std::min(simd::kBlock, V - begin);
    const Acc* z = row.block(begin, n, buffer);
    if (next != excluded.end() && *next < begin + n) {
      if (z != buffer) std::copy(z, z + n, buffer);
      z = buffer;
      for (; next != excluded.end() && *next < begin + n; ++next)
        buffer[*next - begin] = -std::numeric_limits<Acc>::infinity();
    }
    lse.add(z, n);
    if (o.label_smoothing > 0) {
      const auto first = std::lower_bound(excluded.begin(), excluded.end(), begin);
      auto skip = first;
      for (int64_t i = 0; i < n; ++i) {
        if (skip != excluded.end() && *skip == begin + i) {
          ++skip;
          continue;
        }
        const double w = weight ? weight[begin + i] : 1.0;
        sum_w += w;
        sum_wz += w * z[i];
      }
    }
  }
  Part<Acc> part;
  part.finish(lse.value(), row.at(y), weight ? weight[y] : Acc(1),
              static_cast<double>(V - static_cast<int64_t>(excluded.size())), static_cast<Acc>(sum_w),
              static_cast<Acc>(sum_wz), o);
  return part;
}

// unique[k] = 1 where ids[k] is an id, at its first occurrence.
void mark_first(const int64_t* ids, int64_t K, int64_t pad, std::vector<uint8_t>& unique) {
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

  // sorted and unique, without y
  void excluded_from(int64_t y, std::vector<int64_t>& out) const {
    out.clear();
    for (size_t k = 0; k < values.size(); ++k)
      if (unique[k] && values[k] != y) out.push_back(values[k]);
    std::sort(out.begin(), out.end());
  }
};

// {y} and the row's ids. Column 0 is the target; cols and dset, where wanted, get one entry a column.
template <typename T>
acc_t<T> set_part(const Row<T>& row, int64_t y, const Ids& ids, const acc_t<T>* weight, acc_t<T> scale,
                  const SubsetCrossEntropyOptions& o, std::vector<acc_t<T>>& z, int32_t* cols, acc_t<T>* dset) {
  using Acc = acc_t<T>;
  const int64_t K = static_cast<int64_t>(ids.values.size());
  z.assign(1, row.at(y));
  double sum_w = weight ? weight[y] : 1.0, sum_wz = sum_w * z[0];
  for (int64_t k = 0; k < K; ++k) {
    if (!ids.unique[k] || ids.values[k] == y) continue;
    const Acc z_k = row.at(ids.values[k]);
    const double w = weight ? weight[ids.values[k]] : 1.0;
    z.push_back(z_k);
    sum_w += w;
    sum_wz += w * z_k;
  }
  const int64_t n = static_cast<int64_t>(z.size());
  LogSumExp<Acc> lse;
  lse.add(z.data(), n);
  Part<Acc> part;
  part.finish(lse.value(), z[0], weight ? weight[y] : Acc(1), static_cast<double>(n), static_cast<Acc>(sum_w),
              static_cast<Acc>(sum_wz), o);
  if (cols) {
    int64_t i = 0;
    for (int64_t column = 0; column <= K; ++column) {
      const int64_t id = column == 0 ? y : ids.values[column - 1];
      const bool used = column == 0 || (ids.unique[column - 1] && id != y);
      cols[column] = used ? static_cast<int32_t>(id) : -1;
      dset[column] = 0;
      if (!used) continue;
      Acc dz =
          part.a * std::exp(z[i] - part.lse) - part.s * (weight ? weight[id] : Acc(1)) - (column == 0 ? part.d : Acc(0));
      if (row.cap > 0) dz *= 1 - (z[i] / row.cap) * (z[i] / row.cap);
      dset[column] = scale * dz;
      ++i;
    }
  }
  return part.loss;
}

void check_ids(const Tensor& ids, const char* name, int64_t pad, int64_t V) {
  for (int64_t b = 0; b < (ids.strides[0] == 0 ? std::min<int64_t>(1, ids.sizes[0]) : ids.sizes[0]); ++b)
    for (int64_t t = 0; t < (ids.strides[1] == 0 ? std::min<int64_t>(1, ids.sizes[1]) : ids.sizes[1]); ++t)
      for (int64_t k = 0; k < ids.sizes[2]; ++k) {
        const int64_t id = at<int64_t>(ids, b, t, k);
        if (id != pad && (id < 0 || id >= V))
          bad(kOp, name, "lie in [0, " + std::to_string(V) + ") or be " + std::to_string(pad), id,
              "check the vocabulary size of the tokenizer and of the head");
      }
}

template <typename T>
void forward(const SubsetCrossEntropyForward& args, const SubsetCrossEntropyOptions& o, int threads) {
  using Acc = acc_t<T>;
  const int64_t B = args.input.sizes[0], T_ = args.input.sizes[1], V = args.input.sizes[2];
  const int64_t N = B * T_, C = args.cols ? args.cols.sizes[2] : 0;
  const Acc* weight = args.weight.as<Acc>();
  const bool uses_ids = o.subset != Subset::kFull;
  std::vector<int64_t> first(B, -1);
  std::vector<Acc> losses(N, 0);
  double denom = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < T_; ++t) {
      const int64_t y = at<int64_t>(args.target, b, t);
      if (y == o.ignore_index) continue;
      if (first[b] < 0) first[b] = t;
      denom += weight ? weight[y] : Acc(1);
    }

  const auto rows = [&](int64_t begin, int64_t end) {
    Ids ids;
    std::vector<int64_t> excluded;
    const std::vector<int64_t> none;
    std::vector<Acc> gathered;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / T_, t = i % T_, y = at<int64_t>(args.target, b, t);
      int32_t* cols = args.cols ? args.cols.as<int32_t>() + i * C : nullptr;
      Acc* dset = args.cols ? args.dset.as<Acc>() + i * C : nullptr;
      if (cols) std::fill(cols, cols + C, -1), std::fill(dset, dset + C, Acc(0));
      Part<Acc> full, rest;
      Acc of_full = 0, of_rest = 0;
      if (y != o.ignore_index) {
        const Row<T> row = row_of<T>(args.input, b, t, o.logit_softcap);
        const bool all = o.subset == Subset::kFull || (o.first_full && t == first[b]);
        const Acc scale = args.token_weight ? at<Acc>(args.token_weight, b, t) : Acc(1);
        of_full = scale * static_cast<Acc>(all ? 1 : o.mle_weight);
        of_rest = scale * static_cast<Acc>(all ? 0 : 1 - o.mle_weight);
        if (uses_ids) ids.refresh(args.ids, o.ids_pad, b, t);
        if (all || o.mle_weight > 0) {
          full = dense_part(row, V, y, none, weight, o);
          losses[i] += of_full * full.loss;
        }
        if (!all && o.subset == Subset::kReverse) {
          ids.excluded_from(y, excluded);
          rest = dense_part(row, V, y, excluded, weight, o);
          losses[i] += of_rest * rest.loss;
        } else if (!all) {
          losses[i] += of_rest * set_part(row, y, ids, weight, of_rest, o, gathered, cols, dset);
        }
      }
      if (args.stats) {
        Acc* stats = args.stats.as<Acc>() + i;
        const Acc values[kNumStats] = {full.lse, of_full * full.a, of_full * full.s, of_full * full.d,
                                       rest.lse, of_rest * rest.a, of_rest * rest.s, of_rest * rest.d};
        for (int j = 0; j < kNumStats; ++j) stats[j * N] = values[j];
      }
    }
  };
  // A few thousand gathered logits are not worth waking a second thread.
  const int64_t work = N * (o.is_dense() ? V : args.ids ? args.ids.sizes[2] : 1);
  parallel_for(N, kRowsPerPiece, work < 8192 ? 1 : threads, rows);

  const Acc inv_denom = o.reduction != 1 ? Acc(1) : denom != 0 ? static_cast<Acc>(1 / denom) : Acc(0);
  *args.inv_denom.as<Acc>() = inv_denom;
  if (o.reduction == 0) {
    std::copy(losses.begin(), losses.end(), args.out.as<Acc>());
  } else {
    double sum = 0;
    for (const Acc loss : losses) sum += loss;
    *args.out.as<Acc>() = static_cast<Acc>(o.reduction == 1 ? (denom != 0 ? sum / denom : 0) : sum);
  }
}

template <typename T>
void backward(const SubsetCrossEntropyBackward& args, const SubsetCrossEntropyOptions& o, int threads) {
  using Acc = acc_t<T>;
  const int64_t B = args.dinput.sizes[0], T_ = args.dinput.sizes[1], V = args.dinput.sizes[2];
  const int64_t N = B * T_, C = args.cols ? args.cols.sizes[2] : 0;
  const Acc* weight = args.weight.as<Acc>();
  advise_huge_pages(args.dinput.data, N * V * static_cast<int64_t>(sizeof(T)));

  // dz of one dense part over a block, added to `out`
  const auto add_part = [&](const Acc* z, Acc* out, int64_t begin, int64_t n, int64_t y, Acc lse, Acc a, Acc s, Acc d) {
    simd::add_scaled_exp(z, out, n, lse, a);
    if (s != 0)
      for (int64_t j = 0; j < n; ++j) out[j] -= s * (weight ? weight[begin + j] : Acc(1));
    if (y >= begin && y < begin + n) out[y - begin] -= d;
  };

  // A piece of the gradient, [begin_flat, end_flat) of its N * V elements: columns [first, last) of each row that it meets.
  const auto piece = [&](int64_t begin_flat, int64_t end_flat) {
    Ids ids;
    std::vector<int64_t> excluded;
    Acc buffer[simd::kBlock], dz[simd::kBlock], dz_rest[simd::kBlock];
    for (int64_t i = begin_flat / V; i * V < end_flat; ++i) {
      const int64_t b = i / T_, t = i % T_;
      const int64_t first = std::max<int64_t>(begin_flat - i * V, 0), last = std::min(end_flat - i * V, V);
      T* dx = args.dinput.as<T>() + i * V;
      const Acc g = (o.reduction == 0 ? at<Acc>(args.grad_out, b, t) : *args.grad_out.as<Acc>()) * *args.inv_denom.as<Acc>();
      Acc stats[kNumStats] = {};
      if (args.stats)
        for (int j = 0; j < kNumStats; ++j) stats[j] = args.stats.as<Acc>()[j * N + i];
      const bool full = stats[kAF] != 0 || stats[kSF] != 0 || stats[kDF] != 0;
      const bool rest = stats[kAS] != 0 || stats[kSS] != 0 || stats[kDS] != 0;
      if (!full && !rest) {
        std::memset(static_cast<void*>(dx + first), 0, (last - first) * sizeof(T));
        for (int64_t c = 0; c < C; ++c) {
          const int32_t col = args.cols.as<int32_t>()[i * C + c];
          if (col >= first && col < last) store(dx + col, g * args.dset.as<Acc>()[i * C + c]);
        }
        continue;
      }
      const Row<T> row = row_of<T>(args.input, b, t, o.logit_softcap);
      const int64_t y = at<int64_t>(args.target, b, t);
      excluded.clear();
      if (rest) {
        ids.refresh(args.ids, o.ids_pad, b, t);
        ids.excluded_from(y, excluded);
      }
      auto next = std::lower_bound(excluded.begin(), excluded.end(), first);
      for (int64_t begin = first; begin < last; begin += simd::kBlock) {
        const int64_t n = std::min(simd::kBlock, last - begin);
        const Acc* z = row.block(begin, n, buffer);
        std::fill(dz, dz + n, Acc(0));
        if (full) add_part(z, dz, begin, n, y, stats[kLseF], g * stats[kAF], g * stats[kSF], g * stats[kDF]);
        if (rest) {
          std::fill(dz_rest, dz_rest + n, Acc(0));
          add_part(z, dz_rest, begin, n, y, stats[kLseS], g * stats[kAS], g * stats[kSS], g * stats[kDS]);
          for (; next != excluded.end() && *next < begin + n; ++next) dz_rest[*next - begin] = 0;
          for (int64_t j = 0; j < n; ++j) dz[j] += dz_rest[j];
        }
        if (o.logit_softcap > 0) simd::softcap_chain(z, dz, n, static_cast<Acc>(o.logit_softcap));
        for (int64_t c = 0; c < C; ++c) {
          const int64_t col = args.cols.as<int32_t>()[i * C + c];
          if (col >= begin && col < begin + n) dz[col - begin] += g * args.dset.as<Acc>()[i * C + c];
        }
        if constexpr (std::is_same_v<T, Acc>)
          std::copy(dz, dz + n, dx + begin);
        else
          simd::from_float(dz, dx + begin, n);
      }
    }
  };
  parallel_for_pages(args.dinput.as<T>(), N * V, N * V < 16384 ? 1 : threads, piece);
}

}  // namespace

void subset_cross_entropy_fwd_cpu(const SubsetCrossEntropyForward& args, const SubsetCrossEntropyOptions& options,
                                  int threads) {
  check_subset_cross_entropy(args, options);
  const int64_t V = args.input.sizes[2];
  Tensor labels = args.target;
  labels.ndim = 3, labels.sizes[2] = 1, labels.strides[2] = 0;
  check_ids(labels, "target", options.ignore_index, V);
  if (args.ids && options.subset != Subset::kFull) check_ids(args.ids, "subset", options.ids_pad, V);
  dispatch_floats(kOp, args.input.dtype, [&](auto t) { forward<decltype(t)>(args, options, threads); });
}

void subset_cross_entropy_bwd_cpu(const SubsetCrossEntropyBackward& args, const SubsetCrossEntropyOptions& options,
                                  int threads) {
  check_subset_cross_entropy(args, options);
  if (options.subset == Subset::kReverse) check_ids(args.ids, "subset", options.ids_pad, args.dinput.sizes[2]);
  dispatch_floats(kOp, args.dinput.dtype, [&](auto t) { backward<decltype(t)>(args, options, threads); });
}

}  // namespace fastcap
