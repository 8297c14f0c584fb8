"""fastcap.rewards.CiderD: by hand, against pycocoevalcap on real captions, and what it refuses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch

import fastcap
from fastcap.errors import FastcapError
from fastcap.rewards import CiderD

SHARED = Path(os.environ.get("FASTCAP_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "data" / "coco_captions"
OWN = [  # written for this project
    ["a red kite over a green hill", "a kite flies above a hill", "a child flies a red kite"],
    ["two dogs run on a beach", "dogs play in the sand", "two brown dogs on a sandy beach"],
    ["a bowl of soup on a table", "soup in a white bowl", "a table with a bowl of hot soup"],
    ["a man repairs a bicycle", "a bicycle and a man with tools", "the man mends a bicycle wheel"],
]


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """Plain Python and C++: every test of what is computed runs on both."""
    status = fastcap.backends()[request.param]
    if not status:
        pytest.skip(f"backend {request.param}: {status.reason}")
    with fastcap.backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def coco():
    """The references of each of 5,000 images."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the captions in {SHARED}")
    files = [(SHARED / f"reference{i}.txt").read_text().splitlines() for i in range(5)]
    return [list(captions) for captions in zip(*files, strict=True)]


def peer(references, candidates, sigma=6.0):
    """pycocoevalcap's scores, whose document frequencies are those of the references that it is given."""
    from pycocoevalcap.cider.cider import Cider

    gts, res = dict(enumerate(references)), {i: [caption] for i, caption in enumerate(candidates)}
    return torch.tensor(np.asarray(Cider(sigma=sigma).compute_score(gts, res)[1]))


def raises(rule, call, *arguments, **options):
    with pytest.raises(FastcapError) as error:
        call(*arguments, **options)
    text = str(error.value)
    assert text.startswith("fastcap.rewards.CiderD: ") and " must " in text and ", got " in text and "; " in text, text
    assert rule in text, text
    return text


def test_a_score_by_hand(backend):
    """Two images, n = 1. a: in both, idf 0. red: in one, idf log 2. bus: in one, and twice in the second reference."""
    scorer = CiderD([["a red bus", "bus a bus"], ["a cat"]], n=1)
    # the candidate is {red: log 2}; its cosine with {red, bus: log 2} is 1 / sqrt 2, with {bus: 2 log 2} it is 0
    assert scorer(["red"], rows=[0]).tolist() == pytest.approx([10 * (math.sqrt(0.5) + 0) / 2], abs=1e-12)
    # {bus: 3 log 2} is clipped to 1 against the first, to 2 against the second: 1 * 1 / (3 sqrt 2) and 2 * 2 / (3 * 2)
    clipped = 10 * (1 / (3 * math.sqrt(2)) + 4 / 6) / 2
    assert scorer(["bus bus bus"], rows=[0]).tolist() == pytest.approx([clipped], abs=1e-12)


def test_length_is_punished_by_a_gaussian_of_the_difference(backend):
    """n = 2, so that pairs are counted: the candidate has 1, its reference 3."""
    scorer = CiderD([["a red bus stops"], ["one cat"]], n=2, sigma=2.0)
    L = math.log(2)
    unigrams = 2 * L * L / (math.sqrt(2) * L * 2 * L)  # red, bus against a, red, bus, stops
    bigrams = L * L / (L * math.sqrt(3) * L)
    expected = 10 * (unigrams + bigrams) / 2 * math.exp(-((1 - 3) ** 2) / (2 * 2.0**2))
    assert scorer(["red bus"], rows=[0]).tolist() == pytest.approx([expected], abs=1e-12)


def test_a_caption_equal_to_all_its_references_has_ten(backend):
    found = CiderD([["a red kite over a hill"] * 3, ["two dogs run"]])(["a red kite over a hill"], rows=[0])
    assert found.tolist() == pytest.approx([10.0], abs=1e-12)


