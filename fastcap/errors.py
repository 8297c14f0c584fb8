"""The one form in which fastcap answers bad input: `fastcap.<op>: <argument> must <rule>, got <value>; <remedy>`."""

from __future__ import annotations


class FastcapError(ValueError):
    """Bad input to a fastcap function or command. A `ValueError`, so that ordinary handlers catch it."""


class BackendUnavailable(FastcapError, RuntimeError):
    """A backend was named that cannot run here; the message says why and how to get it."""


def bad(op: str, argument: str, rule: str, got: object, remedy: str) -> FastcapError:
    """The error to raise when `argument` of `op` breaks `rule`.

    >>> raise bad("subset_cross_entropy", "reduction", "be 'none', 'mean' or 'sum'", "avg", "pass reduction='mean'")
    Traceback (most recent call last):
    fastcap.errors.FastcapError: fastcap.subset_cross_entropy: reduction must be 'none', 'mean' or 'sum', got 'avg'; pass reduction='mean'
    """
    return FastcapError(f"fastcap.{op}: {argument} must {rule}, got {got!r}; {remedy}")
