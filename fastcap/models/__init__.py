"""Captioning models, their decoding, and their files: `build`, `save`, `load`, `greedy`, `beam_search`, `sample`.

A model is an `nn.Module` made from one frozen dataclass of plain values. It offers
`forward(images, inputs)` -> (logits [B, T, V], alphas [B, T, L] or None), `hidden_states(images, inputs)` -> [B, T, H]
with the linear layer `head`, with which the training fuses its loss, and `encode`, `start`, `step` for decoding (see
`fastcap.models.decoding`). Adding a model is one file and one name in `MODELS`.
"""

from .blip import Blip, BlipConfig, small_architecture
from .clip import Clip, ClipConfig
from .clip_embedder import ClipEmbedder, Embedder, TransformersClipEmbedder
from .clip_pretrained import load_clip
from .decoding import Captions, beam_search, greedy
from .encoders import BackboneEncoder, ConvEncoder, Encoder, FeatureEncoder, VggEncoder, build_encoder
from .files import MODELS, build, load, save
from .glied import Glied, GliedConfig
from .pretrained import PretrainedTokenizer, load_blip, load_tokenizer
from .sampling import sample, sample_and_greedy
from .show_attend_tell import VARIANTS, Decoded, ShowAttendTell, ShowAttendTellConfig
from .show_tell import ShowTell, ShowTellConfig

__all__ = [
    "MODELS",
    "VARIANTS",
    "BackboneEncoder",
    "Blip",
    "BlipConfig",
    "Captions",
    "Clip",
    "ClipConfig",
    "ClipEmbedder",
    "ConvEncoder",
    "Decoded",
    "Embedder",
    "Encoder",
    "FeatureEncoder",
    "Glied",
    "GliedConfig",
    "PretrainedTokenizer",
    "ShowAttendTell",
    "ShowAttendTellConfig",
    "ShowTell",
    "ShowTellConfig",
    "TransformersClipEmbedder",
    "VggEncoder",
    "beam_search",
    "build",
    "build_encoder",
    "greedy",
    "load",
    "load_blip",
    "load_clip",
    "load_tokenizer",
    "sample",
    "sample_and_greedy",
    "save",
    "small_architecture",
]
