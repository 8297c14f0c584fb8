#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/check.h"
#include "../common/parallel.h"
#include "../common/rows.h"
#include "additive_attention.h"
#include "additive_attention_rows.h"

namespace fastcap {
namespace {

constexpr const char* kOp = "additive_attention";
constexpr int64_t kRowsPerPiece = 16;       // of keys, forward
constexpr int64_t kColumnsPerPiece = 1024;  // of a context
constexpr int64_t kSmall = 1 << 15;         // elements that are not worth waking a second thread

// Rows [B, L, width] of any float type and strides as contiguous rows of sums' type: in place where they are that already.
template <typename T>
struct Locations {
  using Acc = acc_t<T>;
  const Tensor& x;
  int64_t width;

  explicit Locations(const Tensor& tensor) : x(tensor), width(tensor.sizes[2]) {}

  // Columns [begin, begin + n) of row (b, l); `buffer` holds n.
  const Acc* row(int64_t b, int64_t l, int64_t begin, int64_t n, Acc* buffer) const {
    const T* p = x.as<T>() + b * x.strides[0] + l * x.strides[1] + begin * x.strides[2];
    if constexpr (std::is_same_v<T, Acc>) {
      if (x.strides[2] == 1) return p;
      for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * x.strides[2]];
    } else {
      if (x.strides[2] == 1)
        simd::to_float(p, buffer, n);
      else
        for (int64_t i = 0; i < n; ++i) buffer[i] = load(p + i * x.strides[2]);
    }
    return buffer;
  }
  const Acc* row(int64_t b, int64_t l, Acc* buffer) const { return row(b, l, 0, width, buffer); }
};

// A row of a gradient: formed in place where its type is that of sums, else in a buffer and then rounded.
template <typename T, typename Form>
void write_row(T* out, int64_t n, acc_t<T>* buffer, const Form& form) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    form(out);
  } else {
    form(buffer);
    simd::from_float(buffer, out, n);
  }
}

// Sums of `rows` rows of n, in order, in double.
template <typename Acc>
void sum_rows(const std::vector<Acc>& parts, int64_t rows, int64_t n, Acc* out) {
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += parts[r * n + i];
    out[i] = static_cast<Acc>(sum);
  }
}

template <typename Acc>
void softmax(Acc* scores, const uint8_t* mask, int64_t L) {
  const Acc nothing = -std::numeric_limits<Acc>::infinity();
  Acc max = nothing;
  for (int64_t l = 0; l < L; ++l) {
    if (mask && !mask[l])
      scores[l] = nothing;
    else if (!(scores[l] <= max))
      max = scores[l];  // a NaN becomes the maximum, and everything NaN, as in torch
  }
  if (max == nothing && mask && std::none_of(mask, mask + L, [](uint8_t m) { return m != 0; })) {
    std::fill_n(scores, L, Acc(0));
    return;
  }
  double sum = 0;
  for (int64_t l = 0; l < L; ++l) {
    scores[l] = mask && !mask[l] ? Acc(0) : std::exp(scores[l] - max);
    sum += scores[l];
  }
  const Acc inverse = static_cast<Acc>(1 / sum);
  for (int64_t l = 0; l < L; ++l) scores[l] *= inverse;
}

template <typename T>
void weights_forward(const AdditiveWeightsForward& args, Activation activation, int threads) {
  using Acc = acc_t<T>;
  const int64_t n = args.query.sizes[0], L = args.keys.sizes[1], A = args.keys.sizes[2];
  const Locations<T> keys(args.keys);
  Acc* alpha = args.alpha.as<Acc>();
  const uint8_t* mask = args.mask.as<uint8_t>();
  if (n * L * A < kSmall) threads = 1;
  parallel_for(n * L, kRowsPerPiece, threads, [&](int64_t begin, int64_t end) {
    std::vector<Acc> buffer(A);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / L, l = i % L;
      if (mask && !mask[i]) continue;
      alpha[i] =
          additive::score(keys.row(b, l, buffer.data()), args.query.as<Acc>() + b * A, args.v.as<Acc>(), A, activation);
    }
  });
  parallel_for(n, 1, threads, [&](int64_t b, int64_t) { softmax(alpha + b * L, mask ? mask + b * L : nullptr, L); });
}

