"""CLIPScore and RefCLIPScore against numbers worked by hand and plain torch."""

from __future__ import annotations

import pytest
import torch

from fastcap.errors import FastcapError
from fastcap.eval import clip_score, ref_clip_score

pytestmark = pytest.mark.usefixtures("one_thread")

# One caption direction, and others at known cosines to it, of various lengths.
TEXT = torch.tensor([[2.0, 0.0]])
AT = {0.6: [3.0, 4.0], 0.8: [4.0, 3.0], 1.0: [0.5, 0.0], 0.0: [0.0, 7.0], -0.6: [-3.0, 4.0]}


def at(*cosines):
    return torch.tensor([AT[cosine] for cosine in cosines])


def test_clip_score_is_two_and_a_half_cosines_and_never_negative():
    found = clip_score(TEXT.repeat(5, 1), at(0.6, 0.8, 1.0, 0.0, -0.6))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([1.5, 2.0, 2.5, 0.0, 0.0], abs=1e-7)
    assert clip_score(TEXT, at(0.6), weight=1).tolist() == pytest.approx([0.6])


def test_the_reference_joins_by_the_harmonic_mean():
    """CLIPScore 1.5; closest reference .8 of (0, .8, -.6): 2 * 1.5 * .8 / 2.3."""
    found = ref_clip_score(TEXT, at(0.6), at(0.0, 0.8, -0.6), torch.tensor([0, 0, 0]))
    assert found.tolist() == pytest.approx([2 * 1.5 * 0.8 / 2.3])


def test_the_factor_is_on_the_image_alone():
    """With all cosines 1 the mean is of 2.5 and 1: 10/7, not 2.5 and not 1."""
    assert ref_clip_score(TEXT, TEXT, TEXT, torch.tensor([0])).tolist() == pytest.approx([10 / 7])


@pytest.mark.parametrize(("image", "reference"), [(0.6, -0.6), (-0.6, 0.6), (0.0, 0.0), (-0.6, -0.6), (0.8, 0.0)])
def test_nothing_of_either_is_zero_and_no_nan(image, reference):
    assert ref_clip_score(TEXT, at(image), at(reference), torch.tensor([0])).tolist() == [0.0]


def test_each_caption_has_its_own_references_in_any_order():
    text = TEXT.repeat(3, 1)
    image = at(0.6, 0.8, 1.0)
    found = ref_clip_score(text, image, at(0.0, 0.8, 1.0, 0.6, -0.6), torch.tensor([2, 0, 1, 2, 0], dtype=torch.int32))
    pairs = [(1.5, 0.8), (2.0, 1.0), (2.5, 0.6)]
    assert found.tolist() == pytest.approx([2 * a * b / (a + b) for a, b in pairs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_random_embeddings_against_plain_torch(dtype):
    """More references than one block of pairs holds."""
    draw = torch.Generator().manual_seed(0)
    N, R, D = 3000, 9000, 12
    text, image, reference = (torch.randn(n, D, generator=draw).to(dtype) for n in (N, N, R))
    of = torch.cat([torch.arange(N), torch.randint(0, N, (R - N,), generator=draw)])[torch.randperm(R, generator=draw)]
    with_image = 2.5 * torch.nn.functional.cosine_similarity(text.double(), image.double()).clamp_min(0)
    torch.testing.assert_close(clip_score(text, image), with_image, rtol=1e-12, atol=1e-12)
    cosines = torch.nn.functional.cosine_similarity(text[of].double(), reference.double())
    closest = torch.stack([cosines[of == n].max() for n in range(N)]).clamp_min(0)
    wanted = torch.where(with_image * closest > 0, 2 / (1 / with_image + 1 / closest), 0.0)
    torch.testing.assert_close(ref_clip_score(text, image, reference, of), wanted, rtol=1e-12, atol=1e-12)


def test_an_embedding_of_zeros_has_cosine_zero():
    assert clip_score(torch.zeros(1, 2), at(0.6)).tolist() == [0.0]


def test_no_captions_have_no_scores():
    assert clip_score(TEXT[:0], TEXT[:0]).shape == (0,)
    assert ref_clip_score(TEXT[:0], TEXT[:0], TEXT[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)


INF = torch.tensor([[1.0, float("inf")]])


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (clip_score, (TEXT, [1.0]), "fastcap.eval.clip_score: image must be a torch.Tensor, got 'list'"),
        (clip_score, (TEXT, torch.eye(3)), "image must have the width of text, 2, got 3"),
        (clip_score, (TEXT, torch.eye(2)), r"image must have a row for each caption, 1, got 2; where images have several"),
        (clip_score, (TEXT, INF), "image must be finite, got 'NaN or infinity in row 0'"),
        (clip_score, (TEXT, TEXT, -1.0), "weight must be a positive number, got -1.0; pass 2.5"),
        (clip_score, (TEXT, TEXT.to("meta")), r"image must be on the device of text, cpu, got 'meta'; call image"),
        (
            ref_clip_score,
            (TEXT.repeat(2, 1), TEXT.repeat(2, 1), TEXT, torch.tensor([0])),
            "fastcap.eval.ref_clip_score: reference must have one for each caption, got 'none for caption 1'; leave such",
        ),
        (ref_clip_score, (TEXT, TEXT, TEXT, torch.tensor([1])), r"of must lie in \[0, 1\), the rows of text, got 1"),
        (ref_clip_score, (TEXT, TEXT, TEXT, torch.tensor([0, 0])), r"of must be an int64 tensor \[1\], got 'torch.int64"),
        (ref_clip_score, (TEXT, TEXT, TEXT, torch.tensor([0.0])), r"of must be an int64 tensor \[1\], got 'torch.float32"),
        (ref_clip_score, (TEXT, TEXT, torch.eye(3), torch.arange(3)), "reference must have the width of text, 2, got 3"),
    ],
)
def test_bad_input_is_refused(function, arguments, message):
    with pytest.raises(FastcapError, match=message):
        function(*arguments)
