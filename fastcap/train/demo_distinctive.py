"""`fastcap demo --story distinctive`: captions that tell their picture from others, by reinforcement with a CLIP.

1. Two small CLIPs, of other widths and other seeds, on scenes of other halves of the pictures: one rewards, one judges.
2. A captioner trained with MLE, whose captions are short and alike, for that is what is most likely.
3. From there, at equal steps, reinforcement with the rewarding CLIP: one way and both ways; with and without the references'
   term and the discriminator; on emoji, SMILE beside it.
4. What each says of test pictures: whether it is found among the others, by the CLIP that judges and by what is known of the
   scenes; how long it is, and how true. Which of the expected trends these numbers show.

Finished runs are kept: an interrupted demo goes on where it was.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastcap import data
from fastcap.errors import bad

from . import checkpoint, demo_distinctive_report, demo_report
from .config import TrainConfig
from .demo import _scores as _word_scores
from .demo_runs import Expected, Pace, Trend, digest, trends, write_whole
from .evaluate import evaluate

NUM_SCENES, DATA_SEED, SEEDS = 8000, 0, {"scenes": 3, "emoji": 1}
TESTED = 400  # pictures of the test split, the first: hard negatives stand together, and stay together
_SCORES = "demo_scores.json"
_MEASURED = ("retrieval", "clip_score", "facts", "diversity")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is trained on a kind of data, and for how many steps: two CLIPs, a captioner, and what starts from it."""

    clip_steps: int
    base_steps: int
    rl_steps: int
    clip: Settings
    judge: Settings
    base: Settings
    rl: Settings
    variants: dict[str, tuple[str, Settings]]  # name -> (what the table calls it, settings of its runs)
    expected: tuple[Expected, ...]
    once: tuple[str, ...] = ()  # variants that are trained from the first seed only

    def scaled(self, scale: float) -> dict[str, int]:
        steps = {"clip": self.clip_steps, "base": self.base_steps, "rl": self.rl_steps}
        return {name: max(2, round(count * scale)) for name, count in steps.items()}


MLE, _BEFORE = "mle", "before: MLE"
_NEITHER = {"gt_weight": "none", "alpha": 1.0}
_RL = {"objective": "wtf-rl", "on_collapse": "go-on"}  # at equal steps, whatever becomes of it
_CLIP = {"batch_size": 128, "max_length": 40}  # longer than any caption: a judge that reads half would judge half
PLANS = {
    "scenes": Plan(
        clip_steps=700,
        base_steps=1000,
        rl_steps=250,
        clip={"width": 128, **_CLIP},
        judge={"width": 160, **_CLIP},
        base={},
        rl={"batch_size": 32, "lr": 3e-4, "warmup": 10},
        variants={
            "two-way": ("two-way", _RL),
            "one-way": ("one-way: image to text", {**_RL, "reward_baseline": "one-way"}),
            "plain": ("two-way, neither term", {**_RL, **_NEITHER}),
            "references": ("two-way, references only", {**_RL, "alpha": 1.0}),
            "discriminator": ("two-way, discriminator only", {**_RL, "gt_weight": "none"}),
            "none": ("no baseline", {**_RL, "reward_baseline": "none"}),
            "greedy": ("greedy caption", {**_RL, "reward_baseline": "greedy"}),
            "similar": ("similar images", {**_RL, "reward_baseline": "similar"}),
        },
        once=("none", "greedy", "similar"),
        expected=(
            ("two-way: captions find their image more often than before", "t2i_r1", "two-way", ">", MLE),
            ("two-way: images find their caption more often than before", "i2t_r1", "two-way", ">", MLE),
            ("two-way beats one-way, captions to images", "t2i_r1", "two-way", ">", "one-way"),
            ("two-way beats one-way, images to captions", "i2t_r1", "two-way", ">", "one-way"),
            ("both terms keep precision above neither", "fact_precision", "two-way", ">", "plain"),
            ("references alone keep precision above neither", "fact_precision", "references", ">", "plain"),
            ("discriminator alone keeps precision above neither", "fact_precision", "discriminator", ">", "plain"),
            ("both terms do not lower R@1, captions to images", "t2i_r1", "two-way", ">=", "plain"),
            ("both terms do not lower R@1, images to captions", "i2t_r1", "two-way", ">=", "plain"),
        ),
    ),
    "emoji": Plan(
        clip_steps=700,
        base_steps=300,
        rl_steps=250,
        clip={"width": 128, **_CLIP},
        judge={"width": 160, **_CLIP},
        base={},
        rl={"batch_size": 32, "lr": 3e-4, "warmup": 10},
        variants={
            "smile": ("SMILE", {"objective": "smile", "batch_size": 64, "lr": 3e-4, "warmup": 50}),
            "two-way": ("RL, two-way", _RL),
        },
        expected=(
            ("SMILE: captions find their image more often than MLE's", "t2i_r1", "smile", ">", MLE),
            ("RL: captions find their image more often than MLE's", "t2i_r1", "two-way", ">", MLE),
            ("RL: captions find their image more often than SMILE's", "t2i_r1", "two-way", ">", "smile"),
        ),
    ),
}


