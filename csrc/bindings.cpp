// fastcap._C: one line per operation and device.
#include <pybind11/pybind11.h>

#include "additive_attention/additive_attention.h"
#include "attention_coverage/attention_coverage.h"
#include "attention_coverage_from_scores/attention_coverage_from_scores.h"
#include "cider_d/cider_d_bindings.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/tensor_caster.h"
#include "contrastive_reward/contrastive_reward.h"
#include "linear_subset_cross_entropy/linear_subset_cross_entropy.h"
#include "retrieval_ranks/retrieval_ranks.h"
#include "subset_cross_entropy/subset_cross_entropy.h"

namespace py = pybind11;
using fastcap::Tensor;

namespace {

using Options = fastcap::SubsetOptions;

Options subset_options(int subset, bool first_full, double mle_weight, double label_smoothing, double logit_softcap,
                       double z_loss, int64_t ignore_index, int64_t ids_pad, int reduction) {
  return {static_cast<fastcap::Subset>(subset),
          first_full,
          mle_weight,
          label_smoothing,
          logit_softcap,
          z_loss,
          ignore_index,
          ids_pad,
          reduction};
}

void subset_cross_entropy_fwd_cpu(Tensor input, Tensor target, Tensor ids, Tensor weight, Tensor token_weight, Tensor out,
                                  Tensor inv_denom, Tensor stats, Tensor cols, Tensor dset, const Options& options,
                                  int threads) {
  py::gil_scoped_release release;
  fastcap::subset_cross_entropy_fwd_cpu(
      {input, target, ids, weight, token_weight, out, inv_denom, stats, cols, dset, Tensor{}}, options, threads);
}

void subset_cross_entropy_bwd_cpu(Tensor grad_out, Tensor inv_denom, Tensor input, Tensor target, Tensor ids, Tensor weight,
                                  Tensor stats, Tensor cols, Tensor dset, Tensor dinput, const Options& options,
                                  int threads) {
  py::gil_scoped_release release;
  fastcap::subset_cross_entropy_bwd_cpu({grad_out, inv_denom, input, target, ids, weight, stats, cols, dset, dinput},
                                        options, threads);
}

#if defined(FASTCAP_WITH_CUDA)
void subset_cross_entropy_fwd_cuda(Tensor input, Tensor target, Tensor ids, Tensor weight, Tensor token_weight, Tensor out,
                                   Tensor inv_denom, Tensor stats, Tensor cols, Tensor dset, Tensor scratch, Tensor excluded,
                                   const Options& options, uintptr_t stream) {
  py::gil_scoped_release release;
  fastcap::subset_cross_entropy_fwd_cuda(
      {input, target, ids, weight, token_weight, out, inv_denom, stats, cols, dset, scratch}, excluded, options,
      reinterpret_cast<void*>(stream));
}

void subset_cross_entropy_bwd_cuda(Tensor grad_out, Tensor inv_denom, Tensor input, Tensor target, Tensor ids, Tensor weight,
                                   Tensor stats, Tensor cols, Tensor dset, Tensor dinput, Tensor excluded,
                                   const Options& options, uintptr_t stream) {
  py::gil_scoped_release release;
  fastcap::subset_cross_entropy_bwd_cuda({grad_out, inv_denom, input, target, ids, weight, stats, cols, dset, dinput},
                                         excluded, options, reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastcap's compiled kernels. Called by fastcap.ops; not a public interface.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const fastcap::BadInput& bad) {
      py::set_error(py::module_::import("fastcap.errors").attr("FastcapError"), bad.what());
    }
  });
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#if defined(FASTCAP_WITH_CUDA)
  m.attr("cuda") = FASTCAP_WITH_CUDA;  // the architectures that it was compiled for, as text
#else
  m.attr("cuda") = py::none();
