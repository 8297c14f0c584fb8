"""Image encoders: pictures [B, 3, S, S] in [-1, 1] to annotations [B, L, D], one vector per image location.

`ConvEncoder` is trained from scratch on small pictures; `BackboneEncoder` wraps any vision model of `transformers`.
Both keep `config`, a dict of plain values from which `build_encoder` makes them again without a download.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcap.data._checks import require
from fastcap.errors import bad

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class StandardisedConv(nn.Conv2d):
    """A 3 x 3 convolution whose filters have mean zero and norm `gain` (Qiao et al. 2019, Brock et al. 2021).

    It keeps the scale of what passes through a ReLU without looking at a batch: a picture is encoded alike in training
    and evaluation and whatever else is in its batch, so that accumulating gradients over small batches is exactly one
    large batch. On the scenes it learns as fast as BatchNorm; GroupNorm reached five times the loss in the same steps.
    """

    GAIN = (2 / (1 - 1 / math.pi)) ** 0.5  # ReLU of a standard normal variable, times this, has variance 1

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__(before, after, 3, stride=stride, padding=1)
        self.gain = nn.Parameter(torch.full((after, 1, 1, 1), self.GAIN))

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        norm = centred.square().sum((1, 2, 3), keepdim=True)
        weight = centred * torch.rsqrt(norm + 1e-4) * self.gain
        return F.conv2d(x, weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)


class ConvEncoder(nn.Module):
    """Convolutions of stride 2, one per entry of `channels`, and one of stride 1: 48 x 48 becomes 6 x 6 locations.

    With three `channels` each location sees 31 x 31 pixels. Its annotation is normalised over its `width` values.

    >>> ConvEncoder(width=32)(torch.zeros(2, 3, 48, 48)).shape
    torch.Size([2, 36, 32])
    """

    def __init__(self, width: int = 256, channels: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise bad("models", "channels", "be positive, at least one", tuple(channels), "pass (32, 64, 128)")
        self.config: dict[str, Any] = {"kind": "conv", "width": width, "channels": list(channels)}
        self.width = width
        layers: list[nn.Module] = []
        for before, after in zip((3, *channels), channels, strict=False):
            layers += [StandardisedConv(before, after, stride=2), nn.ReLU()]
        layers += [StandardisedConv(channels[-1], channels[-1], stride=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], width, 1))
        self.normalise = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.normalise(self.layers(images).flatten(2).transpose(1, 2))


class BackboneEncoder(nn.Module):
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
        if self.size is not None and tuple(images.shape[-2:]) != self.size:  # position embeddings fix the size
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            hidden = self.model(pixel_values=((images + 1) / 2 - mean) / std).last_hidden_state
        if hidden.dim() == 4:
            return hidden.flatten(2).transpose(1, 2).contiguous()
        return hidden[:, self._special_tokens(images, hidden.shape[1]) :]

    def _special_tokens(self, images: Tensor, length: int) -> int:
        """How many leading tokens are not patches: those beyond the grid (none where patches were merged)."""
        if self.patch is None:
            return 0
        return max(0, length - math.prod(s // p for s, p in zip(images.shape[-2:], self.patch, strict=True)))


def build_encoder(config: dict[str, Any] | str) -> nn.Module:
    """The encoder of a configuration: "conv", the name or folder of a backbone, or an encoder's own `config`."""
    if isinstance(config, str):
        return ConvEncoder() if config == "conv" else BackboneEncoder(config)
    options = dict(config)
    kind = options.pop("kind", None)
    if kind not in ("conv", "backbone"):
        raise bad("models", "encoder kind", "be 'conv' or 'backbone'", kind, "pass 'conv' or the name of a backbone")
    return ConvEncoder(**options) if kind == "conv" else BackboneEncoder(options.pop("name", None), **options)


def _pretrained(name: str) -> tuple[nn.Module, tuple[Sequence[float], Sequence[float]]]:
    transformers = require("transformers", "models")
    try:
        model = transformers.AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        remedy = f"check the name or folder ({str(error).strip().splitlines()[0]})"
        raise bad("models", "encoder", "be 'conv' or a transformers vision model", name, remedy) from error
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
