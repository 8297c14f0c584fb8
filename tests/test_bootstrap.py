"""Confidence intervals by bootstrap over images: the right width, the same for equal seeds, and paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcap.data import score_captions
from fastcap.errors import FastcapError
from fastcap.eval import Captioned, Embedded, Found, measure, paired_difference, table
from fastcap.eval.bootstrap import Draws, interval, mean_of, means, medians, of_sums
from fastcap.eval.metrics import METRICS, Task
from fastcap.eval.table import Row

WORDS = ["bleu", "rouge_l", "cider", "diversity", "self_bleu"]


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setenv("FASTCAP_JAVA", "")


def captioned(images=60, good=0.5, seed=0):
    """References of random words; captions that keep each word of the first with probability `good`."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array("a red blue green car dog cat sits runs on the grass street near two".split())
    references = [[" ".join(rng.choice(vocabulary, 9)) for _ in range(3)] for _ in range(images)]
    said = []
    for each in references:
        kept = rng.random(9) < good
        said.append(" ".join(np.where(kept, each[0].split(), rng.choice(vocabulary, 9))))
    return Captioned(said, references)


def of_counts(counts):
    """The images of a resample, one by one."""
    return np.repeat(np.arange(len(counts)), counts.astype(int))


# Resamples


def test_a_resample_holds_as_many_images_as_there_are_and_each_as_often():
    seen = []
    Draws(50, 400, seed=3).scores(lambda counts: seen.append(counts) or {})
    counts = np.concatenate(seen)
    assert counts.shape == (400, 50) and (counts.sum(1) == 50).all() and (counts == counts.round()).all()
    # Of a resample, (1 - 1/N)^N = .364 of the images are missing on average; each is drawn once on average.
    assert (counts == 0).mean() == pytest.approx((1 - 1 / 50) ** 50, abs=0.01)
    assert np.abs(counts.mean(0) - 1).max() < 5 / math.sqrt(400)


def test_blocks_of_resamples_are_all_of_them(monkeypatch):
    """More images than a block holds: blocks of one resample."""
    import fastcap.eval.bootstrap as module

    sizes = []
    monkeypatch.setattr(module, "_BLOCK", 100)
    found = Draws(30, 10, seed=0).scores(lambda counts: sizes.append(len(counts)) or {"x": counts[:, 0]})
    assert sizes == [3, 3, 3, 1] and found["x"].shape == (10,)


def test_worked_statistics():
    counts = np.array([[1, 1, 1, 1], [0, 2, 0, 2], [4, 0, 0, 0], [1, 2, 1, 0]], float)
    values = np.array([5.0, 1.0, 2.0, 8.0])
    assert means({"m": values})(counts)["m"].tolist() == [4.0, 4.5, 5.0, 2.25]
    assert medians({"m": values})(counts)["m"].tolist() == [3.5, 4.5, 5.0, 1.5]
    made = of_sums(np.stack([values, np.ones(4)], 1), lambda sums: {"r": sums[..., 0] / sums[..., 1]})
    assert made(counts)["r"].tolist() == [4.0, 4.5, 5.0, 2.25]


@pytest.mark.parametrize("images", [7, 8])
def test_medians_are_those_of_the_drawn_images(images):
    rng = np.random.default_rng(0)
    values = rng.integers(1, 5, images).astype(float)
    kept = []
    found = Draws(images, 50, 0).scores(lambda counts: kept.append(counts) or medians({"m": values})(counts))["m"]
    assert found.tolist() == [np.median(values[of_counts(counts)]) for counts in np.concatenate(kept)]


