"""Attribute words: the predictor by multiple instances, which words it knows, and words that come with the data."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from fastcap import data
from fastcap.data import Attributed
from fastcap.data.attributed import attribute_images, attribute_words, word_ids
from fastcap.data.batching import stack_items
from fastcap.errors import FastcapError
from fastcap.models.attributes import PRIOR_REGIONS, AttributePredictor, content_words

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def predictor(ids=(4, 6, 9), keep=2, width=5, scale=3.0, **options):
    torch.manual_seed(0)
    made = AttributePredictor(width, list(ids), keep, **options).double()
    with torch.no_grad():
        made.score.weight.mul_(30 * scale)
    return made


# The predictor ----------------------------------------------------------------------------------------------------------


def test_an_image_has_a_word_unless_no_region_does():
    made, regions = predictor(), torch.randn(2, 4, 5, dtype=torch.float64, generator=generator())
    mask = torch.tensor([[True] * 4, [True, False, True, False]])
    absent = made(regions, mask)
    for b in range(2):
        p = torch.sigmoid(regions[b, mask[b]] @ made.score.weight.T + made.score.bias)
        torch.testing.assert_close(1 - absent[b].exp(), 1 - (1 - p).prod(0), rtol=1e-12, atol=1e-14)
    assert not made(regions, torch.zeros(2, 4, dtype=torch.bool)).any()
    torch.testing.assert_close(made(regions, torch.ones(2, 4, dtype=torch.bool)), made(regions, None))


def test_the_loss_is_the_binary_cross_entropy_of_the_words_of_a_caption():
    made, regions = predictor(), torch.randn(3, 4, 5, dtype=torch.float64, generator=generator())
    target = torch.tensor([[6, 3, 6, 2], [2, -100, -100, -100], [4, 9, 6, 2]])
    absent = made(regions, None)
    said = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.float64)
    p = 1 - absent.exp()
    expected = torch.nn.functional.binary_cross_entropy(p, said, reduction="none").sum(1)
    torch.testing.assert_close(made.loss(absent, target), expected, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: made.loss(made(x, None), target), regions.requires_grad_())


def test_certainty_of_any_size_has_a_finite_loss_and_gradient():
    made = AttributePredictor(1, [4, 5], 1)
    with torch.no_grad():
        made.score.weight.fill_(1.0)
        made.score.bias.zero_()
    for size in (1e-6, 1.0, 20.0, 90.0, 200.0, 1e4):
        for sign in (1, -1):
            regions = torch.full((1, 3, 1), sign * size, requires_grad=True)
            loss = made.loss(made(regions, None), torch.tensor([[4, 2]]))
            (gradient,) = torch.autograd.grad(loss.sum(), regions)
            assert loss.isfinite().all() and gradient.isfinite().all()
    regions = torch.full((1, 3, 1), -30.0)  # improbable but said: the gradient of each region's score is its share, 1/3 here
    loss = made.loss(made(regions.requires_grad_(), None), torch.tensor([[4, 2]]))
    (gradient,) = torch.autograd.grad(loss.sum(), regions)
    torch.testing.assert_close(gradient, torch.full((1, 3, 1), -1 / 3), rtol=1e-4, atol=1e-6)


def test_the_most_probable_words_come_first_and_an_image_without_a_region_has_none():
    made = predictor(ids=(4, 6, 9, 11), keep=3)
    regions = torch.randn(5, 4, 5, dtype=torch.float64, generator=generator())
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[3] = False
    absent = made(regions, mask)
    best = made.most_probable(absent)
    assert best.shape == (5, 3) and best[3].tolist() == [0, 0, 0]
    for b in (0, 1, 2, 4):
        ranked = sorted(zip((1 - absent[b].exp()).tolist(), (4, 6, 9, 11), strict=True), reverse=True)
        assert best[b].tolist() == [id for _, id in ranked[:3]]
    assert predictor(keep=50).keep == 3  # there are no more


def test_at_first_a_word_is_as_probable_as_captions_hold_it():
    shares = [0.4, 0.02, 1.0, 0.0]
    made = AttributePredictor(8, [4, 5, 6, 7], 2, shares)
    with torch.no_grad():
        made.score.weight.zero_()
        p = 1 - made(torch.randn(1, PRIOR_REGIONS, 8), None).exp()
    assert p[0].tolist() == pytest.approx([0.4, 0.02, 0.9999, 0.0001], rel=1e-2)


def test_it_learns_which_region_shows_a_word_from_captions_alone():
    """Each word has its direction; an image holds some of them, each in one of five regions, the others are noise."""
    directions = torch.eye(4, 12)
    said = torch.rand(400, 4, generator=generator(1)) < 0.3
    regions = 0.3 * torch.randn(400, 5, 12, generator=generator(2))
    place = torch.randint(0, 5, (400, 4), generator=generator(3))
    for w in range(4):
        regions[torch.arange(400), place[:, w]] += 2 * directions[w] * said[:, w : w + 1]
    target = torch.where(said, torch.arange(4, 8), -100)
    torch.manual_seed(0)
    made = AttributePredictor(12, [4, 5, 6, 7], 2)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        made.loss(made(regions[:300], None), target[:300]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = made(regions[300:], None) < -0.693  # p above a half
        assert (found == said[300:]).float().mean() > 0.95
        of_regions = torch.sigmoid(made.score(regions[300:]))
    for w in range(4):
        there = said[300:, w]
        assert (of_regions[there, :, w].argmax(1) == place[300:][there, w]).float().mean() > 0.95


# Which words ------------------------------------------------------------------------------------------------------------


def test_content_words_are_counted_by_caption_without_stop_words():
    captions = ["A red, red circle in the corner", "the RED square", "circle of a dog's dinner", "on the"]
    assert content_words(captions, 3) == [("circle", 0.5), ("red", 0.5), ("corner", 0.25)]
    assert content_words(["the of a"], 5) == [] and content_words([], 5) == []
    with pytest.raises(FastcapError, match="limit must be an integer of at least 1, got 0; pass limit=1000"):
        content_words(captions, 0)


@pytest.fixture
def tokenizer():
    pytest.importorskip("tokenizers")
    return data.CaptionTokenizer.train_words(["a red circle", "a red square", "blue"])


def test_words_of_one_known_token_have_an_id(tokenizer):
    red, blue = tokenizer.encode("red blue")
    assert word_ids(["red", "zebra", "Blue", "red circle", ""], tokenizer) == [red, None, blue, None, None]


# Words that come with the images ------------------------------------------------------------------------------------------


def batch(B=4):
    return Attributed(torch.randn(B, 3, 6, generator=generator()), torch.arange(B * 2).view(B, 2))


def same(one, images, attributes):
    assert isinstance(one, Attributed)
    return torch.equal(one.images, images) and torch.equal(one.attributes, attributes)


def test_a_batch_with_attributes_goes_where_a_tensor_of_images_goes():
    b = batch()
    x, a, rows = b.images, b.attributes, torch.tensor([2, 0, 2])
    assert len(b) == 4 and b.shape == x.shape and b.dim() == 3 and b.device == x.device
    assert same(b[rows], x[rows], a[rows]) and same(b[1:3], x[1:3], a[1:3])
    assert same(b.repeat_interleave(3, 0), x.repeat_interleave(3, 0), a.repeat_interleave(3, 0))
    for parts, wanted in (
        (b.chunk(3), zip(x.chunk(3), a.chunk(3), strict=True)),
        (b.split(3), zip(x.split(3), a.split(3), strict=True)),
    ):
        wanted = list(wanted)
        assert len(parts) == len(wanted) and all(same(part, *one) for part, one in zip(parts, wanted, strict=True))
    assert same(torch.cat(b.chunk(3)), x, a) and same(
        torch.cat([b, b[rows]], 0), torch.cat([x, x[rows]]), torch.cat([a, a[rows]])
    )
    assert same(b.to("cpu", non_blocking=True), x, a) and same(pickle.loads(pickle.dumps(b)), x, a)
    assert b.double().images.dtype == torch.float64 and b.double().attributes.dtype == torch.int64
    with pytest.raises(TypeError):
        torch.stack([b, b])


def test_words_become_ids_once_and_the_unknown_are_left_out(tokenizer):
    red, circle, blue = tokenizer.encode("red circle blue")
    made = attribute_images(torch.zeros(3, 2, 5), [["red", "zebra", "circle", "red"], [], ["blue"]], tokenizer)
    assert made.attributes.tolist() == [[red, circle], [0, 0], [blue, 0]]
    assert attribute_images(torch.zeros(1, 2, 5), [["zebra"]], tokenizer).attributes.tolist() == [[0]]
    assert attribute_images(torch.zeros(0, 2, 5), [], tokenizer).attributes.shape == (0, 1)


def write(folder, tokenizer=None, **changes):
    Image = pytest.importorskip("PIL.Image")
    words = [["red", "circle"], [], ["blue", "zebra"]]
    records = []
    for n, own in enumerate(words):
        Image.new("RGB", (8, 8)).save(folder / f"{n}.png")
        sentences = [{"raw": "a red circle"}, {"raw": "a blue square"}]
        records.append({"filename": f"{n}.png", "split": "train", "sentences": sentences, "imgid": n, "attributes": own})
    records[1].update(changes)
    (folder / "dataset_x.json").write_text(json.dumps({"images": records}))
    return folder


def test_attributes_come_from_the_records(tmp_path, tokenizer):
    made = data.KarpathyDataset(write(tmp_path), image_size=8)
    red, circle, blue = tokenizer.encode("red circle blue")
    batch = data.collate(tokenizer, 9, attributes=True)([made[0], made[2], made[5]])
    assert batch["images"].attributes.tolist() == [[red, circle], [0, 0], [blue, 0]]
    assert batch["images"].shape == (3, 3, 8, 8)
    plain = data.collate(tokenizer, 9)([made[0], made[2]])
    assert isinstance(plain["images"], torch.Tensor)
    view = made.images()
    assert stack_items([view[2], view[0]], tokenizer).attributes.tolist() == [[blue, 0], [red, circle]]
    assert torch.equal(stack_items([view[2]]), view[2]["image"][None])


def test_attributes_of_files_are_read_by_name_or_by_id(tmp_path):
    from fastcap.data.karpathy import read_attributes

    file = write(tmp_path) / "dataset_x.json"
    assert read_attributes(file) == {"0.png": ["red", "circle"], "1.png": [], "2.png": ["blue", "zebra"]}
    import numpy as np

    np.savez(tmp_path / "regions.npz", **{str(n): np.ones((2, 3), np.float32) for n in range(3)})
    found = read_attributes(file, data.RegionFeatures(tmp_path / "regions.npz"))
    assert found == {"0": ["red", "circle"], "1": [], "2": ["blue", "zebra"]}


def test_attributes_that_are_no_words_and_images_without_are_errors(tmp_path, tokenizer):
    with pytest.raises(FastcapError, match=r"attributes of images\[1\] of .* must be a list of words, got '\[3\]'; write"):
        data.KarpathyDataset(write(tmp_path, attributes=[3]), image_size=8)
    with pytest.raises(FastcapError, match="image 7 must have attributes, got 'none'; add \"attributes\""):
        attribute_words({"imgid": 7, "caption": "a red circle"})
    with pytest.raises(FastcapError, match=r"attributes must be int64 \[2, M\], got 'torch.float32 \[2, 3\]'; pass ids"):
        Attributed(torch.zeros(2, 4, 5), torch.zeros(2, 3))
