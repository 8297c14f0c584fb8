"""One page of HTML for an evaluation: scores with intervals, and pictures with their captions. It needs no network.

Every text is escaped, the page holds no script, and its policy lets a browser load nothing: pictures are data URIs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fastcap.data.text import WORD_PATTERN, words
from fastcap.eval import _report_style
from fastcap.eval.captioned import Column
from fastcap.eval.table import _groups as groups

_WORD = re.compile(WORD_PATTERN)
_MINUS = "−"


@dataclass(frozen=True)
class Word:
    """A word of a caption and where the captioner looked for it: a data URI, dark where it did not, laid on the picture."""

    text: str
    shade: str


@dataclass(frozen=True)
class Said:
    """What one captioner says of an image, its scores by name, and its words with where it looked, if it has attention."""

    name: str
    caption: str
    scores: Mapping[str, float] = field(default_factory=dict)
    attended: Sequence[Word] = ()


@dataclass(frozen=True)
class Card:
    """An image in the report.

    title: its id and name. picture, thumbnail: data URIs, or "" where there is none; size: of the picture, width and height.
    missing: why there is no picture.
    """

    title: str
    references: Sequence[str]
    said: Sequence[Said]
    picture: str = ""
    thumbnail: str = ""
    size: tuple[int, int] = (1, 1)
    missing: str = ""


def report(
    document: Mapping[str, Any],
    heading: str,
    sections: Sequence[tuple[str, str, Sequence[Card]]],
    notes: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        document: what `evaluation.json` holds.
        heading: on what was evaluated, in a line.
        sections: (title, explanation, cards) of the images that are shown.
        notes: what else a reader of the cards should know.
    """
    body = [
        f"<header><h1>Evaluation of captions</h1><p>{escape(heading)}</p></header>",
        *(f'<p class="warning"><strong>Warning</strong> {escape(text)}.</p>' for text in document["warnings"]),
        f"<section><h2>Scores</h2>{''.join(_scores(document))}</section>",
        *_comparisons(document["comparisons"]),
        *_sections(sections, notes),
        f"<section><h2>How it was measured</h2>{_how(document)}</section>",
    ]
    return _report_style.PAGE.format(title=escape(heading), style=_report_style.STYLE, body="\n".join(body))


def _scores(document: Mapping[str, Any]) -> Iterator[str]:
    rows, resamples = document["rows"], document["settings"]["bootstrap"]
    if resamples:
        yield (
            f'<p class="note">Below a score its 95 % interval, from {resamples:,} resamples of the images; the bar shows it '
            "on the scale of its column.</p>"
        )
    for group, columns in groups():
        shown = [column for column in columns if any(column.key in row["scores"] for row in rows)]
        lines = [(row["name"], [_cell(column, row, rows) for column in shown]) for row in rows]
        yield from _table(group, [column.head for column in shown], lines)
    notes = _notes(rows)
    if notes:
        yield f'<details class="note"><summary>Not measured</summary><ul>{"".join(notes)}</ul></details>'


