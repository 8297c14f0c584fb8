"""What the losses over a subset of the vocabulary share: their options, checked, and the ids that a token chooses from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastcap.errors import bad
from fastcap.ops import _checks

SUBSETS = ("caption", "full", "reverse", "random")
REDUCTIONS = ("none", "mean", "sum")
MAX_WORDS = 2**31 - 2**16  # kernels count columns in 32 bits, and a block beyond the last


class Options(NamedTuple):
    """The scalar options as operators take them, in the order of their schema (SCHEMA)."""

    kind: str
    ids_pad: int
    first_full: bool
    mle_weight: float
    label_smoothing: float
    logit_softcap: float
    z_loss: float
    ignore_index: int
    reduction: str

    @property
    def has_full(self) -> bool:
        """Whether some token's loss runs over the whole vocabulary."""
        return self.kind == "full" or self.first_full or self.mle_weight > 0

    @property
    def is_dense(self) -> bool:
        """Whether some token's gradient is dense in the vocabulary, so that the backward needs the logits again."""
        return self.has_full or self.kind == "reverse"


SCHEMA = (
    "str kind, int ids_pad, bool first_full, float mle_weight, float label_smoothing, float logit_softcap, float z_loss, "
    "int ignore_index, str reduction"
)


def random_ids(B: int, T: int, num_random: int, V: int, seed: int | None, device: torch.device) -> Tensor:
    """[B, T, num_random] ids, uniform with replacement: a hash of (seed, position), the same on every device and backend."""
    if seed is None:
        key = torch.randint(0, 2**62, (), device=device)
    else:
        key = torch.full((), seed, dtype=torch.int64, device=device)
    x = torch.arange(B * T * num_random, device=device) + key * 0x632BE59BD9B4E019  # int64 wraps around
    for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):  # splitmix64's finaliser, as signed numbers
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * multiplier
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x & 0x7FFFFFFFFFFFFFFF) % V).view(B, T, num_random)


def candidates(
    subset: str | Tensor, target: Tensor, V: int, num_random: int, seed: int | None, ignore_index: int
) -> tuple[str, Tensor | None, int]:
    """(kind, ids, pad): kind "set" (choose from `ids` and the target), "reverse" (from all but `ids`) or "full".

    ids is [B or 1, T or 1, K], a size of 1 where all share; `pad` marks an id that is none. Repeats stay in: kernels count
    them once.
    """
    B, T = target.shape
    if isinstance(subset, Tensor):
        return "set", subset.unsqueeze(1) if subset.dim() == 2 else subset.view(1, 1, -1), -1
    if subset == "full":
        return "full", None, -1
    if subset == "random":
        return "set", random_ids(B, T, num_random, V, seed, target.device), -1
    if subset == "caption":
        return "set", target.unsqueeze(1), ignore_index
    return "reverse", target.unsqueeze(1), ignore_index


