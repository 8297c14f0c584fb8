"""Other people's kernels, where they are installed; none is needed.

Each peer is a function that returns `Peer(call, reason)`: `call` is None where the peer cannot run, and `reason` says
why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Peer(NamedTuple):
    """Something to compare with, or why it is not here."""

    call: Callable | None
    reason: str = ""
    overwrites_input: bool = False  # writes the gradient over its input, which must be made anew before each call


def liger_cross_entropy(device: str) -> Peer:
    """Liger-Kernel's cross entropy over the whole vocabulary: call(input [N, V], target [N]) -> the mean loss.

    It forms the gradient in the forward, in place of the logits: it needs no memory of its own, and no logits remain.
    """
    if not device.startswith("cuda"):
        return Peer(None, "Liger-Kernel runs on GPUs only")
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy as call
    except ImportError as error:
        return Peer(None, f"pip install liger-kernel ({error})")
    return Peer(lambda input, target: call(input, target), overwrites_input=True)


def compiled(call: Callable) -> Peer:
    """torch.compile of a function, for one shape; compiled at its first call."""
    torch.compiler.reset()  # else the limit on recompilations of one function, over all shapes, falls back to eager
    return Peer(torch.compile(call, fullgraph=True, dynamic=False))


PEERS = {"liger_kernel": liger_cross_entropy}


def missing(device: str) -> dict[str, str]:
    """The optional peers that cannot run on the device, and why."""
    found = {name: find(device) for name, find in PEERS.items()}
    return {name: peer.reason for name, peer in found.items() if peer.call is None}
