"""`attach` and `detach`: a model of transformers whose training step does without its [B, T, V] logits, patched in place.

The patch is one: the model's class becomes a subclass of it with another `forward`. So there is nothing on the instance but
the settings, and copies, pickles and replicas of the model are attached like it. In training with labels that `forward` runs
the model's own without labels, with a head that keeps what it is given and returns an empty tensor; every other call is the
model's own, untouched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastcap
from fastcap.errors import FastcapError, bad
from fastcap.objectives import OBJECTIVES

from .families import OP, family_of
from .hooks import check_reached, rebind_hooked
from .loss import Settings, caption_loss, check_call, shift_right

_SETTINGS = "_fastcap_settings"


def attach(
    model: nn.Module,
    objective: str = "smile",
    *,
    mle_weight: float | None = None,
    first_token: str = "full",
    prompt_length: int = 0,
    label_smoothing: float | None = None,
    weight: Tensor | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    grad_weight: str = "dense",
    memory_budget: int | None = None,
) -> nn.Module:
    """Makes a captioning model of transformers train with `objective`, without the logits of its head.

    Affects calls with `labels` while `model.training`: they return `loss` by `linear_subset_cross_entropy`, and no `logits`.
    [B, T, V] logits are never made by SMILE; where the whole vocabulary takes part they are made in blocks, at most
    `memory_budget` bytes at a time: in "mle", "smile+mle" and "resmile" for every token (so where the budget holds them all,
    they are kept), in "smile" with `first_token="full"` for the first of each caption, [B, V].
    Evaluation (`model.eval()`), calls without labels and `generate` stay the model's own, to the bit; so does everything
    that is saved. A model that is already attached takes the new settings in place of the old.

    Args:
        model: a model of one of `fastcap.hf.FAMILIES`, or one inside PEFT, torch.compile or DistributedDataParallel.
            Attach before making a Trainer, which asks a model once what it takes. One that carries a `forward` of its own,
            as Trainer(bf16=True) leaves on what it trained, cannot be attached; the hooks of accelerate can.
        objective: "mle", "smile", "smile+mle" or "resmile" (fastcap.objectives).
        mle_weight: in [0, 1], the share of MLE; None is 0.01 in "smile+mle" and 0 in the others. Not for "mle".
        first_token: "full" or "subset": what the first target of each caption chooses from.
        prompt_length: how many target tokens of each caption are its prompt, and ignored: the first ones that are not
            `ignore_index` already. A start token is no target, unless the tokenizer writes one into the labels, as those of
            BART and Florence-2 do: add 1 there.
        label_smoothing: in [0, 1]; None is the model's own in "mle" (BLIP has one) and 0 in the others.
        weight, z_loss: class weights [V] and the factor of logsumexp^2, as the operation takes them.
        ignore_index: labels that are none.
        grad_weight: "dense", "sparse" or "accumulate", the gradient of the head's weight. A head tied to the embedding
            gains nothing from "sparse": its gradient ends in a sum with the embedding's, which is dense.
        memory_budget: bytes of scratch where the whole vocabulary takes part; None is 256 MiB, 0 the smallest blocks.

    A training call may also have `token_weight`, [B, T] as labels or [B, 1]: a factor for each token's loss, such as a
    reward. `num_items_in_batch`, which Trainer passes, divides the sum over the tokens in place of their number; it is the
    number of labels that are not `ignore_index`, prompts included. Where `prompt_length` is used with gradient
    accumulation, each part is assumed to hold the same share of prompts: set prompts to `ignore_index` in the labels
    themselves to be exact.

    Labels have the shape of the text that the decoder reads. Two threads may not run one attached model: while one trains,
    the other's logits are empty.

    Returns:
        `model` itself.

    Raises:
        FastcapError: the model is of no known family, its head is not a plain linear layer, it carries a `forward` of its
            own, or an option breaks its rule. Training calls raise it for labels and weights of the wrong shape.

    >>> import fastcap.hf
    >>> model = fastcap.hf.attach(blip, "smile", prompt_length=3)  # doctest: +SKIP
    """
    target = _unwrapped(model)
    family = family_of(target)
    family.check_text(target)
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        rule = f"be one of {', '.join(map(repr, OBJECTIVES))}"
        raise bad(OP, "objective", rule, objective, "pass objective='smile'")
    if not isinstance(prompt_length, int) or isinstance(prompt_length, bool) or prompt_length < 0:
        raise bad(OP, "prompt_length", "be an int of at least 0", prompt_length, "count the prompt's tokens")
    options = dict(
        OBJECTIVES[objective], first_token=first_token, weight=weight, z_loss=z_loss, ignore_index=ignore_index,
        grad_weight=grad_weight, memory_budget=memory_budget,
    )  # fmt: skip
    if mle_weight is not None:
        if objective == "mle" and not (isinstance(mle_weight, (int, float)) and mle_weight == 0):
            remedy = "leave it out, or pass objective='smile+mle'"
            raise bad(OP, "mle_weight", "be left out with objective 'mle'", mle_weight, remedy)
        options["mle_weight"] = mle_weight
    if label_smoothing is None:
        label_smoothing = family.read(target, "smoothing", 0.0) if objective == "mle" else 0.0
    options["label_smoothing"] = label_smoothing
    _check_options(family.head(target).weight.shape[0], options)
    attached = _attached_class(_own_class(target))
    if _SETTINGS not in target.__dict__:  # else a forward on the instance was put around the attached one
        check_reached(target, attached)
    rebind_hooked(target, attached)
    target.__class__ = attached
    setattr(target, _SETTINGS, Settings(family, options, prompt_length))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undoes `attach`: class, `forward` and attributes are what they were. Does nothing to a model that is not attached.

    Returns:
        `model` itself.

    Raises:
        FastcapError: `model` is no module, or it is not attached but a module inside it is.
    """
    target = _unwrapped(model)
    if not isinstance(target, nn.Module):
        raise bad("hf.detach", "model", "be a torch.nn.Module", type(model).__name__, "pass what attach returned")
    if target.__dict__.pop(_SETTINGS, None) is None:
        for name, module in target.named_modules():
            if _SETTINGS in module.__dict__:
                rule, remedy = "be the attached model itself", f"pass its module {name!r}"
                raise bad("hf.detach", "model", rule, type(model).__name__, remedy)
    rebind_hooked(target, _own_class(target))
    target.__class__ = _own_class(target)
    return model