def shape_input(
    op: str,
    input: Tensor | PackedSequence,
    target: Tensor | PackedSequence,
    token_weight: Tensor | None,
    ignore_index: int,
    letter: str,
    what: str,
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """(input [B, T, *], target [B, T], token_weight, whether they came flat); raises where input is no such tensor.

    Packed sequences are padded, target with `ignore_index`, their captions in the order from before they were sorted.
    """
    if isinstance(input, PackedSequence) or isinstance(target, PackedSequence):
        input, target = _unpack(op, input, target, ignore_index)
    _checks.check_tensor(op, "input", input, f"pass the {what}")
    _checks.check_dtype(op, "input", input, _checks.FLOATS, f"convert the {what}")
    _checks.check_dense(op, "input", input)
    flat = input.dim() == 2
    if flat:
        input, target, token_weight = (x.unsqueeze(0) if isinstance(x, Tensor) else x for x in (input, target, token_weight))
    if input.dim() != 3 or input.shape[2] < 1:
        rule = f"have shape [B, T, {letter}] or [N, {letter}], {letter} >= 1"
        raise bad(op, "input", rule, list(input.shape), f"pass the {what}, that dimension last")
    return input, target, token_weight, flat


def _unpack(op: str, input: object, target: object, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Both padded. That both are packed in one order is checked where reading it costs no synchronisation."""
    if not (isinstance(input, PackedSequence) and isinstance(target, PackedSequence)):
        got = f"{type(input).__name__} and {type(target).__name__}"
        raise bad(op, "input and target", "both be PackedSequence, or neither", got, "pack both, or pass both padded")
    if not torch.equal(input.batch_sizes, target.batch_sizes):  # these lie on the CPU
        got = f"batch sizes {target.batch_sizes.tolist()[:8]} against {input.batch_sizes.tolist()[:8]}"
        raise bad(op, "target", "be packed as input is", got, "pack both with the same lengths")
    if _checks.checks_values(input.data):
        orders = [_order(x) for x in (target, input)]
        if orders[0] != orders[1]:
            got = f"captions in the order {orders[0][:8]} against {orders[1][:8]}"
            raise bad(op, "target", "be packed as input is", got, "pack both with the same lengths")
    return _padded(input, 0.0), _padded(target, ignore_index)


def _order(packed: PackedSequence) -> list[int]:
    order = packed.sorted_indices
    return list(range(int(packed.batch_sizes[0]))) if order is None else order.tolist()


def _padded(packed: PackedSequence, value: float) -> Tensor:
    """[B, T, ...] as before sorting. pad_packed_sequence alone would copy the order to the CPU."""
    padded, _ = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes), batch_first=True, padding_value=value)
    return padded if packed.unsorted_indices is None else padded.index_select(0, packed.unsorted_indices)


def prepare(
    op: str, input: Tensor, target: Tensor, V: int, *, subset, first_token, mle_weight, weight, token_weight, ignore_index,
    label_smoothing, logit_softcap, z_loss, num_random, seed, reduction,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Options]:  # fmt: skip
    """Raises for a bad argument; returns (ids, weight, token_weight, options) as the operators take them.

    `input` [B, T, ...] gives the device, and the dtype in which sums run.
    """
    _checks.check_tensor(op, "target", target, "pass token ids of dtype int64")
    _checks.check_dtype(op, "target", target, (torch.int64,), "call target.long()")
    B, T = input.shape[:2]
    _checks.check_shape(op, "target", target, (B, T), "[B, T]", "shift and slice input and target alike")
    _checks.check_device(op, "target", target, input)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise bad(op, "ignore_index", "be an int", ignore_index, "pass -100")
    if not -(2**63) <= ignore_index < 2**63:
        raise bad(op, "ignore_index", "fit 64 bits", ignore_index, "pass -100")
    if isinstance(subset, Tensor):
        _checks.check_dtype(op, "subset", subset, (torch.int64,), "call subset.long()")
        if subset.dim() not in (1, 2) or (subset.dim() == 2 and subset.shape[0] != B):
            raise bad(op, "subset", f"have shape [K] or [B, K] with B = {B}", list(subset.shape), "pad rows with -1")
        _checks.check_device(op, "subset", subset, input)
    else:
        _checks.check_choice(op, "subset", subset, SUBSETS, "or pass ids as a tensor [K] or [B, K]")
    _checks.check_choice(op, "first_token", first_token, ("full", "subset"), "pass first_token='full'")
    _checks.check_choice(op, "reduction", reduction, REDUCTIONS, "pass reduction='mean'")
    mle_weight = _checks.check_number(op, "mle_weight", mle_weight, 0, 1, "0 is the subset loss alone, 1 is MLE alone")
    label_smoothing = _checks.check_number(op, "label_smoothing", label_smoothing, 0, 1, "0 smooths nothing")
    z_loss = _checks.check_number(op, "z_loss", z_loss, 0, float("inf"), "0 adds nothing")
    softcap = 0.0
    if logit_softcap is not None:
        softcap = _checks.check_number(op, "logit_softcap", logit_softcap, 1e-30, 1e30, "pass None for no cap")
    if not isinstance(num_random, int) or isinstance(num_random, bool) or num_random < 1:
        raise bad(op, "num_random", "be an int of at least 1", num_random, "the paper draws 10")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63):
        raise bad(op, "seed", "be None or an int of 64 bits", seed, "pass seed=0")
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    if weight is not None:
        weight = _factor(op, "weight", weight, input).to(acc).contiguous()
        _checks.check_shape(op, "weight", weight, (V,), "[V]", "pass one weight a class")
    if token_weight is not None:
        token_weight = _factor(op, "token_weight", token_weight, input)
        if token_weight.dim() != 2 or token_weight.shape[0] != B or token_weight.shape[1] not in (1, T):
            rule = f"have shape [B, T] = {[B, T]} or [B, 1]"
            raise bad(op, "token_weight", rule, list(token_weight.shape), "use token_weight[:, None] for one a caption")
        token_weight = token_weight.to(acc).expand(B, T)
    if mle_weight == 1:
        subset, mle_weight = "full", 0.0
    kind, ids, pad = candidates(subset, target, V, num_random, seed, ignore_index)
    first_full = first_token == "full" and kind != "full"
    mle_weight = 0.0 if kind == "full" else mle_weight
    options = Options(kind, pad, first_full, mle_weight, label_smoothing, softcap, z_loss, ignore_index, reduction)
    return ids, weight, token_weight, options


def check_words(op: str, name: str, V: int) -> None:
    if V > MAX_WORDS:
        raise bad(op, name, f"have at most {MAX_WORDS} words", V, "check that the vocabulary is its right dimension")


def check_values(op: str, target: Tensor, ids: Tensor | None, V: int, options: Options) -> None:
    """Raises for a target or an id out of range; on CUDA only under FASTCAP_CHECK=1, for it synchronises."""
    if _checks.checks_values(target):
        _checks.check_ids(op, "target", target, V, options.ignore_index)
        if ids is not None:
            _checks.check_ids(op, "subset", ids, V, options.ids_pad)


def _factor(op: str, name: str, factor: Tensor, input: Tensor) -> Tensor:
    _checks.check_tensor(op, name, factor, "pass a tensor or None")
    _checks.check_dtype(op, name, factor, _checks.FLOATS, f"call {name}.float()")
    _checks.check_device(op, name, factor, input)
    if factor.requires_grad:
        remedy = f"pass {name}.detach(), or multiply the loss of reduction='none' yourself"
        raise bad(op, name, "not require a gradient", "requires_grad=True", remedy)
    return factor


def masked_loss(
    logits: Tensor, target: Tensor, ids: Tensor | None, weight: Tensor | None, token_weight: Tensor | None, options: Options
) -> Tensor:
    """The losses by the masked formulation in plain torch, from logits [B, T, V]. O(B T V) memory; in the dtype of sums."""
    kind, ids_pad, first_full, mle_weight, label_smoothing, logit_softcap, z_loss, ignore_index, reduction = options
    B, T, V = logits.shape
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    valid = target != ignore_index
    y = target.masked_fill(~valid, 0).unsqueeze(-1)
    w = torch.ones(V, dtype=acc, device=logits.device) if weight is None else weight

    def part(allowed: Tensor, rows: Tensor) -> Tensor:
        rows = rows.unsqueeze(-1)
        # What takes no part may hold anything, NaN too, and must reach neither the loss nor a gradient: masked at once.
        z = logits.to(acc).masked_fill(~(allowed & rows), 0.0)
        if logit_softcap > 0:
            z = logit_softcap * torch.tanh(z / logit_softcap)
        lse = z.masked_fill(~allowed & rows, -torch.inf).logsumexp(-1)
        w_y = w[y.squeeze(-1)]
        loss = (1 - label_smoothing) * w_y * (lse - z.gather(-1, y).squeeze(-1))
        if label_smoothing > 0:
            spread = (w * (lse.unsqueeze(-1) - z)).masked_fill(~allowed, 0.0).sum(-1)
            loss = loss + label_smoothing * spread / allowed.sum(-1, dtype=acc)
        if z_loss > 0:
            loss = loss + z_loss * w_y * lse * lse
        return loss

    everything = torch.ones(1, 1, V, dtype=torch.bool, device=logits.device).expand(B, T, V)
    if kind == "full":
        loss = part(everything, valid)
    else:
        # V + 1 columns: the last one takes the pads and is cut off
        chosen = torch.zeros(B, T, V + 1, dtype=torch.bool, device=logits.device)
        chosen.scatter_(-1, ids.masked_fill(ids == ids_pad, V).expand(B, T, -1), True)
        allowed = chosen[..., :V] if kind == "set" else ~chosen[..., :V]
        share = torch.full((B, T), mle_weight, dtype=acc, device=logits.device)
        if first_full:
            share = share.masked_fill(_is_first(valid), 1.0)
        loss = (1 - share) * part(allowed.scatter(-1, y, True), valid & (share < 1))
        if mle_weight > 0 or first_full:
            loss = loss + share * part(everything, valid & (share > 0))
    if token_weight is not None:
        loss = loss * token_weight
    loss = torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "mean":
        denom = torch.where(valid, w[y.squeeze(-1)], 0.0).sum()
        total = torch.where(denom != 0, total / torch.where(denom != 0, denom, 1.0), 0.0 * total)
    return total


def _is_first(valid: Tensor) -> Tensor:
    """[B, T] bool: the first valid token of each caption."""
    return valid & (valid.cumsum(-1) == 1)
