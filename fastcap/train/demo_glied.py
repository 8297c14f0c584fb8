"""`fastcap demo --story glied`: what GLIED's distilling steps are worth, and what rewarding CIDEr makes of its captions.

In place of pictures of scenes captioners read what a small detector, which errs, made of them: nine regions and twelve
attribute words each.

1. On captions that mention everything, from each of three seeds, with cross-entropy: GLIED, GLIED without each of its
   distilling steps, its Base, and the Base widened until it has as many parameters.
2. On the scenes' own captions, which leave most out, so that the likeliest caption says little, and with less noise before
   the detector, for what is not seen cannot be rewarded: GLIED with cross-entropy; from there by self-critical training,
   with its captions' CIDEr-D as reward, against its greedy caption (scst) and against its other samples (new-scst); and, for
   as many steps, with cross-entropy as before.
3. What each reaches on validation and test pictures, and which of the expected trends these numbers show.

Finished runs are kept: an interrupted demo goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastcap import data, models
from fastcap.data.scenes import REGIONS
from fastcap.errors import bad
from fastcap.models.glied import matching_width

from . import checkpoint, demo_glied_report, demo_report
from .config import TrainConfig
from .demo_attention import MAX_LENGTH, write_thorough_scenes
from .demo_runs import Expected, Pace, Trend, trends, write_whole
from .evaluate import evaluate

NUM_SCENES, DATA_SEED, SEEDS = 8000, 0, 3
STEPS = {"mle": 2000, "before": 2500, "after": 300}
VALIDATED = 10_000  # captions at most: all there are
BATCH = 32  # captions, or images by reward; twice as many captions before reward
NOISE = {"scenes-thorough": 0.4, "scenes": 0.1}  # that the detector sees its cells through
SCORED = ("bleu", "cider", "facts", "diversity")
_SCORES = "demo_scores.json"
Settings = dict[str, Any]

GLIED, BASE, WIDE, BEFORE = "glied", "base", "wide", "before"
# name -> (what the tables call it, settings of its runs)
MLE: dict[str, tuple[str, Settings]] = {
    GLIED: ("GLIED", {"model": "glied"}),
    BASE: ("Base", {"model": "base"}),
    WIDE: ("Base, as many parameters", {"model": "base"}),  # its width: matching_width
    "no-visual": ("GLIED without visual distilling", {"model": "glied", "visual_distilling": False}),
    "no-attribute": ("GLIED without attribute distilling", {"model": "glied", "attribute_distilling": False}),
    "no-local": ("GLIED without local distilling", {"model": "glied", "local_distilling": False}),
}
RL: dict[str, tuple[str, Settings]] = {
    BEFORE: ("GLIED, cross-entropy", {"model": "glied"}),
    "scst": ("then CIDEr, scst", {"objective": "scst", "on_collapse": "go-on"}),
    "new-scst": ("then CIDEr, new-scst", {"objective": "new-scst", "on_collapse": "go-on"}),
    "more": ("then cross-entropy again", {"objective": "mle"}),
}
# At 2e-3 the wide Base learns less than the narrow one (validation loss .686 and .658 after 3,000 steps; .656 at 1e-3).
_FROM_NOTHING = {"attributes": "given", "lr": 1e-3}
_FROM_BEFORE = {"lr": 1e-4, "warmup": 10}

EXPECTED: tuple[Expected, ...] = (
    ("GLIED has less loss than Base", "val_ce", GLIED, "<", BASE),
    ("GLIED has less loss than a Base of as many parameters", "val_ce", GLIED, "<", WIDE),
    ("GLIED has more CIDEr than Base", "cider", GLIED, ">", BASE),
    ("GLIED has more CIDEr than a Base of as many parameters", "cider", GLIED, ">", WIDE),
    ("visual distilling lowers the loss", "val_ce", GLIED, "<", "no-visual"),
    ("attribute distilling lowers the loss", "val_ce", GLIED, "<", "no-attribute"),
    ("local distilling lowers the loss", "val_ce", GLIED, "<", "no-local"),
    *(
        expected
        for name in ("scst", "new-scst")
        for expected in (
            (f"{name} raises CIDEr", "cider", name, ">", BEFORE),
            (f"{name} raises CIDEr more than cross-entropy does", "cider", name, ">", "more"),
            (f"{name} does not lower precision", "fact_precision", name, ">=", BEFORE),
            (f"{name} does not make captions longer", "mean_length", name, "<=", BEFORE),
            (f"{name} does not make captions more alike", "unique_share", name, ">=", BEFORE),
        )
    ),
)


@dataclass
class GliedResult:
    """What the demo measured; also written as `glied.json`. `scores[variant]` has one dict for each of `seeds`."""

    steps: dict[str, int]
    seeds: list[int]
    scores: dict[str, list[dict[str, float]]]
    trends: list[Trend]
    seconds: float


def run(out: str | Path = "build/demo", *, seed: int = 0, scale: float = 1.0, dataset: str = "auto") -> GliedResult:
    """Trains, or takes from an earlier demo in `out`, everything from every seed; prints and draws what came out.

    Args:
        out: folder; everything goes into its folder `glied`.
        seed: the first of three, of weights and order; the scenes and their regions are always the same.
        scale: factor on the numbers of steps; below 1 is quicker, and less is learnt.
        dataset: "scenes", or "auto" for the same: only there can a caption be checked.

    Raises:
        FastcapError: an argument is wrong, or `out` holds runs that no demo made.
    """
    if dataset not in ("auto", "scenes"):
        remedy = "leave it out: only of scenes is it known what a caption must say"
        raise bad("demo", "data", "be scenes for the story of GLIED", dataset, remedy)
    if not 0 < scale <= 100:
        raise bad("demo", "scale", "be in (0, 100]", scale, "pass 1")
    began = time.perf_counter()
    out = Path(out) / "glied"
    write_data(out)
    steps = {kind: max(2, round(count * scale)) for kind, count in STEPS.items()}
    seeds = list(range(seed, seed + SEEDS))
    demo_glied_report.introduce(out, steps, seeds)
    names = (*MLE, *RL)
    pace = Pace(Counter(kind_of(name) for name in names for _ in seeds))
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for each in seeds:
        for name in names:
            found = made(out, name, each, steps, pace)
            scores[name].append(told(found, data_of(out, name))["scores"])
            demo_report.say(demo_glied_report.line(scores[name][-1]))

    result = GliedResult(steps, seeds, scores, trends(scores, EXPECTED), time.perf_counter() - began)
    demo_glied_report.compare(result)
    numbers = {**asdict(result), "settings": {name: settings for name, (_, settings) in (MLE | RL).items()}}
    numbers["trends"] = [{**asdict(trend), "verdict": trend.verdict} for trend in result.trends]
    write_whole(out / "glied.json", json.dumps(numbers, indent=1))
    write_whole(out / "glied.md", demo_glied_report.markdown(result))
    said = {name: told(checkpoint.find(out / f"{name}-{seeds[0]}"), data_of(out, name))["captions"] for name in names}
    demo_glied_report.draw(out / "glied.png", data_of(out, GLIED), result, said)
    demo_report.say(f"Scores and captions: {out / 'glied.png'}")
    demo_report.say(f"Tables: {out / 'glied.md'}; all numbers: {out / 'glied.json'}")
    return result


def data_of(out: Path, name: str) -> Path:
    """The scenes that a variant learns from, and is tested on: the same pictures in both, other captions."""
    return out / ("scenes-thorough" if name in MLE else "scenes")


def write_data(out: Path) -> None:
    """Both kinds of captions, regions and attributes; left alone where an earlier demo wrote them all."""
    for name in (GLIED, BEFORE):
        folder = data_of(out, name)
        file = folder / "dataset_scenes.json"
        if (folder / REGIONS).is_file() and file.is_file():
            document = json.loads(file.read_text(encoding="utf-8"))
            regions = document.get("regions", {})  # these are written last
            if regions.get("noise") == NOISE[folder.name] and len(document["images"]) == NUM_SCENES:
                continue
        if name == GLIED:
            write_thorough_scenes(folder, NUM_SCENES)
        else:
            data.write_scenes(folder, num_images=NUM_SCENES, seed=DATA_SEED)
        data.write_scene_regions(folder, seed=DATA_SEED, noise=NOISE[folder.name])


def kind_of(name: str) -> str:
    """Which of `STEPS` a variant takes."""
    return "mle" if name in MLE else BEFORE if name == BEFORE else "after"


def made(out: Path, name: str, seed: int, steps: dict[str, int], pace: Pace) -> Path:
    """The last checkpoint of a variant's run from a seed. What starts from another run, or has its size, comes after it."""
    folder, kind = data_of(out, name), kind_of(name)
    label, settings = (MLE | RL)[name]
    settings = {**(_FROM_BEFORE if kind == "after" else _FROM_NOTHING), **settings}
    if name == WIDE:
        settings["width"] = matching_width(models.load(checkpoint.find(out / f"{GLIED}-{seed}")).config)
    if kind == "after":
        settings["init_from"] = str(checkpoint.find(out / f"{BEFORE}-{seed}"))
    config = TrainConfig(
        data=str(folder), features=str(folder / REGIONS), out=str(out / f"{name}-{seed}"), seed=seed, steps=steps[kind],
        batch_size=2 * BATCH if kind == BEFORE else BATCH, max_length=MAX_LENGTH, validate_every=steps[kind],
        validate_batches=-(-VALIDATED // BATCH), checkpoint_every=0, **settings,
    )  # fmt: skip
    return pace.made(kind, f"{label}, seed {seed}", config)


def told(found: Path, folder: Path) -> dict[str, Any]:
    """Of a checkpoint `scores`, and `captions`, greedy ones of all test pictures in order. Kept beside the checkpoint."""
    file = found / _SCORES
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    options = {"metrics": SCORED, "bootstrap": 0, "per_image": True, "progress": False}
    (row,) = evaluate(folder, [found], **options).document["rows"]
    captions = [one["caption"] for one in row["per_image"]]
    scores = {
        "parameters": sum(p.numel() for p in models.load(found).parameters()),
        "val_ce": checkpoint.read(found)["last"]["val_mle"],
        **row["scores"],
        "captions_per_s": len(captions) / row["seconds"]["caption"],
    }
    kept = {"scores": scores, "captions": captions}
    write_whole(file, json.dumps(kept))
    return kept