template <typename T>
void weights_backward(const AdditiveWeightsBackward& args, Activation activation, int threads) {
  using Acc = acc_t<T>;
  const int64_t n = args.query.sizes[0], L = args.keys.sizes[1], A = args.keys.sizes[2];
  const Locations<T> keys(args.keys);
  T* dkeys = args.dkeys.as<T>();
  std::vector<Acc> dv(dkeys ? n * A : 0, 0);
  if (dkeys) advise_huge_pages(dkeys, n * L * A * static_cast<int64_t>(sizeof(T)));
  parallel_for(n, 1, n * L * A < kSmall ? 1 : threads, [&](int64_t b, int64_t) {
    const Acc *alpha = args.alpha.as<Acc>() + b * L, *dalpha = args.dalpha.as<Acc>() + b * L;
    const Acc *query = args.query.as<Acc>() + b * A, *v = args.v.as<Acc>();
    Acc *dscore = args.dscore.as<Acc>() + b * L, *dquery = args.dquery.as<Acc>() + b * A;
    std::vector<Acc> buffer(A), gradient(std::is_same_v<T, Acc> ? 0 : A);
    double mean = 0;
    for (int64_t l = 0; l < L; ++l)
      if (alpha[l] != 0) mean += static_cast<double>(alpha[l]) * dalpha[l];
    std::fill_n(dquery, A, Acc(0));
    for (int64_t l = 0; l < L; ++l) {
      const Acc de = alpha[l] != 0 ? alpha[l] * (dalpha[l] - static_cast<Acc>(mean)) : Acc(0);
      dscore[l] = de;
      T* dk = dkeys ? dkeys + (b * L + l) * A : nullptr;
      if (de == 0) {
        if (dk) std::memset(static_cast<void*>(dk), 0, A * sizeof(T));
        continue;
      }
      const Acc* k = keys.row(b, l, buffer.data());
      if (!dk)
        additive::add_gradient(k, query, v, de, A, activation, dquery, nullptr, nullptr);
      else
        write_row(dk, A, gradient.data(),
                  [&](Acc* out) { additive::add_gradient(k, query, v, de, A, activation, dquery, out, dv.data() + b * A); });
    }
  });
  if (args.dv) sum_rows(dv, dkeys ? n : 0, A, args.dv.as<Acc>());
}

template <typename T>
void context_forward(const AdditiveContextForward& args, int threads) {
  using Acc = acc_t<T>;
  const int64_t n = args.weights.sizes[0], L = args.values.sizes[1], D = args.values.sizes[2];
  const int64_t pieces = (D + kColumnsPerPiece - 1) / kColumnsPerPiece;
  const Locations<T> values(args.values);
  parallel_for(n * pieces, 1, n * L * D < kSmall ? 1 : threads, [&](int64_t i, int64_t) {
    const int64_t b = i / pieces, begin = i % pieces * kColumnsPerPiece, width = std::min(kColumnsPerPiece, D - begin);
    const Acc* weights = args.weights.as<Acc>() + b * L;
    Acc* context = args.context.as<Acc>() + b * D + begin;
    std::fill_n(context, width, Acc(0));
    std::vector<Acc> buffer(4 * width), zeros(width, 0);
    const Acc* rows[4];
    Acc w[4];
    int filled = 0;
    const auto add = [&] {
      for (; filled < 4; ++filled) rows[filled] = zeros.data(), w[filled] = 0;
      additive::add_rows(rows, w, width, context);
      filled = 0;
    };
    for (int64_t l = 0; l < L; ++l) {
      if (weights[l] == 0) continue;
      rows[filled] = values.row(b, l, begin, width, buffer.data() + filled * width);
      w[filled] = weights[l];
      if (++filled == 4) add();
    }
    if (filled) add();
  });
}