def _table(corner: str, heads: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """Names and heads are text, cells are HTML; nothing where there is no column."""
    if heads:
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in (corner, *heads))
        body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>' for name, cells in lines)
        yield f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(column: Column, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if column.key not in row["scores"]:
        return "<td>–</td>"
    text = column.form.format(row["scores"][column.key])
    if column.key not in row["intervals"]:
        return f"<td>{escape(text)}</td>"
    low, high = row["intervals"][column.key]
    ends = [end for other in rows for end in other["intervals"].get(column.key, ())]
    least, most = min(ends), max(ends)
    scale = 100 / (most - least) if most > least else 0.0
    left, width = (low - least) * scale, max((high - low) * scale, 2.0)
    return (
        f"<td>{escape(text)}<small>{escape(column.form.format(low))} to {escape(column.form.format(high))}</small>"
        f'<span class="range"><i style="left:{min(left, 98):.1f}%;width:{width:.1f}%"></i></span></td>'
    )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        for metric, why in row["not_measured"].items():
            found = reasons.setdefault((why["reason"], why["remedy"]), {})
            found.setdefault(metric, []).append(row["name"])
    made = []
    for (reason, remedy), metrics in reasons.items():
        concerned = {name for names in metrics.values() for name in names}
        of = "" if len(concerned) == len(rows) else f" of {', '.join(sorted(concerned))}"
        made.append(f"<li>{escape(', '.join(metrics) + of)}: {escape(reason)}; {escape(remedy)}.</li>")
    return made


def _comparisons(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of each captioner the differences to the first, whose intervals are of the same resamples."""
    if not comparisons:
        return
    yield (
        '<section><h2>Differences</h2><p class="note">On the same images, with the 95 % interval of the difference: one '
        "that holds 0 shows none, and is grey.</p>"
    )
    for group, columns in groups():
        shown = [column for column in columns if any(column.key in one["differences"] for one in comparisons)]
        lines = [
            (f"{one['first']} {_MINUS} {one['second']}", [_difference(c, one["differences"].get(c.key)) for c in shown])
            for one in comparisons
        ]
        yield from _table(group, [column.head for column in shown], lines)
    yield "</section>"


def _difference(column: Column, found: Mapping[str, float] | None) -> str:
    if found is None:
        return "<td>–</td>"
    value, low, high = (signed(column, found[name]) for name in ("value", "low", "high"))
    kind = "same" if found["low"] <= 0 <= found["high"] else "differs"
    return f'<td class="{kind}">{escape(value)}<small>{escape(low)} to {escape(high)}</small></td>'


def signed(column: Column, value: float) -> str:
    """With its sign, unless it rounds to zero."""
    size = column.form.format(abs(value))
    zero = size == column.form.format(0.0)
    return size if zero else f"{'+' if value > 0 else _MINUS}{size}"


def _sections(sections: Sequence[tuple[str, str, Sequence[Card]]], notes: Sequence[str]) -> Iterator[str]:
    if not any(cards for _, _, cards in sections):
        return
    looked = any(said.attended for _, _, cards in sections for card in cards for said in card.said)
    yield (
        '<p class="legend">Words that no reference of the image has are <span class="foreign">underlined</span>. '
        "Beside a caption stand its own scores."
        f"{' Below it, for each word, where the captioner looked: bright.' if looked else ''} {escape(' '.join(notes))}</p>"
    )
    for title, explanation, cards in sections:
        if cards:
            made = "".join(map(_card, cards))
            head = f'<h2>{escape(title)}</h2><p class="note">{escape(explanation)}</p>'
            yield f'<section>{head}<div class="cards">{made}</div></section>'


def _card(card: Card) -> str:
    width, height = card.size
    style = f' style="--p:url({card.thumbnail});--a:{width / height:.3f}"' if card.thumbnail else ""
    if card.picture:
        shown = f'<img class="picture" src="{escape(card.picture)}" width="{width}" height="{height}" alt="">'
    else:
        shown = f'<p class="missing">{escape(card.missing)}</p>' if card.missing else ""
    known = {word for reference in card.references for word in words(reference)}
    items = "".join(f'<li dir="auto">{escape(reference)}</li>' for reference in card.references)
    count = len(card.references)
    references = f"<details><summary>{count} reference{'s' if count != 1 else ''}</summary><ul>{items}</ul></details>"
    said = "".join(_said(one, known) for one in card.said)
    return f'<article class="card"{style}><h3>{escape(card.title)}</h3>{shown}<dl>{said}</dl>{references}</article>'


def _said(said: Said, known: set[str]) -> str:
    chips = "".join(f'<span class="chip">{escape(name)} {value:.2f}</span>' for name, value in said.scores.items())
    caption = _marked(said.caption, known) or "<em>no word</em>"
    tiles = "".join(
        f'<figure><span class="tile"><img src="{escape(word.shade)}" alt=""></span>'
        f"<figcaption>{escape(word.text)}</figcaption></figure>"
        for word in said.attended
    )
    looked = f'<div class="looked">{tiles}</div>' if tiles else ""
    return f'<dt>{escape(said.name)} {chips}</dt><dd dir="auto"><p>{caption}</p>{looked}</dd>'


def _marked(caption: str, known: set[str]) -> str:
    """The caption, escaped, with the words marked that are not among the known ones."""
    made, end = [], 0
    for match in _WORD.finditer(caption):
        made.append(escape(caption[end : match.start()]))
        word = escape(match.group())
        made.append(word if match.group().lower() in known else f'<span class="foreign">{word}</span>')
        end = match.end()
    return "".join([*made, escape(caption[end:])]).strip()


def _how(document: Mapping[str, Any]) -> str:
    lines = {"command": document["command"]} | {
        name.replace("_", " "): value for name, value in document["settings"].items() if value not in (None, "", False)
    }
    if document["clip"]:
        lines["fingerprint of the CLIP"] = document["clip"]["fingerprint"]
    lines["versions"] = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    lines["seconds"] = document["seconds"]["all"]
    shown = ((name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in lines.items())
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>' for name, value in shown)
    return f'<div class="wide"><table class="how"><tbody>{rows}</tbody></table></div>'
