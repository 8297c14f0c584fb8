"""What a decoder that is run step by step on known words shares between its steps: the plan of rows, and linear layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastcap.errors import bad


class Schedule(NamedTuple):
    """Which captions each step works on: the longest first, and ever fewer of them.

    rows: how many at step t; order [B]: the caption of each row, or None where the captions are in that order as they are;
    flat [N], N = sum(rows): b * T + t of each one.
    """

    rows: list[int]
    order: Tensor | None
    flat: Tensor

    def sort(self, x: Tensor) -> Tensor:
        """x [B, *] with the longest caption first; x itself where it is so already."""
        return x if self.order is None else x.index_select(0, self.order)

    def pack(self, x: Tensor) -> Tensor:
        """x [B, T] to [N], step by step."""
        return x.flatten()[self.flat]

    def captions(self, T: int) -> Tensor:
        """[N], which caption each one is of."""
        return self.flat // T

    def unpack(self, packed: Tensor, B: int, T: int) -> Tensor:
        """[N, *] to [B, T, *], zero where nothing was computed."""
        shape = packed.shape[1:]
        return packed.new_zeros(B * T, *shape).index_copy(0, self.flat, packed).view(B, T, *shape)


def plan(inputs: Tensor, lengths: Tensor | None) -> Schedule:
    """The schedule of inputs [B, T] of which the first `lengths` [B] steps count, all where it is None."""
    B, T = inputs.shape
    if lengths is None:  # nothing comes from the CPU, so that a CUDA graph can capture it
        return Schedule([B] * T, None, torch.arange(B * T, device=inputs.device).view(B, T).t().flatten())
    if not isinstance(lengths, Tensor) or lengths.shape != (B,):
        got = list(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise bad("models", "lengths", f"be a tensor [B] = [{B}]", got, "pass the number of words of each caption")
    lengths = lengths.cpu()
    if B and not (0 <= int(lengths.min()) and 0 < int(lengths.max()) <= T):
        raise bad("models", "lengths", f"lie in [0, {T}], one of them above 0", lengths.tolist(), "count the inputs")
    order = lengths.argsort(descending=True, stable=True)
    rows = [n for n in (lengths.unsqueeze(1) > torch.arange(T)).sum(0).tolist() if n]
    flat = torch.cat([order[:n] * T + t for t, n in enumerate(rows)])
    in_order = bool((order[1:] > order[:-1]).all())
    return Schedule(rows, None if in_order else order.to(inputs.device), flat.to(inputs.device))


class StepLinear:
    """A linear layer applied at every step, whose weight gets its gradient once: `add_t + x_t weight^T`.

    As a module called T times it would write the gradient of its weight T times, each a thin product, and add them up; here
    the steps leave their inputs, and one product of all of them follows the backward of the last.

    Args:
        layer: its weight [O, I] is used, and its bias unless `add` is given.
        rows: how many rows each step has.
        add: [N, O], what is added to the N rows of all steps, in place of the bias.
    """

    def __init__(self, layer: nn.Linear, rows: list[int], add: Tensor | None = None) -> None:
        weight = layer.weight
        if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))  # once, not at every step
        if add is None:
            bias = weight.new_zeros(()) if layer.bias is None else layer.bias
            add = bias.expand(sum(rows), weight.shape[0])
        self._inputs: list[Tensor] | None = None
        # torch.compile sees all steps at once, and would trace the backward before the steps leave their inputs
        if torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling():
            self._inputs = []
            add = _WeightOfSteps.apply(weight, add, self._inputs)
            weight = weight.detach()
        self._weight, self._adds = weight.t(), iter(add.split(rows))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._weight.dtype)
        if self._inputs is not None:
            self._inputs.append(x.detach())
        return torch.addmm(next(self._adds), x, self._weight)


class _WeightOfSteps(torch.autograd.Function):
    """Hands on what is added to each step's product: its gradient, complete when all steps have run backward, is that of the
    products, and with their inputs gives the weight's."""

    @staticmethod
    def forward(ctx, weight, add, inputs):
        ctx.inputs, ctx.dtype = inputs, weight.dtype
        return add.view_as(add)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x = torch.cat(ctx.inputs)
        dweight = dy[: len(x)].to(x.dtype).t() @ x  # the steps after the last call, if any, have no gradient
        return dweight.to(ctx.dtype), dy if ctx.needs_input_grad[1] else None, None
