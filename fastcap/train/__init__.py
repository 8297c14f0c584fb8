"""The training loop: `train(TrainConfig(data=..., out=...))`.

`config` says what a run is, `recipes` what it takes where it was not told, by its model; `objectives` which loss it
minimises, or `rl` and its parts, where captions are rewarded; `setup` makes its parts, `loop` runs it, `checkpoint` and
`logs` write it down; `captioner` puts what came out to use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastcap.objectives import OBJECTIVES

from .config import TrainConfig

if TYPE_CHECKING:
    from .captioner import Captioner
    from .loop import Trainer, TrainResult, train

__all__ = ["OBJECTIVES", "Captioner", "TrainConfig", "TrainResult", "Trainer", "train"]

_WHERE = {
    "Captioner": "captioner",
    "TrainResult": "loop",
    "Trainer": "loop",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    """The loop needs torch and the data; a configuration does not, and the command line starts with one."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fastcap.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
