"""Checks that several modules of the data layer share."""

from __future__ import annotations

import importlib
from numbers import Integral
from types import ModuleType

from fastcap.errors import bad

_PROJECTS = {"PIL": "pillow"}  # where the name to import and the name to install differ


def require(module: str, op: str) -> ModuleType:
    """Import `module`, of a package that only part of the data layer needs, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        project = _PROJECTS.get(package, package)
        raise bad(op, project, "be installed", str(error), "run: pip install 'fastcap[train]'") from error


def check_int(op: str, argument: str, value: object, least: int, remedy: str) -> None:
    """Raise unless `value` is an integer (True is none) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise bad(op, argument, f"be an integer of at least {least}", value, remedy)