def test_the_interval_of_a_mean_is_that_of_statistics():
    """1.96 standard errors on each side, for numbers from a normal distribution."""
    values = np.random.default_rng(0).normal(3, 2, 1000)
    found = mean_of("m", values)
    low, high = interval(Draws(1000, 4000, 0).scores(found.resampled)["m"])
    error = values.std() / math.sqrt(1000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


# Of metrics


@pytest.mark.parametrize("name", ["bleu", "rouge_l", "diversity", "retrieval", "clip_score", "ref_clip_score"])
def test_resampled_scores_are_those_of_the_drawn_images(name):
    """What a metric makes of counts equals what it measures on the images drawn; of ranks, among all images as before."""
    given = captioned(12)
    generator = torch.Generator().manual_seed(0)
    text, image, reference = (torch.randn(n, 8, generator=generator) for n in (12, 12, 36))
    given = Captioned(given.captions, given.references, embedded=Embedded(text, image, reference))
    found = METRICS[name].measure(Task(given))
    whole = found.resampled(np.ones((1, 12)))
    assert {key: value.item() for key, value in whole.items()} == pytest.approx({key: found.scores[key] for key in whole})
    counts = np.random.default_rng(1).multinomial(12, [1 / 12] * 12, size=5).astype(float)
    made = found.resampled(counts)
    for r in range(5):
        rows = of_counts(counts[r])
        if name == "retrieval":
            for prefix in ("t2i", "i2t"):
                ranks = np.array(found.each[f"{prefix}_rank"])[rows]
                assert made[f"{prefix}_mean_rank"][r] == pytest.approx(ranks.mean())
                assert made[f"{prefix}_median_rank"][r] == pytest.approx(np.median(ranks))
                assert made[f"{prefix}_r5"][r] == pytest.approx((ranks <= 5).mean())
            continue
        embedded = Embedded(text[rows], image[rows], reference.view(12, 3, 8)[rows].reshape(-1, 8))
        drawn = Captioned([given.captions[n] for n in rows], [given.references[n] for n in rows], embedded=embedded)
        again = METRICS[name].measure(Task(drawn)).scores
        assert {key: value[r] for key, value in made.items()} == pytest.approx({key: again[key] for key in made})


def test_cider_keeps_the_document_frequencies_of_all_images():
    given = captioned(12)
    found = METRICS["cider"].measure(Task(given))
    counts = np.random.default_rng(1).multinomial(12, [1 / 12] * 12, size=5).astype(float)
    each = np.array(found.each["cider"])
    assert found.resampled(counts)["cider"] == pytest.approx([each[of_counts(row)].mean() for row in counts])


def test_intervals_hold_the_score_and_narrow_with_more_images():
    few, many = (measure(captioned(images), metrics=WORDS, bootstrap=300) for images in (40, 640))
    assert set(few.intervals) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "mean_length"}
    for found in (few, many):
        for key, (low, high) in found.intervals.items():
            assert low <= found.scores[key] <= high
    for key in ("bleu_1", "bleu_4", "rouge_l", "cider"):
        widths = [high - low for low, high in (few.intervals[key], many.intervals[key])]
        assert 2.5 < widths[0] / widths[1] < 6.5  # 4, by the square root


def test_the_same_seed_is_the_same_interval_and_another_is_not():
    options = dict(metrics=["rouge_l"], bootstrap=100)
    first, again, other = (measure(captioned(), seed=seed, **options).intervals for seed in (0, 0, 1))
    assert first == again != other


def test_a_metric_s_interval_does_not_depend_on_the_other_metrics():
    alone = measure(captioned(), metrics=["cider"], bootstrap=50).intervals["cider"]
    assert measure(captioned(), metrics=WORDS, bootstrap=50).intervals["cider"] == alone


def test_without_bootstrap_there_are_no_intervals():
    found = measure(captioned(), metrics=WORDS)
    assert found.intervals == {} and found.resampled == {} and found.draws is None


def test_one_image_has_no_interval():
    """All its resamples are the same, and would make it look sure."""
    one, two = (measure(Captioned(["a red car"] * n, [["a car"]] * n), metrics=["rouge_l"], bootstrap=10) for n in (1, 2))
    assert one.scores and one.intervals == {} and one.draws is None
    assert two.intervals["rouge_l"] == (two.scores["rouge_l"],) * 2
    with pytest.raises(FastcapError, match="first must have resamples, got 'none'; .* and two images or more"):
        paired_difference(one, one)


