"""Where the rules of compile_rules.py do not hold, and why: excuses for good, and what is known and not mended yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastcap.benchmarks.compile_plans import Planned


class Excuse(NamedTuple):
    """Why an argument's accesses are narrow though its layout allows more, and where that holds."""

    why: str
    when: Callable[[Planned], bool] | None = None  # of which cases; None: of all
    targets: tuple[str, ...] = ()  # on which; empty: on all


class Known(NamedTuple):
    """A rule that a kernel breaks, where that is known and not mended yet: it is told in every report, and does not fail."""

    rule: str
    kernel: str
    what: str  # a regular expression, found in what a failure says
    why: str
    targets: tuple[str, ...] = ()  # empty: all


# Loads and stores for good ---------------------------------------------------------------------------------------------

_TOKEN = Excuse("a program is a token, which has one number there")
_IDS = Excuse("one number for each id of a batch, some kilobytes; what takes time is comparing all pairs")
_SUM = Excuse("one program adds up some thousands of numbers at most, in one order")
_SET = Excuse("the candidates of a token, fewer than twice its threads; a bias is gathered by id")
_ORDER = Excuse("goes by the order of the images: gathered, and of the size of P")
_LEFT = Excuse("what a sum across the threads leaves to them: 128 numbers, one each, once a program")
_MFMA = Excuse("the matrix unit leaves four numbers of a row to a lane: 8 bytes of half precision", targets=("gfx942",))

# kernel -> its arguments, each with "load" or "store", and their excuse
_EXCUSES: tuple[tuple[str, str, Excuse], ...] = (
    (
        "_subset_cross_entropy_fwd_kernel",
        "input_ptr:load",
        Excuse("gathers of single logits, where no row is read whole", lambda of: of.rows == "none"),
    ),
    ("_subset_cross_entropy_bwd_kernel", "dinput_ptr:load", Excuse("single candidates, added to what is there")),
    ("_subset_cross_entropy_reduce_kernel", "loss_ptr:load denom_ptr:load", _SUM),
    ("_linear_subset_cross_entropy_finish_kernel", "stats_ptr:store loss_ptr:store target_ptr:load", _TOKEN),
    ("_linear_subset_cross_entropy_set_kernel", "scores_ptr:load ids_ptr:load bias_ptr:load dset_ptr:store", _SET),
    ("_caption_bwd_kernel", "dx_ptr:store", _MFMA),
    ("_first_kernel", "ids_ptr:load first_ptr:store distinct_ptr:store counts_ptr:store", _IDS),
    (
        "_rank_kernel",
        "ids_ptr:load first_ptr:load distinct_ptr:store order_ptr:store starts_ptr:store counts_ptr:store",
        _IDS,
    ),
    ("denominator_kernel", "target_ptr:load", _SUM),
    ("reduce_kernel", "loss_ptr:load", _SUM),
    ("scaled_sum_kernel", "part_ptr:load", _SUM),
    (
        "_softmax_kernel",
        "alpha_ptr:load alpha_ptr:store",
        Excuse("scores of locations, 25 kB in all, in L2"),
    ),
    ("_memory_bwd_kernel", "dv_ptr:store", _LEFT),
    (
        "_memory_bwd_kernel",
        "queries_ptr:load",
        Excuse("128 numbers a step for as many threads, in L2"),
    ),
    (
        "_attention_coverage_bwd_kernel",
        "residual_ptr:load",
        Excuse("in pieces as wide as the gradient's rows, of half precision, allow: they are no whole number of 16 bytes"),
    ),
    ("_dquery_kernel", "dquery_ptr:store", _MFMA),
    ("_dkey_kernel", "dkey_ptr:store", _MFMA),
    ("contrastive_reward_weights_kernel", "weights_ptr:store", _MFMA),
    (
        "_contrastive_reward_others_fwd_kernel",
        "order_ptr:load bounds_ptr:load own_ptr:load value_ptr:store index_ptr:store",
        _ORDER,
    ),
    (
        "_contrastive_reward_others_bwd_kernel",
        "order_ptr:load bounds_ptr:load own_ptr:load value_ptr:load dvalue_ptr:load down_ptr:store",
        _ORDER,
    ),
)
# (kernel, argument, "load" or "store") -> its excuse.
NARROW: dict[tuple[str, str, str], Excuse] = {
    (kernel, *argument.split(":")): excuse for kernel, arguments, excuse in _EXCUSES for argument in arguments.split()
}

