"""`fastcap demo --story attention`: what attention and its coverage penalty are worth, over three seeds.

1. Generated scenes with captions that mention everything, each with some 20 words: enough for attention to go around.
2. Six captioners, each from three seeds, all trained with MLE: no attention (Show and Tell, and all locations alike in
   the decoder of Show, Attend and Tell), soft, hard, and soft with the coverage penalty in two normalisations.
3. What each reaches on validation and test pictures, and which of the expected trends these numbers show.

Finished runs are kept: an interrupted demo goes on where it was.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastcap import data
from fastcap.data.scene_captions import WORDS
from fastcap.errors import bad
from fastcap.eval import diversity
from fastcap.functional import attention_coverage

from . import attention_pictures, demo_report
from .captioner import Captioner
from .config import TrainConfig
from .demo_runs import Trend, finished, spread, trends, write_whole

NUM_SCENES, DATA_SEED = 8000, 0
SEEDS, STEPS, DRAWN = 3, 900, 3
BATCH = 32  # soft attention, one seed: validation CE .497 after 1,200 steps of 32, .520 after 800 of 64, which take as long
MAX_LENGTH = 31  # three objects with everything said of them, and the background

# name -> (what the table calls it, settings of its runs)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "show-and-tell": ("no attention: Show and Tell", {"model": "show-and-tell"}),
    "mean": ("no attention: all locations alike", {"attention": "mean"}),
    "soft": ("soft", {"attention": "soft"}),
    "hard": ("hard", {"attention": "hard"}),
    "coverage": ("soft + coverage, mean", {"attention": "soft", "coverage": 1.0, "coverage_reduction": "mean"}),
    "coverage-batchmean": (
        "soft + coverage, batchmean",
        {"attention": "soft", "coverage": 1.0, "coverage_reduction": "batchmean"},
    ),
}

# (what is expected, score, variant, how it compares, with which)
EXPECTED = (
    ("coverage spreads attention: less R than soft", "coverage", "coverage", "<", "soft"),
    ("coverage does not lower the R@1 of soft", "oracle_r1", "coverage", ">=", "soft"),
    ("soft has less loss than Show and Tell", "val_ce", "soft", "<", "show-and-tell"),
    ("soft has less loss than all alike", "val_ce", "soft", "<", "mean"),
    ("hard has less loss than Show and Tell", "val_ce", "hard", "<", "show-and-tell"),
    ("hard has less loss than all alike", "val_ce", "hard", "<", "mean"),
    ("batchmean hurts: more loss than soft", "val_ce", "coverage-batchmean", ">", "soft"),
    ("batchmean hurts: less R@1 than soft", "oracle_r1", "coverage-batchmean", "<", "soft"),
)


@dataclass
class AttentionResult:
    """What the demo measured; also written as `attention.json`. `scores[variant]` has one dict for each of `seeds`."""

    steps: int
    seeds: list[int]
    scores: dict[str, list[dict[str, float | None]]]
    trends: list[Trend]
    seconds: float


def run(out: str | Path = "build/demo", *, seed: int = 0, scale: float = 1.0, dataset: str = "auto") -> AttentionResult:
    """Trains, or takes from an earlier demo in `out`, every variant from every seed; prints and draws what came out.

    Args:
        out: folder; everything goes into its folder `attention`.
        seed: the first of three, of weights and order; the scenes are always the same.
        scale: factor on the number of steps; below 1 is quicker, and less is learnt.
        dataset: "scenes", or "auto" for the same: only there can a caption be checked.

    Raises:
        FastcapError: an argument is wrong, or `out` holds runs that no demo made.
    """
    if dataset not in ("auto", "scenes"):
        remedy = "leave it out: only of scenes is it known what a caption must say"
        raise bad("demo", "data", "be scenes for the story of attention", dataset, remedy)
    if not 0 < scale <= 100:
        raise bad("demo", "scale", "be in (0, 100]", scale, "pass 1")
    began = time.perf_counter()
    out = Path(out) / "attention"
    folder = out / "scenes"
    count = write_thorough_scenes(folder)
    steps, seeds = max(2, round(STEPS * scale)), list(range(seed, seed + SEEDS))
    demo_report.say(f"{count} pictures of scenes, each with five captions that mention all there is, in {folder}")

    scores: dict[str, list[dict[str, float | None]]] = {name: [] for name in VARIANTS}
    trained: list[float] = []
    for i, (each, name) in enumerate((each, name) for each in seeds for name in VARIANTS):
        label, settings = VARIANTS[name]
        demo_report.title(f"{i + 1} of {len(seeds) * len(VARIANTS)}: {label}, seed {each}, {steps} steps")
        config = TrainConfig(
            data=str(folder), out=str(_run_folder(out, name, each)), steps=steps, batch_size=BATCH, seed=each,
            precision="bf16", max_length=MAX_LENGTH, validate_every=0, checkpoint_every=0, **settings,
        )  # fmt: skip
        started = time.perf_counter()
        found, fresh = finished(config)
        reached = _scores(found, folder)
        scores[name].append(reached)
        if fresh:
            trained.append(time.perf_counter() - started)
        minutes = statistics.mean(trained or [0.0]) * (len(seeds) * len(VARIANTS) - i - 1) / 60
        demo_report.say(demo_report.attention_line(reached))
        demo_report.say(f"at most {minutes:.0f} minutes left" if fresh else "as an earlier demo left it")

    made = AttentionResult(steps, seeds, scores, trends(scores, EXPECTED), time.perf_counter() - began)
    demo_report.compare_attention(made, {name: label for name, (label, _) in VARIANTS.items()})
    _draw(out / "attention.png", {name: _run_folder(out, name, seeds[0]) for name in ("soft", "coverage")}, folder)
    numbers = {**asdict(made), "settings": {name: settings for name, (_, settings) in VARIANTS.items()}}
    numbers["trends"] = [{**asdict(trend), "verdict": trend.verdict} for trend in made.trends]
    (out / "attention.json").write_text(json.dumps(numbers, indent=1))
    demo_report.say(f"Attention with and without coverage: {out / 'attention.png'}; all numbers: {out / 'attention.json'}")
    return made


def write_thorough_scenes(folder: Path, num_images: int | None = None) -> int:
    """The scenes of `write_scenes`, with captions that mention every object with all its attributes, and the background.

    The scenes' own captions say little, so that a caption of five words is over before attention has seen the picture.
    """
    summary = data.write_scenes(folder, num_images=num_images or NUM_SCENES, seed=DATA_SEED)
    document = json.loads(summary.json.read_text(encoding="utf-8"))
    rng = Random(f"fastcap thorough captions {DATA_SEED}")
    for image in document["images"]:
        for sentence in image["sentences"]:
            sentence["raw"] = _thorough_caption(rng, image["facts"])
            sentence["tokens"] = data.words(sentence["raw"])
    write_whole(summary.json, json.dumps(document))
    return summary.images


def _thorough_caption(rng: Random, facts: dict) -> str:
    """The objects in random order; for each attribute the usual word six times in ten."""

    def say(attribute: str, value: str) -> str:
        usual, *others = WORDS[attribute].get(value, (value,))  # "middle" and "center" have one word each
        return usual if not others or rng.random() < 0.6 else rng.choice(others)

    phrases = []
    for item in rng.sample(facts["objects"], len(facts["objects"])):
        said = [say(name, item[name]) for name in ("size", "texture", "color", "shape")]
        row, column = say("row", item["row"]), say("column", item["column"])
        phrases.append(f"a {' '.join(said)} at the {row} {column}")
    return f"{' and '.join(phrases)} on {say('background', facts['background'])}"


def _run_folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}"


def _scores(found: Path, folder: Path) -> dict[str, float | None]:
    """Of a checkpoint: cross-entropy per word and coverage R per caption on the validation split with the words given; and
    what it says of test pictures by itself. Kept beside the checkpoint."""
    kept = found / "demo_scores.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captioner = Captioner.load(found, device)
    size = captioner.image_size
    loss = coverage = words = captions = 0.0
    pairs = data.KarpathyDataset(folder, split="val", image_size=size)
    loader = DataLoader(pairs, batch_size=64, collate_fn=data.collate(captioner.tokenizer, captioner.max_length))
    with torch.no_grad():
        for batch in loader:
            target, lengths = batch["target"].to(device), batch["lengths"]
            logits, alphas = captioner.model(batch["images"].to(device), batch["inputs"].to(device), lengths)
            loss += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
            if alphas is not None:
                coverage += attention_coverage(alphas.float(), lengths=lengths, reduction="sum").item()
            words, captions = words + lengths.sum().item(), captions + len(lengths)
    test = data.KarpathyDataset(folder, split="test", image_size=size).images()
    items = [test[i] for i in range(len(test))]  # all: they come in groups that differ in one attribute, the hard negatives
    said = [c for i in range(0, len(items), 64) for c in captioner(torch.stack([x["image"] for x in items[i : i + 64]]))]
    facts = data.score_captions(said, [item["extras"]["facts"] for item in items])
    scores = {
        "val_ce": loss / words,
        "coverage": None if alphas is None else coverage / captions,
        **{name: facts[name] for name in ("oracle_r1", "fact_precision", "fact_recall")},
        "mean_length": diversity(said)["mean_length"],
    }
    write_whole(kept, json.dumps(scores))
    return scores


def _draw(path: Path, runs: dict[str, Path], folder: Path) -> None:
    """Some test pictures of two objects, each with the attention of every run for the caption that it gives."""
    captioners = {name: Captioner.load(run) for name, run in runs.items()}
    size = next(iter(captioners.values())).image_size
    test = data.KarpathyDataset(folder, split="test", image_size=size).images()
    of_two = [i for i in range(len(test)) if len(test.describe(i)["extras"]["facts"]["objects"]) == 2]
    rows = []
    for i in spread(len(of_two), DRAWN):
        image = test[of_two[i]]["image"]
        for name, captioner in captioners.items():
            images = image.unsqueeze(0)
            (attended,) = captioner.attention(images, captioner.ids(images))
            rows.append(attention_pictures.row_of_image(image, attended, name, captioner.centres(images)))
    attention_pictures.draw(path, rows)
