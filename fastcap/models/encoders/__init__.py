"""Image encoders: pictures [B, 3, S, S] in [-1, 1], or features of regions, to annotations [B, L, D].

`ConvEncoder` is trained from scratch on small pictures, `VggEncoder` is the one of Show, Attend and Tell,
`BackboneEncoder` wraps any vision model of `transformers`, `FeatureEncoder` takes what was computed before. Each keeps
`config`, a dict of plain values from which `build_encoder` makes it again without a file or a download, and says which
locations count (`mask`) and how they lie on the picture (`grid`).
"""

from __future__ import annotations

from typing import Any

from fastcap.errors import bad

from ._base import Encoder
from .backbone import BackboneEncoder
from .conv import ConvEncoder
from .regions import FeatureEncoder
from .vgg import VggEncoder

KINDS = {"conv": ConvEncoder, "vgg16": VggEncoder, "features": FeatureEncoder, "backbone": BackboneEncoder}


def build_encoder(config: dict[str, Any] | str) -> Encoder:
    """The encoder of a configuration.

    Args:
        config: "conv"; "vgg16" with random weights, or "vgg16:FILE" with frozen ones from a file; the name or folder of a
            `transformers` vision model; or a dict of its "kind" (one of those, "backbone" or "features") and the options
            of its class, such as an encoder's own `config`.
    """
    if isinstance(config, str):
        kind, _, file = config.partition(":")
        if config == "conv":
            return ConvEncoder()
        if kind == "vgg16":
            return VggEncoder(file or None)
        if config == "features":
            remedy = "pass {'kind': 'features', 'width_in': 2048}"
            raise bad("models", "encoder", "say how wide its features are", config, remedy)
        return BackboneEncoder(config)
    options = dict(config)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        rule = f"be one of {', '.join(map(repr, KINDS))}"
        raise bad("models", "encoder kind", rule, kind, "pass 'conv' or the name of a backbone")
    if kind == "backbone":
        return BackboneEncoder(options.pop("name", None), **options)
    return KINDS[kind](**options)


__all__ = ["BackboneEncoder", "ConvEncoder", "Encoder", "FeatureEncoder", "VggEncoder", "build_encoder"]
