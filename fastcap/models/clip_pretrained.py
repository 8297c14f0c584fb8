"""CLIP from a checkpoint of transformers, by folder or hub name, as an `Embedder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcap.data._checks import require
from fastcap.errors import bad

from .clip_embedder import TransformersClipEmbedder
from .pretrained import is_cached, normalisation

STANDARD_CLIP = "openai/clip-vit-base-patch32"
_FILES = ["*.json", "*.txt"]
_RULE = "be a run of fastcap train --model clip, or a transformers CLIP by folder or hub name"


def load_clip(name: str, device: str | torch.device = "cpu") -> TransformersClipEmbedder:
    """The embedder of a CLIP of transformers.

    Pictures are resized and normalised as its picture processor's file says, or as CLIP's own where there is none.

    Args:
        name: a folder that `save_pretrained` of model and processor wrote, or a name on the hub. Weights are read from
            safetensors, or from a pytorch_model.bin without running its code.

    Raises:
        FastcapError: it cannot be reached or read, is no CLIP, or lacks weights or a tokenizer.
    """
    transformers = require("transformers", "models")
    folder = _fetch(str(name))
    kind = _json(str(name), folder / "config.json").get("model_type")
    if kind != "clip":
        raise bad("models", "clip", _RULE, f"{name}, a {kind}", f"pass one of model_type clip, such as {STANDARD_CLIP}")
    if not any(
        (folder / file).is_file() for file in ("tokenizer.json", "vocab.json")
    ):  # transformers would make an empty one
        remedy = "save the tokenizer there too: tokenizer.save_pretrained(folder)"
        raise bad("models", "clip", "hold tokenizer.json or vocab.json", name, remedy)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise _not_loaded(name, error) from error
    model = _load_model(str(name), folder).to(device)
    vocabulary, most = len(tokenizer), model.config.text_config.vocab_size
    if vocabulary > most:
        raise bad(
            "models", "clip", f"have at most {most} tokens, as its model", f"{vocabulary} in {name}", "mend the folder"
        )
    return TransformersClipEmbedder(model, tokenizer, *normalisation(folder), resize=_resize(folder))


def _fetch(name: str) -> Path:
    """The folder of a checkpoint: `name` itself, or where the hub's files are; what is in the cache is taken from there."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise bad("models", "clip", _RULE, name, "it is a folder without checkpoints and without config.json")
        return folder
    from huggingface_hub import snapshot_download

    try:
        cached = is_cached(name)
        folder = Path(snapshot_download(name, allow_patterns=[*_FILES, "*.safetensors"], local_files_only=cached))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_FILES, "pytorch_model.bin"]))
    except (OSError, ValueError) as error:  # no such name, no network, no access
        raise _not_loaded(name, error) from error
    return folder


def _load_model(name: str, folder: Path) -> nn.Module:
    from transformers import CLIPModel

    try:
        model, info = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # OSError, ValueError, RuntimeError for other shapes, SafetensorError for a cut file
        raise _not_loaded(name, error) from error
    if info["missing_keys"]:
        got = f"{name}, which lacks {sorted(info['missing_keys'])[0]} and {len(info['missing_keys']) - 1} more"
        raise bad("models", "clip", "hold the weights of CLIPModel", got, f"pass one such as {STANDARD_CLIP}")
    return model.requires_grad_(False)


def _resize(folder: Path) -> int | None:
    """To what pictures are resized before their middle is cut out; None where nothing is said."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            found = _json(str(folder), folder / file)
            found = found.get("image_processor", found)
            size = found.get("size")
            if found.get("do_resize", True) and size:
                return size if isinstance(size, int) else size.get("shortest_edge") or size.get("height")
    return None


def _json(name: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{file.name} holds no settings")
        return found
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: Exception) -> Exception:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return bad("models", "clip", _RULE, name, f"check the name and the network ({why})")