@pytest.mark.parametrize("sigma", [6.0, 1.5, 20.0])
def test_equals_pycocoevalcap_on_captions_of_our_own(backend, sigma):
    """With n = 4: whatever its n, pycocoevalcap counts n-grams of up to 4 words."""
    pytest.importorskip("pycocoevalcap")
    candidates = ["a red kite flies", "dogs on a beach", "", "a man a man a man repairs a bicycle bicycle zebra"]
    found = CiderD(OWN, sigma=sigma)(candidates)
    assert found.dtype == torch.float64 and (found > 0).sum() == 3 and found[2] == 0
    torch.testing.assert_close(found, peer(OWN, candidates, sigma), rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [pytest.param(400, id="400"), pytest.param(5000, id="5000", marks=pytest.mark.slow)])
def test_equals_pycocoevalcap_on_coco(backend, coco, count):
    """Each first reference against the others, and captions of other images, as they are written."""
    pytest.importorskip("pycocoevalcap")
    references = [captions[1:] for captions in coco[:count]]
    for shift in (0, 1):
        candidates = [coco[(i + shift) % count][0] for i in range(count)]
        found = CiderD(references)(candidates)
        assert (found.mean() > 0.4) == (shift == 0)
        torch.testing.assert_close(found, peer(references, candidates), rtol=0, atol=1e-9)


def test_document_frequencies_come_from_the_documents_alone(backend, coco):
    """Of a training set, with references of images that are not in it: as if computed by hand from their counts."""
    training, held_out = coco[:300], coco[300:420]
    scorer = CiderD(training)
    candidates = [captions[0] for captions in held_out]
    references = [captions[1:] for captions in held_out]
    found = scorer(candidates, references)
    with fastcap.backend("reference"):
        counted = {}
        for captions in training:
            grams = {
                tuple(w[i : i + k])
                for c in captions
                for w in [c.split()]
                for k in range(1, 5)
                for i in range(len(w) - k + 1)
            }
            for gram in grams:
                counted[gram] = counted.get(gram, 0) + 1
        expected = CiderD.from_frequencies(counted, 300)(candidates, references)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, CiderD(references)(candidates))
    prepared = scorer.prepare(references)
    assert len(prepared) == 120
    assert torch.equal(scorer(candidates, prepared), found)
    rows = [5, 5, 0]
    picked = scorer([candidates[5], candidates[7], candidates[0]], prepared, rows)
    assert picked[[0, 2]].tolist() == found[[5, 0]].tolist()
    assert torch.equal(scorer([candidates[5]], prepared, torch.tensor([5], dtype=torch.int32)), found[5:6])


def test_words_and_ids_score_alike(backend):
    """The same captions as words, as tuples of words, and as a tokenizer's ids, of which some are negative or large."""
    names = {}

    def number(word):
        return names.setdefault(word, (-1) ** len(names) * 7 ** (len(names) % 20) + 1_000_003 * len(names))

    candidates = ["a red kite flies", "two dogs in a bowl of soup", "zebra zebra", "a man repairs a bicycle"]
    as_words = [tuple(caption.split()) for caption in candidates]
    as_ids = [[[number(w) for w in c.split()] for c in captions] for captions in OWN]
    ids = [[number(word) for word in caption] for caption in as_words]
    expected = CiderD(OWN)(candidates)
    assert expected.min() == 0 and expected.max() > 2
    assert torch.equal(CiderD(OWN)(as_words), expected)
    assert torch.equal(CiderD(as_ids)(ids), expected)
    assert torch.equal(CiderD(as_ids)([torch.tensor(caption) for caption in ids]), expected)
    assert torch.equal(CiderD(as_ids)([np.array(caption) for caption in ids]), expected)


def test_a_tensor_is_a_list_of_its_rows(backend):
    """References [images, captions, words] and candidates [captions, words] of ids, as lists and as tensors."""
    documents = torch.arange(3 * 2 * 5).reshape(3, 2, 5) % 11
    expected = CiderD(documents.tolist())(documents[:, 0].tolist())
    assert torch.equal(CiderD(documents)(documents[:, 0]), expected) and expected.min() > 1


