// The gradient of the head by words: rows of equal id are summed, in the order of the tokens, whatever the threads.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/parallel.h"
#include "../common/rows.h"
#include "linear_subset_cross_entropy_check.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "linear_subset_cross_entropy";

template <typename Acc, typename T>
void axpy(Acc* out, const T* x, Acc factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += factor * static_cast<Acc>(load(x + i));
}

// out = values, or out + values
template <typename Acc, typename T>
void write(T* out, const Acc* values, int64_t n, bool add) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out + i, (add ? static_cast<Acc>(load(out + i)) : Acc(0)) + values[i]);
}

template <typename T>
void add_rows(const Tensor& values, const Tensor& group, const Tensor& factor, const Tensor& source, int64_t share,
              int threads) {
  using Acc = acc_t<T>;
  const int64_t M = group.sizes[0], U = values.sizes[0], H = values.sizes[1];
  const int64_t* g = group.as<int64_t>();
  // A counting sort: the rows of each group, in order.
  std::vector<int64_t> starts(U + 1, 0), order(M);
  for (int64_t j = 0; j < M; ++j)
    if (g[j] >= 0) ++starts[g[j] + 1];
  for (int64_t u = 0; u < U; ++u) starts[u + 1] += starts[u];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t j = 0; j < M; ++j)
    if (g[j] >= 0) order[next[g[j]]++] = j;
  parallel_for(U, 4, M * H < 32768 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u)
      for (int64_t i = starts[u]; i < starts[u + 1]; ++i) {
        const int64_t j = order[i];
        const Acc c = factor ? factor.as<Acc>()[j] : Acc(1);
        if (c != 0) axpy(values.as<Acc>() + u * H, source.as<T>() + j / share * H, c, H);
      }
  });
}

template <typename T, typename Acc>
void write_rows(const Tensor& out, const Tensor& ids, const Tensor& values, bool add, bool clear, int threads) {
  const int64_t U = values.sizes[0], H = values.sizes[1], V = out.sizes[0], stride = out.strides[0];
  if (clear) {
    advise_huge_pages(out.data, V * H * static_cast<int64_t>(sizeof(T)));
    parallel_for_pages(out.as<T>(), V * H, V * H < 16384 ? 1 : threads, [&](int64_t begin, int64_t end) {
      std::memset(static_cast<void*>(out.as<T>() + begin), 0, (end - begin) * sizeof(T));
    });
  }
  parallel_for(U, 8, U * H < 32768 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u)
      write(out.as<T>() + ids.as<int64_t>()[u] * stride, values.as<Acc>() + u * H, H, add);
  });
}

void check_vector(const char* name, const Tensor& tensor, int64_t n, DType dtype) {
  check_shape(kOp, name, tensor, {n});
  check_dtype(kOp, name, tensor, dtype);
  check_contiguous(kOp, name, tensor);
}

void check_matrix(const char* name, const Tensor& tensor) {
  if (tensor.ndim != 2) bad(kOp, name, "be a matrix", shape_of(tensor), "pass what the forward made");
  check_shape(kOp, name, tensor, {tensor.sizes[0], tensor.sizes[1]});
}

void check_below(const char* name, const Tensor& tensor, int64_t low, int64_t high) {
  for (int64_t j = 0; j < tensor.sizes[0]; ++j) {
    const int64_t value = tensor.as<int64_t>()[j];
    if (value < low || value >= high)
      bad(kOp, name, "lie in [" + std::to_string(low) + ", " + std::to_string(high) + ")", value, "pass what `group` made");
  }
}

}  // namespace

int64_t linear_subset_cross_entropy_group_cpu(const Tensor& ids, int64_t pad, int64_t V, const Tensor& group,
                                              const Tensor& distinct) {
  const int64_t M = ids.ndim == 1 ? ids.sizes[0] : 0;
  check_vector("ids", ids, M, DType::kInt64);
  check_vector("group", group, M, DType::kInt64);
  check_vector("distinct", distinct, M, DType::kInt64);
  const int64_t* id = ids.as<int64_t>();
  int64_t* words = distinct.as<int64_t>();
  int64_t n = 0;
  for (int64_t j = 0; j < M; ++j) {
    if (id[j] == pad) continue;
    if (id[j] < 0 || id[j] >= V)
      bad(kOp, "ids", "lie in [0, " + std::to_string(V) + ")", id[j], "check the vocabulary size");
    words[n++] = id[j];
  }
  std::sort(words, words + n);
  const int64_t U = std::unique(words, words + n) - words;
  for (int64_t j = 0; j < M; ++j)
    group.as<int64_t>()[j] = id[j] == pad ? -1 : std::lower_bound(words, words + U, id[j]) - words;
  return U;
}

void linear_subset_cross_entropy_add_rows_cpu(const Tensor& values, const Tensor& group, const Tensor& factor,
                                              const Tensor& source, int64_t share, int threads) {
  check_matrix("values", values);
  check_matrix("source", source);
  check_contiguous(kOp, "values", values);
  check_contiguous(kOp, "source", source);
  check_dtype(kOp, "values", values, source.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  const int64_t M = group.ndim == 1 ? group.sizes[0] : 0;
  check_vector("group", group, M, DType::kInt64);
  check_below("group", group, -1, values.sizes[0]);
  if (factor) check_vector("factor", factor, M, values.dtype);
  if (share < 1 || (M > 0 && source.sizes[0] <= (M - 1) / share) || source.sizes[1] != values.sizes[1])
    bad(kOp, "source", "have a row for each `share` elements of group", shape_of(source), "pass rows of H elements");
  dispatch_floats(kOp, source.dtype, [&](auto t) { add_rows<decltype(t)>(values, group, factor, source, share, threads); });
}

void linear_subset_cross_entropy_write_rows_cpu(const Tensor& out, const Tensor& ids, const Tensor& values, bool add,
                                                bool clear, int threads) {
  check_matrix("out", out);
  check_matrix("values", values);
  check_contiguous(kOp, "values", values);
  if (clear) check_contiguous(kOp, "out", out);
  if (out.sizes[1] != values.sizes[1] || (out.sizes[1] > 1 && out.strides[1] != 1))
    bad(kOp, "out", "have contiguous rows of H elements", shape_of(out), "pass the head's gradient");
  check_vector("ids", ids, values.sizes[0], DType::kInt64);
  check_below("ids", ids, 0, out.sizes[0]);
  dispatch_floats(kOp, out.dtype, [&](auto t) {
    if (values.dtype == DType::kFloat64) {
      if constexpr (std::is_same_v<decltype(t), double>)
        return write_rows<double, double>(out, ids, values, add, clear, threads);
      bad(kOp, "values", "have the dtype of sums of out", "float64", "pass float32");
    }
    check_dtype(kOp, "values", values, DType::kFloat32);
    write_rows<decltype(t), float>(out, ids, values, add, clear, threads);
  });
}

}  // namespace fastcap
