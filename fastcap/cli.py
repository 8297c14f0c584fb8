"""The `fastcap` command. Each command imports what it needs when it runs, so that `fastcap --help` is quick."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from pathlib import Path
from typing import Annotated, Any

from fastcap.errors import FastcapError, bad

try:
    import typer
except ModuleNotFoundError:  # the `train` extra is not installed: main() says so
    typer = None

INTERRUPTED = 130  # what shells expect after Ctrl-C


def main() -> None:
    """The entry point: bad input is one line on stderr and status 2."""
    if typer is None:
        if sys.argv[1:] == ["doctor"]:  # which says what is missing, and so must not need it
            from fastcap.doctor import main as report

            return report()
        print("fastcap: the command line needs more packages; run: pip install 'fastcap[train]'", file=sys.stderr)
        sys.exit(2)
    try:
        app()()
    except FastcapError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that is a file, no permission, a full disk: it names the path
        print(f"fastcap: {error}", file=sys.stderr)
        sys.exit(2)


def app() -> Any:
    """The commands, as a typer application."""
    made = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
    made.callback()(_root)
    made.command("train")(_train_command())
    made.command("caption")(caption)
    made.command("evaluate")(evaluate)
    data = typer.Typer(no_args_is_help=True, help="Make data that needs no download.")
    data.command("scenes")(scenes)
    data.command("emoji")(emoji)
    made.add_typer(data, name="data")
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    made.command("demo")(demo)
    made.command("bench", context_settings=passed_on)(bench)
    made.command("doctor")(doctor)
    return made


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda wanted: _version() if wanted else None)
    ] = False,
) -> None:
    """Fused kernels and training loops for image captioning."""


def _version() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"fastcap {version('fastcap')}")
    except PackageNotFoundError:
        print("fastcap (not installed: run from its sources)")
    raise typer.Exit()


def _train_command() -> Any:
    """`train` with one option per field of TrainConfig, from which defaults and help come."""
    from fastcap.train.config import TrainConfig
    from fastcap.train.recipes import SETTINGS, shown_default

    kinds = typing.get_type_hints(TrainConfig)
    resume = typer.Option("--resume", help="go on from the last checkpoint in --out", rich_help_panel="Run")
    named = [("context", inspect.Parameter.empty, typer.Context), ("resume", False, Annotated[bool, resume])]
    for field in dataclasses.fields(TrainConfig):
        default = shown_default(field.name) if field.name in SETTINGS else field.default != ""
        option = typer.Option(help=field.metadata["help"], show_default=default, rich_help_panel=field.metadata["panel"])
        named.append((field.name, field.default, Annotated[kinds[field.name], option]))
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, default, annotation in named
    ]

    def command(**options: Any) -> None:
        train(**options)

    command.__doc__ = train.__doc__
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def train(context: typer.Context, resume: bool, **options: Any) -> None:
    """Train a captioning model. Ctrl-C saves a checkpoint; --resume goes on from it."""
    from fastcap.train import TrainConfig, checkpoint
    from fastcap.train import train as run

    given = {name: value for name, value in options.items() if context.get_parameter_source(name).name == "COMMANDLINE"}
    for name in ("out",) if resume else ("data", "out"):
        if not options[name]:
            raise bad("train", f"--{name}", "be given", options[name], f"pass --{name} FOLDER")
    if resume:
        config = dataclasses.replace(checkpoint.read_config(checkpoint.to_resume(options["out"])), **given)
    else:
        _check_init_from(given)
        config = TrainConfig(**options)
    result = run(config, resume=resume)
    if result.interrupted:
        print(
            f"stopped at step {result.step} of {config.steps}; saved {result.checkpoint}\n"
            f"go on with: fastcap train --out {config.out} --resume"
        )
        raise typer.Exit(INTERRUPTED)
    print(f"{result.step} steps in {result.seconds:.0f} s; saved {result.checkpoint}")
    if result.val_loss is not None and result.validation is not None:  # a run that was over is not validated again
        (_show_retrieval if result.retrieval else _show_samples)(result)


def _check_init_from(given: dict[str, Any]) -> None:
    from fastcap.train.config import FROM_CHECKPOINT

    for name in FROM_CHECKPOINT if given.get("init_from") else ():
        if name in given:
            option = "--" + name.replace("_", "-")
            raise bad("train", option, "come from --init-from", given[name], f"leave {option} out")


def _show_retrieval(result: Any) -> None:
    """How a CLIP retrieves among the validation's pairs."""
    found = result.retrieval
    print(f"validation {result.val_loss:.3f}; of {found['images']} images and their captions, found")
    for name, told in (("t2i", "the image of a caption"), ("i2t", "a caption of an image")):
        ranks = ", ".join(f"among {k} {found[f'{name}_r{k}']:.1%}" for k in (1, 5, 10))
        print(f"  {told}: {ranks}; median rank {found[f'{name}_median_rank']:g}")