template <typename T>
void context_backward(const AdditiveContextBackward& args, int threads) {
  using Acc = acc_t<T>;
  const int64_t n = args.weights.sizes[0], L = args.values.sizes[1], D = args.values.sizes[2];
  const Locations<T> values(args.values);
  T* dvalues = args.dvalues.as<T>();
  Acc* dweights = args.dweights.as<Acc>();
  if (dvalues) advise_huge_pages(dvalues, n * L * D * static_cast<int64_t>(sizeof(T)));
  parallel_for(n * L, kRowsPerPiece, n * L * D < kSmall ? 1 : threads, [&](int64_t begin, int64_t end) {
    std::vector<Acc> buffer(D);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / L, l = i % L;
      const Acc w = args.weights.as<Acc>()[i], *dcontext = args.dcontext.as<Acc>() + b * D;
      if (dweights) dweights[i] = additive::dot(dcontext, values.row(b, l, buffer.data()), D);
      if (!dvalues) continue;
      if (w == 0)
        std::memset(static_cast<void*>(dvalues + i * D), 0, D * sizeof(T));
      else
        write_row(dvalues + i * D, D, buffer.data(), [&](Acc* out) { additive::scale(dcontext, w, D, out); });
    }
  });
}

template <typename T>
void memory_backward(const AdditiveMemoryBackward& args, Activation activation, int threads) {
  using Acc = acc_t<T>;
  const int64_t steps = args.dscores.sizes[0], B = args.keys.sizes[0], L = args.keys.sizes[1], A = args.keys.sizes[2];
  const Locations<T> keys(args.keys);
  T* dkeys = args.dkeys.as<T>();
  std::vector<Acc> dv(B * A, 0);
  advise_huge_pages(dkeys, B * L * A * static_cast<int64_t>(sizeof(T)));
  parallel_for(B, 1, B * L * A < kSmall ? 1 : threads, [&](int64_t b, int64_t) {
    std::vector<Acc> buffer(A), gradient(std::is_same_v<T, Acc> ? 0 : A), de(steps);
    for (int64_t l = 0; l < L; ++l) {
      bool any = false;
      for (int64_t t = 0; t < steps; ++t) any |= (de[t] = at<Acc>(args.dscores, t, b, l)) != 0;
      T* dk = dkeys + (b * L + l) * A;
      if (!any) {
        std::memset(static_cast<void*>(dk), 0, A * sizeof(T));
        continue;
      }
      const Acc* k = keys.row(b, l, buffer.data());
      write_row(dk, A, gradient.data(), [&](Acc* out) {
        additive::gradients(k, args.queries.as<Acc>() + b * args.queries.strides[1], args.queries.strides[0],
                            args.v.as<Acc>(), de.data(), steps, A, activation, out, dv.data() + b * A);
      });
    }
  });
  sum_rows(dv, B, A, args.dv.as<Acc>());
}

}  // namespace

void additive_attention_weights_fwd_cpu(const AdditiveWeightsForward& args, Activation activation, int threads) {
  check_additive_attention(args);
  dispatch_floats(kOp, args.keys.dtype, [&](auto t) { weights_forward<decltype(t)>(args, activation, threads); });
}

void additive_attention_weights_bwd_cpu(const AdditiveWeightsBackward& args, Activation activation, int threads) {
  check_additive_attention(args);
  dispatch_floats(kOp, args.keys.dtype, [&](auto t) { weights_backward<decltype(t)>(args, activation, threads); });
}

void additive_attention_context_fwd_cpu(const AdditiveContextForward& args, int threads) {
  check_additive_attention(args);
  dispatch_floats(kOp, args.values.dtype, [&](auto t) { context_forward<decltype(t)>(args, threads); });
}

void additive_attention_context_bwd_cpu(const AdditiveContextBackward& args, int threads) {
  check_additive_attention(args);
  dispatch_floats(kOp, args.values.dtype, [&](auto t) { context_backward<decltype(t)>(args, threads); });
}

void additive_attention_memory_bwd_cpu(const AdditiveMemoryBackward& args, Activation activation, int threads) {
  check_additive_attention(args);
  dispatch_floats(kOp, args.keys.dtype, [&](auto t) { memory_backward<decltype(t)>(args, activation, threads); });
}

}  // namespace fastcap
