"""What an operation is to a test: example calls, operators, kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One call of an operation: its arguments by name. Tensors lie on the CPU, the floating ones in float64."""

    name: str
    arguments: dict[str, Any]
    size: float = 0.0  # of the terms that cancel in the outputs, where they are larger than these: see `tolerance`

    def to(self, dtype: torch.dtype, device: str = "cpu", keep: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments rounded to `dtype`, then held in `keep`: so float64 can start from the same values."""

        def move(value):
            if not isinstance(value, Tensor):
                return value
            value = value.to(dtype).to(keep or dtype) if value.is_floating_point() else value
            return value.detach().to(device, copy=True)

        return {name: move(value) for name, value in self.arguments.items()}


class Operation(NamedTuple):
    """An operation and what a test has to know of it."""

    function: Callable[..., Any]  # public; returns a tensor or a tuple of them
    cases: Callable[[], list[Case]]  # small inputs that between them use every option
    empty: Case  # an empty batch
    inputs: tuple[str, ...]  # the floating arguments that results depend on; the first one is always passed
    operators: tuple[str, ...]  # of torch.ops.fastcap; the first case calls all
    launches: Callable[[], Iterator[tuple[str, list[Any]]]]  # (name, Triton launches) at the shapes of real captioners
    backends: tuple[str, ...] = ("reference", "cpp", "triton", "cuda")
    autocasts: bool = False  # whether it multiplies matrices, which autocast does in its own dtype
    stem: str = ""  # of its files in every layer, where it is not its name
    differentiable: bool = True  # in `inputs`; else results carry no graph, whatever requires a gradient
    result: torch.dtype | None = None  # of the results; None: that of the inputs
    sums: bool = False  # whether results are in the dtype that sums run in: float32 for half precision

    def result_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the results of inputs in `dtype`."""
        return self.result or (torch.promote_types(dtype, torch.float32) if self.sums else dtype)

    def given(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        """Those of `inputs` that a call passes."""
        return tuple(name for name in self.inputs if arguments.get(name) is not None)
