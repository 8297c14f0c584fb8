"""What a training run is: plain values, checked when made, kept as JSON in every checkpoint."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any

from fastcap.errors import bad
from fastcap.objectives import OBJECTIVES, REINFORCED

from . import rl_settings

PRECISIONS = ("fp32", "bf16", "fp16")
TOKENIZERS = ("words", "wordpiece")
ATTENTIONS = ("soft", "hard", "mean")
VARIANTS = ("original", "tutorial")
DISTILLING = ("visual_distilling", "attribute_distilling", "local_distilling")  # of glied; base has none
ATTRIBUTES = ("predicted", "given")
COVERAGE_REDUCTIONS = ("mean", "batchmean", "sum", "theano")
CONTRASTIVES = ("symmetric", "decoupled")
MOST_MEMORY = 2**30  # MB: a petabyte, and as bytes still an int64

# What may change when a run is resumed: nothing here changes the weights that come out.
# (`data` and `features` may have moved; that the data are as many as they were is checked.)
FREE_ON_RESUME = (
    "data",
    "features",
    "reward_clip",
    "out",
    "device",
    "workers",
    "validate_every",
    "validate_batches",
    "samples_every",
    "on_collapse",
    "checkpoint_every",
    "keep",
)

# What comes with the weights and the tokenizer of a checkpoint: a run that starts from one does not choose it again.
FROM_CHECKPOINT = (
    "model",
    "pretrained",
    "prompt",
    "encoder",
    "width",
    "attention_width",
    "embed_width",
    "text_layers",
    "attention",
    "variant",
    "heads",
    *DISTILLING,
    "attributes",
    "num_attributes",
    "attribute_vocab",
    "dropout",
    "image_size",
    "tokenizer",
    "min_count",
    "vocab_size",
    "max_length",
)


def _option(default: Any, help: str, panel: str) -> Any:
    """A field that `fastcap train` offers as an option, with its help and the heading that it stands under."""
    return dataclasses.field(default=default, metadata={"help": help, "panel": panel})


@dataclass(frozen=True)
class TrainConfig:
    """A training run; `data` and `out` must be given.

    `batch_size` is the number of captions of one optimiser step, whatever `accumulate` is: `accumulate` says in how
    many parts the step is computed, and so how much memory it takes, not what it computes (but dropout, hard attention and
    scheduled sampling draw other numbers for other parts). A run with `init_from` takes the settings named in
    `FROM_CHECKPOINT` from there. What is None here is filled in when the run begins, by the model's
    recipe (`recipes.RECIPES`); the run's own configuration, in its result and checkpoints, has it filled in.
    """

    data: str = _option("", "folder with a Karpathy-format dataset_*.json and its pictures", "Run")
    features: str | None = _option(
        None, "features of the pictures' regions, in their place: HDF5, npz or a folder, as fastcap.data reads them", "Run"
    )
    out: str = _option("", "folder of the run: checkpoints and logs", "Run")
    objective: str = _option(
        "mle", "mle, smile, smile+mle, resmile; or by reward: wtf-rl, by a CLIP; scst or new-scst, self-critical", "Run"
    )
    mle_weight: float | None = _option(None, "share of MLE in smile+mle, where it is 0.01 unless given", "Run")
    init_from: str | None = _option(None, "checkpoint or run whose model and tokenizer to start from", "Run")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...", "Run")
    precision: str = _option("fp32", "fp32, bf16 or fp16 (GPU only)", "Run")
    seed: int = _option(0, "of weights, order and dropout", "Run")
    workers: int = _option(0, "processes that load pictures; 0 loads in this one", "Run")

    model: str = _option(
        "show-attend-tell", "show-attend-tell, show-and-tell, glied, its base, blip, or clip: no captioner", "Model"
    )
    pretrained: str | None = _option(
        None,
        "of blip: transformers checkpoint to start from, a folder or a hub name; none: a small model with random weights. "
        "If not given: the standard one where it is in the local cache, else none",
        "Model",
    )
    encoder: str | None = _option(
        None, "conv; vgg16, or vgg16:FILE of weights; or a transformers vision model by name or folder", "Model"
    )
    width: int | None = _option(None, "of word embeddings and hidden layers", "Model")
    attention_width: int | None = _option(None, "of the attention's hidden layer", "Model")
    dropout: float | None = _option(
        None, "before the last layer; of glied and base, after attention; of blip, everywhere in the decoder", "Model"
    )
    image_size: int | None = _option(None, "side of the pictures, in pixels", "Model")
    attention: str | None = _option(
        None, "soft; hard, trained by REINFORCE; or mean, all locations alike: what attention is worth", "Model"
    )
    variant: str | None = _option(
        None, "of show-attend-tell: original (tanh, scalar gate, deep output) or tutorial (relu, vector gate)", "Model"
    )
    heads: int | None = _option(None, "of each attention of glied and base, whose width is a multiple of it", "Model")
    visual_distilling: bool | None = _option(None, "regions first attend to each other", "Model")
    attribute_distilling: bool | None = _option(None, "words first attend to the attributes", "Model")
    local_distilling: bool | None = _option(None, "regions and attributes are attended to once more at the end", "Model")
    attributes: str | None = _option(
        None, "words of an image: predicted from its regions, or given as `attributes` in the data", "Model"
    )
    num_attributes: int | None = _option(None, "words kept of an image, the most probable ones", "Model")
    attribute_vocab: int | None = _option(None, "most frequent content words of the captions, to predict from", "Model")
    prompt: str | None = _option(None, "text that every caption begins with: given, not learnt, not printed", "Model")

    tokenizer: str | None = _option(None, "words or wordpiece", "Words")
    min_count: int | None = _option(None, "words seen less often become unknown (words)", "Words")
    vocab_size: int | None = _option(None, "tokens at most (wordpiece)", "Words")
    max_length: int = _option(30, "words or pieces of a caption; the rest is cut", "Words")

    steps: int = _option(2000, "optimiser steps", "Optimiser")
    batch_size: int = _option(64, "captions a step", "Optimiser")
    accumulate: int = _option(1, "parts in which a step is computed: less memory, same result", "Optimiser")
    memory_budget: float = _option(256.0, "MB of scratch for losses over the whole vocabulary", "Optimiser")
    lr: float | None = _option(
        None, "highest learning rate of AdamW; by wtf-rl 3e-4, self-critical 1e-4, of blip 1e-6", "Optimiser"
    )
    warmup: int | None = _option(None, "steps of linear rise, before half a cosine", "Optimiser")
    weight_decay: float | None = _option(None, "of matrices, not of vectors", "Optimiser")
    clip: float = _option(5.0, "largest norm of the gradient", "Optimiser")
    mle_steps: int = _option(0, "of an objective by reward: the first of the steps, which are by mle", "Optimiser")
    mle_lr: float | None = _option(None, "highest learning rate of those; mle's own if not given", "Optimiser")
    mle_warmup: int | None = _option(None, "steps of linear rise of those, before half a cosine", "Optimiser")
    label_smoothing: float | None = _option(None, "of mle, over the vocabulary; the other objectives have none", "Optimiser")

    coverage: float = _option(
        0.0, "weight of the doubly stochastic penalty, which spreads attention; 1 suits the reduction mean", "Attention"
    )
    coverage_reduction: str = _option(
        "mean", "of that penalty: mean over captions and locations, batchmean over captions, sum, or theano", "Attention"
    )
    coverage_target: str = _option(
        "1", "what a location's attention should sum to: a number, or length: a caption's words over locations", "Attention"
    )
    scheduled_sampling: float = _option(
        0.0, "probability that a word to go on from is the model's own, not the reference's", "Attention"
    )

    contrastive: str | None = _option(
        None, "loss of pairs among others: symmetric, CLIP's cross-entropies, or decoupled, without the pair below", "CLIP"
    )
    embed_width: int | None = _option(None, "of the embeddings", "CLIP")
    text_layers: int | None = _option(None, "of the transformer that reads texts", "CLIP")

    rewards: str = _option(
        "cider-d",
        "of scst and new-scst, a weighted sum of cider-d, bleu-4 and similarity, the cosine by --reward-clip: such as "
        "cider-d=1,bleu-4=0.5",
        "Reinforcement",
    )
    df: str | None = _option(
        None,
        "document frequencies of cider-d, a file of CiderD.save; those of the training captions if not given",
        "Reinforcement",
    )
    reward_clip: str | None = _option(
        None, "the CLIP that rewards: a run of --model clip, or a transformers CLIP by name or folder", "Reinforcement"
    )
    reward_baseline: str = _option(
        "two-way",
        "what is subtracted from the similarity: two-way, or one-way (image to text), the decoupled contrastive baselines; "
        "similar, that to similar images; greedy, that of the greedy caption; or none",
        "Reinforcement",
    )
    reward_scale: float | None = _option(None, "inverse temperature of those; the CLIP's own if not given", "Reinforcement")
    reward_exclude: str = _option(
        "self", "self: other captions of an image are among the others; group: they are not", "Reinforcement"
    )
    neighbours: int = _option(2, "images most similar to each of the batch that join it as others", "Reinforcement")
    alpha: float = _option(0.94, "share of the similarity; the rest is the discriminator's", "Reinforcement")
    discriminator_lr: float = _option(7e-5, "of the discriminator's Adam", "Reinforcement")
    gt_weight: str = _option(
        "clamp0", "of the data's captions, by reward: clamp0, if it is above 0; centered at 0; raw; or none", "Reinforcement"
    )
    policy: str = _option("sample", "which captions to reward: sample, or beam, the best of a beam", "Reinforcement")
    samples: int | None = _option(None, "captions drawn of each image; if not given, 5 by new-scst, else 1", "Reinforcement")
    temperature: float = _option(1.0, "of the draws; the gradient is that of 1", "Reinforcement")
    beam_size: int = _option(5, "of policy beam", "Reinforcement")
    on_collapse: str = _option(
        "stop", "of captions that are all alike, empty or apart, or of equal rewards: stop, or go-on", "Reinforcement"
    )

    validate_every: int = _option(250, "steps between validations; 0 for none", "Logs and checkpoints")
    validate_batches: int = _option(20, "batches of a validation", "Logs and checkpoints")
    samples_every: int = _option(25, "by reward: steps between lines of samples.jsonl; 0 for none", "Logs and checkpoints")
    checkpoint_every: int = _option(500, "steps between checkpoints; the last has one", "Logs and checkpoints")
    keep: int = _option(2, "newest checkpoints to keep", "Logs and checkpoints")

    def __post_init__(self) -> None:
        from fastcap.models import MODELS

        for name, kind in typing.get_type_hints(TrainConfig).items():
            value, kinds = getattr(self, name), typing.get_args(kind) or (kind,)
            wanted = (*kinds, int) if float in kinds else kinds
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in kinds):
                kind_name = {int: "an integer", float: "a number", bool: "True or False"}.get(kinds[0], "a string")
                raise bad("train", name, f"be {kind_name}", value, f"pass {kind_name}")
        self.one_of("model", (*MODELS, "base"))
        self.one_of("objective", (*OBJECTIVES, *REINFORCED))
        self.one_of("precision", PRECISIONS)
        self.one_of("tokenizer", TOKENIZERS)
        self.one_of("attention", ATTENTIONS)
        self.one_of("variant", VARIANTS)
        self.one_of("attributes", ATTRIBUTES)
        self.one_of("contrastive", CONTRASTIVES)
        self.one_of("coverage_reduction", COVERAGE_REDUCTIONS)
        self._check_coverage_target()
        rl_settings.check(self)
        for name in ("data", "out", "encoder", "device", "pretrained", "features", "df", "reward_clip"):
            if getattr(self, name) == "":
                raise bad("train", name, "not be empty", getattr(self, name), f"pass --{name.replace('_', '-')}")
        for name in ("width", "attention_width", "embed_width", "text_layers", "image_size", "min_count", "max_length"):
            self.at_least(name, 1)
        for name in ("heads", "num_attributes", "attribute_vocab"):
            self.at_least(name, 1)
        for name in ("steps", "batch_size", "accumulate", "validate_batches", "keep"):
            self.at_least(name, 1)
        for name in ("warmup", "mle_warmup", "weight_decay", "seed", "workers", "validate_every", "checkpoint_every"):
            self.at_least(name, 0)
        self.at_least("vocab_size", 5)
        if self.seed >= 2**63:
            raise bad("train", "seed", "be less than 2**63", self.seed, "pass seed=0")
        for name, usual in (("lr", 0.002), ("mle_lr", 0.002), ("clip", 5.0)):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise bad("train", name, "be positive and finite", getattr(self, name), f"pass {name}={usual}")
        for name in ("dropout", "mle_weight", "label_smoothing"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise bad("train", name, "be in [0, 1)", getattr(self, name), f"pass a share such as {name}=0.1")
        if not 0 <= self.coverage < float("inf"):
            raise bad("train", "coverage", "be at least 0 and finite", self.coverage, "pass coverage=1.0, or 0 for none")
        if not 0 <= self.scheduled_sampling <= 1:
            remedy = "pass scheduled_sampling=0.25, or 0 for the captions' own words"
            raise bad("train", "scheduled_sampling", "be in [0, 1]", self.scheduled_sampling, remedy)
        if not 0 <= self.memory_budget <= MOST_MEMORY:
            remedy = "pass memory_budget=256, or 0 for the smallest blocks"
            raise bad("train", "memory_budget", f"be in [0, {MOST_MEMORY}] MB", self.memory_budget, remedy)
        if self.accumulate > self.batch_size:
            rule = f"be at most batch_size={self.batch_size}"
            raise bad("train", "accumulate", rule, self.accumulate, "pass a smaller number")

    def one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in (*choices, None):
            rule = f"be one of {', '.join(map(repr, choices))}"
            raise bad("train", name, rule, getattr(self, name), f"pass {name}={choices[0]!r}")

    def _check_coverage_target(self) -> None:
        try:
            sound = self.coverage_target == "length" or math.isfinite(float(self.coverage_target))
        except ValueError:
            sound = False
        if not sound:
            rule, remedy = "be a finite number or 'length'", "pass coverage_target='1'"
            raise bad("train", "coverage_target", rule, self.coverage_target, remedy)

    def at_least(self, name: str, least: int) -> None:
        if getattr(self, name) is not None and not getattr(self, name) >= least:
            raise bad("train", name, f"be at least {least}", getattr(self, name), f"pass {name}={least} or more")

    def as_likelihood(self) -> TrainConfig:
        """The run that the first `mle_steps` steps of this one are."""
        usual = rl_settings.usual(self)
        return dataclasses.replace(self, objective="mle", mle_steps=0, mle_lr=None, mle_warmup=None, **usual)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def differences(self, other: TrainConfig) -> list[str]:
        """The names of the settings that differ and that a resumed run must keep."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [name for name in mine if mine[name] != theirs[name] and name not in FREE_ON_RESUME]

    def with_model_of(self, other: TrainConfig) -> TrainConfig:
        """This run, with the model and the tokenizer's settings of another."""
        return dataclasses.replace(self, **{name: getattr(other, name) for name in FROM_CHECKPOINT})

    def open_settings_of(self, other: TrainConfig) -> TrainConfig:
        """This run, with another's values where it leaves a setting open."""
        theirs = {name: value for name, value in other.to_dict().items() if getattr(self, name) is None}
        return dataclasses.replace(self, **theirs)