def _show_samples(result: Any) -> None:
    """A few captions of validation pictures, and how varied they are."""
    from fastcap.data.batching import stack_items
    from fastcap.eval.diversity import diversity
    from fastcap.train import Captioner

    captioner = Captioner(result.model, result.tokenizer, result.config.image_size, result.config.max_length)
    view = result.validation.images()
    count = min(len(view), 200)
    items = [view[i * len(view) // count] for i in range(count)]
    images = stack_items(items, captioner.attribute_tokenizer)
    captions = [caption for batch in images.split(25) for caption in captioner(batch)]
    varied = diversity(captions)
    loss, mle = f"{result.val_loss:.3f}", f"{result.val_mle:.3f}"
    print(
        f"validation {loss}{f' (as MLE {mle})' if mle != loss else ''}; {count} greedy captions: "
        f"{varied['mean_length']:.1f} words each, {varied['vocabulary']} in all, {varied['unique_share']:.0%} unique"
    )
    for item, said in list(zip(items, captions, strict=True))[:: max(1, count // 3)][:3]:
        print(f"  {said!r} for {item['captions'][0]!r}")


def caption(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="picture files; with --features, ids in there")],
    checkpoint: Annotated[Path, typer.Option(help="a run's --out, or one checkpoint in it")],
    beam: Annotated[int, typer.Option(help="captions kept at each word; 1 is greedy")] = 3,
    length_penalty: Annotated[float, typer.Option(help="0 compares log p, 1 log p per word: longer captions")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="pictures at a time")] = 64,
    attention: Annotated[
        Path | None, typer.Option(help="draw where the model looked for each word, into this .png, .pdf, ...")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="of a model trained on precomputed features: the file or folder that has the images'")
    ] = None,
    attributes: Annotated[
        Path | None, typer.Option(help="of a model trained with --attributes given: a dataset_*.json with the images' words")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Print PATH<TAB>CAPTION for each picture; pictures that cannot be read are listed on stderr, with status 1."""
    from fastcap.train import Captioner
    from fastcap.train.setup import find_device

    if batch_size < 1:
        raise bad("caption", "--batch-size", "be at least 1", batch_size, "pass --batch-size 64")
    if attention is not None and features is not None:
        remedy = "leave one of them out: regions of precomputed features have no grid to draw on"
        raise bad("caption", "--attention", "come without --features", str(attention), remedy)
    if attention is not None:
        from fastcap.train import attention_pictures

        attention_pictures.check(attention, len(images))
    captioner = Captioner.load(checkpoint, find_device(device))
    options = {"beam": beam, "length_penalty": length_penalty, "batch_size": batch_size}
    if features is not None:
        from fastcap.data import RegionFeatures

        options["features"] = RegionFeatures(features)
    if attributes is not None:
        from fastcap.data.karpathy import read_attributes

        options["attributes"] = read_attributes(attributes, options.get("features"))
    unread, drawn = [], []
    for told in captioner.files(images, **options):
        if told.caption is None:
            unread.append(told.reason)
        else:
            print(f"{told.path}\t{told.caption}", flush=True)
            drawn += [told] if attention is not None else []
    for reason in unread:
        print(" ".join(reason.split()), file=sys.stderr)
    if unread:
        print(f"fastcap caption: {len(unread)} of {len(images)} pictures could not be read", file=sys.stderr)
    if drawn:
        attention_pictures.draw_files(attention, captioner, drawn)
        print(f"attention: {attention}", file=sys.stderr)
    if unread:
        raise typer.Exit(1)


def evaluate(
    data: Annotated[Path | None, typer.Option(help="folder with a Karpathy-format dataset_*.json and its pictures")] = None,
    references: Annotated[
        Path | None,
        typer.Option(help="in place of --data, without pictures: COCO's captions_*.json, or a dataset_*.json"),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="a captioner's run or checkpoint; may be repeated, a row each")
    ] = None,
    captions: Annotated[
        list[Path] | None, typer.Option(help="captions in COCO's results format, scored as they are; may be repeated")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="the CLIP that judges: a run of train --model clip, or a transformers CLIP")
    ] = None,
    split: Annotated[str | None, typer.Option(help="of the data; test if not given. COCO's files have none")] = None,
    tokenizer: Annotated[str, typer.Option(help="fastcap, or ptb: the Stanford tokenizer, which needs Java")] = "fastcap",
    metrics: Annotated[
        str | None,
        typer.Option(help="such as bleu,cider,diversity; all if not given. meteor and spice run in Java, and are slow"),
    ] = None,
    bootstrap: Annotated[int, typer.Option(help="resamples of the images for 95 % intervals; 0 for none")] = 1000,
    seed: Annotated[int, typer.Option(help="of the resamples")] = 0,
    beam: Annotated[int, typer.Option(help="captions kept at each word; 1 is greedy")] = 1,
    length_penalty: Annotated[float, typer.Option(help="0 compares log p, 1 log p per word: longer captions")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="pictures or texts at a time")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="folder for evaluation.json, evaluation.md, report.html and the captions")
    ] = None,
    per_image: Annotated[
        bool, typer.Option("--per-image", help="each image's caption and scores, too, in JSON and per_image.csv")
    ] = False,
    report_images: Annotated[int, typer.Option(help="most images in report.html: the best, the worst, some between")] = 60,
    partial: Annotated[bool, typer.Option("--partial", help="leave out images without a picture or a caption")] = False,
    clip_prompt: Annotated[str, typer.Option(help="put before captions for the CLIP; published: 'A photo depicts '")] = "",
    features: Annotated[
        Path | None, typer.Option(help="of captioners trained on precomputed features, where these have moved")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Score captions of files and of models: BLEU, METEOR, ROUGE-L, CIDEr, SPICE, retrieval by a CLIP, diversity."""
    from fastcap.train.evaluate import evaluate as run

    names = None if metrics is None else [name.strip() for name in metrics.split(",")]
    made = run(
        data, checkpoint or [], captions or [], references=references, clip=clip, split=split, tokenizer=tokenizer,
        metrics=names, bootstrap=bootstrap, seed=seed, beam=beam, length_penalty=length_penalty, batch_size=batch_size,
        clip_prompt=clip_prompt, features=features, out=out, per_image=per_image, report_images=report_images,
        partial=partial, device=device,
    )  # fmt: skip
    sys.stdout.reconfigure(errors="backslashreplace")  # a path, or a dash, that the terminal cannot show
    print(made.table)
    if made.files:
        print(f"written: {', '.join(map(str, made.files))}", file=sys.stderr)


def scenes(
    out: Annotated[Path, typer.Option(help="folder to write; scenes that stand there are replaced")],
    num_images: Annotated[int, typer.Option(help="pictures; 80% to train on")] = 8000,
    seed: Annotated[int, typer.Option(help="the same seed makes the same data")] = 0,
    regions: Annotated[
        bool, typer.Option("--regions", help="also features of 9 regions and 12 attribute words a picture, with errors")
    ] = False,
) -> None:
    """Small pictures of coloured shapes with five captions each, whose every fact is known."""
    from fastcap.data import write_scene_regions, write_scenes

    _say_written(write_scenes(out, num_images=num_images, seed=seed))
    if regions:
        made = write_scene_regions(out, seed=seed)
        print(
            f"regions in {made.features}, for train --features; the detector, on pictures that it has not learnt from: "
            f"{made.accuracy['shape']:.0%} of shapes right, {made.accuracy['color']:.0%} of colours; "
            f"{made.attributes_right:.0%} of the attribute words true"
        )


def emoji(
    out: Annotated[Path, typer.Option(help="folder to write; emoji that stand there are replaced")],
    size: Annotated[int, typer.Option(help="side of the pictures, in pixels")] = 48,
    font: Annotated[Path | None, typer.Option(help="a colour emoji font; found if not given")] = None,
    seed: Annotated[int, typer.Option(help="of the split into train, val and test")] = 0,
) -> None:
    """The emoji of a font with their names as captions: real pictures, many of them nearly alike."""
    from fastcap.data import write_emoji

    _say_written(write_emoji(out, size=size, font=font, seed=seed))


def _say_written(summary: Any) -> None:
    splits = ", ".join(f"{count} {split}" for split, count in sorted(summary.splits.items()))
    print(f"{summary.images} pictures ({splits}) with {summary.captions} captions in {summary.root}")
    if summary.skipped:
        name, reason = summary.skipped[0]
        print(f"left out {len(summary.skipped)}, the first: {name} ({reason})")


def demo(
    story: Annotated[
        str,
        typer.Option(
            help="smile: MLE against SMILE, masked and by fastcap; attention: none, soft, hard, and coverage; "
            "distinctive: reinforcement by a CLIP, judged by another; glied: GLIED, its ablations, and CIDEr rewarded"
        ),
    ] = "smile",
    data: Annotated[
        str,
        typer.Option(help="emoji, scenes, or auto: for smile emoji where a colour emoji font is installed, else scenes"),
    ] = "auto",
    out: Annotated[str, typer.Option(help="folder for data, runs, numbers and pictures")] = "build/demo",
    seed: Annotated[int, typer.Option(help="of weights, order and, for smile, data; for the others the first of three")] = 0,
    scale: Annotated[float, typer.Option(help="factor on the numbers of steps")] = 1.0,
) -> None:
    """Train captioners on pictures made here, and compare them: by loss, by where they look, or by what they tell apart."""
    if story not in ("smile", "attention", "distinctive", "glied"):
        raise bad("demo", "story", "be one of 'smile', 'attention', 'distinctive', 'glied'", story, "pass smile")
    again = "it starts anew next time" if story == "smile" else "the same command goes on with it"
    try:
        if story == "smile":
            from fastcap.train.demo import run

            run(data, out, seed=seed, scale=scale)
        elif story == "attention":
            from fastcap.train.demo_attention import run

            run(out, seed=seed, scale=scale, dataset=data)
        elif story == "glied":
            from fastcap.train.demo_glied import run

            run(out, seed=seed, scale=scale, dataset=data)
        else:
            from fastcap.train.demo_distinctive import run

            run(out, seed=seed, scale=scale, dataset=data)
    except KeyboardInterrupt:
        print(f"fastcap: the demo was interrupted; {again}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def bench(context: typer.Context) -> None:
    """Run the benchmarks and draw their plots: `fastcap bench --help`."""
    from fastcap.bench import main as run

    run(context.args)


def doctor() -> None:
    """Say which backends run here and, for those that do not, why and how to get them."""
    from fastcap.doctor import report

    print(report())
