"""Checkpoints: self-contained folders in safetensors and JSON, written whole or not at all, and nothing pickled.

OUT/checkpoints/step-00000500/
    model.json, model.safetensors     the model (fastcap.models.load)
    tokenizer.json                    the tokenizer (CaptionTokenizer.load)
    optimizer.safetensors             the optimiser's tensors, `<parameter>/<name>`
    discriminator.safetensors         of a run by reinforcement: the discriminator and its optimiser
    trainer.json                      step, configuration, random generators, gradient scale
OUT/checkpoints/last                  the name of the newest
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcap import models
from fastcap.errors import bad

from .config import TrainConfig

_STATE = ("step", "seconds", "last", "items", "scaler", "config", "random")  # what trainer.json holds


def find(folder: str | Path) -> Path:
    """The checkpoint that a path names: a checkpoint itself, or the last one of a run."""
    folder = Path(folder)
    if (folder / "trainer.json").is_file():
        return folder
    last = last_of(folder)
    if last is None:
        remedy = "pass what a run had as --out"
        raise bad("train", "checkpoint", "be a checkpoint or the folder of a run", str(folder), remedy)
    return last


def last_of(out: str | Path) -> Path | None:
    """The last checkpoint of a run, if it has one."""
    folder = Path(out) / "checkpoints"
    pointer = folder / "last"
    return folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def to_resume(out: str | Path) -> Path:
    """The last checkpoint of a run, which must have one."""
    last = last_of(out)
    if last is None:
        raise bad("train", "out", "hold a checkpoint to resume", str(out), "start a new run without --resume")
    return last


def read(checkpoint: Path) -> dict[str, Any]:
    """`trainer.json` of a checkpoint."""
    try:
        state = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
        lacking = [name for name in _STATE if name not in state] if isinstance(state, dict) else ["everything"]
        if lacking or not isinstance(state["config"], dict):
            raise ValueError(f"it lacks {', '.join(lacking or ['settings in config'])}")
    except (OSError, ValueError) as error:
        rule = "hold a whole trainer.json"
        raise bad("train", "checkpoint", rule, f"{checkpoint} ({error})", "use an earlier checkpoint") from error
    return state


def read_config(checkpoint: Path) -> TrainConfig:
    """The configuration of the run that wrote a checkpoint."""
    settings = read(checkpoint)["config"]
    unknown = [name for name in settings if name not in {field.name for field in dataclasses.fields(TrainConfig)}]
    if unknown:
        rule, remedy = "have settings that this fastcap knows", "use the newer fastcap that wrote it"
        raise bad("train", "checkpoint", rule, f"{checkpoint} ({', '.join(unknown)})", remedy)
    return TrainConfig(**settings)


def save(
    out: str | Path,
    model: nn.Module,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    discriminator: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes the checkpoint of `state["step"]`, points `last` at it, and removes all but the newest `keep`."""
    folder = Path(out) / "checkpoints"
    final = folder / f"step-{state['step']:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    models.save(model, partial)
    tokenizer.save(partial / "tokenizer.json")
    _save_optimizer(model, optimizer, partial / "optimizer.safetensors")
    if discriminator:
        _save_tensors(discriminator, partial / "discriminator.safetensors")
    (partial / "trainer.json").write_text(json.dumps({**state, "random": random_state()}), encoding="utf-8")
    for file in partial.iterdir():
        _flush(file)
    if final.exists():  # the same step again: a resumed run that was interrupted before its first step
        replaced = folder / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
        os.replace(partial, final)
        shutil.rmtree(replaced)
    else:
        os.replace(partial, final)
    pointer = folder / ".last.partial"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    _flush(pointer)
    os.replace(pointer, folder / "last")
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the saved tensors back into `optimizer`; its settings come from the configuration."""
    saved = load_tensors(checkpoint, "optimizer")
    for name, parameter in model.named_parameters():
        prefix = name + "/"
        for key in [key for key in saved if key.startswith(prefix)]:
            tensor = saved[key]
            if tensor.dim():  # moments lie where and how the parameter lies; `step` is a scalar, kept on the CPU
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            elif optimizer.defaults.get("fused"):
                tensor = tensor.to(parameter.device)
            optimizer.state[parameter][key[len(prefix) :]] = tensor


def load_tensors(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of `name`.safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(checkpoint / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        rule = f"hold a whole {name}.safetensors"
        remedy = "use an earlier checkpoint, or start a new run with --init-from"
        raise bad("train", "checkpoint", rule, f"{checkpoint} ({error})", remedy) from error


def _save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}/{key}": tensor
        for parameter, values in optimizer.state.items()
        for key, tensor in values.items()
    }
    _save_tensors(tensors, file)


def _save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def random_state() -> dict[str, Any]:
    """The states of every global random generator, as JSON."""
    version, internal, gauss = random.getstate()
    state = {"python": [version, list(internal), gauss], "torch": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available():
        state["cuda"] = [one.numpy().tobytes().hex() for one in torch.cuda.get_rng_state_all()]
    import numpy as np

    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    return {**state, "numpy": [algorithm, keys.tolist(), position, has_gauss, cached]}


def set_random_state(state: dict[str, Any]) -> None:
    import numpy as np

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_bytes(state["torch"]))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([_bytes(one) for one in state["cuda"]])


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _flush(file: Path) -> None:
    """To the disk before the rename: after a power cut a folder under its final name is complete."""
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