def test_captions_that_change_while_they_are_read(backend):
    """Python's code runs in between: what it frees is not looked at again, and what it raises comes out."""

    class Emptying:
        def __init__(self, raised):
            self.raised, self.captions = raised, [self, [1]]

        def __len__(self):
            return 1

        def __getitem__(self, place):
            return 1

        def __iter__(self):
            self.captions.clear()
            del self.captions  # of the list, no one else holds the caption
            raise self.raised

    scorer = CiderD([[[1, 2]], [[3]]])
    raises("candidates[0] must be a caption, got 'Emptying'", scorer, Emptying(TypeError("no words")).captions)
    with pytest.raises(KeyboardInterrupt):
        scorer(Emptying(KeyboardInterrupt()).captions)

    class Clearing:
        def __index__(self):
            words.clear()
            return 3

    words = [1, Clearing(), 2, 2]
    either = scorer([[1, 3], [1, 3, 2, 2]], rows=[1, 1]).tolist()  # what is read before, or all
    assert scorer([words], rows=[1]).item() in either and min(either) > 0


def test_words_are_cut_where_python_cuts_them(backend):
    """At white space of any kind; and words of the same bytes but for a space, or of another script, are others."""
    spaced = "a\tred\u00a0kite\u2003over\x1ca\u3000green\nhill"
    assert torch.equal(CiderD(OWN)([spaced], rows=[0]), CiderD(OWN)([OWN[0][0]], rows=[0]))
    unusual = [["größe naïve \U0001f680", "red"], ["\ud800 half", "größ enaïve"]]
    found = CiderD(unusual, n=2)(["größe naïve \U0001f680", "\ud800 half"])
    assert found.tolist() == pytest.approx([5.0, 5.0])


def test_captions_that_share_nothing_or_hold_nothing(backend):
    scorer = CiderD(OWN)
    assert scorer(["", "xylophone", "  ", "of of of"], rows=[0, 1, 2, 3]).tolist() == [0, 0, 0, 0]
    assert scorer([], rows=[]).shape == (0,)
    empty = CiderD([["", "a kite"], ["", ""]])
    assert empty(["a kite", "a kite"]).tolist() == pytest.approx([2.5, 0.0])  # one reference of two, two orders of four
    assert empty(["", ""]).tolist() == [0, 0]


def test_repeated_and_very_long_captions(backend):
    """As pycocoevalcap has them: what repeats is clipped, and 20,000 words are as far from a reference as can be."""
    pytest.importorskip("pycocoevalcap")
    long = " ".join(f"w{i % 5000}" for i in range(20_000))
    candidates = ["kite " * 50, long, "a red kite over a green hill " * 3, "bicycle"]
    found = CiderD(OWN)(candidates)
    torch.testing.assert_close(found, peer(OWN, candidates), rtol=0, atol=1e-9)
    assert found[1] == 0
    assert CiderD([[long], *OWN])([long], rows=[0]).tolist() == pytest.approx([10.0])


def test_words_that_no_document_has_count_in_the_norm(backend):
    """They match nothing, and make what matches a smaller part: with idf log N."""
    scorer = CiderD([["red bus"], ["blue car"]], n=1)
    L = math.log(2)
    found = scorer(["red", "red zebra", "red zebra zebra", "red zebra yak"], rows=[0] * 4) / 10
    expected = [L * L / (norm * math.sqrt(2) * L) for norm in (L, math.sqrt(2) * L, math.sqrt(5) * L, math.sqrt(3) * L)]
    assert found.tolist() == pytest.approx(expected)
    fresh = scorer(["zebra"], [["zebra"]])  # a reference may have them too: then they match
    assert fresh.tolist() == pytest.approx([10.0])


def test_a_word_of_one_role_is_no_word_of_another(backend):
    """(a, b c) and (a b, c) are no n-grams of each other, however they are put together."""
    scorer = CiderD([[["ab", "c"]], [["a", "bc"]], [["a", "b", "c"]]])
    assert scorer([["a", "bc"], ["abc"], ["ab", "c"]], rows=[0, 0, 0]).tolist() == pytest.approx([0, 0, 5.0])