def _unwrapped(model: Any) -> Any:
    """The model inside a PEFT model, a compiled one or a parallel one, which hold it by these names."""
    while isinstance(model, nn.Module):
        inner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else None
        for name in ("_orig_mod", "module"):
            inner = model._modules.get(name) if inner is None else inner
        if inner is None or inner is model:
            break
        model = inner
    return model


def _own_class(model: nn.Module) -> type[nn.Module]:
    """The class that a model has, or had before it was attached."""
    return type(model).__dict__.get("_fastcap_base", type(model))


def _check_options(V: int, options: dict[str, Any]) -> None:
    """Lets the operation check its options now, on a caption of one token, and not in the first step."""
    weight = options["weight"].cpu() if isinstance(options["weight"], Tensor) else options["weight"]
    sparse = options["grad_weight"] == "sparse"
    try:
        with fastcap.backend("reference"), torch.device("cpu"):
            fastcap.functional.linear_subset_cross_entropy(
                torch.zeros(1, 1, 1), torch.zeros(V, 1, requires_grad=True), torch.zeros(1, 1, dtype=torch.int64),
                **dict(options, weight=weight, grad_weight="dense" if sparse else options["grad_weight"]),
            )  # fmt: skip
    except FastcapError as error:
        raise FastcapError(str(error).replace("fastcap.linear_subset_cross_entropy:", f"fastcap.{OP}:", 1)) from None
    if sparse and (options["subset"] != "caption" or options["first_token"] == "full" or options.get("mle_weight")):
        rule = "be 'dense' or 'accumulate' where a token uses the whole vocabulary"
        raise bad(OP, "grad_weight", rule, "sparse", "pass objective='smile' with first_token='subset' and no mle_weight")


