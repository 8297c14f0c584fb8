"""The training loop: one object, `Trainer`, and `train`, which makes and runs one.

A run is a function of its configuration and its data: step s trains on batch s of a permutation that depends on the
seed and the epoch alone, its learning rate and objective depend on s alone, and a checkpoint keeps every random
generator. So a run that is interrupted and resumed ends, on the CPU, with the same weights bit for bit as one that is not.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcap import data, models
from fastcap.errors import FastcapError, bad
from fastcap.models.pretrained import STANDARD
from fastcap.objectives import REINFORCED

from . import checkpoint, clip_loss, setup
from .config import TrainConfig
from .logs import JsonLog, Progress, Record, TensorBoardLog
from .objectives import IGNORE, LossFunction, TrainingLoss, make_loss
from .recipes import NO_CHECKPOINT

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `loss` at its last step, `val_loss` and `val_mle` at its last validation, on `validation`.

    Of a CLIP `val_mle` is None, and `retrieval` says of how many `images` and how well it found them: what
    `fastcap.eval.retrieval` measures."""

    model: nn.Module
    tokenizer: Any
    config: TrainConfig
    checkpoint: Path
    step: int
    loss: float
    val_loss: float | None
    val_mle: float | None
    validation: Any | None
    seconds: float
    interrupted: bool
    retrieval: dict[str, float] | None = None


Callback = Callable[["Trainer", Record], None]


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    loss_fn: LossFunction | None = None,
    embedder: Any | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> TrainResult:
    """Trains a captioning model and returns it, in evaluation mode, with its tokenizer and its last checkpoint.

    Args:
        config: the run.
        resume: go on from the last checkpoint in `config.out`, whose configuration must be this one.
        loss_fn: in place of the objective's loss: `loss_fn(logits [B, T, V], target [B, T])` -> the mean over the
            tokens that are not -100, a scalar. Without it the loss is fused with the model's head: SMILE makes no logits but
            the first words' [B, V]; MLE, smile+mle and resmile keep the gradient of all [B * T, V] where it fits
            `config.memory_budget`, else make them in blocks.
        embedder: in place of `config.reward_clip`: the CLIP that rewards, an object as `fastcap.train.embedders` makes them.
        callbacks: each is called after each step as `callback(trainer, record)`; `trainer.stop()` ends the run there,
            with a checkpoint.
        progress: write the progress to stderr.

    Raises:
        FastcapError: an argument is wrong, `config.out` holds another run, the loss or a part of the reward is no longer
            finite, or the captions or their rewards have been all the same for 20 steps.

    Ctrl-C and SIGTERM end the run after the step that is under way, with a checkpoint; the result then says
    `interrupted`.
    """
    options = {"loss_fn": loss_fn, "embedder": embedder, "callbacks": callbacks, "progress": progress}
    trainer = Trainer(config, resume=resume, **options)
    return trainer.run()


