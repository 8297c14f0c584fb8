"""Any vision model of `transformers` as an encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcap.data._checks import require
from fastcap.errors import bad

from ._base import IMAGENET_MEAN, IMAGENET_STD, Encoder, normalise_colours


class BackboneEncoder(Encoder):
    """The last hidden state of a `transformers` vision model, by hub name or local folder, as [B, L, D].

    Vision transformers lose their leading special tokens (class, distillation, registers), so that L is the grid of
    patches; convolutional outputs [B, C, H, W] are flattened; of CLIP and SigLIP the vision tower is kept.

    Args:
        name_or_folder: what `AutoModel.from_pretrained` takes. None builds the architecture of `backbone` with random
            weights, for a checkpoint to fill.
        trainable: fine-tune the weights; otherwise they are frozen and run without gradients. Either way the backbone
            stays in evaluation mode: BatchNorm keeps its statistics, and dropout stays off.
        backbone: the architecture as `config.to_dict()` gives it; read from the model when a name is given.
        mean, std: normalisation per channel of values in [0, 1]; read from the model's image processor, else
            ImageNet's.
    """

    def __init__(
        self,
        name_or_folder: str | None = None,
        *,
        trainable: bool = False,
        backbone: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if name_or_folder is not None:
            model, (found_mean, found_std) = _pretrained(name_or_folder)
            mean, std = mean or found_mean, std or found_std
        else:
            model = _architecture(backbone)
        self.model = getattr(model, "vision_model", model)  # of a two-tower model only the pictures' tower
        backbone = self.model.config.to_dict()
        backbone.pop("_name_or_path", None)  # a folder of this machine
        self.mean, self.std = tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD)
        self.trainable = trainable
        self.size = _pair(backbone.get("image_size")) if backbone.get("patch_size") else None
        self.patch = _pair(backbone.get("patch_size"))
        self.width = _hidden_width(backbone)
        self.config = {
            "kind": "backbone",
            "trainable": trainable,
            "backbone": backbone,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        self.model.requires_grad_(trainable)
        self.model.eval()

    def train(self, mode: bool = True) -> BackboneEncoder:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        hidden = self._hidden(images)
        if hidden.dim() == 4:
            return hidden.flatten(2).transpose(1, 2).contiguous()
        return hidden[:, self._special_tokens(images, hidden.shape[1]) :]

    def grid(self, images: Tensor) -> tuple[int, int] | None:
        """What is left of the grid of patches, which some models merge: read off the encoding of one picture."""
        with torch.no_grad():
            hidden = self._hidden(images[:1])
        if hidden.dim() == 4:
            return tuple(hidden.shape[2:])
        if self.patch is None:
            return None
        rows, columns = self._patches(images)
        merged = math.isqrt(max(1, rows * columns // hidden.shape[1]))  # patches of a side that make one location
        rows, columns = rows // merged, columns // merged
        locations = hidden.shape[1] - self._special_tokens(images, hidden.shape[1])
        return (rows, columns) if rows * columns == locations else None

    def _hidden(self, images: Tensor) -> Tensor:
        """The last hidden state, special tokens included: [B, L, D], or [B, D, rows, columns] of a convolutional model."""
        if self.size is not None and tuple(images.shape[-2:]) != self.size:  # position embeddings fix the size
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return self.model(pixel_values=normalise_colours(images, self.mean, self.std)).last_hidden_state

    def _patches(self, images: Tensor) -> tuple[int, int]:
        height, width = self.size or images.shape[-2:]
        return height // self.patch[0], width // self.patch[1]

    def _special_tokens(self, images: Tensor, length: int) -> int:
        """How many leading tokens are not patches: those beyond the grid (none where patches were merged)."""
        return 0 if self.patch is None else max(0, length - math.prod(self._patches(images)))


def _pretrained(name: str) -> tuple[nn.Module, tuple[Sequence[float], Sequence[float]]]:
    transformers = require("transformers", "models")
    try:
        model = transformers.AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        remedy = f"check the name or folder ({str(error).strip().splitlines()[0]})"
        raise bad("models", "encoder", "be 'conv', 'vgg16' or a transformers vision model", name, remedy) from error
    if getattr(model, "vision_model", model).main_input_name != "pixel_values":
        raise bad("models", "encoder", "be a vision model", name, "name one that takes pictures, e.g. a ViT or CLIP")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # a folder without a processor's file, or no torchvision to load it
        return model, (IMAGENET_MEAN, IMAGENET_STD)
    return model, (processor.image_mean or IMAGENET_MEAN, processor.image_std or IMAGENET_STD)


def _architecture(backbone: dict[str, Any] | None) -> nn.Module:
    if not backbone:
        raise bad("models", "backbone", "describe an architecture", backbone, "pass a name, or config.to_dict()")
    options = dict(backbone)
    transformers = require("transformers", "models")
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(options.pop("model_type"), **options))


def _pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[return-value]


def _hidden_width(backbone: dict[str, Any]) -> int:
    width = backbone.get("hidden_size") or (backbone.get("hidden_sizes") or [None])[-1]
    if not isinstance(width, int):
        rule = "state its width as hidden_size or hidden_sizes"
        raise bad("models", "encoder", rule, backbone.get("model_type"), "use another backbone")
    return width
