"""`fastcap demo`: from pictures to a captioner trained with SMILE, and what the fused loss saves on the way.

1. Pictures with captions: emoji where a colour emoji font is installed, else generated scenes.
2. A captioner trained with MLE.
3. From there, SMILE twice from the same seed: with the paper's masked formulation, then with fastcap. Each loss is timed,
   forward and backward, inside the training itself; the losses are compared step by step.
4. Captions of test pictures by both captioners, their statistics, and ten pictures with both captions in one PNG.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastcap import data
from fastcap.errors import FastcapError, bad
from fastcap.eval import diversity
from fastcap.functional import subset_cross_entropy
from fastcap.memory import peak_extra

from .captioner import Captioner
from .config import TrainConfig
from .loop import TrainResult, train

# MLE steps, SMILE steps with fastcap, of which compared with the masked formulation, and test pictures; for 2 CPU cores.
# On emoji, 3,051 pictures with 8,345 captions, more MLE steps than these overfit. SMILE's learning rate is low: two runs
# whose sums are rounded differently drift apart, the faster the larger their steps.
PLANS = {"emoji": (300, 250, 60, 300), "scenes": (3500, 400, 60, 300)}
MARK = ".fastcap-demo"  # in the folders of runs that a demo made, and so may replace
SMILE_LR, SMILE_WARMUP = {"emoji": 1e-4, "scenes": 2e-4}, 50


def masked_smile(logits: Tensor, target: Tensor) -> Tensor:
    """SMILE as the paper's code writes it: fill what is not in the caption, then softmax over the whole vocabulary.

    The first valid word of a caption competes with the whole vocabulary, as in the authors' training.
    """
    B, T, V = logits.shape
    valid = target != -100
    words = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device)
    words.scatter_(1, target.masked_fill(~valid, V), True)
    allowed = words[:, None, :V].expand(B, T, V) | (valid & (valid.cumsum(1) == 1)).unsqueeze(-1)
    masked = logits.masked_fill(~allowed, float("-inf")).masked_fill(~valid.unsqueeze(-1), 0.0)
    return torch.nn.functional.cross_entropy(masked.flatten(0, 1), target.flatten())


class _TimedLoss:
    """A loss whose forward and backward run, timed, at once; the training's own backward takes that gradient."""

    def __init__(self, loss) -> None:
        self.loss, self.milliseconds, self.batch = loss, [], None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.loss(logits, target)
        leaf = logits.detach().requires_grad_()
        began = time.perf_counter()
        value = self.loss(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf)
        self.milliseconds.append((time.perf_counter() - began) * 1e3)
        self.batch = (leaf.detach(), target)
        return _Formed.apply(logits, value.detach(), gradient)

    def step(self) -> None:
        """Forward and backward once more, on the last batch: for the memory."""
        leaf = self.batch[0].requires_grad_()
        torch.autograd.grad(self.loss(leaf, self.batch[1]), leaf)


class _Formed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None


@dataclass
class Formulation:
    """One way to compute the loss: its value at each step, the time of each step's loss, and its peak extra memory."""

    losses: list[float] = field(default_factory=list)
    milliseconds: float = 0.0
    peak_bytes: int | None = None


@dataclass
class DemoResult:
    """What the demo measured; also written as `demo.json`."""

    dataset: str
    masked: Formulation
    fastcap: Formulation
    largest_difference: float
    scores: dict[str, dict[str, float]]
    captions: list[dict]
    seconds: float