class Trainer:
    """The state of a run: `config`, `model`, `tokenizer`, `optimizer`, `step` (steps done) and `out`."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = False,
        loss_fn: LossFunction | None = None,
        embedder: Any | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> None:
        self.config, last = setup.resolve(config, resume)
        config = self.config
        self.out = Path(config.out)
        self.device = setup.find_device(config.device)
        setup.check_precision(config.precision, self.device)
        setup.set_seed(config.seed)
        self._pairs, self._validation = setup.load_data(config)
        if last is None:
            self.tokenizer, self.model = setup.make_parts(config, self._pairs)
        else:
            self.tokenizer, self.model = models.load_tokenizer(last), models.load(last)
            setup.check_features(config, self.model)
        self.model.to(self.device)
        self.optimizer = setup.make_optimizer(config, self.model)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        if config.model == "clip":
            clip_loss.check(config, loss_fn, embedder)
        elif loss_fn is None:
            self._read = self.model.hidden_states
            self._loss = self._mle = make_loss(config, self.model.head)
            if config.objective not in REINFORCED and (config.objective != "mle" or config.label_smoothing):
                self._mle = make_loss(replace(config, objective="mle", label_smoothing=0.0), self.model.head)
        else:
            self._read = lambda *inputs: self.model(*inputs)[0]
            self._loss, self._mle = loss_fn, _cross_entropy
        self._callbacks, self._show = tuple(callbacks), progress
        self._training = self._make_training(loss_fn, embedder, last)
        self._sampler = data.ShuffledBatches(
            len(self._pairs), config.batch_size, seed=config.seed, drop_last=len(self._pairs) >= config.batch_size
        )
        self._loader = setup.make_loader(config, self._pairs, self.tokenizer, self.device, self._sampler)
        self._validator = None
        if self._validation is not None:
            batches = setup.validation_sampler(config, self._validation)
            self._validator = setup.make_loader(config, self._validation, self.tokenizer, self.device, batches)
        self.step, self._seconds, self._stopped = 0, 0.0, ""
        self._last: dict[str, Any] = {"loss": math.nan, "val_loss": None, "val_mle": None}
        self._saved: Path | None = None
        if last is not None:
            self._restore(last)

    def run(self) -> TrainResult:
        """Trains from `step` to the end, or to the first interruption."""
        config = self.config
        self._progress = Progress(self.step, config.steps, self._show)
        self._introduce()
        logs = [JsonLog(self.out / "log.jsonl", self.step), TensorBoardLog(self.out / "tensorboard", self.step)]
        logs.append(self._progress)
        samples = JsonLog(self.out / "samples.jsonl", self.step) if self._reinforced and config.samples_every else None
        self._began = time.perf_counter()
        try:
            with setup.interrupts(self._interrupt):
                for epoch, batch in self._batches():
                    record = self._train_step(epoch, batch)
                    if self._due(config.validate_every):
                        record.update(self.validate())
                    self._last.update(record)
                    for log in logs:
                        log.write(record)
                    if samples is not None and self._due(config.samples_every) and (shown := self._training.samples()):
                        samples.write(shown)
                    for callback in self._callbacks:
                        callback(self, record)
                    if self._stopped or self._due(config.checkpoint_every) or self.step == config.steps:
                        self.save()
                    if self._stopped:
                        break
                    self._began = time.perf_counter()  # the speed counts the loading of a batch, not the validation
        finally:
            for log in [*logs, *([samples] if samples else [])]:
                log.close()
        return self._result()

    def stop(self, reason: str = "stop") -> None:
        """Ends the run, with a checkpoint, after the step that is under way."""
        self._stopped = reason

    def _interrupt(self, reason: str) -> None:
        self.stop(reason)
        self._progress.note(f"{reason}: finishing step {self.step + 1}, then saving; once more to stop without saving")

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def validate(self) -> dict[str, float]:
        """The objective (`val_loss`) and cross-entropy (`val_mle`) per token of the validation batches.

        By reward both are the cross-entropy, and `val_reward` is the mean reward of an image's greedy caption: by wtf-rl the
        two-way similarity, by the others CIDEr-D.
        """
        self.model.eval()
        if self.config.model == "clip":
            return self._training.validate(self._validator)
        sums, rewards = torch.zeros(3, dtype=torch.float64), []
        with torch.no_grad():
            for batch in self._validator:
                images, inputs, target, lengths = self._to_device(batch)
                with self._autocast():
                    read = self._read(images, inputs, lengths)
                    loss = self._loss(read, target)
                    mle = loss if self._mle is self._loss else self._mle(read, target)
                count = (target != IGNORE).sum().item()
                sums += torch.tensor([loss.item() * count, mle.item() * count, count], dtype=torch.float64)
                if self._reinforced and (found := self._training.validate(images, batch)) is not None:
                    rewards.append(found)
        val_loss, val_mle = (sums[:2] / sums[2]).tolist()
        found = {"val_loss": val_loss, "val_mle": val_mle}
        return {**found, "val_reward": torch.cat(rewards).mean().item()} if rewards else found

    def save(self) -> Path:
        """Writes a checkpoint of this moment; only between steps is it one to resume from."""
        state = {
            "step": self.step,
            "seconds": self._seconds,
            "last": self._last,
            "items": len(self._pairs),
            "scaler": self._scaler.state_dict(),
            "config": self.config.to_dict(),
        }
        parts, tensors = (self.model, self.tokenizer, self.optimizer), {}
        if self._reinforced:
            state["reinforced"], tensors = self._training.state()
        self._saved = checkpoint.save(self.out, *parts, state, self.config.keep, tensors)
        return self._saved

    def _restore(self, last: Path) -> None:
        state = checkpoint.read(last)
        if state["items"] != len(self._pairs):
            rule = f"hold the {state['items']} captions that the run began with"
            remedy = "restore the data, or start a new run with --init-from"
            raise bad("train", "data", rule, len(self._pairs), remedy)
        checkpoint.load_optimizer(last, self.model, self.optimizer)
        self._scaler.load_state_dict(state["scaler"])
        if self._reinforced:
            tensors = checkpoint.load_tensors(last, "discriminator") if self._training.keeps_tensors else {}
            self._training.load(state.get("reinforced", {}), tensors)
        self.step, self._seconds, self._last, self._saved = state["step"], state["seconds"], state["last"], last
        checkpoint.set_random_state(state["random"])

    def _batches(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(epoch, batch) of the steps that are left."""
        while self.step < self.config.steps:
            epoch, position = divmod(self.step, len(self._sampler))
            self._sampler.set_position(epoch, position)
            for batch in self._loader:
                yield epoch, batch
                if self.step == self.config.steps:
                    return

    def _train_step(self, epoch: int, batch: dict[str, Tensor]) -> Record:
        config = self.config
        self.model.train()
        if config.mle_steps and self.step == config.mle_steps:
            self.optimizer.state.clear()  # the likelihood's moments: `lr` means here what it means in a run of its own
        lr = setup.learning_rate(config, self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        tokens = [int((part != IGNORE).sum()) for part in batch["target"].chunk(config.accumulate)]
        moved = self._to_device(batch)
        self._training.begin(moved[0], batch, self.step + 1)
        for *part, count in zip(*(x.chunk(config.accumulate) for x in moved), tokens, strict=True):
            with self._autocast():
                loss = self._training.part(*part, count)
            self._scaler.scale(loss).backward()
        self._scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_((p for p in self.model.parameters() if p.requires_grad), config.clip)
        values = {**self._training.values(), "lr": lr, "grad_norm": norm.item()}
        self._check_finite(values)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        values.update(self._training.end())
        self.step += 1
        seconds = time.perf_counter() - self._began
        self._seconds += seconds
        speed = {"images_per_s": round(len(batch["target"]) / seconds, 1), "seconds": round(self._seconds, 3)}
        return {"step": self.step, "epoch": epoch, **values, **speed}

    def _check_finite(self, values: dict[str, float]) -> None:
        scaled = self._scaler.is_enabled()  # then a gradient that overflows skips its step and lowers the scale
        for name in ("loss",) if scaled else ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                kept = f"; the last checkpoint is {self._saved}" if self._saved else ""
                precision = "" if self.config.precision == "fp32" else ", or --precision fp32"
                remedy = f"lower --lr (it was {values['lr']:.2g}), raise --warmup, lower --clip{precision}{kept}"
                raise bad("train", f"{name} of step {self.step + 1}", "be finite", values[name], remedy)

    def _make_training(self, loss_fn: LossFunction | None, embedder: Any | None, last: Path | None) -> Any:
        """What the steps minimise: `TrainingLoss`, or what `rl_warmup.make` makes of an objective by reward."""
        config, self._reinforced = self.config, self.config.objective in REINFORCED
        if config.model == "clip":
            return clip_loss.ClipLoss(config, self.model, self.device, self._autocast)
        if not self._reinforced:
            if embedder is not None:
                remedy = "or pass objective='wtf-rl', or scst with rewards='similarity'"
                raise bad("train", "embedder", f"be left out with objective {config.objective}", embedder, remedy)
            return TrainingLoss(config, self.model, loss_fn)
        from . import rl_warmup

        kept = None if last is None else checkpoint.read(last).get("reinforced", {})
        given = ((self._pairs, self._validation), self.out, self.device, self._autocast, self._note)
        return rl_warmup.make(config, self.model, self.tokenizer, embedder, loss_fn, kept, *given)

    def _note(self, text: str) -> None:
        """What is said before the progress begins."""
        if self._show:
            print(text, file=sys.stderr, flush=True)

    def _to_device(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """images, inputs, target, and lengths, which stay: the model reads them to plan its steps."""
        moved = (batch[name].to(self.device, non_blocking=True) for name in ("images", "inputs", "target"))
        return (*moved, batch["lengths"])

    def _autocast(self) -> torch.autocast:
        precision = self.config.precision
        return torch.autocast(self.device.type, _AUTOCAST[precision], enabled=precision != "fp32")

    def _introduce(self) -> None:
        config, millions = self.config, sum(p.numel() for p in self.model.parameters()) / 1e6
        self._progress.note(
            f"{config.model}: {millions:.1f} M parameters, {self.tokenizer.vocab_size} words; "
            f"{len(self._pairs)} captions, {len(self._sampler)} steps an epoch; "
            f"{config.contrastive or config.objective}, {config.precision} on {self.device}"
        )
        if config.model == "blip" and config.pretrained == NO_CHECKPOINT:
            self._progress.note(
                "a small blip with random weights, which knows nothing but this data; "
                f"to start from a checkpoint: --pretrained NAME, such as {STANDARD}"
            )
        if self.step:
            self._progress.note(f"resumed at step {self.step} of {config.steps}")
        longest = config.max_length
        cut = sum(len(ids) > longest for ids in self.tokenizer.encode_batch(self._pairs.captions()))
        if cut:
            self._progress.note(f"cut {cut} captions after {longest} tokens (--max-length)")
        attributes = setup.attribute_note(config, self._pairs, self.tokenizer, self.model)
        if attributes:
            self._progress.note(attributes)
        skipped = self._pairs.skipped
        if skipped:
            path, reason = skipped[0]
            self._progress.note(f"skipped {len(skipped)} images or captions of the data, the first: {path} ({reason})")

    def _result(self) -> TrainResult:
        if self._saved is None:
            raise FastcapError("fastcap.train: the run ended before its first step")
        return TrainResult(
            model=self.model.eval(),
            tokenizer=self.tokenizer,
            config=self.config,
            checkpoint=self._saved,
            step=self.step,
            loss=self._last["loss"],
            val_loss=self._last["val_loss"],
            val_mle=self._last["val_mle"],
            retrieval=clip_loss.retrieval_of(self._last),
            validation=self._validation,
            seconds=self._seconds,
            interrupted=bool(self._stopped) and self.step < self.config.steps,
        )


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())
