"""Precomputed features in place of pictures."""

from __future__ import annotations

from torch import Tensor, nn

from fastcap.errors import bad

from ._base import Encoder


class FeatureEncoder(Encoder):
    """Annotations from features [B, R, D_in] that a detector or a backbone computed before: R regions of each image.

    They are brought to mean 0 and variance 1 (LayerNorm with a learnt scale and shift) and, with a `width`, projected to it.
    A row of zeros is no region: `mask` is False there, and its annotation is zero.

    Args:
        width_in: D_in.
        width: of the annotations; None keeps D_in, without a projection.

    >>> encoder = FeatureEncoder(2048, width=512)
    >>> encoder(torch.rand(2, 36, 2048)).shape
    torch.Size([2, 36, 512])
    """

    def __init__(self, width_in: int, width: int | None = None) -> None:
        super().__init__()
        for name, value in (("width_in", width_in), ("width", width)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise bad("models", name, "be at least 1", value, "pass the values of a region, for example 2048")
        self.config = {"kind": "features", "width_in": width_in, "width": width}
        self.width = width or width_in
        self.normalise = nn.LayerNorm(width_in)
        self.project = nn.Identity() if width is None else nn.Linear(width_in, width)

    def forward(self, images: Tensor) -> Tensor:
        width_in = self.config["width_in"]
        if images.dim() != 3 or images.shape[2] != width_in:
            rule, remedy = f"be features [B, R, {width_in}]", "give the model the features that it was made for"
            raise bad("models", "images of a model of features", rule, tuple(images.shape), remedy)
        annotations = self.project(self.normalise(images))
        return annotations.masked_fill(~self.mask(images).unsqueeze(2), 0)

    def mask(self, images: Tensor) -> Tensor:
        return (images != 0).any(2)

    def grid(self, images: Tensor) -> None:
        return None