def test_saved_and_loaded(backend, tmp_path):
    scorer = CiderD(OWN, sigma=4.0)
    scorer.save(tmp_path / "df.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["df.npz"]
    candidates = ["a red kite flies", "dogs on a beach", "a zebra in soup", "a man repairs a bicycle"]
    expected = scorer(candidates)
    for name in ("reference", "cpp"):  # each reads what the other wrote
        if not fastcap.backends()[name]:
            continue
        with fastcap.backend(name):
            loaded = CiderD.load(tmp_path / "df.npz")
            assert (loaded.n, loaded.sigma, loaded.num_documents) == (4, 4.0, 4)
            torch.testing.assert_close(loaded(candidates, OWN), expected, rtol=0, atol=1e-12)
            again = tmp_path / f"again-{name}.npz"
            loaded.save(again)
            torch.testing.assert_close(CiderD.load(again)(candidates, OWN), expected, rtol=0, atol=1e-12)
    raises("references must be given", CiderD.load(tmp_path / "df.npz"), candidates)


def test_saved_ids_are_loaded_as_ids(backend, tmp_path):
    documents = [[[5, -7, 2**62], [5]], [[9, 9]]]
    scorer = CiderD(documents, n=2)
    scorer.save(tmp_path / "ids.npz")
    loaded = CiderD.load(tmp_path / "ids.npz")
    assert torch.equal(loaded([[5, -7], [9]], documents), scorer([[5, -7], [9]]))
    raises("be of ids, as the first caption", loaded, ["5"], [[[5]]])


def test_frequencies_that_were_counted_elsewhere(backend):
    """As the field's pickles hold them: n-grams to the number of images."""
    counted = {}
    for captions in OWN:
        for gram in {(word,) for caption in captions for word in caption.split()}:
            counted[gram] = counted.get(gram, 0) + 1
    candidates = ["a red kite", "two dogs", "soup", "wheel wheel"]
    found = CiderD.from_frequencies(counted, len(OWN), n=1)(candidates, OWN)
    torch.testing.assert_close(found, CiderD(OWN, n=1)(candidates), rtol=0, atol=1e-12)
    longer = {**counted, ("a", "b", "c"): 2}  # an n-gram whose beginning was not counted
    torch.testing.assert_close(CiderD.from_frequencies(longer, 4, n=1)(candidates, OWN), found, rtol=0, atol=1e-12)
    assert CiderD.from_frequencies({}, 2)(["a b"], [["a b"]]).tolist() == pytest.approx([5.0])
    for wrong in ({"a": 1}, {(): 1}, {("a", 1): 1}, {("a",): 1, (2,): 1}, {(2**63,): 1}):
        raises("n-grams of words, or all of ids", CiderD.from_frequencies, wrong, 5)
    for wrong in (-1, 1.5, True, "1", None, math.inf, math.nan, 2**70):
        raises("be a count", CiderD.from_frequencies, {("a",): wrong}, 5)
    raises("be at most num_documents, 5", CiderD.from_frequencies, {("a",): 6}, 5)
    raises("be a mapping", CiderD.from_frequencies, [("a",)], 5)
    for wrong in (1, 0, 2.0, True, 2**32):
        raises("num_documents must", CiderD.from_frequencies, {}, wrong)
    raises("n must be an integer in [1, 8]", CiderD.from_frequencies, {("a",): 1}, 5, n="4")


def test_one_image_is_an_error_that_explains_idf(backend):
    text = raises("be of at least 2 images", CiderD, OWN[:1])
    assert "log(1/1) is 0" in text
    raises("be of at least 2 images", CiderD, [])


@pytest.mark.parametrize(
    ("documents", "rule"),
    [
        ("a red kite", "documents must be a list"),
        ({1: ["a"], 2: ["b"]}, "documents must be a list"),
        (5, "documents must be a list"),
        (["a red kite", "two dogs"], "documents[0] must be a list, got 'str'"),
        ([["a"], {"b": 1}], "documents[1] must be a list, got 'a mapping'"),
        ([["a"], UserDict(b=1)], "documents[1] must be a list, got 'a mapping'"),
        ([["a"], {"b"}], "documents[1] must be a list, got 'set'"),
        ([["a"], 5], "documents[1] must be a list, got 'int'"),
        ([["a"], []], "documents[1] must have a caption, got 'none'"),
        ([["a"], ["b", 5]], "documents[1][1] must be a caption, got 'int'"),
        ([["a"], ["b", None]], "documents[1][1] must be a caption, got 'NoneType'"),
        ([["a"], [b"b"]], "documents[1][0] must be a caption, got 'bytes'"),
        ([["a"], [UserDict(b=1)]], "documents[1][0] must be a caption, got 'UserDict'"),
        ([["a"], [["b", 1]]], "documents[1][0] must hold words, or ids, got 'int, str'"),
        ([["a"], [[1.5]]], "documents[1][0] must hold words, or ids, got 'float'"),
        ([["a"], [[2**63]]], "documents[1][0] must hold words, or ids, got 'int'"),
        ([["a"], [[1, 2]]], "documents[1][0] must be of words, as the first caption, got 'ids'"),
        ([[[3]], ["a b"]], "documents[1][0] must be of ids, as the first caption, got 'words'"),
    ],
)
def test_what_is_no_document_is_named(backend, documents, rule):
    raises(rule, CiderD, documents)


def test_what_is_no_candidate_or_row_is_named(backend):
    scorer = CiderD(OWN)
    raises("candidates must be one for each of the 4 entries", scorer, ["a"])
    raises("candidates must be a list", scorer, "a kite")
    raises("candidates[1] must be a caption, got 'int'", scorer, ["a", 3], rows=[0, 1])
    raises("candidates[0] must be of words, as the first caption, got 'ids'", scorer, [[1]], rows=[0])
    for rows in ([4], [-1], torch.tensor([2**40])):
        raises("rows must lie in [0, 4)", scorer, ["a"], rows=rows)
    raises("rows must be one for each of the 1 candidates", scorer, ["a"], rows=[0, 1])
    raises("rows must be integers", scorer, ["a"], rows=[0.5])
    raises("rows must be integers", scorer, ["a"], rows=["x"])
    raises("references[0] must have a caption", scorer, ["a"], [[]])
    raises("references must be prepared by the same scorer", scorer, ["a"] * 4, CiderD(OWN).prepare(OWN))
    for n in (0, 9, 2.0, True):
        raises("n must be an integer in [1, 8]", CiderD, OWN, n=n)
    for sigma in (0, -1, math.nan, math.inf, "6", 1e-200, 1e200, 10**400):
        raises("sigma must be a positive finite number", CiderD, OWN, sigma=sigma)


def test_broken_files_are_named(backend, tmp_path):
    scorer, path = CiderD(OWN), tmp_path / "df.npz"
    scorer.save(path)
    raises("path must be a file", CiderD.load, tmp_path / "none.npz")
    raises("path must be a file that can be written", scorer.save, tmp_path / "none" / "df.npz")
    (tmp_path / "folder").mkdir()
    raises("path must be a file that can be written", scorer.save, tmp_path / "folder")
    assert {found.name for found in tmp_path.iterdir()} == {"df.npz", "folder"}
    whole = path.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    with np.load(path) as file:
        arrays = dict(file)

    def damaged(**changes):
        np.savez(tmp_path / "damaged.npz", **{**arrays, **changes})
        raises("be a whole file of document frequencies", CiderD.load, tmp_path / "damaged.npz")

    for name in ("cut", "text"):
        raises("be a whole file of document frequencies", CiderD.load, tmp_path / f"{name}.npz")
    damaged(parent=np.arange(len(arrays["parent"])))
    damaged(word=arrays["word"] + 10_000)
    damaged(count=-arrays["count"])
    damaged(ends=arrays["ends"] + 1)
    damaged(count=arrays["count"][1:])
    damaged(count=arrays["count"].astype(np.float64))
    damaged(format=np.asarray(99))
    damaged(parent=np.full(3, -1), word=np.zeros(3, int), count=np.ones(3, int))  # one n-gram three times
    damaged(ends=np.array([0, 0, len(arrays["text"])]), parent=np.array([-1]), word=np.array([0]), count=np.array([1]))


def test_raw_calls_of_the_extension_check_before_they_read():
    """What no public function passes: an error each, not a crash."""
    if not fastcap.backends()["cpp"]:
        pytest.skip("needs the extension")
    from fastcap import _C

    made = _C.CiderD(OWN, 4, 6.0, 1)
    prepared, out, rows = made.documents(), torch.zeros(2, dtype=torch.float64), torch.tensor([0, 1])
    for arguments in (
        (["a", "b"], prepared, torch.tensor([0, 4]), out),
        (["a", "b"], prepared, torch.tensor([0, -1]), out),
        (["a", "b"], prepared, rows.int(), out),
        (["a", "b"], prepared, rows, out.float()),
        (["a", "b", "c"], prepared, rows, out),
        (["a", "b"], prepared, rows, torch.zeros(4, dtype=torch.float64)[::2]),
        (["a", "b"], None, rows, out),
    ):
        with pytest.raises((FastcapError, TypeError)):
            made.score(*arguments, 1)
    for n, sigma in ((0, 6.0), (9, 6.0), (4, 0.0), (4, math.nan)):
        with pytest.raises(FastcapError):
            _C.CiderD(OWN, n, sigma, 1)
    empty, column = torch.zeros(0, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    for table in (
        (empty, column, column, column, column, column),  # an n-gram before itself
        (empty, column + 5, column, column - 1, column, column),  # a word behind the text
        (empty, column, column, column - 1, column + 1, column),
        (empty, column, column, column - 1, column, column - 1),
        (empty, column, column, column - 1, column[:0], column),
    ):
        with pytest.raises(FastcapError):
            _C.CiderD.from_table(*table, 5, 4, 6.0)


def test_the_result_does_not_depend_on_the_number_of_threads(coco):
    if not fastcap.backends()["cpp"]:
        pytest.skip("needs the extension")
    candidates, before, found = [captions[1] for captions in coco[:1500]], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            scorer = CiderD(coco[:1500])
            found.append(torch.cat((scorer(candidates), scorer(candidates[::-1], coco[1500:3000]))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_other_threads_run_while_it_scores(coco):
    """The interpreter's lock is released: while one thread scores, another counts."""
    if not fastcap.backends()["cpp"]:
        pytest.skip("needs the extension")
    scorer = CiderD([captions[:1] for captions in coco[:50]])
    candidates = [" ".join(word for captions in coco for word in captions[0].split())] * 40
    ticks, done = [0], threading.Event()

    def tick():
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0.0005)

    watcher = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(30)  # nobody takes the lock from a thread that holds on to it
    watcher.start()
    try:
        scorer(candidates, rows=[0] * len(candidates))
        found = ticks[0]
    finally:
        sys.setswitchinterval(interval)
        done.set()
        watcher.join()
    assert found >= 5


def test_without_the_extension_the_plain_path_runs():
    """In a process of its own, where importing fastcap._C fails."""
    code = (
        "import sys; sys.modules['fastcap._C'] = None\n"
        "from fastcap.rewards import CiderD\n"
        f"scorer = CiderD({OWN!r})\n"
        "print(scorer._backend, scorer(['a red kite flies'], rows=[0]).item())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
    )
    name, score = found.stdout.split()
    with fastcap.backend("reference"):
        expected = CiderD(OWN)(["a red kite flies"], rows=[0]).item()
    assert name == "reference" and float(score) == pytest.approx(expected, abs=1e-12)
