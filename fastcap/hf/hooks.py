"""A `forward` that a model itself carries, as accelerate leaves there, hides its class's and so the attached one."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from fastcap.errors import bad

from .families import OP


def check_reached(model: nn.Module, attached: type[nn.Module]) -> None:
    """Sees to it that a call of `model` will reach the forward of the class `attached`.

    Raises:
        FastcapError: `model` carries a `forward` that does not lead there.
    """
    own = model.__dict__.get("forward")
    if own is None or _is_hooked(model):
        return
    if _is_method(own, model, attached.forward):
        del model.forward  # what accelerate leaves where it unwraps: the class's own
        return
    if any(function is attached.forward for function in _chain(own)):  # attached, wrapped by Trainer, and detached
        return
    remedy = (
        "attach before training or dispatching, or unwrap it by "
        "accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)"
    )
    raise bad(OP, "model", "carry no forward of its own", getattr(own, "__qualname__", type(own).__name__), remedy)


def rebind_hooked(model: nn.Module, cls: type[nn.Module]) -> None:
    """Hooks of accelerate (device_map, dispatch_model) call a bound forward that they kept: makes it that of `cls`."""
    if _is_hooked(model):
        model._old_forward = MethodType(cls.forward, model)


def _is_hooked(model: nn.Module) -> bool:
    return "_old_forward" in model.__dict__ and _is_method(model._old_forward, model)


def _is_method(function: Any, model: nn.Module, *others: Any) -> bool:
    """Whether `function` is `model`'s forward as one of its classes or of `others` has it, with nothing around it."""
    forwards = [cls.__dict__["forward"] for cls in type(model).__mro__ if "forward" in cls.__dict__]
    known = [inner for forward in (*forwards, *others) for inner in _chain(forward)]
    return isinstance(function, MethodType) and function.__self__ is model and any(function.__func__ is f for f in known)


def _chain(function: Any) -> Iterator[Any]:
    """A function, what it wraps, what that wraps, ..., none of them bound."""
    while function is not None:
        yield getattr(function, "__func__", function)
        function = getattr(function, "__wrapped__", None)
