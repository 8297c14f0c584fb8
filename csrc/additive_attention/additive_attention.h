// Additive attention (Bahdanau et al. 2015; Xu et al. 2015) over L locations:
//
//   e_l = sum_a v_a act(keys_la + query_a)      alpha = softmax(e) over the locations that count
//   context_d = sum_l w_l values_ld             w = alpha, or weights that are given
//
// Forward: `weights` reads keys once, `context` reads values once. Backward, with g = dL/dalpha:
//
//   dw_l = <dcontext, values_l>                 dvalues_ld = w_l dcontext_d
//   de_l = alpha_l (g_l - sum_m alpha_m g_m)
//   G_la = de_l v_a act'(keys_la + query_a)     dkeys = G,  dquery_a = sum_l G_la,  dv_a = sum_l de_l act(keys_la + query_a)
//
// The [B, L, A] activation is made again, row by row, and stored nowhere. A decoder that attends T times to the same keys
// leaves dkeys and dv to `memory_bwd`, which reads keys once and writes dkeys once: dkeys_la = v_a sum_t de_tl act'(keys_la
// + query_ta).
#pragma once
#include "../common/tensor.h"

namespace fastcap {

enum class Activation : int { kTanh = 0, kRelu = 1 };

// acc is float, or double where keys (values) are double. n <= B: queries are for the first n rows of keys and values.
struct AdditiveWeightsForward {
  Tensor keys;   // [B, L, A] any strides; float, double, half or bfloat16
  Tensor query;  // [n, A] acc, contiguous
  Tensor v;      // [A] acc, contiguous
  Tensor mask;   // [B, L] uint8 contiguous, 0: the location does not count, and may hold anything; or absent
  Tensor alpha;  // out: [n, L] acc, contiguous; all 0 where no location counts
};

struct AdditiveWeightsBackward {
  Tensor dalpha;  // [n, L] acc, contiguous; not read where alpha is 0
  Tensor alpha;   // [n, L] acc, contiguous
  Tensor keys;    // [B, L, A]; rows of weight 0 are not read
  Tensor query;   // [n, A] acc, contiguous
  Tensor v;       // [A] acc, contiguous
  Tensor dscore;  // out: [n, L] acc, contiguous: de
  Tensor dquery;  // out: [n, A] acc, contiguous
  Tensor dv;      // out: [A] acc; or absent, with dkeys
  Tensor dkeys;   // out: [B, L, A] as keys, contiguous; here n = B; or absent
};

struct AdditiveContextForward {
  Tensor weights;  // [n, L] acc, contiguous
  Tensor values;   // [B, L, D] any strides; rows of weight 0 are not read
  Tensor context;  // out: [n, D] acc, contiguous
};

struct AdditiveContextBackward {
  Tensor dcontext;  // [n, D] acc, contiguous
  Tensor weights;   // [n, L] acc, contiguous
  Tensor values;    // [B, L, D]
  Tensor dweights;  // out: [n, L] acc, contiguous; or absent
  Tensor dvalues;   // out: [B, L, D] as values, contiguous; here n = B; or absent
};

struct AdditiveMemoryBackward {
  Tensor dscores;  // [T, B, L] acc, the last stride 1; 0 where a step did not use a row
  Tensor queries;  // [T, B, A] acc, the last stride 1
  Tensor keys;     // [B, L, A]
  Tensor v;        // [A] acc, contiguous
  Tensor dv;       // out: [A] acc, contiguous
  Tensor dkeys;    // out: [B, L, A] as keys, contiguous
};

void additive_attention_weights_fwd_cpu(const AdditiveWeightsForward& args, Activation activation, int threads);
void additive_attention_weights_bwd_cpu(const AdditiveWeightsBackward& args, Activation activation, int threads);
void additive_attention_context_fwd_cpu(const AdditiveContextForward& args, int threads);
void additive_attention_context_bwd_cpu(const AdditiveContextBackward& args, int threads);
void additive_attention_memory_bwd_cpu(const AdditiveMemoryBackward& args, Activation activation, int threads);

// Shapes, dtypes and layouts, checked before any pointer is followed.
void check_additive_attention(const AdditiveWeightsForward& args);
void check_additive_attention(const AdditiveWeightsBackward& args);
void check_additive_attention(const AdditiveContextForward& args);
void check_additive_attention(const AdditiveContextBackward& args);
void check_additive_attention(const AdditiveMemoryBackward& args);

}  // namespace fastcap
