"""The models that `attach` knows, a row each: where the head is, and what stands between it and the loss.

Whether labels are shifted left or decoder inputs right is the configuration's `is_encoder_decoder`. In every family the last
positions of the decoder are the labels' (an image's tokens come before the text), so no row says where the text begins.
"""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from fastcap.errors import FastcapError, bad

OP = "hf.attach"

RECIPE = """\
for another model, make its head an identity while you train, and give the loss what the head was given:
    head = model.get_output_embeddings()
    head.forward = lambda hidden: hidden  # `del head.forward` ends it
    hidden = model(**inputs).logits  # without labels; [B, T, H]
    loss = fastcap.functional.linear_subset_cross_entropy(
        hidden[:, :-1], head.weight, labels[:, 1:].contiguous(), linear_bias=head.bias
    )"""


class Family(NamedTuple):
    """One row: dotted paths that start at the model; None where the family has no such thing."""

    name: str
    model: str  # the class, of transformers
    decoder: str | None = None  # the module whose output embeddings are the head; None: the model
    start: str | None = None  # the configuration with pad_token_id and decoder_start_token_id of an encoder-decoder
    softcap: str | None = None  # what the model applies to its logits between head and loss
    smoothing: str | None = None  # the model's own label smoothing
    texts: tuple[str, ...] = ()  # where not any: the text models (their model_type) whose head makes the logits, as tested

    def head(self, model: nn.Module) -> nn.Module:
        """The linear layer from hidden states to the vocabulary. Looked up each time: PEFT may wrap it after `attach`."""
        head = (model if self.decoder is None else attrgetter(self.decoder)(model)).get_output_embeddings()
        if hasattr(head, "base_layer") or not (isinstance(head, nn.Linear) or type(head).__name__ == "ModulesToSaveWrapper"):
            remedy = "leave the head out of target_modules, and trainable_token_indices out if head and embedding are tied"
            raise bad(OP, "model", "have a plain linear head", type(head).__name__, remedy)
        weight = getattr(head, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise bad(OP, "model", "have a linear head of floats", type(head).__name__, "detach, and train with logits")
        return head

    def check_text(self, model: nn.Module) -> None:
        """A text model that scales, caps or biases its logits after the head would get another loss without a word."""
        kind = attrgetter(self.decoder)(model).config.model_type if self.texts else None
        if self.texts and kind not in self.texts:
            rule = f"have a text model of type {', '.join(map(repr, self.texts))}"
            remedy = "train without attach, or call fastcap.functional.linear_subset_cross_entropy, with its logit_softcap"
            raise bad(OP, "model", rule, kind, remedy)

    def cap(self, model: nn.Module) -> float | None:
        """What the model itself caps its logits with. transformers heeds PaliGemma's configuration since 5.23 only."""
        if self.softcap is None:
            return None
        own = [cls for cls in type(model).__mro__ if cls.__name__ == self.model][-1]  # below it: attached, or a subclass
        code = inspect.unwrap(own.forward).__code__
        applied = self.softcap.rpartition(".")[2] in (*code.co_names, *code.co_consts)
        return self.read(model, "softcap", None) if applied else None

    def read(self, model: nn.Module, field: str, default: Any) -> Any:
        """The value at the path that the column `field` holds."""
        path = getattr(self, field)
        try:
            value = default if path is None else attrgetter(path)(model)
        except AttributeError:  # not every text model of a family has it
            return default
        return default if value is None else value


FAMILIES = (
    Family("BLIP", "BlipForConditionalGeneration", decoder="text_decoder", smoothing="text_decoder.label_smoothing"),
    Family(
        "BLIP-2",
        "Blip2ForConditionalGeneration",
        decoder="language_model",
        start="config.text_config",
        texts=("opt", "t5", "llama"),
    ),  # fmt: skip
    Family("GIT", "GitForCausalLM"),
    Family("Florence-2", "Florence2ForConditionalGeneration", start="config.text_config"),
    Family("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration"),
    Family("PaliGemma", "PaliGemmaForConditionalGeneration", softcap="config.text_config.final_logit_softcapping"),
    Family("VisionEncoderDecoder", "VisionEncoderDecoderModel", decoder="decoder", start="config"),
)


def family_of(model: object) -> Family:
    """The row of a model; a subclass counts as its base.

    Raises:
        FastcapError: there is none; the message names the families, and shows what to do for any other model.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if family.model in names:
            return family
    known = ", ".join(f"{family.name} ({family.model})" for family in FAMILIES)
    raise FastcapError(f"fastcap.{OP}: model must be one of {known}, got {type(model).__name__!r}; {RECIPE}")
