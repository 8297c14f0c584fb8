"""The one form in which fastcap answers bad input: `fastcap.<op>: <argument> must <rule>, got <value>; <remedy>`."""

from __future__ import annotations


class FastcapError(ValueError):
    """Bad input to a fastcap function or command. A `ValueError`, so that ordinary handlers catch it."""


class BackendUnavailable(FastcapError, RuntimeError):
    """A backend was named that cannot run here; the message says why and how to get it."""


def bad(op: str, argument: str, rule: str, got: object, remedy: str) -> FastcapError:
    """The error to raise when `argument` of `op` breaks `rule`.

    >>> print(bad("train", "batch_size", "be positive", 0, "pass --batch-size 64"))
    fastcap.train: batch_size must be positive, got 0; pass --batch-size 64
    """
    return FastcapError(f"fastcap.{op}: {argument} must {rule}, got {got!r}; {remedy}")