_SCALAR = "for rows that are no whole number of 16 bytes"
# (operation, kernel of CUDA, with or without its template's arguments) -> why it has no access of 16 bytes.
NARROW_CUDA: dict[tuple[str, str], str] = {
    ("subset_cross_entropy", "reduce_kernel"): _SUM.why,
    ("attention_coverage", "reduce_kernel"): _SUM.why,
    **{
        ("attention_coverage", f"{kernel}<{of}, 1>"): _SCALAR
        for kernel in ("forward_kernel", "backward_kernel")
        for of in ("float", "double", "half", "nv_bfloat16")
    },
}

# Not mended yet --------------------------------------------------------------------------------------------------------

_OCCUPANCY = (
    "ptxas stays at a number of registers at which one more block is resident, and keeps 8 bytes a thread in memory from "
    "before a loop to after it"
)
_WAVES = "blocks and warps are chosen for warps of 32: of 64 lanes each gets 8 bytes or less"

KNOWN: list[Known] = [
    Known("spill", "_dquery_kernel", r"^8 bytes a thread, [2-5] instructions, 96 registers", _OCCUPANCY),  # of float32
    Known("spill", "_subset_cross_entropy_fwd_kernel", r"^8 bytes a thread, .*, 32 registers", _OCCUPANCY, ("sm_100",)),
    Known(
        "narrow",
        "_subset_cross_entropy_fwd_kernel",
        r"^input_ptr .* bfloat16: loads of at most 64 bits \(\w+ bf16 reverse",
        "reverse has blocks of 1,024 for 256 threads, four numbers each, to have registers for two parts",
    ),
    Known(
        "narrow",
        "_caption_fwd_kernel",
        "^dset_ptr",
        "rows of T numbers, of whose beginnings the compiler knows only what T divisible by 16 says",
    ),
    Known("narrow", "_add_rows_kernel", "^values_ptr", "blocks of 128 numbers for 128 threads: one each"),
    Known(
        "narrow",
        "contrastive_reward_finish_kernel",
        "^(row|col)_(first|second)_ptr",
        "blocks of 256 numbers for 128 threads: two each; the partial results are a megabyte",
    ),
    *(
        Known("narrow", kernel, what, _WAVES, ("gfx942",))
        for kernel, what in (
            ("_subset_cross_entropy_fwd_kernel", "^input_ptr"),
            ("_linear_subset_cross_entropy_absorb_kernel", "^logits_ptr .* bfloat16"),
            ("_linear_subset_cross_entropy_emit_kernel", "^logits_ptr .* bfloat16"),
            ("_write_rows_kernel", "^(out|values)_ptr .* at most 64 bits"),
            ("_attention_coverage_bwd_kernel", "^dalpha_ptr .* at most 64 bits"),
            ("_weights_bwd_kernel", "^d?keys_ptr .* bfloat16"),
            ("_memory_bwd_kernel", "^d?keys_ptr .* bfloat16"),
            ("_dkey_kernel", "^(key|query)_ptr .* bfloat16"),
        )
    ),
    *(
        Known(
            "narrow", kernel, "^(text|image)_ptr .* at most 64 bits", "tiles of 16 or 32 features for waves of 64 lanes",
            ("gfx942",),
        )
        for kernel in (
            "contrastive_reward_statistics_kernel",
            "contrastive_reward_weights_kernel",
            "_own_kernel",
            "_counts_kernel",
        )
    ),
]  # fmt: skip
