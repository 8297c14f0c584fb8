// Norms, equal rows and the pairs' own scores: once a call, O((P + Q) D).
#include <algorithm>
#include <cstring>
#include <utility>

#include "../common/parallel.h"
#include "../common/simd_math.h"
#include "retrieval_ranks_exact.h"

namespace fastcap {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kGrain = 256;  // rows

// The lanes are the source's, not the compiler's: position i is summed in lane i % kLanes, wherever the rows lie in memory.
template <typename T>
FASTCAP_INLINE double dot_of(const T* a, const T* b, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j)
      lanes[j] += static_cast<double>(load(a + i + j)) * static_cast<double>(load(b + i + j));
  for (int64_t j = 0; i + j < n; ++j)
    lanes[j] += static_cast<double>(load(a + i + j)) * static_cast<double>(load(b + i + j));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

// Of the value, so that 0 and -0 are alike.
template <typename T>
uint64_t hash_of(const T* row, int64_t n) {
  uint64_t hash = 0x9e3779b97f4a7c15ull;
  for (int64_t i = 0; i < n; ++i) {
    const double value = static_cast<double>(load(row + i)) + 0.0;
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    hash = (hash ^ bits) * 0xbf58476d1ce4e5b9ull;
    hash ^= hash >> 29;
  }
  return hash;
}

template <typename T>
bool equal(const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (load(a + i) != load(b + i)) return false;
  return true;
}

template <typename T>
void rows(const RankRows& args, int threads) {
  const EmbeddingRows<T> x{args.x};
  const int64_t N = args.x.sizes[0];
  double* norm = args.norm.as<double>();
  int64_t* same = args.same.as<int64_t>();
  std::vector<std::pair<uint64_t, int64_t>> order(N);
  parallel_for(N, kGrain, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer;
    for (int64_t i = begin; i < end; ++i) {
      const T* row = x.at(i, buffer);
      norm[i] = std::sqrt(retrieval_dot(row, row, x.D));
      order[i] = {hash_of(row, x.D), i};
      same[i] = i;
    }
  });
  std::sort(order.begin(), order.end());
  std::vector<T> one, other;
  std::vector<int64_t> found;  // the different rows of one hash: nearly always one
  for (int64_t k = 0; k < N; ++k) {
    const auto [hash, i] = order[k];
    if (k == 0 || hash != order[k - 1].first) found.clear();
    if (std::isnan(norm[i])) continue;  // equals nothing
    const T* row = x.at(i, one);
    const auto first =
        std::find_if(found.begin(), found.end(), [&, i = i](int64_t j) { return j < i && equal(row, x.at(j, other), x.D); });
    if (first == found.end())
      found.push_back(i);
    else
      same[i] = *first;
  }
}

template <typename T>
void own(const RankPairs& args, int threads) {
  const int64_t P = args.text.sizes[0], Q = args.image.sizes[0];
  const int64_t* positive = args.positive.as<int64_t>();
  double* out = args.own.as<double>();
  parallel_for(P, kGrain, threads, [&](int64_t begin, int64_t end) {
    ExactScores<T> exact(args);
    for (int64_t p = begin; p < end; ++p)
      out[p] = positive[p] < 0 || positive[p] >= Q ? std::nan("") : exact(p, positive[p]);
  });
}

}  // namespace

FASTCAP_CLONES double retrieval_dot(const float* a, const float* b, int64_t n) { return dot_of(a, b, n); }
FASTCAP_CLONES double retrieval_dot(const double* a, const double* b, int64_t n) { return dot_of(a, b, n); }
FASTCAP_CLONES double retrieval_dot(const Half* a, const Half* b, int64_t n) { return dot_of(a, b, n); }
FASTCAP_CLONES double retrieval_dot(const BFloat16* a, const BFloat16* b, int64_t n) { return dot_of(a, b, n); }

void retrieval_ranks_rows_cpu(const RankRows& args, int threads) {
  check_rank_rows(args);
  dispatch_floats("retrieval_ranks", args.x.dtype, [&](auto type) { rows<decltype(type)>(args, threads); });
}

void retrieval_ranks_own_cpu(const RankPairs& args, int threads) {
  check_rank_pairs(args);
  dispatch_floats("retrieval_ranks", args.text.dtype, [&](auto type) { own<decltype(type)>(args, threads); });
}

}  // namespace fastcap
