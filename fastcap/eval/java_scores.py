"""METEOR and SPICE: Java programs that pycocoevalcap carries. Where one cannot run, the answer says why."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np

from fastcap.eval import _java
from fastcap.eval.bootstrap import mean_of, of_sums
from fastcap.eval.captioned import Found, NotMeasured, Task

# METEOR 1.5 for English: how much an exact, stemmed, synonymous or paraphrased match weighs, and the four parameters.
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_STATISTICS = 23  # numbers in a line of its output
_JAVA_8 = "SPICE was made for Java 8: name such a java in FASTCAP_JAVA"
_CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def meteor(task: Task) -> Found | NotMeasured:
    """METEOR 1.5 of the whole set, from the sums of its statistics, and of each image."""
    if missing := task.without_references():
        return missing
    if isinstance(task.tokens, NotMeasured):
        return task.tokens
    lines = []
    for caption, references in zip(task.tokens.captions, task.tokens.references, strict=True):
        # "|||" separates the parts of a line, so no word may be one.
        parts = [" ".join(words).replace("|||", " ") for words in (*references, caption)]
        lines.append(" ||| ".join(("SCORE", *parts)))
    try:
        jar = _java.coco_file("meteor", "meteor-1.5.jar")
        options = ["-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
        said = _java.run("METEOR", options, lines, cwd=jar.parent)
        each = _statistics(said, len(lines))
    except _java.Unavailable as error:
        return NotMeasured(error.reason, error.remedy)
    scores = {key: float(value) for key, value in meteor_of(each.sum(0)).items()}
    return Found(scores, {key: value.tolist() for key, value in meteor_of(each).items()}, of_sums(each, meteor_of))


def _statistics(lines: list[str], images: int) -> np.ndarray:
    """[N, 23] float64."""
    try:
        each = np.array([[float(number) for number in line.split()] for line in lines])
    except ValueError:
        each = np.zeros(0)
    if each.shape != (images, _STATISTICS) or not np.isfinite(each).all():
        got = lines[0][:80] if lines else "nothing"
        raise _java.Unavailable(f"METEOR answered {len(lines)} lines for {images} images ({got})", "check java -version")
    whole = (each[:, 21:] == each[:, :2]).all(1) & (each[:, 20] == 1)  # said as a reference has it, which has no penalty,
    each[whole, 20] = 0  # and no chunk in the sums
    return each


def meteor_of(statistics: np.ndarray) -> dict[str, np.ndarray]:
    """METEOR of statistics [..., 23] or of sums of them: [...].

    They are the words of caption and reference, how many of these are function words, for each kind of match the content
    words of caption and reference and the function words of both that it matched, the chunks, and the words matched in both.
    """
    length, function = statistics[..., :2], statistics[..., 2:4]
    # kind of match, content or function words, of caption or reference
    matched = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 2, 2)
    chunks, words = statistics[..., 20], statistics[..., 21:]
    content, of_function = (np.einsum("...ks,k->...s", matched[..., n, :], _WEIGHTS) for n in (0, 1))
    weight = _DELTA * (length - function) + (1 - _DELTA) * function
    share = (_DELTA * content + (1 - _DELTA) * of_function) / np.where(weight > 0, weight, 1)
    precision, recall = share[..., 0], share[..., 1]
    below = _ALPHA * precision + (1 - _ALPHA) * recall
    mean = precision * recall / np.where(below > 0, below, 1)
    fragments = chunks / np.where(words.sum(-1) > 0, words.sum(-1) / 2, 1)
    return {"meteor": mean * (1 - _GAMMA * fragments**_BETA)}


def spice(task: Task) -> Found | NotMeasured:
    """SPICE: the mean over images of the F-score of the propositions in a caption and its references."""
    if missing := task.without_references():
        return missing
    if isinstance(task.tokens, NotMeasured):
        return task.tokens
    entries = [
        {"image_id": n, "test": " ".join(caption), "refs": [" ".join(words) for words in references]}
        for n, (caption, references) in enumerate(zip(task.tokens.captions, task.tokens.references, strict=True))
    ]
    try:
        jar = _java.coco_file("spice", "spice-1.0.jar")
        missing_jars = [name for name in _CORENLP if not (jar.parent / "lib" / name).is_file()]
        if missing_jars:
            remedy = (
                "python -c 'from pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; get()' "
                "downloads them (400 MB)"
            )
            return NotMeasured(f"SPICE lacks {' and '.join(missing_jars)} in {jar.parent / 'lib'}", remedy)
    except _java.Unavailable as error:
        return NotMeasured(error.reason, error.remedy)
    try:
        return mean_of("spice", _spice(jar, entries))
    except _java.Unavailable as error:
        return NotMeasured(error.reason, _JAVA_8)


def _spice(jar: Path, entries: list[dict]) -> np.ndarray:
    """[N] float64. Files of its own in a folder of its own: that of the package may be read-only."""
    with tempfile.TemporaryDirectory(prefix="fastcap-spice-") as folder:
        given, made = Path(folder, "given.json"), Path(folder, "made.json")
        given.write_text(json.dumps(entries), encoding="utf-8")
        options = ["-Xmx8G", "-jar", jar.name, str(given), "-out", str(made), "-subset", "-silent"]
        _java.run("SPICE", options, [], cwd=jar.parent, limit=120 + 2.0 * len(entries))
        try:
            entries_made = json.loads(made.read_text(encoding="utf-8"))
            found = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in entries_made}
            each = np.array([float(found[n]) for n in range(len(entries))])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _java.Unavailable("SPICE wrote no scores", _JAVA_8) from error
    if not all(math.isfinite(score) for score in each):
        raise _java.Unavailable("SPICE gave a score that is no number", _JAVA_8)
    return each
