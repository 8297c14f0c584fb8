"""The work of a call on a GPU, written down without one: each launch and each call of a library, in order.

`trace` runs the call on meta tensors, whose values do not exist, and Triton's launches are written down instead of run: what
comes out is the work of the code as it stands, with its bytes and FLOPs. A number that a launch reads several times counts
once, as if caches held it, and a sort or another call of several kernels is one. What depends on values (how many words a
batch has, how many steps count) is taken from a `Batch` that stands for them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from fastcap.benchmarks import floors
from fastcap.benchmarks.plain import DENSE_ROWS, GATHERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Work(NamedTuple):
    """One launch, or one call of a library."""

    name: str
    bytes: int
    flops: int = 0
    unit: str = "float32"  # what does the FLOPs: "half", "tf32", "float32" or "float64"


class Batch(NamedTuple):
    """What of a batch depends on its values."""

    positions: int  # B * T
    valid: int  # tokens, or steps, that count
    words: int = 0  # distinct ids
    dense: int = 0  # rows that run over the whole vocabulary
    gathered: int = 0  # logits that the others gather
    terms: int = 0  # logits among which tokens choose, gathered or in a row that is read whole

    @classmethod
    def of(cls, target: Tensor, variant: str) -> Batch:
        """Of targets [B, T], whose loss is a variant of plain.VARIANTS."""
        counts = floors.count(target)
        rows = DENSE_ROWS[variant]
        dense = {"none": 0, "first": counts.captions, "all": counts.valid}[rows]
        terms = counts.pairs - (counts.distinct if rows == "first" else 0) if variant in GATHERS else 0
        return cls(counts.positions, counts.valid, counts.words, dense, terms if rows != "all" else 0, terms)


GPU = 9, 132, 227 << 10  # whose plans are traced, an H200's: capability, processors, bytes of shared memory a program


# The trace -------------------------------------------------------------------------------------------------------------


class _Trace(TorchDispatchMode):
    """Writes down what is called; our own operators are entered, with the implementation that CUDA tensors have."""

    def __init__(self, found: list[Work]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "fastcap":
            with self:
                return function._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
        name = function.__name__.split(".")[0]
        if function.__name__.endswith("dtype_out"):  # a product in another dtype, which meta tensors do not know
            result = kwargs["out"]
        else:
            result = function(*args, **kwargs)
        given, made = tensors_of((args, kwargs)), tensors_of(result)
        # a view makes nothing; memory that is only asked for is not touched
        alike = {x.untyped_storage()._cdata for x in given} & {x.untyped_storage()._cdata for x in made}
        written = function._schema.is_mutable
        if made and not name.startswith(("empty", "new_empty")) and (written or not alike):
            self.found.append(_of_library(name, args, given, made))
        return result


def tensors_of(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _nbytes(tensors: Sequence[Tensor]) -> int:
    """Of each, once; a dimension of stride 0 is there once."""
    return sum({(_place(x), tuple(x.shape)): _size(x) for x in tensors}.values())


def _size(x: Tensor) -> int:
    there = math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return there * x.element_size() if x.numel() else 0


def _place(x: Tensor) -> tuple[int, int]:
    return x.untyped_storage()._cdata, x.storage_offset()


def unit_of(dtype: torch.dtype, tf32: bool = False) -> str:
    """What multiplies matrices of a dtype."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "float64" if dtype == torch.float64 else "tf32" if tf32 else "float32"


_PRODUCTS = {"matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "addmm_": (1, 2)}
_FACTORIES = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "arange", "scalar_tensor", "zero_", "fill_")
_GATHERS = ("index_select", "gather", "index", "embedding")


def _of_library(name: str, args: tuple, given: list[Tensor], made: list[Tensor]) -> Work:
    """The bytes of what goes in and comes out; of what is looked up, what comes out. FLOPs of matrix products alone."""
    if name in _PRODUCTS:
        a, b = (args[i] for i in _PRODUCTS[name])
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return Work(name, _nbytes([*given, *made]), 2 * a.numel() * b.shape[-1], unit_of(a.dtype, tf32))
    if name.startswith(_FACTORIES):  # which take the dtype and the place of what goes in, and read nothing
        return Work(name, _nbytes(made))
    if name in _GATHERS:
        return Work(name, 2 * _nbytes(made) + _nbytes([x for x in given if not x.is_floating_point()]))
    return Work(name, _nbytes([*given, *made]))