@functools.cache
def _attached_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `base` that trains without its logits, by the same name, since transformers saves and looks up names."""
    # It swaps a method, which torch.compile cannot trace; what it calls is compiled.
    training_forward = torch.compiler.disable(_training_forward, recursive=False)

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        settings = self.__dict__.get(_SETTINGS)
        if settings is None:  # detached, while something like accelerate still holds this function
            return base.forward(self, *args, **kwargs)
        token_weight = kwargs.pop("token_weight", None)
        if args:
            kwargs = _by_name(base.forward, self, args, kwargs)
        if not self.training or kwargs.get("labels") is None:
            if not getattr(base, "accepts_loss_kwargs", True):
                kwargs.pop("num_items_in_batch", None)  # Trainer passes it because of accepts_loss_kwargs below
            return base.forward(self, **kwargs)
        return training_forward(base, self, settings, token_weight, kwargs)

    # A Trainer drops the columns of a data set that `forward` does not name. And accelerate, when it unwraps a model, goes
    # down __wrapped__ to the end: past this function.
    forward.__signature__ = _with_token_weight(inspect.signature(base.forward))
    del forward.__wrapped__

    def __reduce_ex__(self, protocol):
        return _new, (base,), self.__dict__

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_fastcap_base": base,
        "forward": forward,
        # Trainer hands num_items_in_batch only to models that say so. Qwen2.5-VL's own class says no.
        "accepts_loss_kwargs": True,
    }
    return type(base)(base.__name__, (base,), namespace)


def _with_token_weight(signature: inspect.Signature) -> inspect.Signature:
    """`signature` with a keyword more, before any **kwargs."""
    parameters = [p for p in signature.parameters.values() if p.name != "token_weight"]
    last = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    added = inspect.Parameter("token_weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
    parameters.insert(len(parameters) - last, added)
    return signature.replace(parameters=parameters)


def _new(base: type[nn.Module]) -> nn.Module:
    """An empty attached model: where unpickling and copying begin."""
    cls = _attached_class(base)
    return cls.__new__(cls)


def _by_name(function: Any, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call as keywords."""
    signature = inspect.signature(function)
    named = dict(signature.bind(model, *args, **kwargs).arguments)
    del named["self"]
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def _training_forward(
    base: type[nn.Module], model: Any, settings: Settings, token_weight: Tensor | None, kwargs: dict[str, Any]
) -> Any:
    kwargs = dict(kwargs)
    labels = kwargs.pop("labels")
    shift_labels, num_items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
    return_dict = kwargs.pop("return_dict", None)
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    is_encoder_decoder = model.config.is_encoder_decoder
    check_call(kwargs, is_encoder_decoder, labels, shift_labels, token_weight, num_items)
    kwargs.setdefault("use_cache", False)  # without labels a model would fill a cache that nobody reads
    if is_encoder_decoder:
        given = (kwargs.get("decoder_input_ids"), kwargs.get("decoder_inputs_embeds"))
        if all(value is None for value in given):
            config = settings.family.read(model, "start", model.config)
            kwargs["decoder_input_ids"] = shift_right(labels, config, settings.ignore_index)
    with _head_keeps_its_input(settings.family.head(model)) as kept:
        output = base.forward(model, **kwargs, return_dict=True)
    (hidden,) = kept
    loss = caption_loss(model, settings, hidden, labels, shift_labels, token_weight, num_items)
    output = type(output)(**{**output, "loss": loss, "logits": None})
    return output if return_dict else output.to_tuple()


@contextmanager
def _head_keeps_its_input(head: nn.Module) -> Iterator[list[Tensor]]:
    """Meanwhile, `head(hidden)` appends `hidden` to the list and returns [..., 0]: logits of no word.

    An empty tensor and not `hidden` itself, because models go on to cap, scale and reshape what they take for logits.
    """
    kept: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden.new_empty(*hidden.shape[:-1], 0)

    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield kept
    finally:
        del head.forward
        if before is not None:
            head.forward = before