@dataclass
class DistinctiveResult:
    """What the demo measured; also written as `distinctive.json`. `scores[variant]` has one dict for each of `seeds`, or for
    the first of them."""

    dataset: str
    steps: dict[str, int]
    seeds: list[int]
    scores: dict[str, list[dict[str, float]]]
    trends: list[Trend]
    seconds: float


@dataclass(frozen=True)
class _Folders:
    """The data in three cuts: all of it for the captioner, and each CLIP's."""

    all: Path
    clip: Path
    judge: Path


def run(out: str | Path = "build/demo", *, seed: int = 0, scale: float = 1.0, dataset: str = "auto") -> DistinctiveResult:
    """Trains, or takes from an earlier demo in `out`, everything from every seed; prints and draws what came out.

    Args:
        out: folder; everything goes into its folder `distinctive`, or `distinctive-emoji`.
        seed: the first of three (on emoji the only one), of weights and order; the scenes are always the same.
        scale: factor on the numbers of steps; below 1 is quicker, and less is learnt.
        dataset: "scenes", or "auto" for the same; "emoji" compares MLE, SMILE and reinforcement on those.

    Raises:
        FastcapError: an argument is wrong, `out` holds runs that no demo made, or there is no emoji font.
    """
    dataset = "scenes" if dataset == "auto" else dataset
    if dataset not in PLANS:
        raise bad("demo", "data", "be one of 'auto', 'emoji', 'scenes'", dataset, "pass auto")
    if not 0 < scale <= 100:
        raise bad("demo", "scale", "be in (0, 100]", scale, "pass 1")
    began = time.perf_counter()
    plan, steps = PLANS[dataset], PLANS[dataset].scaled(scale)
    out = Path(out) / ("distinctive" if dataset == "scenes" else f"distinctive-{dataset}")
    folders = _write_data(out, dataset)
    seeds = list(range(seed, seed + SEEDS[dataset]))
    demo_distinctive_report.introduce(dataset, plan, steps, seeds)

    runs_of = {each: [name for name in plan.variants if each == seed or name not in plan.once] for each in seeds}
    pace = Pace({"clip": 2 * len(seeds), "base": len(seeds), "rl": sum(map(len, runs_of.values()))})
    labels = {MLE: _BEFORE, **demo_distinctive_report.labels_of(plan, seeds)}
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in labels}
    for each in seeds:
        for name, found in _of_seed(plan, steps, folders, out, each, runs_of[each], pace).items():
            scores[name].append(found)

    made = DistinctiveResult(dataset, steps, seeds, scores, trends(scores, plan.expected), time.perf_counter() - began)
    demo_distinctive_report.compare(made, labels)
    settings = {name: settings for name, (_, settings) in plan.variants.items()}
    numbers = {**asdict(made), "settings": settings}
    numbers["trends"] = [{**asdict(trend), "verdict": trend.verdict} for trend in made.trends]
    write_whole(out / "distinctive.json", json.dumps(numbers, indent=1))
    write_whole(out / "distinctive.md", demo_distinctive_report.markdown(made, labels))
    drawn = demo_distinctive_report.drawn(labels)
    told = {name: _kept(checkpoint.find(out / f"{name}-{seeds[0]}"))["per_image"] for name in drawn}
    demo_distinctive_report.draw(out / "distinctive.png", folders.judge, out / f"judge-{seeds[0]}", drawn, told)
    demo_report.say(f"Pictures with their captions: {out / 'distinctive.png'}")
    demo_report.say(f"Tables: {out / 'distinctive.md'}; all numbers: {out / 'distinctive.json'}")
    return made


