#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/check.h"
#include "../common/parallel.h"
#include "../common/subset_rows.h"
#include "subset_cross_entropy.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "subset_cross_entropy";
constexpr int64_t kRowsPerPiece = 8;

template <typename T>
void forward(const SubsetCrossEntropyForward& args, const SubsetOptions& o, int threads) {
  using Acc = acc_t<T>;
  const int64_t V = args.input.sizes[2];
  const int64_t N = args.input.sizes[0] * args.input.sizes[1], C = args.cols ? args.cols.sizes[2] : 0;
  const Acc* weight = args.weight.as<Acc>();
  const Tokens<Acc> tokens(args.target, args.token_weight, o);
  const double denom = denominator(args.target, weight, o.ignore_index);
  std::vector<Acc> losses(N, 0);

  const auto rows = [&](int64_t begin, int64_t end) {
    Ids ids;
    std::vector<int64_t> excluded;
    const std::vector<int64_t> none;
    std::vector<Acc> gathered;
    for (int64_t i = begin; i < end; ++i) {
      const Token<Acc> token = tokens[i];
      const Columns<Acc> columns{args.cols ? args.cols.as<int32_t>() + i * C : nullptr,
                                 args.cols ? args.dset.as<Acc>() + i * C : nullptr, C};
      columns.clear();
      Part<Acc> full, rest;
      if (token.valid) {
        const int64_t y = token.y;
        const Row<T> row = row_of<T>(args.input, token.b, token.t, o.logit_softcap);
        if (token.full) {
          full = dense_part(row, V, y, none, weight, o);
          losses[i] += token.of_full * full.loss;
        }
        if (token.rest) ids.refresh(args.ids, o.ids_pad, token.b, token.t);
        if (token.rest && o.subset == Subset::kReverse) {
          ids.excluded_from(y, excluded);
          rest = dense_part(row, V, y, excluded, weight, o);
          losses[i] += token.of_rest * rest.loss;
        } else if (token.rest) {
          losses[i] += token.of_rest * set_part(
                                           row.at(y), y, ids, [&](int64_t k) { return row.at(ids.values[k]); }, weight,
                                           token.of_rest, o, gathered, columns.cols != nullptr,
                                           [&](int64_t k, Acc dx) { columns.set(k + 1, k < 0 ? y : ids.values[k], dx); });
        }
      }
      if (args.stats) {
        Acc* stats = args.stats.as<Acc>() + i;
        const Acc of_full = token.of_full, of_rest = token.of_rest;
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
void backward(const SubsetCrossEntropyBackward& args, const SubsetOptions& o, int threads) {
  using Acc = acc_t<T>;
  const int64_t B = args.dinput.sizes[0], T_ = args.dinput.sizes[1], V = args.dinput.sizes[2];
  const int64_t N = B * T_, C = args.cols ? args.cols.sizes[2] : 0;
  const Acc* weight = args.weight.as<Acc>();
  advise_huge_pages(args.dinput.data, N * V * static_cast<int64_t>(sizeof(T)));

  // A piece of the gradient, [begin_flat, end_flat) of its N * V elements: columns [first, last) of each row that it meets.
  const auto piece = [&](int64_t begin_flat, int64_t end_flat) {
    Ids ids;
    std::vector<int64_t> excluded;
    Acc buffer[simd::kBlock], dz[simd::kBlock], scratch[simd::kBlock];
    for (int64_t i = begin_flat / V; i * V < end_flat; ++i) {
      const int64_t b = i / T_, t = i % T_;
      const int64_t first = std::max<int64_t>(begin_flat - i * V, 0), last = std::min(end_flat - i * V, V);
      T* dx = args.dinput.as<T>() + i * V;
      const Acc g = (o.reduction == 0 ? at<Acc>(args.grad_out, b, t) : *args.grad_out.as<Acc>()) * *args.inv_denom.as<Acc>();
      const Columns<Acc> columns{args.cols ? args.cols.as<int32_t>() + i * C : nullptr,
                                 args.cols ? args.dset.as<Acc>() + i * C : nullptr, C};
      Acc stats[kNumStats] = {};
      if (args.stats)
        for (int j = 0; j < kNumStats; ++j) stats[j] = args.stats.as<Acc>()[j * N + i];
      const bool full = stats[kAF] != 0 || stats[kSF] != 0 || stats[kDF] != 0;
      const bool rest = stats[kAS] != 0 || stats[kSS] != 0 || stats[kDS] != 0;
      if (!full && !rest) {
        std::memset(static_cast<void*>(dx + first), 0, (last - first) * sizeof(T));
        for (int64_t c = 0; c < C; ++c)
          if (columns.cols[c] >= first && columns.cols[c] < last) store(dx + columns.cols[c], g * columns.values[c]);
        continue;
      }
      for (int j = 0; j < kNumStats; ++j)
        if (j != kLseF && j != kLseS) stats[j] *= g;
      const Row<T> row = row_of<T>(args.input, b, t, o.logit_softcap);
      const int64_t y = at<int64_t>(args.target, b, t);
      excluded.clear();
      if (rest) {
        ids.refresh(args.ids, o.ids_pad, b, t);
        ids.excluded_from(y, excluded);
      }
      for (int64_t begin = first; begin < last; begin += simd::kBlock) {
        const int64_t n = std::min(simd::kBlock, last - begin);
        const Acc* z = row.block(begin, n, buffer);
        dense_gradient(z, dz, scratch, begin, n, y, stats, excluded, weight, static_cast<Acc>(o.logit_softcap));
        columns.add_to(dz, begin, n, g);
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

void subset_cross_entropy_fwd_cpu(const SubsetCrossEntropyForward& args, const SubsetOptions& options, int threads) {
  check_subset_cross_entropy(args, options);
  const int64_t V = args.input.sizes[2];
  check_target(kOp, args.target, options.ignore_index, V);
  if (args.ids && options.subset != Subset::kFull) check_ids(kOp, args.ids, "subset", options.ids_pad, V);
  dispatch_floats(kOp, args.input.dtype, [&](auto t) { forward<decltype(t)>(args, options, threads); });
}

void subset_cross_entropy_bwd_cpu(const SubsetCrossEntropyBackward& args, const SubsetOptions& options, int threads) {
  check_subset_cross_entropy(args, options);
  if (options.subset == Subset::kReverse) check_ids(kOp, args.ids, "subset", options.ids_pad, args.dinput.sizes[2]);
  dispatch_floats(kOp, args.dinput.dtype, [&](auto t) { backward<decltype(t)>(args, options, threads); });
}

}  // namespace fastcap
