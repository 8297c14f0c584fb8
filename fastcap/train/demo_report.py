"""What the demo prints and draws."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .demo import DemoResult
    from .demo_attention import AttentionResult

_console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)

_SCORES = {
    "mean_length": ("length, words", "{:.1f}"),
    "unique_share": ("unique captions", "{:.0%}"),
    "vocabulary": ("vocabulary, words", "{:.0f}"),
    "word_precision": ("words found in a reference", "{:.0%}"),
    "fact_precision": ("fact precision", "{:.3f}"),
    "fact_recall": ("fact recall", "{:.3f}"),
    "oracle_r1": ("oracle R@1", "{:.3f}"),
}
_ATTENTION_SCORES = {
    "val_ce": ("validation CE", "{:.3f}"),
    "coverage": ("coverage R", "{:.1f}"),
    "oracle_r1": ("oracle R@1", "{:.3f}"),
    "fact_precision": ("precision", "{:.3f}"),
    "fact_recall": ("recall", "{:.3f}"),
    "mean_length": ("words", "{:.1f}"),
}


def say(text: str) -> None:
    _console.print(text, markup=False)


def title(text: str) -> None:
    _console.print(f"\n[bold]{text}[/bold]")


def compare(made: DemoResult) -> None:
    """The two formulations side by side, then the captions of the two captioners."""
    masked, ours = made.masked, made.fastcap
    steps = len(masked.losses)
    table = Table(title="SMILE, two formulations from the same seed", title_justify="left")
    for name in ("", "masked (paper)", "fastcap", ""):
        table.add_column(name, justify="right" if name else "left")
    shown = sorted({0, *range(9, steps, 10), steps - 1})
    for i in shown:
        a, b = masked.losses[i], ours.losses[i]
        table.add_row(f"loss of step {i + 1}", f"{a:.6f}", f"{b:.6f}", f"differ by {abs(a - b) / abs(a):.1e}")
    table.add_section()
    ratio = masked.milliseconds / ours.milliseconds
    times = [f"{x.milliseconds:.2f} ms" for x in (masked, ours)]
    table.add_row("loss, forward + backward", *times, f"{ratio:.1f} times faster")
    peaks = ["not measured" if x.peak_bytes is None else f"{x.peak_bytes / 1e6:.1f} MB" for x in (masked, ours)]
    table.add_row("its peak extra memory", *peaks, "the gradient included")
    _console.print(table)
    say(f"Largest difference of the loss over {steps} steps: {made.largest_difference:.1e} relative.")

    table = Table(title=f"Captions of {len(made.captions)} test pictures, greedy", title_justify="left")
    table.add_column("")
    for name in made.scores:
        table.add_column(name, justify="right")
    for key, (label, form) in _SCORES.items():
        if all(key in scores for scores in made.scores.values()):
            table.add_row(label, *(form.format(scores[key]) for scores in made.scores.values()))
    _console.print()
    _console.print(table)
    say(f"{made.seconds:.0f} s in all.")


def attention_line(scores: dict[str, float | None]) -> str:
    """The scores of one run."""
    shown = {name: column for name, column in _ATTENTION_SCORES.items() if scores[name] is not None}
    return ", ".join(f"{label} {form.format(scores[name])}" for name, (label, form) in shown.items())


def compare_attention(made: AttentionResult, labels: dict[str, str]) -> None:
    """For each way to attend the mean over the seeds, and each seed; then the trends, held or not."""
    table = Table(title=f"Attention on scenes, MLE, {made.steps} steps, seeds {made.seeds}", title_justify="left")
    table.add_column("")
    for label, _ in _ATTENTION_SCORES.values():
        table.add_column(label, justify="right")
    for name, label in labels.items():
        seeds = made.scores[name]
        columns = {key: [scores[key] for scores in seeds] for key in _ATTENTION_SCORES}
        means = {key: None if None in values else sum(values) / len(values) for key, values in columns.items()}
        for title, scores in ((label, means), *((f"  seed {k}", one) for k, one in zip(made.seeds, seeds, strict=True))):
            cells = ["" if scores[key] is None else form.format(scores[key]) for key, (_, form) in _ATTENTION_SCORES.items()]
            table.add_row(title, *cells, style="bold" if scores is means else "dim")
        table.add_section()
    _console.print()
    _console.print(table)
    say("Validation CE per word and coverage R per caption, sum over locations of (1 - sum over words of alpha)^2, with the "
        "words given; the rest of greedy captions of test pictures.")  # fmt: skip
    table = Table(title="Expected, and what these runs show", title_justify="left", show_header=False)
    for trend in made.trends:
        form = _ATTENTION_SCORES[trend.score][1]
        against = f"{form.format(trend.mean)} against {form.format(trend.other_mean)}"
        table.add_row(trend.expected, against, trend.verdict)
    _console.print(table)
    say(f"{made.seconds:.0f} s in all.")


def draw_captions(path: Path, items: list[dict], rows: list[dict]) -> None:
    """Ten pictures, spread over the test set, with what each captioner says and the fullest reference."""
    import textwrap

    from matplotlib import pyplot as plt

    differ = [i for i, row in enumerate(rows) if row["MLE"] != row["SMILE"]] or list(range(len(rows)))
    chosen = [differ[round(k * (len(differ) - 1) / 9)] for k in range(10)] if len(differ) > 1 else differ
    figure, axes = plt.subplots(5, 4, figsize=(13, 12), gridspec_kw={"width_ratios": [1, 2.6, 1, 2.6]})
    for ax in axes.flat:
        ax.axis("off")
    for place, i in enumerate(chosen):
        picture, text = axes[place // 2][place % 2 * 2 : place % 2 * 2 + 2]
        picture.imshow((items[i]["image"].permute(1, 2, 0).numpy() * 0.5 + 0.5).clip(0, 1), interpolation="nearest")
        y = 0.97
        reference = max(rows[i]["references"], key=len)
        for name, caption, colour in (
            ("Reference", reference, "0.45"), ("MLE", rows[i]["MLE"], "tab:blue"), ("SMILE", rows[i]["SMILE"], "tab:red"),
        ):  # fmt: skip
            wrapped = textwrap.wrap(f"{name}: {caption}", 46) or [name]
            text.text(0, y, "\n".join(wrapped), va="top", fontsize=10.5, color=colour, transform=text.transAxes)
            y -= 0.14 * len(wrapped) + 0.06
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_losses(path: Path, made: DemoResult) -> None:
    """The loss of each step by both formulations, and how far they are apart."""
    from matplotlib import pyplot as plt

    n = len(made.masked.losses)
    apart = [abs(a - b) / abs(a) for a, b in zip(made.masked.losses, made.fastcap.losses, strict=False)]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1])
    above.plot(range(1, n + 1), made.masked.losses, lw=4, color="0.75", label="masked formulation (paper)")
    above.plot(range(1, n + 1), made.fastcap.losses[:n], lw=1.2, color="tab:red", label="fastcap")
    above.set_ylabel("SMILE loss")
    above.legend(frameon=False)
    below.semilogy(range(1, n + 1), [max(a, 1e-9) for a in apart], color="tab:red", lw=1)
    below.axhline(1e-4, color="0.5", lw=1, ls="--")
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
