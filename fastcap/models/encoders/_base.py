"""What every encoder has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """A module that makes annotations [B, L, D] of a batch of images.

    width: D.
    config: plain values from which `build_encoder` makes the encoder again, with no file of this machine in them.
    """

    width: int
    config: dict[str, Any]

    def mask(self, images: Tensor) -> Tensor | None:
        """[B, L] bool, False where a location only pads its image; None where every location is one of the image."""
        return None

    def grid(self, images: Tensor) -> tuple[int, int] | None:
        """(rows, columns) in which the L locations tile the picture, row by row; None where they are no grid."""
        raise NotImplementedError

    def centres(self, images: Tensor) -> tuple[list[float], list[float]] | None:
        """Where its rows and columns look, in shares of the picture's height and width; None: the middles of tiles."""
        return None


def normalise_colours(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures in [-1, 1] as a network trained on `(value - mean) / std` of values in [0, 1] takes them."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return ((images + 1) / 2 - mean) / std
