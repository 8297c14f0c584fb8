"""Recall and ranks from captions to images and back, and what equal scores are worth."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastcap.errors import FastcapError
from fastcap.eval import Queries, retrieval, retrieve

pytestmark = pytest.mark.usefixtures("one_thread")


def directions(degrees):
    """Unit vectors of the plane: the closer two angles, the higher their cosine."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], 1)


def over_all_orders(scores, own, k):
    """(chance that one of `own` is among the first k, mean place of the first of them), equals in every order there is."""
    found, places = [], []
    for order in itertools.permutations(range(len(scores))):
        listed = sorted(order, key=lambda i: -scores[i])  # stable: equals stay in the order drawn
        place = 1 + min(listed.index(i) for i in own)
        found.append(place <= k)
        places.append(place)
    return sum(found) / len(found), sum(places) / len(places)


def test_worked_example_without_ties():
    """Captions at 0, 50.1 and 30 degrees, images at 10, 20 and 90. Caption 0 finds its image first; caption 1, 40.1 degrees
    from image 0, 30.1 from its own and 39.9 from image 2, too; caption 2, 60 from its own, 20 and 10 from the others, last.
    Image 0 has captions at 10, 40, 20: first. Image 1 at 20, 30, 10: last. Image 2 at 90, 40, 60: second."""
    found = retrieval(directions([0, 50.1, 30]), directions([10, 20, 90]), ks=(1, 2, 3))
    assert found == pytest.approx(
        {
            "t2i_r1": 2 / 3, "t2i_r2": 2 / 3, "t2i_r3": 1, "t2i_mean_rank": 5 / 3, "t2i_median_rank": 1,
            "i2t_r1": 1 / 3, "i2t_r2": 2 / 3, "i2t_r3": 1, "i2t_mean_rank": 2, "i2t_median_rank": 2,
        }
    )  # fmt: skip


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two():
    """Captions at 0, 91, 10 and 20 degrees, images at 0, 90, 180 and 270: ranks 1, 1, 4 and 3."""
    found = retrieval(directions([0, 91, 10, 20]), directions([0, 90, 180, 270]))
    assert (found["t2i_median_rank"], found["t2i_mean_rank"]) == (2.0, 2.25)


def test_a_captioner_that_says_one_thing_of_every_image_has_chance():
    N = 20
    text, image = torch.ones(N, 4), torch.nn.functional.one_hot(torch.arange(N) % 4, 4).float()
    found = retrieval(text, image)
    for direction in ("t2i", "i2t"):  # all N images are at the same cosine, 1/2, and all captions are equal
        assert [found[f"{direction}_r{k}"] for k in (1, 5, 10)] == pytest.approx([1 / N, 5 / N, 10 / N])
        assert found[f"{direction}_mean_rank"] == found[f"{direction}_median_rank"] == (N + 1) / 2


def test_ties_by_hand():
    """Captions 0 and 1 are equal. Image 0 lies on them, image 1 beside them, image 2 opposite."""
    text, image = directions([0, 0, 180]), directions([0, 60, 180])
    found = retrieve(text, image)
    assert found.text_to_image.above.tolist() == [0, 1, 0] and found.text_to_image.tied.tolist() == [0, 0, 0]
    assert found.image_to_text.above.tolist() == [0, 0, 0] and found.image_to_text.tied.tolist() == [1, 1, 0]
    assert found.image_to_text.rank().tolist() == [1.5, 1.5, 1.0]
    assert found.image_to_text.credit(1).tolist() == [0.5, 0.5, 1.0]
    scores = retrieval(text, image, ks=(1,))
    assert scores["t2i_r1"] == pytest.approx(2 / 3) and scores["i2t_r1"] == pytest.approx(2 / 3)
    assert scores["i2t_mean_rank"] == pytest.approx(4 / 3) and scores["i2t_median_rank"] == 1.5


