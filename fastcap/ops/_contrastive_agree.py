"""What processes with shards of embeddings tell each other before contrastive_reward begins: sizes, what must be the same on
all, and errors, which then all of them raise.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _checks
from fastcap.ops._contrastive import Options
from fastcap.ops._embeddings import Embeddings
from fastcap.ops._processes import Ring

_DEVICES = ("cpu", "cuda", "xpu", "mps", "another")
_NAN = 0x7FF8 << 48  # the bits of a NaN: "not known" in Facts.scale


class Whole(NamedTuple):
    """What is known of all processes together."""

    op: str
    ring: Ring
    P: list[int]  # by rank
    Q: list[int]
    paired: bool  # every text lies beside its image, and no two have the same
    wanted: bool  # some process wants a gradient
    wants_image: bool

    def images(self, rank: int) -> slice:
        return slice(sum(self.Q[:rank]), sum(self.Q[: rank + 1]))

    @property
    def texts(self) -> slice:
        """This process' own."""
        return slice(sum(self.P[: self.ring.rank]), sum(self.P[: self.ring.rank + 1]))

    def siblings(self, options: Options) -> bool:
        """Whether other texts of the same image count among the others, and there may be some."""
        return sum(self.P) > 0 and options.statistics[1] and options.exclude == "self" and not self.paired

    def turns(self, options: Options) -> bool:
        """Whether images must travel at all."""
        rows, cols, _ = options.statistics
        return sum(self.P) > 0 and (rows or cols or not self.paired)


class Facts(NamedTuple):
    """What each process tells the others: integers, or tensors [] int64 that need no reading yet."""

    call: int = 0  # the function and its options, hashed
    device: int = 0
    dtype: int = 0
    D: int = 0
    scale: int | Tensor = _NAN  # the bits of a float64
    records: int = 0  # grad mode is on
    wants: int = 0  # a gradient
    wants_image: int = 0
    paired: int = 0
    lowest: int | Tensor = 0  # of positive
    highest: int | Tensor = -1
    P: int = 0
    Q: int = 0


def facts_of(op: str, ring: Ring, pairs: Embeddings, scale: Tensor, options: Options) -> Facts:
    text, image, positive, paired = pairs
    wants = [torch.is_grad_enabled() and x.requires_grad for x in (text, image, scale)]
    options = options._replace(clamp=options.clamp and tuple(options.clamp))
    told = Facts(
        call=zlib.crc32(repr((op, options)).encode()),
        device=_DEVICES.index(text.device.type if text.device.type in _DEVICES else "another"),
        dtype=_checks.FLOATS.index(text.dtype),
        D=text.shape[1],
        records=torch.is_grad_enabled(),
        wants=any(wants),
        wants_image=wants[1],
        paired=paired,
        P=text.shape[0],
        Q=image.shape[0],
    )
    if ring.reads(scale):
        told = told._replace(scale=scale.detach().double().view(torch.int64))
    if not paired and text.shape[0] and ring.reads(positive):
        lowest, highest = positive.aminmax()
        told = told._replace(lowest=lowest, highest=highest)
    return told


def agree(op: str, ring: Ring, every: list[tuple[list[int], str | None]]) -> Whole:
    """What the processes told, or the same error on all of them."""
    for rank, (_, message) in enumerate(every):
        if message is not None:
            rule = "be of processes that all bring valid arguments"
            raise bad(op, "group", rule, f"on rank {rank}: {message}", "correct them there")
    facts = [Facts(*told) for told, _ in every]
    dtypes = [str(_checks.FLOATS[f.dtype]).removeprefix("torch.") for f in facts]
    scales = [struct.unpack("d", struct.pack("q", f.scale))[0] for f in facts]
    calls = [f"{f.call:08x}" for f in facts]
    _same(op, "group", "be of processes that call with the same options", calls, "pass the same on every process")
    _same(op, "text", "be on one kind of device", [_DEVICES[f.device] for f in facts], "move it")
    _same(op, "text", "have one dtype on all processes", dtypes, "convert it")
    _same(op, "text", "have one width on all processes", [f.D for f in facts], "embed with one model")
    known = [x for x in scales if not math.isnan(x)]
    if not all(math.isclose(x, known[0], rel_tol=1e-5) for x in known):
        _same(op, "logit_scale", "be the same on all processes", scales, "broadcast it from one of them")
    if any(f.wants for f in facts):
        modes = ["on" if f.records else "off" for f in facts]
        _same(op, "group", "be of processes in one grad mode", modes, "use torch.no_grad() on every process or on none")
    Q = [f.Q for f in facts]
    for rank, f in enumerate(facts):
        if f.lowest < 0 or f.highest >= sum(Q):
            got = f"{f.lowest if f.lowest < 0 else f.highest} on rank {rank}"
            rule, remedy = f"lie in [0, {sum(Q)}), the images of all processes", "count them in the order of the ranks"
            raise bad(op, "positive", rule, got, remedy)
    paired, wants, wants_image = all(f.paired for f in facts), any(f.wants for f in facts), any(f.wants_image for f in facts)
    return Whole(op, ring, [f.P for f in facts], Q, paired, wants, wants_image)


def _same(op: str, name: str, rule: str, values: list, remedy: str) -> None:
    if len(set(values)) > 1:
        raise bad(op, name, rule, ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values)), remedy)
