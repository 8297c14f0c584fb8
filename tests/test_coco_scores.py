"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE: pycocoevalcap's numbers, without its files, prints and crashes."""

from __future__ import annotations

import math
import os
import random
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from fastcap.errors import FastcapError
from fastcap.eval import Captioned, _java, coco_scores, java_scores, measure, ptb_tokenize, table
from fastcap.eval.captioned import Found, NotMeasured, Task, Tokens
from fastcap.eval.table import Row

SHARED = Path(os.environ.get("FASTCAP_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "data" / "coco_captions"
WORDS = ["bleu", "rouge_l", "cider", "self_bleu"]


@pytest.fixture(autouse=True)
def no_java(monkeypatch, request):
    """METEOR needs seconds to start: only tests that say so have Java."""
    if "with_java" not in request.fixturenames:
        monkeypatch.setenv("FASTCAP_JAVA", "")


@pytest.fixture(scope="module")
def with_java():
    try:
        _java.java(), _java.coco_file("meteor", "meteor-1.5.jar")
    except _java.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def people():
    """The first captions of 1,000 images of COCO against the other four."""
    if not SHARED.is_dir():
        pytest.skip("needs the COCO captions: set FASTCAP_SHARED")
    files = [(SHARED / f"reference{n}.txt").read_text(encoding="utf-8").splitlines()[:1000] for n in range(5)]
    return Captioned(files[0], list(map(list, zip(*files[1:], strict=True))))


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a shell script in Java's place."""

    def make(text):
        path = tmp_path / "java"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("FASTCAP_JAVA", str(path))

    return make


def made_up(images, seed=0):
    """Captions of few words, so that n-grams repeat; some empty, references of every number and length."""
    rng = random.Random(seed)

    def caption():
        return rng.choices("a red blue car dog on the the grass".split(), k=rng.choice([0, 1, 2, 3, 5, 8, 12, 30]))

    return Tokens([caption() for _ in range(images)], [[caption() for _ in range(rng.randint(1, 5))] for _ in range(images)])


def as_coco(tokens):
    """The references and results that scorers of pycocoevalcap take."""
    references = {n: [" ".join(words) for words in each] for n, each in enumerate(tokens.references)}
    return references, {n: [" ".join(words)] for n, words in enumerate(tokens.captions)}


def tokens_of(captioned):
    return Task(captioned).tokens


# Known answers


def test_people_score_as_published_notes_have_it(people):
    scores = measure(people, metrics=WORDS).scores
    wanted = {"bleu_4": 0.193, "rouge_l": 0.466, "cider": 0.910}
    assert {key: scores[key] for key in wanted} == pytest.approx(wanted, abs=0.002)


@pytest.mark.slow
def test_meteor_of_people_is_the_known_one(with_java, people):
    found = measure(people, metrics=["meteor"], bootstrap=200)
    assert found.scores["meteor"] == pytest.approx(0.240, abs=0.002)
    low, high = found.intervals["meteor"]
    assert found.scores["meteor"] - 0.01 < low < found.scores["meteor"] < high < found.scores["meteor"] + 0.01


def test_worked_captions():
    """4 of 5 words, 2 of 4 pairs; closest reference 5 words. ROUGE-L: a common subsequence of 4 in 5 and 6 words."""
    tokens = Tokens(["a b c x d".split()], [["a b c d e f".split(), "q r s t u".split()]])
    counts = coco_scores.bleu_counts(tokens)
    assert counts.tolist() == [[4, 2, 1, 0, 5, 4, 3, 2, 5, 5]]
    found = coco_scores.bleu_of(counts[0])
    assert found["bleu_1"] == pytest.approx(0.8) and found["bleu_2"] == pytest.approx(math.sqrt(0.8 * 0.5))
    precision, recall = 4 / 5, 4 / 6
    assert coco_scores.rouge_of(tokens)[0] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


# Against pycocoevalcap


@pytest.fixture(params=["people", "made up", "one word"])
def tokens(request):
    if request.param == "people":
        return tokens_of(request.getfixturevalue("people"))
    if request.param == "made up":
        return made_up(300)
    return Tokens([["a"], ["b"], []], [[["a"], ["a"]], [[]], [["a"]]])


def test_bleu_is_that_of_pycocoevalcap(tokens):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    counts = coco_scores.bleu_counts(tokens)
    score, each = bleu.Bleu(4).compute_score(*as_coco(tokens), verbose=0)
    assert list(coco_scores.bleu_of(counts.sum(0)).values()) == pytest.approx(score, abs=1e-9)
    assert np.abs(np.stack(list(coco_scores.bleu_of(counts).values())) - np.array(each)).max() < 1e-9


def test_rouge_l_is_that_of_pycocoevalcap_where_there_are_words(tokens):
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    _, each = rouge.Rouge().compute_score(*as_coco(tokens))
    found = coco_scores.rouge_of(tokens)
    worded = np.array([bool(said) and all(refs) for said, refs in zip(tokens.captions, tokens.references, strict=True)])
    assert worded.any() and np.abs(found - each)[worded].max() < 1e-9
    assert (found[[not said for said in tokens.captions]] == 0).all()  # pycocoevalcap: 1 where both are empty


def test_cider_is_that_of_pycocoevalcap(tokens):
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    task = Task(Captioned([" ".join(w) for w in tokens.captions], [[" ".join(w) for w in r] for r in tokens.references]))
    assert task.tokens == tokens
    score, each = cider.Cider().compute_score(*as_coco(tokens))
    found = coco_scores.cider(task)
    assert found.scores["cider"] == pytest.approx(score, abs=1e-6)
    assert np.abs(np.array(found.each["cider"]) - each).max() < 1e-6


# What METEOR 1.5 of pycocoevalcap 1.2 answered for five captions: its statistics, their scores and that of the set.
SAID = ["two dogs run on the beach", "a man rides a horse", "cats", "a red car stops", "the the the"]
OF_THEM = [["two dogs run on the beach"], ["a person rides horses", "man on horse"], ["a dog"], ["red cars"], ["the"]]
STATISTICS = """\
6 6 3 3 3 3 3 3 0 0 0 0 0 0 0 0 0 0 0 0 1 6 6
5 3 2 1 2 2 0 0 0 0 0 0 0 0 0 0 0 0 0 0 2 2 2
1 2 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
4 2 1 0 1 1 0 0 1 1 0 0 0 0 0 0 0 0 0 0 1 2 2
3 1 3 1 0 0 1 1 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1"""
EACH, ALL = [1.0, 0.3157894736842105, 0.0, 0.3473961178344186, 0.3076923076923077], 0.38710110862701347


@pytest.mark.skipif(os.name != "posix", reason="writes a shell script")
def test_meteor_follows_from_its_statistics(program):
    """A caption that is its reference has no chunk in the sums: METEOR does not punish it."""
    pytest.importorskip("pycocoevalcap")
    program(f"cat <<END\n{STATISTICS}\nEND")
    found = measure(Captioned(SAID, OF_THEM), metrics=["meteor"])
    assert found.each["meteor"] == pytest.approx(EACH, abs=1e-12)
    assert found.scores["meteor"] == pytest.approx(ALL, abs=1e-12)


def test_meteor_survives_odd_captions(with_java, capfd):
    """Those that its protocol would misread, between the worked ones. Java needs seconds to read its paraphrases."""
    odd = ["", "||| SCORE ||| a", "EVAL ||| 1.0", "“ü” 日本 😀 \u2028 x", "a" * 3000, "%s \\n ' \" & <b>"]
    captioned = Captioned(odd + SAID, [["a dog"], ["||| a"], ["EVAL"], ["ü x"], ["a ||| b", ""], ["x"], *OF_THEM])
    found = java_scores.meteor(Task(captioned))
    assert isinstance(found, Found) and len(found.each["meteor"]) == len(captioned.captions)
    assert found.each["meteor"][0] == 0 and all(0 <= score <= 1 for score in found.each["meteor"])
    assert found.each["meteor"][len(odd) :] == pytest.approx(EACH, abs=1e-9)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_meteor_is_that_of_pycocoevalcap(with_java, people):
    meteor = pytest.importorskip("pycocoevalcap.meteor.meteor")
    tokens = tokens_of(people)
    tokens = Tokens(tokens.captions[:200], tokens.references[:200])
    found = java_scores.meteor(Task(Captioned(people.captions[:200], people.references[:200])))
    scorer = meteor.Meteor()
    score, each = scorer.compute_score(*as_coco(tokens))
    assert found.each["meteor"] == pytest.approx(each, abs=1e-9)
    assert found.scores["meteor"] == pytest.approx(score, abs=1e-9)


# What cannot be measured


def test_one_image_has_no_cider_and_no_self_bleu():
    found = measure(Captioned(["a red car"], [["a red car"]]), metrics=WORDS)
    assert set(found.not_measured) == {"cider", "self_bleu"} and found.scores["bleu_1"] == pytest.approx(1)
    assert "log(1/1), is 0" in found.not_measured["cider"].reason


def test_images_without_references_are_named():
    found = measure(Captioned(["a", "b"], [["a"], []]))
    for name in ("bleu", "meteor", "rouge_l", "cider", "spice"):
        assert found.not_measured[name] == NotMeasured("image 1 has no reference", "give every image a reference caption")
    assert "self_bleu" in found.scores


def test_captions_without_a_word_score_nothing_and_break_nothing():
    found = measure(Captioned(["", "."], [["a car"], ["..."]]), metrics=WORDS, bootstrap=20)
    assert {found.scores[key] for key in ("rouge_l", "cider", "self_bleu")} == {0.0}
    assert found.scores["bleu_4"] == pytest.approx(0, abs=1e-9) and not found.not_measured
    assert all(math.isfinite(value) for each in found.intervals.values() for value in each)


def test_without_java_there_is_no_meteor_and_the_table_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("FASTCAP_JAVA")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    found = measure(Captioned(["a", "b"], [["a"], ["b"]]))
    assert found.not_measured["meteor"] == NotMeasured("no Java was found", _java.INSTALL_JAVA)
    assert "bleu_4" in found.scores and "meteor" not in found.scores
    shown = table([Row("a", found.scores, found.not_measured)])
    assert "Not measured: meteor (no Java was found; install a Java runtime" in shown


def test_without_java_the_ptb_tokenizer_leaves_all_of_words_unmeasured():
    found = measure(Captioned(["a", "b"], [["a"], ["b"]]), tokenizer="ptb")
    for name in ("bleu", "meteor", "rouge_l", "cider", "spice", "self_bleu"):
        assert found.not_measured[name].reason == "FASTCAP_JAVA is empty, which does without Java"
    assert found.scores["mean_length"] == 1


def test_without_pycocoevalcap_only_java_is_missing(monkeypatch):
    monkeypatch.setattr(_java.importlib.util, "find_spec", lambda name: None)
    found = measure(Captioned(["a", "b"], [["a"], ["b"]]))
    for name in ("meteor", "spice"):
        assert found.not_measured[name] == NotMeasured("pycocoevalcap is not installed", _java.INSTALL_PACKAGE)
    assert {"bleu_4", "rouge_l", "cider", "self_bleu"} <= set(found.scores)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo 'Unsupported class file' >&2; exit 1", "METEOR failed (Unsupported class file)"),
        ("exit 3", "METEOR failed (status 3)"),
        ("kill -9 $$", "METEOR failed (status -9)"),
        ("exit 0", "METEOR answered 0 lines for 2 images (nothing)"),
        ("cat", "METEOR answered 2 lines for 2 images (SCORE ||| a ||| a)"),
        ("echo 1.0 2.0; echo 1.0", "METEOR answered 2 lines for 2 images (1.0 2.0)"),
        ("n=$(printf 'nan %.0s' $(seq 23)); echo $n; echo $n", f"METEOR answered 2 lines for 2 images ({'nan ' * 20})"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="writes a shell script")
def test_a_java_that_fails_is_a_reason_and_no_crash(program, text, reason):
    pytest.importorskip("pycocoevalcap")
    program(text)
    found = measure(Captioned(["a", "b"], [["a"], ["b"]]), metrics=["meteor"])
    assert found.not_measured["meteor"].reason == reason and found.scores == {}


@pytest.mark.skipif(os.name != "posix", reason="writes a shell script")
def test_a_java_that_hangs_is_ended(program, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(_java, "_TIMEOUT", 0.3)
    program("exec sleep 60")
    began = time.perf_counter()
    found = measure(Captioned(["a", "b"], [["a"], ["b"]]), metrics=["meteor"])
    assert "METEOR did not end within" in found.not_measured["meteor"].reason and time.perf_counter() - began < 10


@pytest.mark.skipif(os.name != "posix", reason="writes a shell script")
def test_a_java_named_from_here_runs_elsewhere_too(program, monkeypatch, tmp_path):
    """METEOR runs in its own folder, where a relative path would lead somewhere else."""
    pytest.importorskip("pycocoevalcap")
    program(f"cat >{tmp_path / 'read'}; exit 3")
    monkeypatch.chdir(tmp_path)  # where `program` wrote java
    for name, value in (("FASTCAP_JAVA", "./java"), ("PATH", ".:/usr/bin:/bin")):
        (tmp_path / "read").unlink(missing_ok=True)
        monkeypatch.delenv("FASTCAP_JAVA", raising=False)
        monkeypatch.setenv(name, value)
        found = measure(Captioned(["a", "b"], [["a"], ["b"]]), metrics=["meteor"])
        assert found.not_measured["meteor"].reason == "METEOR failed (status 3)" and (tmp_path / "read").is_file()


def test_a_java_that_is_not_there_is_a_reason(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("FASTCAP_JAVA", "/nowhere/java")
    found = measure(Captioned(["a", "b"], [["a"], ["b"]]), metrics=["meteor"])
    assert found.not_measured["meteor"].reason == "METEOR could not be started (No such file or directory)"


@pytest.fixture
def spice_jars(tmp_path, monkeypatch):
    """A folder with files of the names of SPICE's; returned to be filled."""
    folder = tmp_path / "spice"
    (folder / "lib").mkdir(parents=True)
    (folder / "spice-1.0.jar").write_text("")
    monkeypatch.setattr(_java, "coco_file", lambda *parts: tmp_path.joinpath(*parts))
    return folder / "lib"


def test_spice_without_its_jars_says_which_and_downloads_nothing(spice_jars):
    (spice_jars / "stanford-corenlp-3.6.0.jar").write_text("")
    found = measure(Captioned(["a", "b"], [["a"], ["b"]]), metrics=["spice"]).not_measured["spice"]
    assert found.reason == f"SPICE lacks stanford-corenlp-3.6.0-models.jar in {spice_jars}"
    assert "get_stanford_models" in found.remedy and len(list(spice_jars.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="writes a shell script")
def test_spice_with_its_jars_is_the_mean_of_the_images(spice_jars, program):
    """The program's side of the protocol: it is given a file of captions, and writes one of scores, in any order."""
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (spice_jars / name).write_text("")
    scores = '[{"image_id": 1, "scores": {"All": {"f": 0.5}}}, {"image_id": 0, "scores": {"All": {"f": 0.25}}}]'
    captioned = Captioned(["a", "b"], [["a"], ["b"]])
    program(f'grep -q \'"test": "a", "refs": ..a\' "$5" || exit 9\necho \'{scores}\' > "$7"')
    found = measure(captioned, metrics=["spice"], bootstrap=50)
    assert found.scores == {"spice": 0.375} and found.each == {"spice": [0.25, 0.5]}
    assert found.intervals["spice"] == (0.25, 0.5)
    for text, reason in (
        ("exit 0", "SPICE wrote no scores"),
        ("echo '[]' > \"$7\"", "SPICE wrote no scores"),
        (f"echo '{scores.replace('0.5', 'NaN')}' > \"$7\"", "SPICE gave a score that is no number"),
        ("echo 'module java.base does not opens' >&2; exit 1", "SPICE failed (module java.base does not opens)"),
    ):
        program(text)
        why = measure(captioned, metrics=["spice"]).not_measured["spice"]
        assert why.reason == reason and "Java 8" in why.remedy


# Options


def test_only_what_was_asked_for_is_measured():
    found = measure(Captioned(["a", "b"], [["a"], ["b"]]), metrics=["rouge_l"])
    assert found.scores == {"rouge_l": 1.0} and found.not_measured == {} and found.each == {"rouge_l": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "stanford"}, r"tokenizer must be one of fastcap, ptb, got 'stanford'; pass 'fastcap'"),
        ({"bootstrap": -1}, r"bootstrap must be an integer of at least 0, got -1; pass bootstrap=1000"),
        ({"bootstrap": True}, r"bootstrap must be an integer"),
        ({"bootstrap": 1}, r"bootstrap must be 0 or at least 2, got 1"),
        ({"seed": 0.5}, r"seed must be an integer of at least 0, got 0\.5; pass seed=0"),
        ({"metrics": ["bleu_4"]}, r"metrics must be a list of some of bleu, meteor, .*, got \['bleu_4'\]"),
        ({"metrics": "bleu"}, r"metrics must be a list of some of bleu"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(FastcapError, match=rf"fastcap\.eval\.measure: {message}"):
        measure(Captioned(["a"], [["a"]]), **options)


def test_references_that_are_no_strings_are_refused():
    with pytest.raises(FastcapError, match="must be a string, got 5"):
        measure(Captioned(["a"], [[5]]), metrics=["bleu"])


def test_captions_are_cut_once_for_all_metrics(monkeypatch):
    import fastcap.eval.captioned as module

    calls = []
    monkeypatch.setattr(module, "ptb_tokenize", lambda captions: calls.append(len(captions)) or ptb_tokenize(captions))
    measure(Captioned(["a", "b"], [["a", "c"], ["b"]]))
    assert calls == [5]
