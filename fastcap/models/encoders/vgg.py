"""VGG-16 up to its last convolution, as Show, Attend and Tell uses it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcap.errors import bad

from ._base import IMAGENET_MEAN, IMAGENET_STD, Encoder, normalise_colours

_CHANNELS = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512)  # None: halve the size
_HALVINGS = 2 ** _CHANNELS.count(None)


class VggEncoder(Encoder):
    """The thirteen convolutions of VGG-16 (Simonyan and Zisserman 2015): 224 x 224 pixels become 14 x 14 annotations.

    D is 512; L is 196, or (rows / 16) x (columns / 16) of any size that 16 divides. The layers have torchvision's names
    (`features.0` to `features.28`), so that its state dict fits. ImageNet's normalisation is done inside.

    Args:
        weights: a file of such a state dict, `.safetensors` or what `torch.save` wrote (read with weights_only=True, which
            runs no code of the file). Its other entries, the classifier's, are left alone. None: random weights (He).
        trainable: train the weights; otherwise they are frozen and run without gradients. By default random weights are
            trained and weights from a file are frozen.
        normalise: bring each annotation to mean 0 and variance 1, whatever the scale of the weights, so that attention
            and LSTM begin unsaturated. False gives conv5_3 after its ReLU as it is.

    >>> VggEncoder()(torch.zeros(1, 3, 32, 48)).shape
    torch.Size([1, 6, 512])
    """

    def __init__(self, weights: str | Path | None = None, *, trainable: bool | None = None, normalise: bool = True) -> None:
        super().__init__()
        self.width = 512
        self.trainable = weights is None if trainable is None else trainable
        self.config = {"kind": "vgg16", "trainable": self.trainable, "normalise": normalise}
        layers: list[nn.Module] = []
        before = 3
        for after in _CHANNELS:
            if after is None:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
                before = after
        self.features = nn.Sequential(*layers)
        if weights is None:
            self._initialise()
        else:
            self._read(Path(weights))
        self.requires_grad_(self.trainable)

    def forward(self, images: Tensor) -> Tensor:
        if any(side % _HALVINGS or not side for side in images.shape[-2:]):
            rule, size = f"have sides that {_HALVINGS} divides", tuple(images.shape[-2:])
            raise bad("models", "images of vgg16", rule, size, "resize them, to 224 x 224 as it was trained")
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            maps = self.features(normalise_colours(images, IMAGENET_MEAN, IMAGENET_STD))
            annotations = maps.flatten(2).transpose(1, 2).contiguous()
            return F.layer_norm(annotations, (self.width,)) if self.config["normalise"] else annotations

    def grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // _HALVINGS, images.shape[-1] // _HALVINGS

    def _initialise(self) -> None:
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def _read(self, file: Path) -> None:
        found = _state_dict(file)
        ours = self.state_dict()
        for name, tensor in ours.items():
            value = found.get(name)
            shape = tuple(value.shape) if isinstance(value, Tensor) else "nothing"
            if shape != tuple(tensor.shape):
                rule, got = f"hold a {name} of shape {tuple(tensor.shape)}", f"{shape} in {file}"
                raise bad("models", "vgg16 weights", rule, got, "give torchvision's vgg16 (not vgg16_bn) state dict")
        self.load_state_dict({name: found[name] for name in ours})


def _state_dict(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        remedy = "check the path; torchvision's vgg16(weights='DEFAULT').state_dict() saved by torch.save is one"
        raise bad("models", "vgg16 weights", "be a file", str(file), remedy) from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        why = f"{file} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        remedy = "give a state dict saved by torch.save, or a .safetensors file"
        raise bad("models", "vgg16 weights", "be a file of tensors", why, remedy) from error
    if not isinstance(found, dict):
        remedy = "save the model's state_dict()"
        raise bad("models", "vgg16 weights", "hold a state dict", f"{type(found).__name__} in {file}", remedy)
    return found
