"""Argument checks that operations share. Errors have one form: see fastcap.errors."""

from __future__ import annotations

import math
import os

import torch

from fastcap.errors import bad

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensor(op: str, name: str, value: object, remedy: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise bad(op, name, "be a torch.Tensor", type(value).__name__, remedy)


def check_dtype(op: str, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], remedy: str) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise bad(op, name, f"be {names}", str(tensor.dtype).removeprefix("torch."), remedy)


def check_dense(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided:
        raise bad(op, name, "be dense", tensor.layout, f"call {name}.to_dense()")


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], letters: str, remedy: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise bad(op, name, f"have shape {letters} = {list(shape)}", list(tensor.shape), remedy)


def check_device(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.device != like.device:
        raise bad(op, name, f"be on the device of input, {like.device}", str(tensor.device), f"call {name}.to(input.device)")


def check_number(op: str, name: str, value: object, low: float, high: float, remedy: str) -> float:
    """A finite number in [low, high]."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value == math.inf:  # NaN fails any comparison
        rule = f"be a finite number of at least {low:g}" if high == math.inf else f"be a number in [{low:g}, {high:g}]"
        raise bad(op, name, rule, value, remedy)
    return float(value)


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...], remedy: str) -> None:
    if not isinstance(value, str) or value not in choices:
        raise bad(op, name, f"be one of {', '.join(repr(c) for c in choices)}", value, remedy)


def check_ids(op: str, name: str, ids: torch.Tensor, size: int, pad: int) -> None:
    """Every id lies in [0, size) or is `pad`. Reads the values: on CUDA, a synchronisation."""
    wrong = ((ids < 0) | (ids >= size)) & (ids != pad)
    if bool(wrong.any()):
        got = int(ids[wrong][0])
        raise bad(
            op,
            name,
            f"lie in [0, {size}) or be {pad}",
            got,
            "check the vocabulary size of the tokenizer and of the head",
        )


def checks_values(tensor: torch.Tensor) -> bool:
    """Whether values (not only shapes) of `tensor` are checked in Python: on the CPU always, on CUDA under FASTCAP_CHECK=1,
    never while torch.compile or fake tensors trace."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) is not torch.Tensor:
        return False
    if tensor.device.type == "cpu":
        return True
    return os.environ.get("FASTCAP_CHECK", "0") not in ("", "0") and not (
        tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    )