@contextlib.contextmanager
def _planning(found: list[Work], batch: Batch | None) -> Iterator[None]:
    """Operations choose Triton, on a GPU such as `GPU`, and its launches are written into `found`."""
    from fastcap.kernels import contrastive_reward as contrastive
    from fastcap.kernels._common import Launch
    from fastcap.kernels._word_sums import WordSums

    from fastcap.ops import _backend, _plans

    def sparse_rows(self, ids, values, shape):
        """Their number is not known without values, and sparse tensors have no memory of their own to tell by."""
        found.append(Work("count the rows and wait", ids.numel() * 8))
        return values.new_empty(shape)

    device = contrastive.Device(*GPU)
    patches = [
        mock.patch.object(_backend, "_resolve", lambda op, chosen, device, has: "triton"),
        mock.patch.dict(_plans.BALANCE, {"meta": _plans.BALANCE["cuda"]}),
        mock.patch.object(contrastive, "_device_of", lambda x: device),
        mock.patch.object(Launch, "run", lambda launch: found.append(of_launch(launch, batch))),
        mock.patch.object(WordSums, "sparse_rows", sparse_rows),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # which meta tensors do not have
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def trace(call: Callable[[], object], batch: Batch | None = None) -> list[Work]:
    """The work of `call` on meta tensors, in order; `batch` stands for the values of their targets or lengths."""
    found: list[Work] = []
    with _planning(found, batch), _Trace(found):
        call()
    return found


# Our kernels -----------------------------------------------------------------------------------------------------------


def of_launch(launch: Any, batch: Batch | None = None) -> Work:
    """A launch's bytes and FLOPs: each tensor that it takes once, but for the kernels that read or write another part."""
    name = launch.kernel.fn.__name__
    arguments = launch.args
    tensors = {key: x for key, x in arguments.items() if isinstance(x, Tensor)}
    sizes = {key: _size(x) for key, x in tensors.items()}
    flops, unit = 0, "float32"
    special = _KERNELS.get(name.removeprefix("_").removesuffix("_kernel"))
    if special is not None:
        flops, unit = special(arguments, sizes, tensors, batch)
    # what stands in for an argument that is not there, and what is there twice, moves once
    once = {(_place(tensors[key]), size): size for key, size in sizes.items()}
    return Work(name.strip("_").removesuffix("_kernel"), sum(once.values()), flops, unit)


def _subset_fwd(a: dict, sizes: dict, tensors: dict, batch: Batch) -> tuple[int, str]:
    """Of the logits: the dense rows whole, and a sector for each candidate of the others."""
    dense = batch.dense * a["V"]
    sizes["input_ptr"] = dense * tensors["input_ptr"].element_size() + batch.gathered * floors.SECTOR["cuda"]
    return floors.PER_TERM * (dense + batch.terms), "float32"


def _subset_bwd(a: dict, sizes: dict, tensors: dict, batch: Batch) -> tuple[int, str]:
    """Of the logits: the dense rows."""
    if a["IS_DENSE"]:
        sizes["input_ptr"] = batch.dense * a["V"] * tensors["input_ptr"].element_size()
    return floors.PER_TERM * (batch.dense * a["V"] + batch.terms), "float32"


def _caption(a: dict, sizes: dict, tensors: dict, batch: Batch) -> tuple[int, str]:
    """Of the head: the batch's words. Forward one product of each caption's T by T, backward two."""
    H, (N, _) = a["H"], tensors["x_ptr"].shape
    sizes["head_ptr"] = batch.words * H * tensors["head_ptr"].element_size()
    products = a.get("NEED_X", False) + a.get("NEED_WORDS", False) if "dx_ptr" in a else 1
    return 2 * N * a["T"] * H * products, unit_of(tensors["x_ptr"].dtype, a["PRECISION"] == "tf32")


def _all_pairs(a: dict, sizes: dict, tensors: dict, batch: Batch) -> tuple[int, str]:
    """Every id is compared with every other: two operations a pair at least."""
    return 2 * a["M"] ** 2, "float32"


def _add_rows(a: dict, sizes: dict, tensors: dict, batch: Batch) -> tuple[int, str]:
    sizes["values_ptr"] *= 2  # read, and written
    return 0, "float32"


def _write_rows(a: dict, sizes: dict, tensors: dict, batch: Batch) -> tuple[int, str]:
    """The rows of the words that there are; read first where they are added to."""
    words = min(batch.words, tensors["ids_ptr"].numel())
    sizes["out_ptr"] = words * a["H"] * tensors["out_ptr"].element_size() * (2 if a["ADD"] else 1)
    sizes["values_ptr"] = words * a["H"] * tensors["values_ptr"].element_size()
    return 0, "float32"


def _absorb(a: dict, sizes: dict, tensors: dict, batch: Batch) -> tuple[int, str]:
    sizes["state_ptr"] *= 2
    return floors.PER_TERM * tensors["logits_ptr"].numel(), "float32"


def _emit(a: dict, sizes: dict, tensors: dict, batch: Batch) -> tuple[int, str]:
    sizes["logits_ptr"] *= 2  # in place
    return floors.PER_TERM * tensors["logits_ptr"].numel(), "float32"


def _coverage_fwd(a: dict, sizes: dict, tensors: dict, batch: Batch | None) -> tuple[int, str]:
    """The rows of the steps that count."""
    if a["valid_ptr"] is not None and batch is not None:
        sizes["alpha_ptr"] = sizes["alpha_ptr"] * batch.valid // batch.positions
    alpha = tensors["alpha_ptr"]  # an addition a weight, three operations a location
    return sizes["alpha_ptr"] // alpha.element_size() + 3 * (alpha.numel() // max(a["T"], 1)), "float32"


def _coverage_bwd(a: dict, sizes: dict, tensors: dict, batch: Batch | None) -> tuple[int, str]:
    return tensors["residual_ptr"].numel(), "float32"  # a product a location


def _from_scores(products: int) -> Callable:
    def of(a: dict, sizes: dict, tensors: dict, batch: Batch | None) -> tuple[int, str]:
        (B, heads, T, E), L = tensors["query_ptr"].shape, a["L"]
        return products * 2 * B * heads * T * L * E, unit_of(tensors["query_ptr"].dtype, a["PRECISION"] == "tf32")

    return of


def _each(count: int, name: str) -> Callable:
    """So many operations for each number of an argument, once a step; none where it is not there."""

    def of(a: dict, sizes: dict, tensors: dict, batch: Batch | None) -> tuple[int, str]:
        return count * tensors[name].numel() * a.get("T", 1) if name in tensors else 0, "float32"

    return of


def _statistics(a: dict, sizes: dict, tensors: dict, batch: Batch | None) -> tuple[int, str]:
    unit = unit_of(tensors["text_ptr"].dtype, a["PRECISION"] == "tf32")
    return 2 * a["P"] * a["Q"] * a["D"], unit


def _weights(a: dict, sizes: dict, tensors: dict, batch: Batch | None) -> tuple[int, str]:
    """A block of the scores, and the rows of texts and images that it is of."""
    rows, cols = a["P"] - a["FIRST_P"], a["Q"] - a["FIRST_Q"]
    for key, n in (("text_ptr", rows), ("image_ptr", cols)):
        sizes[key] = n * a["D"] * tensors[key].element_size()
    sizes["weights_ptr"] = rows * cols * tensors["weights_ptr"].element_size()
    return 2 * rows * cols * a["D"], unit_of(tensors["text_ptr"].dtype, a["PRECISION"] == "tf32")


def _own(a: dict, sizes: dict, tensors: dict, batch: Batch | None) -> tuple[int, str]:
    """A product of a block of texts by as many images, of which the diagonal is kept."""
    return 2 * a["P"] * a["BLOCK"] * a["D"], unit_of(tensors["text_ptr"].dtype)


def _counts_of_ranks(a: dict, sizes: dict, tensors: dict, batch: Batch | None) -> tuple[int, str]:
    """V = P + Q columns: an image once for each of its texts, so that both directions come of one product."""
    return 2 * (a["END"] - a["BEGIN"]) * a["V"] * a["D"], unit_of(tensors["text_ptr"].dtype)


_KERNELS: dict[str, Callable] = {
    "subset_cross_entropy_fwd": _subset_fwd,
    "subset_cross_entropy_bwd": _subset_bwd,
    "caption_fwd": _caption,
    "caption_bwd": _caption,
    "first": _all_pairs,
    "rank": _all_pairs,
    "add_rows": _add_rows,
    "write_rows": _write_rows,
    "linear_subset_cross_entropy_absorb": _absorb,
    "linear_subset_cross_entropy_emit": _emit,
    "attention_coverage_fwd": _coverage_fwd,
    "attention_coverage_bwd": _coverage_bwd,
    "rows": _from_scores(1),
    "sums": _from_scores(1),
    "dquery": _from_scores(3),
    "dkey": _from_scores(2),
    "scores": _each(4, "keys_ptr"),
    "weights_bwd": _each(8, "keys_ptr"),
    "memory_bwd": _each(8, "keys_ptr"),
    "context": _each(2, "values_ptr"),
    "context_bwd": _each(3, "values_ptr"),
    "contrastive_reward_statistics": _statistics,
    "contrastive_reward_weights": _weights,
    "own": _own,
    "counts": _counts_of_ranks,
}
