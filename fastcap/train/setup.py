"""What a run needs before its first step: the device, the data, the tokenizer, the model, the optimiser."""

from __future__ import annotations

import math
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastcap import data, models
from fastcap.data.attributed import attribute_words, word_ids
from fastcap.errors import FastcapError, bad
from fastcap.models.attributes import content_words
from fastcap.models.show_attend_tell import VARIANTS

from . import checkpoint, recipes
from .config import DISTILLING, TrainConfig


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; torch built without it; no such GPU
        remedy = "pass --device auto, or cpu; fastcap doctor says what there is"
        raise bad("train", "device", "be one that torch can use here", name, remedy) from error
    return device


def check_precision(precision: str, device: torch.device) -> None:
    if precision == "fp16" and device.type != "cuda":
        raise bad("train", "precision", f"be 'fp32' or 'bf16' on {device.type}", precision, "pass --precision bf16")


def resolve(config: TrainConfig, resume: bool) -> tuple[TrainConfig, Path | None]:
    """The configuration to run, with nothing left open, and the checkpoint to go on from, after checking that `out` is
    free or fits."""
    if not resume:
        last = checkpoint.last_of(config.out)
        if last is not None:
            remedy = f"it holds a run at {last.name}: add --resume to go on with it, or name another folder"
            raise bad("train", "out", "be a new folder", config.out, remedy)
        if (Path(config.out) / "log.jsonl").exists():
            remedy = "it holds a run that ended before its first checkpoint: name another folder, or delete this one"
            raise bad("train", "out", "be a new folder", config.out, remedy)
        if config.init_from:
            config = config.with_model_of(checkpoint.read_config(checkpoint.find(config.init_from)))
        return recipes.complete(config), None
    last = checkpoint.to_resume(config.out)
    saved = checkpoint.read_config(last)
    if config.init_from:
        config = config.with_model_of(saved)
    config = config.open_settings_of(saved)
    for name in config.differences(saved):
        rule = f"stay {getattr(saved, name)!r}, as the run began"
        raise bad("train", name, rule, getattr(config, name), "leave it out, or start a new run with --init-from")
    return config, last


def load_data(config: TrainConfig) -> tuple[Any, Any | None]:
    """The (image, caption) pairs to train on, and those to validate on unless `validate_every` is 0."""
    options = {"image_size": config.image_size}
    if config.features:
        options["features"] = data.RegionFeatures(config.features)
    train, validation = data.KarpathyDataset(config.data, split="train", **options), None
    if config.validate_every:
        try:
            validation = data.KarpathyDataset(config.data, split="val", **options)
        except FastcapError as error:
            raise FastcapError(f"{error}; or train without validation: --validate-every 0") from error
    if config.attributes == "given":  # an image that lacks them is found now, not in the epoch's last batch
        for part in (train, validation):
            for record in [] if part is None else part.records:
                attribute_words(record)
    return train, validation


def make_parts(config: TrainConfig, dataset: Any) -> tuple[Any, nn.Module]:
    """The tokenizer and the model that a run begins with."""
    if config.init_from:
        folder = checkpoint.find(config.init_from)
        model = models.load(folder)
        check_features(config, model)
        return models.load_tokenizer(folder), model
    if config.model == "blip" and config.pretrained != recipes.NO_CHECKPOINT:
        model, tokenizer = models.load_blip(config.pretrained, prompt=config.prompt, image_size=config.image_size)
    else:
        tokenizer = _make_tokenizer(config, dataset)
        model = _make_model(config, tokenizer, dataset)
    longest = getattr(model, "longest", math.inf)
    if config.max_length >= longest:
        rule = f"be at most {longest - 1}, the positions that the prompt leaves"
        raise bad("train", "max_length", rule, config.max_length, f"pass --max-length {longest - 1}")
    return tokenizer, model


def check_features(config: TrainConfig, model: nn.Module) -> None:
    """That a model which is there already reads what the run gives it: features, or pictures."""
    reads = isinstance(getattr(model, "encoder", None), models.FeatureEncoder)
    if reads != bool(config.features):
        rule = "be given: the model reads features of regions" if reads else "be left out: the model reads pictures"
        raise bad("train", "features", rule, config.features, "give the run what the model was trained on")


def _make_tokenizer(config: TrainConfig, dataset: Any) -> Any:
    captions = dataset.captions()
    if config.prompt:  # so that its words are known
        captions = [*captions, *[config.prompt] * config.min_count]
    if config.tokenizer == "words":
        return data.CaptionTokenizer.train_words(captions, min_count=config.min_count)
    return data.CaptionTokenizer.train_wordpiece(captions, vocab_size=config.vocab_size)