def test_facts_of_scenes_are_resampled_as_their_claims():
    """Precision is of all claims together: a caption that claims more weighs more, also in a resample."""
    facts = [
        {
            "background": "white",
            "objects": [dict(shape="square", color="red", size="large", texture="solid", row="top", column="left")],
        }
    ] * 4
    said = ["a red square", "a large blue square and a circle", "of the", "a square"]
    found = measure(Captioned(said, [["a square"]] * 4, facts), metrics=["facts"], bootstrap=200)
    assert set(found.intervals) == set(found.scores) == set(score_captions(said, facts))
    counts = Draws(4, 200, 0).scores(lambda counts: {"counts": counts})["counts"]
    for r in range(20):
        wanted = score_captions([said[n] for n in of_counts(counts[r])], facts)
        for key, score in wanted.items():
            assert found.resampled[key][r] == pytest.approx(score)
    assert len(set(found.resampled["fact_precision"])) > 5
    assert found.intervals["fact_precision"][0] < found.scores["fact_precision"] < found.intervals["fact_precision"][1]


# Two captioners


def test_a_difference_is_surer_than_intervals_side_by_side():
    """One more word is right on every fourth image: the intervals overlap, that of the difference does not hold 0."""
    given = captioned(200, good=0.5)
    ends = [references[0].split()[-1] if n % 4 == 0 else "zebra" for n, references in enumerate(given.references)]
    better = [f"{said} {end}" for said, end in zip(given.captions, ends, strict=True)]
    worse = [f"{said} zebra" for said in given.captions]
    options = dict(metrics=["bleu", "rouge_l"], bootstrap=500)
    first, second = (measure(Captioned(said, given.references), **options) for said in (better, worse))
    found = paired_difference(first, second)
    assert set(found) == set(first.intervals)
    assert first.intervals["rouge_l"][0] < second.intervals["rouge_l"][1]
    for key in ("bleu_1", "rouge_l"):
        assert found[key].value == pytest.approx(first.scores[key] - second.scores[key])
        assert 0 < found[key].low < found[key].value < found[key].high
    back = paired_difference(second, first)["rouge_l"]
    value, low, high = found["rouge_l"]
    assert back == pytest.approx((-value, -high, -low))


def test_a_captioner_does_not_differ_from_itself():
    one = measure(captioned(), metrics=["rouge_l"], bootstrap=50)
    assert paired_difference(one, one)["rouge_l"] == (0, 0, 0)


def test_captioners_on_other_resamples_are_refused():
    one = measure(captioned(), metrics=["rouge_l"], bootstrap=50)
    with pytest.raises(FastcapError, match="second must have resamples, got 'none'; pass bootstrap=1000 to measure"):
        paired_difference(one, measure(captioned(), metrics=["rouge_l"]))
    for other in (dict(seed=1, bootstrap=50), dict(bootstrap=60)):
        with pytest.raises(FastcapError, match="second must have the resamples of first"):
            paired_difference(one, measure(captioned(), metrics=["rouge_l"], **other))
    with pytest.raises(FastcapError, match="measure both on the same images"):
        paired_difference(one, measure(captioned(61), metrics=["rouge_l"], bootstrap=50))


# Shown


def test_the_table_shows_intervals_below_their_row():
    rows = [
        Row("one", {"rouge_l": 0.5, "cider": 1.25}, {}, {"rouge_l": (0.4, 0.6125)}),
        Row("two", {"rouge_l": 0.25}, {}),
    ]
    lines = table(rows).splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")]
    at = {head: n for n, head in enumerate(heads)}
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
    assert [row[1] for row in cells] == ["one", "95 %", "two"]
    assert [row[at["ROUGE-L"]] for row in cells] == ["0.500", "0.400–0.613", "0.250"]
    assert [row[at["CIDEr"]] for row in cells] == ["1.250", "", "-"]
    assert len({len(line) for line in lines}) == 1


def test_a_found_without_resamples_has_no_interval(monkeypatch):
    monkeypatch.setitem(METRICS, "own", METRICS["diversity"]._replace(measure=lambda task: Found({"own": 1.0})))
    found = measure(captioned(), metrics=["own"], bootstrap=10)
    assert found.scores == {"own": 1.0} and found.intervals == {}
