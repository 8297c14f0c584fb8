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


def liger_linear_cross_entropy(device: str) -> Peer:
    """Liger-Kernel's, fused with the head, in blocks of rows: call(input [N, H], weight [V, H], target [N]) -> the mean."""
    if not device.startswith("cuda"):
        return Peer(None, "Liger-Kernel runs on GPUs only")
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as call
    except ImportError as error:
        return Peer(None, f"pip install liger-kernel ({error})")
    return Peer(lambda input, weight, target: call(input, weight, target))


def cut_cross_entropy(device: str, exact: bool = False) -> Peer:
    """Apple's cut-cross-entropy: call(input [N, H], weight [V, H], target [N]) -> the mean loss. Half precision only.

    By default it leaves out gradients that half precision would hardly show; `exact` computes them all.
    """
    if not device.startswith("cuda"):
        return Peer(None, "cut-cross-entropy runs on GPUs only")
    try:
        from cut_cross_entropy import linear_cross_entropy as call
    except ImportError as error:
        return Peer(None, f"pip install cut-cross-entropy ({error})")
    given = {"filter_eps": None} if exact else {}
    return Peer(lambda input, weight, target: call(input, weight, target, **given))


def inf_cl(device: str) -> Peer:
    """Inf-CL's contrastive loss, in tiles: call(text [B, D], image [B, D], scale) -> the mean of both directions.

    Rows of unit length. The pair stays in its denominators, products are TF32 whatever the dtype, and each direction is a
    call of its own. D must be a multiple of 256, its default width of a block of features, or a power of 2 below.
    """
    if not device.startswith("cuda"):
        return Peer(None, "Inf-CL runs on GPUs only")
    try:
        from inf_cl import cal_flash_loss as call
    except ImportError as error:
        return Peer(None, f"pip install inf-cl ({error})")

    def both(text, image, scale):
        width = min(text.shape[1], 256)
        return (call(text, image, scale=scale, head_dim=width) + call(image, text, scale=scale, head_dim=width)).mean() / 2

    return Peer(both)


def open_clip(device: str) -> Peer:
    """open_clip's ClipLoss: call(text [B, D], image [B, D], scale) -> the mean of both directions' losses, of unit rows."""
    try:
        from open_clip.loss import ClipLoss
    except ImportError as error:
        return Peer(None, f"pip install open-clip-torch ({error})")
    loss = ClipLoss(cache_labels=True)
    return Peer(lambda text, image, scale: loss(image, text, scale))


def torch_chunked(rows: int | None = None) -> Peer:
    """torch's linear_cross_entropy in blocks of rows: call(input [N, H], weight [V, H], target [N]) -> the mean loss.

    rows: of a block; None: torch's own choice (`LinearCrossEntropyOptions()`), which keeps a block of logits about half
    as large as the input: 8 rows, 80 blocks, at N 640, V 30,522, H 768 in float32.
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return Peer(None, f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions; install a later one")
    options = torch.nn.LinearCrossEntropyOptions(**({"batch_chunk_size": rows} if rows else {}))
    call = torch.nn.functional.linear_cross_entropy
    return Peer(lambda input, weight, target: call(input, weight, target, options=options))


def compiled(call: Callable) -> Peer:
    """torch.compile of a function, for one shape; compiled at its first call."""
    torch.compiler.reset()  # else the limit on recompilations of one function, over all shapes, falls back to eager
    return Peer(torch.compile(call, fullgraph=True, dynamic=False))


PEERS = {
    "liger_kernel": liger_cross_entropy,
    "liger_kernel_linear": liger_linear_cross_entropy,
    "cut_cross_entropy": cut_cross_entropy,
    "inf_cl": inf_cl,
    "open_clip": open_clip,
}


def missing(device: str) -> dict[str, str]:
    """The optional peers that cannot run on the device, and why."""
    found = {name: find(device) for name, find in PEERS.items()}
    return {name: peer.reason for name, peer in found.items() if peer.call is None}