@pytest.mark.parametrize("seed", range(12))
def test_ties_are_worth_their_mean_over_all_orders(seed):
    """Six captions of four images with scores of three levels, several captions an image, against every order of equals."""
    draw = torch.Generator().manual_seed(seed)
    P, Q = 6, 4
    corners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    text = corners[torch.randint(0, 3, (P,), generator=draw)]
    image = torch.randint(0, 2, (Q, 3), generator=draw).float() + torch.tensor([0.5, 0, 0])
    positive = torch.randint(0, Q, (P,), generator=draw)
    found = retrieve(text, image, positive)
    # Equal inputs give equal products here; rounding them keeps what is equal equal.
    s = (text @ torch.nn.functional.normalize(image, dim=1).T).double().mul(1e4).round()
    for k in (1, 2, 3, 5, 9):
        wanted = [over_all_orders(s[p].tolist(), [int(positive[p])], k) for p in range(P)]
        torch.testing.assert_close(found.text_to_image.credit(k), torch.tensor(wanted).double()[:, 0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.text_to_image.rank(), torch.tensor(wanted).double()[:, 1], rtol=1e-6, atol=1e-6)
        captioned = positive.unique().tolist()
        wanted = [over_all_orders(s[:, q].tolist(), (positive == q).nonzero().flatten().tolist(), k) for q in captioned]
        torch.testing.assert_close(found.image_to_text.credit(k), torch.tensor(wanted).double()[:, 0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.image_to_text.rank(), torch.tensor(wanted).double()[:, 1], rtol=1e-6, atol=1e-6)


def test_an_image_is_found_by_the_best_of_its_captions():
    """Captions 0 and 1 of image 0, one on it and one opposite; caption 2 of image 1."""
    text, image = directions([0, 180, 100]), directions([0, 90])
    found = retrieve(text, image, torch.tensor([0, 0, 1]))
    assert found.image_to_text.rank().tolist() == [1.0, 1.0]
    assert found.text_to_image.rank().tolist() == [1.0, 2.0, 1.0]


def test_own_captions_of_one_score_help_each_other():
    """Image 0 has two captions and image 1 one, all equal: among three, one of image 0's is first in two orders of three."""
    found = retrieve(torch.ones(3, 2), directions([0, 90]).float(), torch.tensor([0, 0, 1]))
    assert found.image_to_text.credit(1).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found.image_to_text.credit(2).tolist() == pytest.approx([1, 2 / 3])
    assert found.image_to_text.rank().tolist() == pytest.approx([4 / 3, 2])


def test_images_without_a_caption_are_searched_and_ask_nothing():
    text, image = directions([0, 90]), directions([40, 90, 5])
    with_more = retrieve(text, image, torch.tensor([0, 1]))
    assert with_more.text_to_image.rank().tolist() == [2.0, 1.0]
    assert with_more.image_to_text.rank().tolist() == [1.0, 1.0]
    assert retrieval(text, image, torch.tensor([0, 1])) == retrieval(text, image)


@pytest.mark.parametrize("seed", range(3))
def test_neither_order_nor_length_of_the_embeddings_counts(seed):
    draw = torch.Generator().manual_seed(seed)
    text, image = torch.randn(40, 8, generator=draw), torch.randn(25, 8, generator=draw)
    positive = torch.randint(0, 25, (40,), generator=draw)
    wanted = retrieval(text, image, positive)
    p, q = torch.randperm(40, generator=draw), torch.randperm(25, generator=draw)
    moved = torch.empty_like(q)
    moved[q] = torch.arange(25)
    assert retrieval(text[p], image[q], moved[positive][p]) == pytest.approx(wanted)
    assert retrieval(3 * text, 0.01 * image, positive) == pytest.approx(wanted)


def test_equals_are_found_equal_wherever_they_stand():
    """300 images in groups of three captions of one text each: a tie lost to rounding would show as 1 or 0."""
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(100, 33, generator=draw).repeat_interleave(3, 0)
    image = text + 0.05 * torch.randn(300, 33, generator=draw)
    order = torch.randperm(300, generator=draw)
    found = retrieve(text[order], image[order])
    assert (found.image_to_text.tied >= 2).all()
    assert (found.image_to_text.credit(1) <= 1 / 3 + 1e-12).all()


def test_recall_never_falls_with_k_and_ends_at_one():
    draw = torch.Generator().manual_seed(3)
    found = retrieve(torch.randn(30, 4, generator=draw), torch.randn(30, 4, generator=draw))
    for queries in found:
        credits = torch.stack([queries.credit(k) for k in range(1, 31)])
        assert (credits.diff(dim=0) >= 0).all() and (credits[-1] == 1).all() and credits[0].min() == 0


def test_queries_by_hand():
    """Two above, three equals of which one or two are to be found."""
    queries = Queries(torch.tensor([2, 2]), torch.tensor([2, 1]), torch.tensor([1, 2]))
    assert queries.rank().tolist() == pytest.approx([4, 2 + 4 / 3])
    assert [queries.credit(k).tolist() for k in (2, 3, 4, 5)] == [
        pytest.approx([0, 0]),
        pytest.approx([1 / 3, 2 / 3]),
        pytest.approx([2 / 3, 1]),
        pytest.approx([1, 1]),
    ]


def test_progress_ends_complete():
    seen = []
    retrieval(torch.eye(5), torch.eye(5), progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] > 0


NAN = torch.tensor([[1.0, 0.0], [float("nan"), 0.0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", torch.eye(2)), "fastcap.eval.retrieval: text must be a torch.Tensor, got 'str'; pass embeddings, one a row"),
        ((torch.eye(2).long(), torch.eye(2)), "text must be a dense tensor of floating point numbers, got 'torch.int64'"),
        ((torch.ones(2), torch.eye(2)), r"text must have shape \[N, D\], D >= 1, got \[2\]"),
        ((torch.eye(2), torch.eye(3)), "image must have the width of text, 2, got 3; embed both with one model"),
        ((torch.eye(2)[:0], torch.eye(2)), r"text must have a row, got \[0, 2\]; pass the embedding of at least one"),
        ((NAN, torch.eye(2)), "text must be finite, got 'NaN or infinity in row 1'; check the model that made it"),
        ((torch.eye(2), NAN / 0), "image must be finite, got 'NaN or infinity in row 0'"),
        ((torch.eye(2), torch.eye(2), None, (0,)), r"ks must be integers of at least 1, got 0; pass ks=\(1, 5, 10\)"),
        ((torch.eye(2), torch.eye(2), None, 5), r"ks must be integers of at least 1, got 5; pass ks=\(1, 5, 10\)"),
        ((torch.eye(2), torch.eye(2), torch.tensor([0, 2])), r"positive must lie in \[0, 2\), the rows of image, got 2"),
        ((torch.eye(3), torch.eye(3)[:2]), "positive must be given where there are more texts than images, 3 and 2"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(FastcapError, match=message):
        retrieval(*arguments)