def _of_seed(
    plan: Plan, steps: dict[str, int], folders: _Folders, out: Path, seed: int, names: list[str], pace: Pace
) -> dict[str, dict[str, float]]:
    """The scores of everything that is trained from one seed."""

    def made(kind: str, name: str, title: str, folder: Path, **settings: Any) -> Path:
        settings = {"steps": steps[kind], "seed": seed, "validate_every": 0, "checkpoint_every": 0, **settings}
        config = TrainConfig(data=str(folder), out=str(out / f"{name}-{seed}"), **settings)
        return pace.made(kind, f"{title}, seed {seed}", config)

    clip = made("clip", "clip", "the CLIP that rewards", folders.clip, model="clip", **plan.clip)
    other = {"model": "clip", "seed": seed + 1000, **plan.judge}
    judge = made("clip", "judge", "the CLIP that judges", folders.judge, **other)
    base = made("base", MLE, _BEFORE, folders.all, precision="bf16", **plan.base)
    scores = {MLE: _told(base, judge, folders.judge)}
    for name in names:
        label, settings = plan.variants[name]
        settings = {**plan.rl, "init_from": str(base), **settings}
        if settings["objective"] == "wtf-rl":
            settings["reward_clip"] = str(clip)
        scores[name] = _told(made("rl", name, label, folders.all, **settings), judge, folders.judge)
    return scores


def _told(found: Path, judge: Path, folder: Path) -> dict[str, float]:
    """What a checkpoint says of the test pictures, scored; and said. Kept beside the checkpoint."""
    judged_by, told = digest(str(judge)), _kept(found)
    if told.get("judge") != judged_by:
        options = {"metrics": _MEASURED, "bootstrap": 0, "per_image": True, "progress": False}
        (row,) = evaluate(folder, [found], clip=str(judge), **options).document["rows"]
        told = {"judge": judged_by, "scores": row["scores"], "per_image": row["per_image"]}
        if "fact_precision" not in told["scores"]:
            view = data.KarpathyDataset(folder, split="test").images()
            said, items = [one["caption"] for one in told["per_image"]], [view.describe(i) for i in range(len(view))]
            told["scores"]["word_precision"] = _word_scores("emoji", said, items)["word_precision"]
        write_whole(found / _SCORES, json.dumps(told))
    demo_report.say(demo_distinctive_report.line(told["scores"]))
    return told["scores"]


def _kept(found: Path) -> dict[str, Any]:
    """What `_told` has kept of a checkpoint: scores by the judge of a digest, and each picture's caption with its ranks."""
    file = found / _SCORES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write_data(out: Path, dataset: str) -> _Folders:
    """Pictures with captions, and what each CLIP learns from; the judge's folder has the tested pictures.

    Of scenes each CLIP has half of the training groups, whose pictures differ in one attribute; no group is shared.
    Emoji are too few to share, and held-out ones too strange: both CLIPs learn from all training pictures, and the one that
    judges knows the names of the tested ones, too.
    """
    folders = _Folders(out / dataset, out / f"{dataset}-clip", out / f"{dataset}-judge")
    if dataset == "emoji":
        summary = data.write_emoji(folders.all, seed=DATA_SEED)
    else:
        summary = data.write_scenes(folders.all, num_images=NUM_SCENES, seed=DATA_SEED)
    images = json.loads(summary.json.read_text(encoding="utf-8"))["images"]
    images = [{**image, "filepath": f"../{dataset}/images"} for image in images if image["split"] in ("train", "test")]
    trained, tested = ([image for image in images if image["split"] == split] for split in ("train", "test"))
    tested = tested[:TESTED]
    if dataset == "emoji":
        halves = [trained, [*trained, *({**image, "split": "train"} for image in tested)]]
    else:
        order = {group: i for i, group in enumerate(dict.fromkeys(image["group"] for image in trained))}
        halves = [[image for image in trained if order[image["group"]] % 2 == half] for half in (0, 1)]
    for folder, half in zip((folders.clip, folders.judge), halves, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / summary.json.name, json.dumps({"dataset": dataset, "images": [*half, *tested]}))
    return folders
