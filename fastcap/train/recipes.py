"""What a run takes where the user has not said otherwise: the settings whose default depends on the model.

A setting of `TrainConfig` that stands in this table is None until `complete` fills it in, so that one look at a run's
configuration tells what ran. A row that does not name a setting has no such setting: giving it is an error.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from fastcap.errors import bad
from fastcap.objectives import OBJECTIVES, REINFORCED, SELF_CRITICAL

from .config import DISTILLING, FROM_CHECKPOINT, TrainConfig
from .rl_settings import SAMPLES

NO_CHECKPOINT = "none"  # the value of `pretrained` that asks for random weights
INSTALL = "run: pip install 'fastcap[train]'"
AS_TRAINED = "as trained"  # the checkpoint's own value

# A clip's encoder "conv", with half a captioner's channels: a third of its time, and nearly what it learns in as many steps.
CLIP_CONV = {"width": 128, "channels": [16, 32, 64]}

# Of GLIED and its Base on small pictures. Published on COCO: width 512, 8 heads, 49 of 1,000 attributes.
_GLIED = {
    "encoder": "conv",
    "width": 128,
    "heads": 4,
    "attributes": "predicted",
    "num_attributes": 12,
    "attribute_vocab": 1000,
    "dropout": 0.1,
    "image_size": 48,
    "tokenizer": "words",
    "min_count": 1,
    "vocab_size": 8000,
    "lr": 2e-3,
    "warmup": 200,
    "weight_decay": 0.01,
    "label_smoothing": 0.0,
}

RECIPES: dict[str, dict[str, Any]] = {
    "show-attend-tell": {
        "encoder": "conv",
        "width": 256,
        "attention_width": 128,
        "attention": "soft",
        "variant": "original",
        "dropout": 0.2,
        "image_size": 48,
        "tokenizer": "words",
        "min_count": 1,
        "vocab_size": 8000,
        "lr": 2e-3,
        "warmup": 100,
        "weight_decay": 0.01,
        "label_smoothing": 0.0,
    },
    "show-and-tell": {
        "encoder": "conv",
        "width": 256,
        "dropout": 0.2,
        "image_size": 48,
        "tokenizer": "words",
        "min_count": 1,
        "vocab_size": 8000,
        "lr": 2e-3,
        "warmup": 100,
        "weight_decay": 0.01,
        "label_smoothing": 0.0,
    },
    "glied": {**_GLIED, **dict.fromkeys(DISTILLING, True)},
    "base": {**_GLIED, **dict.fromkeys(DISTILLING, False)},
    # Fine-tuning as BLIP's authors do it. What is not here comes with the checkpoint.
    "blip": {
        "image_size": AS_TRAINED,
        "prompt": "a picture of",
        "lr": 1e-5,
        "warmup": 0,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
    },
    # Where there is no checkpoint: a small BLIP, which learns from random weights on small pictures.
    "small blip": {
        "width": 128,
        "dropout": 0.0,
        "image_size": 48,
        "tokenizer": "words",
        "min_count": 1,
        "vocab_size": 8000,
        "prompt": "a picture of",
        "lr": 2e-3,
        "warmup": 100,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
    },
    "clip": {
        "encoder": "conv",
        "width": 128,
        "embed_width": 256,
        "text_layers": 1,
        "dropout": 0.0,
        "image_size": 48,
        "tokenizer": "words",
        "min_count": 1,
        "vocab_size": 8000,
        "lr": 2e-3,
        "warmup": 100,
        "weight_decay": 0.05,
        "contrastive": "symmetric",
    },
}
# In place of those by reinforcement, which begins where likelihood ended. On scenes 1e-3 soon rambles.
REINFORCED_LR = {
    "show-attend-tell": 3e-4,
    "show-and-tell": 3e-4,
    "glied": 3e-4,
    "base": 3e-4,
    "small blip": 3e-4,
    "blip": 1e-6,
}
# Self-critical ones: on scenes, after 2,500 steps of MLE, 3e-4 earned no more in 120 steps, and said less that is true.
SELF_CRITICAL_LR = {row: min(lr, 1e-4) for row, lr in REINFORCED_LR.items()}
REINFORCED_WARMUP = 10
SETTINGS = tuple(dict.fromkeys(name for recipe in RECIPES.values() for name in recipe))


def complete(config: TrainConfig) -> TrainConfig:
    """`config` with every setting that it leaves open filled in by its recipe.

    A `blip` for which no checkpoint was named starts from the standard one if it is in the local cache, else from none.
    Label smoothing is MLE's, also that of the first steps of a run by reward: with another objective it is 0. The weight of
    MLE is smile+mle's: with another there is none.

    Raises:
        FastcapError: a setting was given that the model does not have, or the named checkpoint cannot be reached.
    """
    pretrained = config.pretrained
    if config.model != "blip":
        if pretrained:
            raise bad("train", "pretrained", f"be left out with {config.model}", pretrained, "or pass --model blip")
    elif importlib.util.find_spec("transformers") is None:
        raise bad("train", "model", "be show-attend-tell where transformers is missing", "blip", INSTALL)
    elif pretrained is None:
        pretrained = _standard()
    elif pretrained != NO_CHECKPOINT and _is_run(pretrained):
        remedy = f"that is a run of fastcap: pass --init-from {pretrained}, without --model and --pretrained"
        raise bad("train", "pretrained", "be a checkpoint of transformers", pretrained, remedy)
    row = row_of(config.model, pretrained)
    if config.objective in REINFORCED and config.samples is None:
        config = dataclasses.replace(config, samples=SAMPLES[config.objective])
    recipe, given = _recipe(row, config), {name: value for name, value in config.to_dict().items() if value is not None}
    for name in SETTINGS:
        brought = config.init_from and name in FROM_CHECKPOINT  # from a checkpoint, where the user cannot choose it
        if name in given and name not in recipe and not brought:
            of = "blip from a checkpoint" if row == "blip" else config.model
            raise bad("train", name, f"be left out with {of}", given[name], "that model has no such setting to choose")
    _check_features(config, recipe)
    _check_clip(config)
    smooths = config.objective == "mle" or config.mle_steps > 0
    if config.label_smoothing and not smooths:
        remedy = "leave it out: a smoothed SMILE would reward every word of its caption in every place"
        if config.objective in REINFORCED:
            remedy = "leave it out: it belongs to the likelihood, with which the captioner was trained before"
        rule = f"be 0 with objective {config.objective}"
        raise bad("train", "label_smoothing", rule, config.label_smoothing, remedy)
    if config.mle_weight and config.objective != "smile+mle":
        remedy = "leave it out, or pass --objective smile+mle"
        raise bad("train", "mle_weight", f"be 0 with objective {config.objective}", config.mle_weight, remedy)
    filled = {name: value for name, value in recipe.items() if name not in given}
    if not smooths:
        filled["label_smoothing"] = 0.0
    if config.objective == "smile+mle" and config.mle_weight is None:
        filled["mle_weight"] = OBJECTIVES[config.objective]["mle_weight"]
    if config.features:
        filled.pop("encoder", None)  # the features' own
    _check_attention(config, {**filled, **given}.get("attention"))
    if {**filled, **given}.get("attributes") == "given":
        _check_given_attributes(config, given)
        filled = {name: value for name, value in filled.items() if name not in ("num_attributes", "attribute_vocab")}
    if filled.get("image_size") == AS_TRAINED:
        from fastcap.models.pretrained import image_size

        filled["image_size"] = image_size(pretrained)
    return dataclasses.replace(config, pretrained=pretrained, **filled)


def _recipe(row: str, config: TrainConfig) -> dict[str, Any]:
    if config.objective not in REINFORCED or row not in REINFORCED_LR:
        return RECIPES[row]
    rates = SELF_CRITICAL_LR if config.objective in SELF_CRITICAL else REINFORCED_LR
    recipe = {**RECIPES[row], "lr": rates[row], "warmup": REINFORCED_WARMUP}
    if config.mle_steps:
        recipe |= {"mle_lr": RECIPES[row]["lr"], "mle_warmup": RECIPES[row]["warmup"]}
    return recipe


def _check_features(config: TrainConfig, recipe: dict[str, Any]) -> None:
    if config.features and "encoder" not in recipe:
        remedy = "or pass --model show-attend-tell"
        raise bad("train", "features", f"be left out with {config.model}", config.features, remedy)
    if config.features and config.encoder and not config.init_from:
        remedy = "the features come from an encoder that ran before"
        raise bad("train", "encoder", "be left out with features", config.encoder, remedy)


def _check_clip(config: TrainConfig) -> None:
    if config.model == "clip" and config.objective in REINFORCED and config.init_from:
        rule = f"be a captioner's run with objective {config.objective}"
        raise bad("train", "init_from", rule, f"{config.init_from}, a clip", "a clip rewards: pass it as --reward-clip")
    if config.model == "clip" and config.batch_size < 2:
        remedy = "pass --batch-size 128: the pairs of a batch are compared with each other"
        raise bad("train", "batch_size", "be at least 2 with clip", config.batch_size, remedy)
    unused = (
        ("objective", "a clip's loss is chosen by --contrastive"),
        ("memory_budget", "its loss needs none"),
        ("features", "it embeds pictures"),
    )
    for name, remedy in unused:
        usual = TrainConfig.__dataclass_fields__[name].default
        if config.model == "clip" and getattr(config, name) != usual:
            raise bad("train", name, "be left out with clip", getattr(config, name), remedy)


def _check_attention(config: TrainConfig, attention: str | None) -> None:
    """`attention` is that of the run; None where the model has none to choose."""
    if config.coverage and attention in (None, "mean") and config.model not in ("glied", "base"):
        of, remedy = config.model, "or pass --model show-attend-tell"
        if attention:
            of, remedy = (
                "mean attention, which it cannot change",
                "leave it out, or train soft attention",
            )
        raise bad("train", "coverage", f"be 0 with {of}", config.coverage, remedy)
    if config.scheduled_sampling and attention is None:
        remedy = "or pass --model show-attend-tell"
        raise bad("train", "scheduled_sampling", f"be 0 with {config.model}", config.scheduled_sampling, remedy)


def _check_given_attributes(config: TrainConfig, given: dict[str, Any]) -> None:
    for name in ("num_attributes", "attribute_vocab"):
        if name in given and not config.init_from:
            remedy = "the data have their own; or pass --attributes predicted"
            raise bad("train", name, "be left out with attributes 'given'", given[name], remedy)


def row_of(model: str, pretrained: str | None) -> str:
    """The row of `RECIPES` that a model takes."""
    return "small blip" if model == "blip" and pretrained == NO_CHECKPOINT else model


def shown_default(name: str) -> str:
    """What the help says of a setting's default: one value, or one for each recipe that has another."""
    values = {row: recipe[name] for row, recipe in RECIPES.items() if name in recipe}
    alike: dict[Any, list[str]] = {}
    for row, value in values.items():
        alike.setdefault(value, []).append(row)
    if len(alike) == 1 and len(values) == len(RECIPES):
        return str(next(iter(alike)))
    return "; ".join(f"{', '.join(rows)}: {value}" for value, rows in alike.items())


def _is_run(folder: str) -> bool:
    from . import checkpoint

    return checkpoint.last_of(folder) is not None or (Path(folder) / "trainer.json").is_file()


def _standard() -> str:
    from fastcap.models.pretrained import STANDARD, is_cached

    return STANDARD if is_cached(STANDARD) else NO_CHECKPOINT