#endif

  py::class_<Options>(m, "SubsetOptions")
      .def(py::init(&subset_options), py::kw_only(), py::arg("subset"), py::arg("first_full"), py::arg("mle_weight"),
           py::arg("label_smoothing"), py::arg("logit_softcap"), py::arg("z_loss"), py::arg("ignore_index"),
           py::arg("ids_pad"), py::arg("reduction"));
  // Holds pointers: it keeps the tensors alive that they lead to.
  py::class_<fastcap::LinearTokens>(m, "LinearTokens")
      .def(py::init([](Tensor target, Tensor ids, Tensor weight, Tensor token_weight, Tensor bias, int64_t V) {
             return fastcap::LinearTokens{target, ids, weight, token_weight, bias, V};
           }),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::keep_alive<1, 5>(),
           py::keep_alive<1, 6>());
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("linear_subset_cross_entropy_tokens_cpu", &fastcap::linear_subset_cross_entropy_tokens_cpu, release);
  m.def("linear_subset_cross_entropy_set_cpu", &fastcap::linear_subset_cross_entropy_set_cpu, release);
  m.def("linear_subset_cross_entropy_rows_cpu", &fastcap::linear_subset_cross_entropy_rows_cpu, release);
  m.def("linear_subset_cross_entropy_absorb_cpu", &fastcap::linear_subset_cross_entropy_absorb_cpu, release);
  m.def("linear_subset_cross_entropy_finish_cpu", &fastcap::linear_subset_cross_entropy_finish_cpu, release);
  m.def("linear_subset_cross_entropy_emit_cpu", &fastcap::linear_subset_cross_entropy_emit_cpu, release);
  m.def("linear_subset_cross_entropy_group_cpu", &fastcap::linear_subset_cross_entropy_group_cpu, release);
  m.def("linear_subset_cross_entropy_add_rows_cpu", &fastcap::linear_subset_cross_entropy_add_rows_cpu, release);
  m.def("linear_subset_cross_entropy_write_rows_cpu", &fastcap::linear_subset_cross_entropy_write_rows_cpu, release);
  m.def("advise_huge_pages",
        [](Tensor tensor) { fastcap::advise_huge_pages(tensor.data, tensor.numel() * fastcap::item_size(tensor.dtype)); });
  m.def("subset_cross_entropy_fwd_cpu", &subset_cross_entropy_fwd_cpu);
  m.def("subset_cross_entropy_bwd_cpu", &subset_cross_entropy_bwd_cpu);
  using fastcap::CoverageReduction;
  m.def(
      "attention_coverage_fwd_cpu",
      [](Tensor alpha, Tensor valid, Tensor tau, Tensor out, Tensor residual, double target, int reduction, int threads) {
        const auto how = static_cast<CoverageReduction>(reduction);
        fastcap::attention_coverage_fwd_cpu({alpha, valid, tau, out, residual, Tensor{}, target, how}, threads);
      },
      release);
  m.def(
      "attention_coverage_bwd_cpu",
      [](Tensor grad_out, Tensor residual, Tensor valid, Tensor dalpha, int reduction, int threads) {
        const auto how = static_cast<CoverageReduction>(reduction);
        fastcap::attention_coverage_bwd_cpu({grad_out, residual, valid, dalpha, how}, threads);
      },
      release);
  m.def(
      "attention_coverage_from_scores_rows_fwd_cpu",
      [](Tensor scores, Tensor key_mask, Tensor valid, Tensor lse, Tensor sums, bool add, int threads) {
        fastcap::attention_coverage_from_scores_rows_fwd_cpu({scores, key_mask, valid, lse, sums, add}, threads);
      },
      release);
  m.def(
      "attention_coverage_from_scores_rows_bwd_cpu",
      [](Tensor scores, Tensor key_mask, Tensor valid, Tensor lse, Tensor residual, Tensor grad_out, double coefficient,
         int threads) {
        fastcap::attention_coverage_from_scores_rows_bwd_cpu({scores, key_mask, valid, lse, residual, grad_out, coefficient},
                                                             threads);
      },
      release);
  using fastcap::Activation;
  m.def(
      "additive_attention_weights_fwd_cpu",
      [](Tensor keys, Tensor query, Tensor v, Tensor mask, Tensor alpha, bool relu, int threads) {
        fastcap::additive_attention_weights_fwd_cpu({keys, query, v, mask, alpha}, static_cast<Activation>(relu), threads);
      },
      release);
  m.def(
      "additive_attention_weights_bwd_cpu",
      [](Tensor dalpha, Tensor alpha, Tensor keys, Tensor query, Tensor v, Tensor dscore, Tensor dquery, Tensor dv,
         Tensor dkeys, bool relu, int threads) {
        fastcap::additive_attention_weights_bwd_cpu({dalpha, alpha, keys, query, v, dscore, dquery, dv, dkeys},
                                                    static_cast<Activation>(relu), threads);
      },
      release);
  m.def(
      "additive_attention_context_fwd_cpu",
      [](Tensor weights, Tensor values, Tensor context, int threads) {
        fastcap::additive_attention_context_fwd_cpu({weights, values, context}, threads);
      },
      release);
  m.def(
      "additive_attention_context_bwd_cpu",
      [](Tensor dcontext, Tensor weights, Tensor values, Tensor dweights, Tensor dvalues, int threads) {
        fastcap::additive_attention_context_bwd_cpu({dcontext, weights, values, dweights, dvalues}, threads);
      },
      release);
  m.def(
      "additive_attention_memory_bwd_cpu",
      [](Tensor dscores, Tensor queries, Tensor keys, Tensor v, Tensor dv, Tensor dkeys, bool relu, int threads) {
        fastcap::additive_attention_memory_bwd_cpu({dscores, queries, keys, v, dv, dkeys}, static_cast<Activation>(relu),
                                                   threads);
      },
      release);
  m.def(
      "contrastive_reward_block_fwd_cpu",
      [](Tensor scores, Tensor positive, Tensor row_factor, Tensor col_factor, Tensor own, Tensor row_top, Tensor row_sum,
         Tensor row_index, Tensor col_top, Tensor col_sum, Tensor col_index, int64_t first_row, int64_t first_col,
         int threads) {
        fastcap::contrastive_reward_block_fwd_cpu({scores, positive, row_factor, col_factor, own, row_top, row_sum,
                                                   row_index, col_top, col_sum, col_index, first_row, first_col},
                                                  threads);
      },
      release);
  m.def(
      "contrastive_reward_block_bwd_cpu",
      [](Tensor scores, Tensor positive, Tensor row_factor, Tensor col_factor, Tensor down, Tensor row, Tensor drow,
         Tensor col, Tensor dcol, int64_t first_col, int threads) {
        fastcap::contrastive_reward_block_bwd_cpu(
            {scores, positive, row_factor, col_factor, down, row, drow, col, dcol, first_col}, threads);
      },
      release);
  m.def(
      "contrastive_reward_others_fwd_cpu",
      [](Tensor own, Tensor positive, Tensor value, Tensor index, int64_t Q) {
        fastcap::contrastive_reward_others_fwd_cpu({own, positive, value, index, Q});
      },
      release);
  m.def(
      "contrastive_reward_others_bwd_cpu",
      [](Tensor dvalue, Tensor value, Tensor own, Tensor positive, Tensor down, int64_t Q) {
        fastcap::contrastive_reward_others_bwd_cpu({dvalue, value, own, positive, down, Q});
      },
      release);
  // Holds pointers: it keeps the tensors alive that they lead to.
  py::class_<fastcap::RankPairs>(m, "RankPairs")
      .def(py::init([](Tensor text, Tensor image, Tensor positive, Tensor text_norm, Tensor image_norm, Tensor own,
                       bool normalize) {
             return fastcap::RankPairs{text, image, positive, text_norm, image_norm, own, normalize};
           }),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::keep_alive<1, 5>(),
           py::keep_alive<1, 6>(), py::keep_alive<1, 7>());
  m.def(
      "retrieval_ranks_rows_cpu",
      [](Tensor x, Tensor norm, Tensor same, int threads) { fastcap::retrieval_ranks_rows_cpu({x, norm, same}, threads); },
      release);
  m.def("retrieval_ranks_own_cpu", &fastcap::retrieval_ranks_own_cpu, release);
  m.def(
      "retrieval_ranks_block_cpu",
      [](const fastcap::RankPairs& pairs, Tensor scores, int64_t row, int64_t col, Tensor text_same, Tensor image_same,
         Tensor texts, Tensor above_images, Tensor tied_images, Tensor above_texts, Tensor tied_texts, bool last,
         int threads) {
        return fastcap::retrieval_ranks_block_cpu({pairs, scores, row, col, text_same, image_same, texts, above_images,
                                                   tied_images, above_texts, tied_texts, last},
                                                  threads);
      },
      release);
  fastcap::bind_cider_d(m);
#if defined(FASTCAP_WITH_CUDA)
  m.def("subset_cross_entropy_fwd_cuda", &subset_cross_entropy_fwd_cuda);
  m.def("subset_cross_entropy_bwd_cuda", &subset_cross_entropy_bwd_cuda);
  m.def("attention_coverage_blocks_cuda", &fastcap::attention_coverage_blocks_cuda, release);
  m.def(
      "attention_coverage_fwd_cuda",
      [](Tensor alpha, Tensor valid, Tensor tau, Tensor out, Tensor residual, Tensor scratch, double target, int reduction,
         uintptr_t stream) {
        const auto how = static_cast<CoverageReduction>(reduction);
        fastcap::attention_coverage_fwd_cuda({alpha, valid, tau, out, residual, scratch, target, how},
                                             reinterpret_cast<void*>(stream));
      },
      release);
  m.def(
      "attention_coverage_bwd_cuda",
      [](Tensor grad_out, Tensor residual, Tensor valid, Tensor dalpha, int reduction, uintptr_t stream) {
        const auto how = static_cast<CoverageReduction>(reduction);
        fastcap::attention_coverage_bwd_cuda({grad_out, residual, valid, dalpha, how}, reinterpret_cast<void*>(stream));
      },
      release);
#endif
}
