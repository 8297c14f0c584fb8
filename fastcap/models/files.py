"""A model in a folder: `model.json` (its name and configuration) and `model.safetensors` (its weights)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcap.errors import FastcapError, bad

from .blip import Blip
from .clip import Clip
from .glied import Glied
from .show_attend_tell import ShowAttendTell
from .show_tell import ShowTell

MODELS: dict[str, type[nn.Module]] = {model.name: model for model in (ShowAttendTell, ShowTell, Glied, Blip, Clip)}


def build(name: str, **options: Any) -> nn.Module:
    """A model with new weights: `build("show-attend-tell", vocab_size=1000, encoder="conv")`."""
    if name not in MODELS:
        raise bad("models", "model", f"be one of {', '.join(MODELS)}", name, "pass one of these names")
    fields = {field.name for field in dataclasses.fields(MODELS[name].Config)}
    unknown = sorted(set(options) - fields)
    if unknown:
        raise bad("models", "options", f"be among {', '.join(sorted(fields))}", unknown[0], "leave it out")
    return MODELS[name](MODELS[name].Config(**options))


def save(model: nn.Module, folder: str | Path) -> None:
    """Writes `model.json` and `model.safetensors` into an existing folder; a tensor with two names is written once."""
    from safetensors.torch import save_file

    folder = Path(folder)
    config = {"model": model.name, **dataclasses.asdict(model.config)}
    (folder / "model.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    first = _first_names(model)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if first[name] == name}
    save_file(weights, folder / "model.safetensors")


def load(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model that `save` wrote, in evaluation mode.

    Raises:
        FastcapError: a file is missing, cut short or foreign, weights are not those of the model that `model.json`
            describes, or that model needs a package that is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "model" not in config:
            raise ValueError("model.json names no model")
        weights = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        rule = "hold model.json and model.safetensors"
        raise bad("models", "folder", rule, str(folder), "pass a checkpoint folder") from error
    except (ValueError, SafetensorError) as error:
        rule = "hold a whole model.json and model.safetensors"
        raise bad("models", "folder", rule, f"{folder} ({error})", "use an earlier checkpoint") from error
    try:
        model = build(config.pop("model"), **config)
        first = _first_names(model)
        tied = {name: weights[kept] for name, kept in first.items() if kept in weights and name != kept}
        model.load_state_dict({**weights, **tied})
    except FastcapError:
        raise
    except Exception as error:  # each library has its own for sizes that are missing, foreign or do not fit
        why = f"{folder} ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        rule = "hold a model.json and the weights of the model that it describes"
        raise bad("models", "folder", rule, why, "use another checkpoint, or the fastcap that wrote it") from error
    return model.to(device).eval()


def _first_names(model: nn.Module) -> dict[str, str]:
    """For each name in the state dict, the first name of the same tensor: tied weights have two names and one tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
