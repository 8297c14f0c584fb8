"""BLIP from a checkpoint of transformers, by folder or hub name, with the tokenizer that comes with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcap.data import CaptionTokenizer
from fastcap.errors import bad

from .blip import CLIP_MEAN, CLIP_STD, Blip, BlipConfig

STANDARD = "Salesforce/blip-image-captioning-base"
_FILES = ["*.json", "*.txt", "*.safetensors"]  # nothing pickled
_IDS = "tokenizer_ids.json"


class PretrainedTokenizer:
    """A tokenizer of `tokenizers` as a checkpoint has it, used as `CaptionTokenizer` is.

    Captions are cleaned as BLIP's authors do before they are cut: lower case, and . ! " ( ) * # : ; ~ become spaces.
    """

    def __init__(self, tokenizer: Any, start_id: int, end_id: int, pad_id: int) -> None:
        self._tokenizer = tokenizer
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id

    @classmethod
    def load(cls, folder: str | Path) -> PretrainedTokenizer:
        """Reads what `save` wrote."""
        from tokenizers import Tokenizer

        try:
            ids = json.loads((Path(folder) / _IDS).read_text(encoding="utf-8"))
            return cls(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")), **ids)
        except Exception as error:  # `tokenizers` raises bare Exception
            rule = f"hold a whole tokenizer.json and {_IDS}"
            raise bad("models", "folder", rule, f"{folder} ({error})", "use an earlier checkpoint") from error

    def save(self, path: str | Path) -> None:
        """Writes the `tokenizers` JSON, and beside it `tokenizer_ids.json`: start, end and pad, which it does not tell."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        ids = {"start_id": self.start_id, "end_id": self.end_id, "pad_id": self.pad_id}
        (Path(path).parent / _IDS).write_text(json.dumps(ids) + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of the caption, without special tokens."""
        cleaned = " ".join(re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split())
        return self._tokenizer.encode(cleaned, add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The caption of `ids`, up to the first `end_id`, special tokens dropped."""
        ids = list(ids)
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a token."""
        return self._tokenizer.get_vocab_size()


def load_tokenizer(folder: str | Path) -> CaptionTokenizer | PretrainedTokenizer:
    """The tokenizer of a checkpoint that fastcap wrote."""
    folder = Path(folder)
    if (folder / _IDS).is_file():
        return PretrainedTokenizer.load(folder)
    return CaptionTokenizer.load(folder / "tokenizer.json")


def is_cached(name: str) -> bool:
    """Whether a hub checkpoint can be loaded without the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return False
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) and _has_tokenizer(folder)


def fetch(name: str) -> Path:
    """The folder of a checkpoint: `name` itself, or where the hub's files are; what is in the cache is taken from there.

    Raises:
        FastcapError: there is neither, or it is no BLIP.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=is_cached(name)))
        except (OSError, ValueError) as error:  # no such name, no network, no access
            raise _not_loaded(name, error) from error
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error
    if kind != "blip":
        raise bad("models", "pretrained", "be a BLIP checkpoint", f"{name} ({kind})", f"pass one such as {STANDARD}")
    return folder


def image_size(name: str) -> int:
    """The side of the pictures that a checkpoint takes, in pixels."""
    from transformers import BlipConfig as Architecture

    return Architecture.from_pretrained(fetch(name)).vision_config.image_size


def load_blip(name: str, *, prompt: str = "", image_size: int | None = None) -> tuple[Blip, PretrainedTokenizer]:
    """A BLIP captioner and its tokenizer from a checkpoint of transformers.

    Args:
        name: a folder that `save_pretrained` of model and tokenizer wrote, or a name on the hub.
        prompt: text that begins every caption and is not printed.
        image_size: side of the pictures if not the checkpoint's; position embeddings are then interpolated, as the authors
            do between pre-training and fine-tuning.

    Raises:
        FastcapError: it cannot be reached or read, or lacks weights of a captioner or a tokenizer.
    """
    folder = fetch(name)
    blip = _load_model(name, folder)
    if image_size is not None:
        _resize(blip, image_size)
    text = blip.config.text_config
    if not _has_tokenizer(folder):  # transformers would make an empty one
        remedy = "save the tokenizer there too: tokenizer.save_pretrained(folder)"
        raise bad("models", "pretrained", "hold tokenizer.json or vocab.txt", name, remedy)
    from transformers import AutoTokenizer

    try:
        cutter = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # `tokenizers` raises bare Exception
        raise _not_loaded(name, error) from error
    cutter.no_truncation()
    cutter.no_padding()
    tokenizer = PretrainedTokenizer(cutter, text.bos_token_id, text.sep_token_id, text.pad_token_id)
    if tokenizer.vocab_size > text.vocab_size:
        got = f"{tokenizer.vocab_size} tokens in {name}"
        raise bad("models", "pretrained", f"have at most {text.vocab_size} tokens, as its model", got, "mend the folder")
    config = BlipConfig(_plain(blip.config), tokenizer.encode(prompt), *normalisation(folder))
    return Blip(config, blip), tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt"))


def _load_model(name: str, folder: Path) -> nn.Module:
    from transformers import BlipForConditionalGeneration

    try:
        blip, info = BlipForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # OSError, ValueError, RuntimeError for other shapes, SafetensorError for a cut file
        raise _not_loaded(name, error) from error
    # A model that answers questions has a captioner's weights too; its decoder reads the states of a text encoder.
    others = [key for key in info["unexpected_keys"] if key.startswith("text_encoder.")]
    for verb, keys in (("lacks", info["missing_keys"]), ("also has", others)):
        if keys:
            got = f"{name}, which {verb} {sorted(keys)[0]} and {len(keys) - 1} more"
            remedy = f"pass a captioner, such as {STANDARD}"
            raise bad("models", "pretrained", "hold the weights of BlipForConditionalGeneration", got, remedy)
    return blip


def _not_loaded(name: str, error: Exception) -> Exception:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    remedy = f"check the name and the network ({why}), or pass --pretrained none for a small model with random weights"
    return bad("models", "pretrained", "be a folder or a hub name that can be loaded", name, remedy)


@torch.no_grad()
def _resize(blip: nn.Module, size: int) -> None:
    config, embeddings = blip.config.vision_config, blip.vision_model.embeddings
    if size == config.image_size:
        return
    patch = config.patch_size
    if size < patch or size % patch:
        near = max(patch, round(size / patch) * patch)
        raise bad("models", "image_size", f"be a multiple of {patch}, the patch", size, f"pass image_size={near}")
    wanted = embeddings.position_embedding.new_zeros(1, (size // patch) ** 2 + 1, 1)  # only its shape is looked at
    positions = embeddings.interpolate_pos_encoding(wanted.expand(-1, -1, config.hidden_size), size, size)
    embeddings.position_embedding = nn.Parameter(positions.clone())
    embeddings.image_size = config.image_size = size


def normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, from the picture processor's file if there is one."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            found = json.loads((folder / file).read_text(encoding="utf-8"))
            found = found.get("image_processor", found)
            if "image_mean" in found and "image_std" in found:
                return found["image_mean"], found["image_std"]
    return list(CLIP_MEAN), list(CLIP_STD)


def _plain(config: Any) -> dict[str, Any]:
    """The architecture without what belongs to a machine or a version."""
    plain = config.to_dict()
    for part in (plain, plain["text_config"], plain["vision_config"]):
        for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
            part.pop(name, None)
    return plain
