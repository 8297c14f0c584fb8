"""The loss of an attached model: from what its head was given and the labels, to a scalar."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcap import functional as F_cap
from fastcap.errors import bad

from .families import OP, Family


@dataclass(frozen=True)
class Settings:
    """What `attach` leaves on a model."""

    family: Family
    options: dict[str, Any]  # of linear_subset_cross_entropy
    prompt_length: int

    @property
    def ignore_index(self) -> int:
        return self.options["ignore_index"]


def shift_right(labels: Tensor, config: Any, ignore_index: int) -> Tensor:
    """The decoder's inputs [B, T] for labels [B, T], as transformers makes them: a start token, all labels but the last."""
    for name in ("decoder_start_token_id", "pad_token_id"):
        if getattr(config, name, None) is None:
            raise bad(OP, f"config.{name}", "be set", None, f"set it on {type(config).__name__}, or pass decoder_input_ids")
    inputs = labels.roll(1, dims=1)
    inputs[:, 0] = config.decoder_start_token_id
    return inputs.masked_fill((inputs == ignore_index) | (inputs == -100), config.pad_token_id)


def _without_prompt(target: Tensor, settings: Settings) -> Tensor:
    """`target` with the first `prompt_length` valid tokens of each caption ignored."""
    valid = target != settings.ignore_index
    return target.masked_fill(valid.cumsum(1) <= settings.prompt_length, settings.ignore_index)


def check_call(
    kwargs: dict[str, Any], is_encoder_decoder: bool, labels: Any, shift_labels: Any, token_weight: Any, num_items: Any
) -> None:
    """What came beside the model's own inputs `kwargs`, before it runs: types, and shapes against the text's."""
    names = ("decoder_input_ids", "decoder_inputs_embeds") if is_encoder_decoder else ("input_ids", "inputs_embeds")
    texts = [(name, list(kwargs[name].shape[:2])) for name in names if isinstance(kwargs.get(name), Tensor)]
    for name, value in (("labels", labels), ("shift_labels", shift_labels)):
        if name == "shift_labels" and value is None:
            continue
        if not isinstance(value, Tensor) or value.dim() != 2:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise bad(OP, name, "be a torch.Tensor [B, T]", got, "pass ids, a row for each caption")
        for text, shape in texts:
            if list(value.shape) != shape:
                # transformers' BLIP-2 would take them for the last tokens of the text.
                remedy = f"pad {name} and {text} alike"
                raise bad(OP, name, f"have the shape [B, T] of {text}, {shape}", list(value.shape), remedy)
    if token_weight is not None:
        B, T = (labels if shift_labels is None else shift_labels).shape
        if not isinstance(token_weight, Tensor) or tuple(token_weight.shape) not in ((B, T), (B, 1)):
            got = list(token_weight.shape) if isinstance(token_weight, Tensor) else type(token_weight).__name__
            remedy = "pass token_weight[:, None] for one a caption"
            raise bad(OP, "token_weight", f"be a torch.Tensor [B, T] = {[B, T]} or [B, 1]", got, remedy)
    if num_items is not None:
        single = num_items.numel() == 1 if isinstance(num_items, Tensor) else isinstance(num_items, (int, float))
        if not single:
            got = list(num_items.shape) if isinstance(num_items, Tensor) else type(num_items).__name__
            raise bad(OP, "num_items_in_batch", "be one number", got, "pass how many labels are not ignored in the batch")


def _check_placed(weight: Tensor) -> None:
    """The loss reads the head's weight without the head's own forward, which hooks fetch it for."""
    if type(weight).__name__ == "DTensor":
        remedy = "call fully_shard on the model and on its layers, not on the head or a part that holds it"
        raise bad(OP, "model", "have its head gathered while it trains", "a DTensor", remedy)
    if weight.is_meta:
        remedy = "keep the head out of the offload: give it a device in device_map"
        raise bad(OP, "model", "have its head in memory while it trains", "an offloaded head", remedy)


def caption_loss(
    model: nn.Module,
    settings: Settings,
    hidden: Tensor,
    labels: Tensor,
    shift_labels: Tensor | None,
    token_weight: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """The loss, a scalar.

    Args:
        hidden: what the head was given, [B, S, H]; the last T positions are the labels', which `check_call` has seen.
        labels: [B, T]. Targets of a decoder-only model are `labels[:, 1:]`, of an encoder-decoder `labels`.
        shift_labels: [B, T], where given: targets that already stand where they are predicted.
        token_weight: [B, T], aligned with labels (shift_labels, if given), or [B, 1].
        num_items_in_batch: if given, the sum over the tokens is divided by it, in place of their number here. 0 counts as 1.
    """
    head = settings.family.head(model)
    weight, bias = head.weight, head.bias
    _check_placed(weight)
    options = dict(settings.options)
    if options["grad_weight"] == "accumulate" and _world_size() > 1:
        remedy = "pass grad_weight='dense': a gradient added in place is not averaged over processes"
        raise bad(OP, "grad_weight", "not be 'accumulate' in distributed training", options["grad_weight"], remedy)
    target = labels if shift_labels is None else shift_labels
    length = target.shape[1]
    if hidden.dim() != 3 or hidden.shape[1] < length:
        rule = f"be [B, T] with a position of the decoder for each, of which there are {list(hidden.shape[:-1])}"
        raise bad(OP, "labels", rule, list(target.shape), "pad labels and input_ids alike")
    # Models that are spread over devices move the head's input to the head; so must the loss, which takes its place.
    hidden, target = hidden[:, hidden.shape[1] - length :].to(weight.device), target.to(weight.device)
    if token_weight is not None:
        token_weight = token_weight.to(weight.device)
    if shift_labels is None and not model.config.is_encoder_decoder:
        hidden, target = hidden[:, :-1], target[:, 1:]
        if token_weight is not None and token_weight.shape[1] > 1:
            token_weight = token_weight[:, 1:]
    counted = target
    if settings.prompt_length:
        target = _without_prompt(target, settings)
    if options["weight"] is not None:
        options["weight"] = options["weight"].to(weight.device)

    with _float32_loss(hidden):
        loss = F_cap.linear_subset_cross_entropy(
            hidden, weight, target, linear_bias=bias, token_weight=token_weight,
            logit_softcap=settings.family.cap(model),
            reduction="mean" if num_items_in_batch is None else "sum", **options,
        )  # fmt: skip
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device).reshape(()).clamp(min=1)  # DataParallel makes it [1, 1]
    else:
        num_items_in_batch = max(num_items_in_batch, 1)
    if settings.prompt_length:
        # Whoever counted the items saw the prompts among them: take as large a share off as there is here.
        before, after = ((t != settings.ignore_index).sum() for t in (counted, target))
        num_items_in_batch = num_items_in_batch * after.clamp(min=1) / before.clamp(min=1)
    return loss / num_items_in_batch


def _float32_loss(hidden: Tensor) -> AbstractContextManager:
    """Where a model in half precision gets a loss in float32, as transformers' own are: under autocast to what it has."""
    device = hidden.device.type
    if hidden.dtype not in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, hidden.dtype)


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
