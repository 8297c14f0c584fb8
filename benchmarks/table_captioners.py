"""`python -m fastcap.benchmarks.table_captioners`: the four captioners in the shape of GLIED's Table 2.

Parameters, seconds of training until the validation's cross-entropy is first at most a fixed level, and captions a second,
for an LSTM (show-and-tell), soft attention (show-attend-tell), Base and GLIED, with fastcap's kernels and with the same in
plain torch (the backend "reference"). On scenes whose captions mention all there is, read as nine regions each and, by Base
and GLIED, twelve attribute words besides.

The levels are the same for all: one that the LSTM still reaches, and one that it does not. Seconds count training steps
alone, with the loading of their batches, and not the validations. Runs of the two backends take the same steps from the
same seed, in turn.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastcap.benchmarks import machine, report, timing

import fastcap
from fastcap import data, models
from fastcap.data.batching import stack_items
from fastcap.data.scenes import REGIONS
from fastcap.errors import FastcapError, bad
from fastcap.train import Captioner, TrainConfig, checkpoint, train
from fastcap.train.demo_attention import MAX_LENGTH, write_thorough_scenes

OP = "bench.table_captioners"
# name -> (what the table calls it, settings): the recipes' own sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {"model": "show-and-tell"}),
    "soft-attention": ("soft attention", {"model": "show-attend-tell"}),
    "base": ("Base", {"model": "base", "attributes": "given"}),
    "glied": ("GLIED", {"model": "glied", "attributes": "given"}),
}
BACKENDS = {"auto": "fastcap", "reference": "plain torch"}
BATCH, DECODED = 32, 32  # captions a step; images decoded at a time
SECONDS = 8.0  # of timing the captions of a model
EVERY, VALIDATED = 25, 20  # steps between validations, and their batches


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcap.benchmarks.table_captioners", description=__doc__)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.95, 0.75], help="validation cross-entropies per word")
    parser.add_argument("--steps", type=int, default=2000, help="most steps of a run, over which its learning rate falls")
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each; the table has their median")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--out", help="a folder for captioners_table.json; not written if not given")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    for name in given.models:
        if name not in MODELS:
            raise bad(OP, "models", f"be among {', '.join(MODELS)}", name, "leave it out for all")
    for name, least in (("steps", 1), ("scenes", 12), ("seeds", 1)):
        if getattr(given, name) < least:
            raise bad(OP, name, f"be at least {least}", getattr(given, name), "leave it out")
    for level in given.levels:
        if not level > 0:
            raise bad(OP, "levels", "be above 0", level, "leave them out")
    with tempfile.TemporaryDirectory(prefix="fastcap-table-") as folder:
        rows = measure(Path(folder), given)
    print("\n" + table(rows))
    if given.out:
        path = Path(given.out) / "captioners_table.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "fastcap.benchmarks.table_captioners", *words])
        report.write(path, rows, command)
        print(path)
    return 0


def measure(folder: Path, given: argparse.Namespace) -> list[dict]:
    """A row for each model and backend."""
    scenes = folder / "scenes"
    write_thorough_scenes(scenes, given.scenes)
    data.write_scene_regions(scenes)
    rows = []
    for name in given.models:
        label, settings = MODELS[name]
        runs: dict[str, list[dict]] = {backend: [] for backend in BACKENDS}
        found: dict[str, Path] = {}
        for seed in range(given.seeds):
            for backend in BACKENDS if seed % 2 else reversed(BACKENDS):
                config = TrainConfig(
                    data=str(scenes), features=str(scenes / REGIONS), out=str(folder / f"{name}-{backend}-{seed}"),
                    steps=given.steps, batch_size=BATCH, max_length=MAX_LENGTH, seed=seed, device="cpu",
                    validate_every=EVERY, validate_batches=VALIDATED, checkpoint_every=0, **settings,
                )  # fmt: skip
                with fastcap.backend(backend):
                    run, found[backend] = _until(config, given.levels)
                runs[backend].append(run)
        speeds = _speeds({backend: found[backend] for backend in BACKENDS}, scenes)
        for backend in BACKENDS:
            seconds = {}
            for level in given.levels:
                times = [run["reached"][f"{level:g}"] for run in runs[backend] if f"{level:g}" in run["reached"]]
                seconds[f"{level:g}"] = statistics.median(times) if len(times) == given.seeds else None
            rows.append(
                {
                    "model": name, "label": label, "backend": backend, "seconds": seconds, "runs": runs[backend],
                    "parameters": sum(p.numel() for p in models.load(found[backend]).parameters()),
                    **speeds[backend], "machine": machine.describe("cpu"), "load": machine.load(),
                }
            )  # fmt: skip
            print(_line(rows[-1]), flush=True)
    return rows


def _until(config: TrainConfig, levels: list[float]) -> tuple[dict, Path]:
    """After how many seconds the validation's cross-entropy was first at most each of `levels`, as `reached`; there the run
    stops. And its checkpoint."""
    run: dict[str, Any] = {"reached": {}, "val_ce": None, "steps": 0, "seconds": 0.0}

    def look(trainer: Any, record: dict) -> None:
        run.update(steps=record["step"], seconds=record["seconds"])
        if "val_mle" in record:
            run["val_ce"] = record["val_mle"]
            for level in levels:
                if record["val_mle"] <= level:
                    run["reached"].setdefault(f"{level:g}", record["seconds"])
            if len(run["reached"]) == len(set(levels)):
                trainer.stop("levels")

    result = train(config, callbacks=[look], progress=False)
    if result.interrupted and len(run["reached"]) < len(set(levels)):
        raise KeyboardInterrupt
    run["ms_per_step"] = run["seconds"] / run["steps"] * 1e3
    return run, result.checkpoint


def _speeds(found: dict[str, Path], scenes: Path) -> dict[str, dict[str, float]]:
    """Captions a second of test pictures, greedy and by beam 3, of each backend; timed in turn. Loading is not counted."""
    calls = {}
    for backend, path in found.items():
        captioner = Captioner.load(path)
        config = checkpoint.read_config(path)
        view = data.KarpathyDataset(scenes, split="test", features=config.features).images()
        images = stack_items([view[i] for i in range(min(DECODED, len(view)))], captioner.attribute_tokenizer)
        for beam in (1, 3):

            def call(captioner=captioner, images=images, beam=beam, backend=backend) -> None:
                with fastcap.backend(backend):
                    captioner(images, beam=beam)

            calls[backend, beam] = call
    samples = timing.compare(calls, seconds=SECONDS)
    speeds = {key: len(images) / statistics.median(values) for key, values in samples.items()}
    return {backend: {"greedy_per_s": speeds[backend, 1], "beam_3_per_s": speeds[backend, 3]} for backend in found}


def table(rows: list[dict]) -> str:
    """Markdown, a line for each model: plain torch, then fastcap."""
    levels = list(rows[0]["seconds"])
    columns = ["parameters", *(f"s to CE {level}" for level in levels), "ms a step", "captions/s greedy", "beam 3"]
    lines = [["plain torch, fastcap", *columns], ["---", *["---:"] * len(columns)]]
    for name in dict.fromkeys(row["model"] for row in rows):
        of = {row["backend"]: row for row in rows if row["model"] == name}
        both = [of["reference"], of["auto"]]
        cells = [both[0]["label"], f"{both[0]['parameters']:,}"]
        cells += [_pair([row["seconds"][level] for row in both]) for level in levels]
        cells.append(_pair([statistics.median(run["ms_per_step"] for run in row["runs"]) for row in both]))
        cells += [_pair([row[key] for row in both]) for key in ("greedy_per_s", "beam_3_per_s")]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _pair(values: list[float | None]) -> str:
    shown = ["not reached" if value is None else f"{value:.0f}" for value in values]
    return shown[0] if values == [None, None] else ", ".join(shown)


def _line(row: dict) -> str:
    reached = ", ".join(f"{level}: " + ("no" if s is None else f"{s:.1f} s") for level, s in row["seconds"].items())
    steps = ", ".join(str(run["steps"]) for run in row["runs"])
    return (
        f"{row['label']}, {BACKENDS[row['backend']]}: {row['parameters']:,} parameters, to CE {reached} ({steps} steps), "
        f"{row['greedy_per_s']:.0f} captions/s greedy, {row['beam_3_per_s']:.0f} by beam 3"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FastcapError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