def run(dataset: str = "auto", out: str | Path = "build/demo", *, seed: int = 0, scale: float = 1.0) -> DemoResult:
    """Runs the demo and prints what it finds.

    Args:
        dataset: "emoji", "scenes", or "auto": emoji where a colour emoji font is found.
        out: folder for data, runs, `demo.json`, `captions.png` and `losses.png`; a demo there is replaced.
        seed: of data, weights and order.
        scale: factor on the numbers of steps; below 1 is quicker, and the captions are worse.

    Raises:
        FastcapError: an argument is wrong, or no emoji font is found where "emoji" was asked for.
    """
    if dataset not in ("auto", *PLANS):
        raise bad("demo", "data", "be one of 'auto', 'emoji', 'scenes'", dataset, "pass auto")
    if not 0 < scale <= 100:
        raise bad("demo", "scale", "be in (0, 100]", scale, "pass 1")
    from . import demo_report as report

    began = time.perf_counter()
    out = Path(out)
    dataset = _choose(dataset)
    folder = out / dataset
    write = data.write_emoji if dataset == "emoji" else data.write_scenes
    summary = write(folder, seed=seed)
    report.say(f"{summary.images} pictures of {dataset}, {summary.captions} captions, in {folder}")

    mle_steps, smile_steps, compared, tested = (max(2, round(n * scale)) for n in PLANS[dataset])
    # On the CPU wherever it runs: there the two formulations' trainings are deterministic, and their memory can be seen.
    base = TrainConfig(
        device="cpu", data=str(folder), out=str(_fresh(out / "mle")), steps=mle_steps, seed=seed, precision="bf16",
        checkpoint_every=0,
    )  # fmt: skip
    report.title(f"1. MLE, {mle_steps} steps")
    mle = _unless_interrupted(train(base))

    smile = TrainConfig(
        device="cpu", data=str(folder), out=str(out / "smile"), objective="smile", steps=smile_steps, seed=seed,
        lr=SMILE_LR[dataset], warmup=SMILE_WARMUP, init_from=str(mle.checkpoint), validate_every=0, checkpoint_every=0,
    )  # fmt: skip
    report.title(f"2. SMILE from there, by the paper's masked formulation, {compared} steps")
    masked, _ = _formulation(smile, masked_smile, out / "smile-masked", stop_after=compared)
    report.title(f"3. The same with fastcap, same seed; on to {smile_steps} steps")
    ours, result = _formulation(smile, subset_cross_entropy, out / "smile")
    pairs = list(zip(masked.losses, ours.losses, strict=False))
    largest = max(abs(a - b) / abs(a) for a, b in pairs)

    report.title("4. Captions of test pictures")
    test = data.KarpathyDataset(folder, split="test", image_size=mle.config.image_size).images()
    chosen = [round(i * (len(test) - 1) / (min(tested, len(test)) - 1)) for i in range(min(tested, len(test)))]
    items = [test[i] for i in chosen]
    captions = {"MLE": _captions(mle, items), "SMILE": _captions(result, items)}
    scores = {name: _scores(dataset, found, items) for name, found in captions.items()}
    rows = [
        {"imgid": item["imgid"], "references": item["captions"], **{n: captions[n][i] for n in captions}}
        for i, item in enumerate(items)
    ]
    made = DemoResult(dataset, masked, ours, largest, scores, rows, time.perf_counter() - began)
    report.compare(made)
    report.draw_captions(out / "captions.png", items, rows)
    report.draw_losses(out / "losses.png", made)
    (out / "demo.json").write_text(json.dumps(asdict(made), indent=1))
    report.say(f"Pictures with both captions: {out / 'captions.png'}")
    report.say(f"Losses: {out / 'losses.png'}; all numbers and captions: {out / 'demo.json'}")
    return made


def _choose(dataset: str) -> str:
    if dataset != "auto":
        return dataset
    from fastcap.data.emoji import EmojiFont

    from . import demo_report as report

    try:
        EmojiFont(data.find_font())
        return "emoji"
    except FastcapError as error:
        report.say(f"No usable colour emoji font, so on generated scenes. For real pictures: {error}")
        return "scenes"


def _fresh(run: Path) -> Path:
    """`run`, emptied if an earlier demo made it (it left MARK); a run of someone else's is not touched."""
    import shutil

    if run.exists() and any(run.iterdir()):
        if not (run / MARK).is_file():
            raise bad("demo", "out", "hold nothing but an earlier demo", str(run), "pass another --out")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    (run / MARK).touch()
    return run


def _unless_interrupted(result: TrainResult) -> TrainResult:
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def _formulation(config: TrainConfig, loss, out: Path, stop_after: int | None = None) -> tuple[Formulation, TrainResult]:
    import dataclasses

    timed, made = _TimedLoss(loss), Formulation()

    def note(trainer, record) -> None:
        made.losses.append(record["loss"])
        if record["step"] == stop_after:
            trainer.stop("compared")

    result = train(dataclasses.replace(config, out=str(_fresh(out))), loss_fn=timed, callbacks=[note])
    if stop_after is None or result.step < stop_after:
        _unless_interrupted(result)
    made.milliseconds = statistics.median(timed.milliseconds)
    made.peak_bytes, _ = peak_extra(timed.step, "cpu")
    return made, result


def _captions(result: TrainResult, items: list[dict]) -> list[str]:
    captioner = Captioner(result.model, result.tokenizer, result.config.image_size, result.config.max_length)
    images = [item["image"] for item in items]
    return [c for i in range(0, len(images), 64) for c in captioner(torch.stack(images[i : i + 64]))]


def _scores(dataset: str, captions: list[str], items: list[dict]) -> dict[str, float]:
    """Diversity, and precision beside it, for length alone is cheap: of facts on scenes; on emoji of words, right
    if any reference of the picture has them."""
    scores = diversity(captions)
    if dataset == "scenes":
        return {**scores, **data.score_captions(captions, [item["extras"]["facts"] for item in items])}
    said = [data.words(caption) for caption in captions]
    known = [set(data.words(" ".join(item["captions"]))) for item in items]
    right = sum(word in found for cut, found in zip(said, known, strict=True) for word in cut)
    return {**scores, "word_precision": right / max(1, sum(map(len, said)))}