def _make_model(config: TrainConfig, tokenizer: Any, dataset: Any) -> nn.Module:
    if config.model == "blip":
        prompt = tokenizer.encode(config.prompt)
        architecture = models.small_architecture(
            tokenizer.vocab_size,
            image_size=config.image_size,
            width=config.width,
            dropout=config.dropout,
            max_tokens=1 + len(prompt) + config.max_length,
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
        )
        return models.build("blip", architecture=architecture, prompt=prompt)
    encoder, options = config.encoder, {}
    if config.features:
        encoder = {"kind": "features", "width_in": dataset.features.width, "width": config.width}
    if config.model == "clip":
        options = {name: getattr(config, name) for name in ("image_size", "width", "embed_width", "text_layers", "dropout")}
        if encoder == "conv":
            encoder = {"kind": "conv", **recipes.CLIP_CONV}
        given = {"vocab_size": tokenizer.vocab_size, "encoder": encoder, "context": config.max_length + 1}
        return models.build("clip", **given, **options)
    if config.model in ("glied", "base"):
        return _make_glied(config, tokenizer, dataset, encoder)
    if config.model == "show-attend-tell":
        options = {"attention_width": config.attention_width, "attention": config.attention, **VARIANTS[config.variant]}
    return models.build(
        config.model,
        vocab_size=tokenizer.vocab_size,
        encoder=encoder,
        embed_width=config.width,
        hidden_width=config.width,
        dropout=config.dropout,
        **options,
    )


def _make_glied(config: TrainConfig, tokenizer: Any, dataset: Any, encoder: Any) -> nn.Module:
    if encoder == "conv":
        encoder = {"kind": "conv", "width": config.width}  # nothing to project
    options = {name: getattr(config, name) for name in ("width", "heads", "dropout", *DISTILLING)}
    if config.attributes == "predicted":
        found = content_words(dataset.captions(), config.attribute_vocab)
        ids = word_ids([word for word, _ in found], tokenizer)
        kept = [(id, share) for id, (_, share) in zip(ids, found, strict=True) if id is not None]
        if not kept:
            remedy = "lower --min-count, pass --tokenizer words, or --attributes given"
            got = f"none among {len(found)} content words" if found else "captions of stop words alone"
            raise bad("train", "attributes", "be words that the tokenizer has", got, remedy)
        options["attribute_ids"], options["attribute_shares"] = [id for id, _ in kept], [share for _, share in kept]
        options["num_attributes"] = config.num_attributes
    return models.build("glied", vocab_size=tokenizer.vocab_size, encoder=encoder, **options)


def attribute_note(config: TrainConfig, dataset: Any, tokenizer: Any, model: nn.Module) -> str:
    """What is said of a run's attribute words; nothing where its model has none, or knows all that are given."""
    if config.attributes == "predicted":
        predictor = model.predictor
        return f"attributes: the {predictor.keep} most probable of {len(predictor.ids)} words of the captions"
    if config.attributes is None:
        return ""
    given = Counter(word for record in dataset.records for word in record.get("attributes", []))
    unknown = [word for word, id in zip(given, word_ids(list(given), tokenizer), strict=True) if id is None]
    if not unknown:
        return ""
    times = sum(given[word] for word in unknown)
    return (
        f"left out {len(unknown)} of {len(given)} attribute words, which occur {times} times, as the tokenizer has no one "
        f"token for them, the first: {unknown[0]!r}"
    )


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW; biases and normalisations (vectors) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=trained[0].device.type in ("cpu", "cuda"))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 1, 2, ..., `steps`: a linear rise over `warmup` steps, then half a cosine that ends just above zero; of the
    first `mle_steps` likewise, with their own rate, and then once more."""
    first, lr, warmup, steps = 0, config.mle_lr, config.mle_warmup, config.mle_steps
    if step > config.mle_steps:
        first, lr, warmup, steps = config.mle_steps, config.lr, config.warmup, config.steps - config.mle_steps
    step -= first
    if step <= warmup:
        return lr * step / warmup
    done = (step - warmup - 1) / max(1, steps - warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * done))


def make_loader(config: TrainConfig, dataset: Dataset, tokenizer: Any, device: torch.device, sampler: Any) -> DataLoader:
    """Batches of `dataset` in the sampler's order."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=data.collate(tokenizer, config.max_length, attributes=config.attributes == "given"),
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        worker_init_fn=_ignore_interrupts,
        pin_memory=device.type == "cuda",
        # An iterator draws its workers' seed from the global generator unless it is given one; a resumed run makes
        # one iterator more than the run it continues, and its dropout would differ from there on.
        generator=torch.Generator().manual_seed(config.seed),
    )


def validation_sampler(config: TrainConfig, dataset: Dataset) -> list[list[int]]:
    """The same `validate_batches` batches each time, spread over the whole split; of a clip, as mixed as in training."""
    wanted = min(len(dataset), config.validate_batches * config.batch_size)
    chosen = [i * len(dataset) // wanted for i in range(wanted)]
    if config.model == "clip":
        random.Random(0).shuffle(chosen)
    return [chosen[i : i + config.batch_size] for i in range(0, wanted, config.batch_size)]


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of the group; the trainer still needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def interrupts(stop: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `stop`; a second one ends the program as usual."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        stop(signal.Signals(number).name)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
