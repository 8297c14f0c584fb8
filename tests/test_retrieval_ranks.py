"""retrieval_ranks and retrieval_counts: whole numbers, whose scores are exact, and float64 scores are their oracle."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastcap
from fastcap.errors import BackendUnavailable, FastcapError
from fastcap.functional import retrieval_counts, retrieval_ranks
from fastcap.memory import peak_extra
from fastcap.ops import _backend, _rank_blocks
from fastcap.ops import retrieval_ranks as story
from fastcap.testing import Allocations
from fastcap.testing.ranks import make_embeddings, make_positive

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(place, text, image, dtype=None, **options):
    """The four counts at a place, on the CPU."""
    dtype = dtype or text.dtype
    options = {k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with fastcap.backend(place.backend):
        counts = retrieval_counts(text.to(place.device, dtype), image.to(place.device, dtype), **options)
    assert all(x.dtype == torch.int64 and x.shape == text.shape[:1] for x in counts)
    return [x.cpu() for x in counts]


def by_hand(scores, positive):
    """The counts of a list of rows of numbers of any exact kind."""
    found = []
    for p, q in enumerate(positive):
        own = scores[p][q]
        row = [s for i, s in enumerate(scores[p]) if i != q]
        column = [scores[i][q] for i in range(len(scores)) if i != p]
        found.append([sum(s > own for s in part) for part in (row, column)] + [part.count(own) for part in (row, column)])
    above_images, above_texts, tied_images, tied_texts = zip(*found, strict=True) if found else ((),) * 4
    return [torch.tensor(x, dtype=torch.int64) for x in (above_images, tied_images, above_texts, tied_texts)]


def whole_scores(text, image):
    """Dot products of whole numbers, as Python's integers."""
    text, image = ([[int(x) for x in row] for row in m.tolist()] for m in (text, image))
    return [[sum(a * b for a, b in zip(t, v, strict=True)) for v in image] for t in text]


def assert_same(found, expected):
    for a, b, name in zip(found, expected, story.Counts._fields, strict=True):
        assert torch.equal(a, b), (name, a, b)


# What it is ------------------------------------------------------------------------------------------------------------

# texts x images: text 0 is nearest to image 1; text 1 ties with image 2; text 2 shares image 0 with text 0 and leads it
TEXT = torch.tensor([[1.0, 2.0, 0.0], [0.0, 2.0, 2.0], [3.0, 0.0, 1.0]])
IMAGE = torch.eye(3)


def test_three_texts_by_hand(target):
    positive = torch.tensor([0, 1, 0])
    counts = run(target, TEXT, IMAGE, positive=positive, normalize=False)
    # rows 1 2 0 | 0 2 2 | 3 0 1; columns of images 0, 1, 0 are 1 0 3 | 2 2 0 | 1 0 3
    assert [x.tolist() for x in counts] == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]]
    with fastcap.backend(target.backend):
        given = (x.to(target.device) for x in (TEXT, IMAGE))
        over_images, over_texts = retrieval_ranks(*given, positive=positive.to(target.device), normalize=False)
    assert over_images.dtype == over_texts.dtype == torch.float64
    assert over_images.tolist() == [2.0, 1.5, 1.0] and over_texts.tolist() == [2.0, 1.5, 1.0]


@each_dtype
@pytest.mark.parametrize(("P", "Q"), [(9, 9), (7, 19), (23, 6), (1, 1), (17, 1), (1, 17)])
def test_whole_numbers_are_counted_exactly(P, Q, dtype, target):
    inputs = make_embeddings(P, Q, 4, seed=P)
    for positive in (make_positive(P, Q), torch.zeros(P, dtype=torch.int64)):
        expected = by_hand(whole_scores(**inputs), positive.tolist())
        assert_same(run(target, **inputs, dtype=dtype, positive=positive, normalize=False), expected)
    if P <= Q:
        expected = by_hand(whole_scores(**inputs), list(range(P)))
        assert_same(run(target, **inputs, dtype=dtype, normalize=False), expected)


def exact_cosines(text, image):
    """Cosines times their absolute value, as fractions: in the order of cosines, and without a square root."""
    text, image = ([[Fraction(x) for x in row] for row in m.double().tolist()] for m in (text, image))
    dots = [[sum(a * b for a, b in zip(t, v, strict=True)) for v in image] for t in text]
    norms = [[sum(a * a for a in row) for row in m] for m in (text, image)]
    return [[d * abs(d) / norms[0][p] / norms[1][q] for q, d in enumerate(row)] for p, row in enumerate(dots)]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ranks_are_those_of_exact_cosines(data, cpp):
    """Random embeddings, some of them copies, of any dtype and strides, in blocks of any size, against fractions."""
    P, Q, D = (data.draw(st.integers(low, 12)) for low in (1, 1, 3))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    made = []
    for n in (P, Q):
        pool = torch.randn(data.draw(st.integers(1, n)), D, generator=generator, dtype=torch.float64).to(dtype)
        made.append(pool[torch.randint(len(pool), (n,), generator=generator)])
    positive = torch.randint(Q, (P,), generator=generator)
    expected = by_hand(exact_cosines(*made), positive.tolist())
    if data.draw(st.booleans()):
        made = [x.T.contiguous().T for x in made]
    if data.draw(st.booleans()):
        made = [x.repeat_interleave(2, 1)[:, ::2] for x in made]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rank_blocks, "BLOCK_ROWS", data.draw(st.integers(1, 13)))
        patch.setattr(_rank_blocks, "BLOCK_COLS", data.draw(st.integers(1, 13)))
        assert_same(run(cpp, *made, positive=positive), expected)
    for name in ("reference",):
        with fastcap.backend(name):
            over_images, over_texts = retrieval_ranks(*made, positive=positive)
        above_images, tied_images, above_texts, tied_texts = (x.double() for x in expected)
        assert torch.equal(over_images, 1 + above_images + tied_images / 2)
        assert torch.equal(over_texts, 1 + above_texts + tied_texts / 2)


# Ties and near ties ----------------------------------------------------------------------------------------------------


@each_dtype
def test_copies_tie_wherever_they_stand(dtype, target):
    """A matrix product rounds the same dot product differently in its tails: sums of 37 random numbers would show it."""
    D, n = (37, 30) if target.backend == "triton" and target.device == "cpu" else (301, 777)
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(3, D, generator=generator) for _ in range(2))
    which = torch.arange(n) % 3
    above_images, tied_images, above_texts, tied_texts = run(target, text[which], image[which], dtype)
    assert (tied_images == n // 3 - 1).all() and (tied_texts == n // 3 - 1).all()
    assert not (above_images % (n // 3)).any() and not (above_texts % (n // 3)).any()


def test_all_captions_alike_share_the_middle_rank(target):
    n = 40 if target == ("cpu", "triton") else 1100
    one = torch.randn(1, 24, generator=torch.Generator().manual_seed(3)).to(target.device).expand(n, 24)
    with fastcap.backend(target.backend):
        for ranks in retrieval_ranks(one, one.clone()):
            assert (ranks == (n + 1) / 2).all()


@pytest.mark.parametrize("positive", ["each its own", "few images", "one image"])
@pytest.mark.parametrize("step", [0.0, 1e-7, 1e-9, 1e-3])
def test_near_copies_are_told_apart_as_in_float64(step, positive, cpp):
    """Scores that float32 cannot tell apart, for all elements or for many: decided in float64."""
    generator = torch.Generator().manual_seed(1)
    text, image = (
        (torch.randn(1, 48, generator=generator) + step * torch.randn(600, 48, generator=generator, dtype=torch.float64))
        for _ in range(2)
    )
    q = {"each its own": torch.arange(600), "few images": torch.arange(600) % 7 * 80, "one image": torch.full((600,), 599)}
    for dtype in (torch.float32, torch.float64):
        given = text.to(dtype), image.to(dtype)
        with fastcap.backend("reference"):
            expected = retrieval_counts(*given, positive=q[positive])
        assert_same(run(cpp, *given, positive=q[positive]), expected)


def test_a_difference_below_float32_decides(cpp):
    """Cosines of 1 and 1 - 5e-13: in float32 both are 1."""
    text = torch.tensor([[1.0, 0.0]])
    image = torch.tensor([[1.0, 1e-6], [1.0, 0.0], [-1.0, 0.0]])
    for own, ranks in ((0, 2.0), (1, 1.0), (2, 3.0)):
        with fastcap.backend("cpp"):
            over_images, over_texts = retrieval_ranks(text, image, positive=torch.tensor([own]))
        assert over_images.item() == ranks and over_texts.item() == 1.0
    with fastcap.backend("cpp"):
        _, over_texts = retrieval_ranks(image, text, positive=torch.zeros(3, dtype=torch.int64))
    assert over_texts.tolist() == [2.0, 1.0, 3.0]


@pytest.mark.parametrize("texts", [0, 1, 5, 6, 7, 8, 40])
def test_images_of_many_texts(texts, cpp):
    """Up to some number of texts an image is compared row by row, above it column by column; beside images of one text."""
    P, Q = 130, 70
    inputs = make_embeddings(P, Q, 6, seed=texts)
    positive = torch.arange(P) % Q
    positive[:texts] = 69
    expected = by_hand(whole_scores(**inputs), positive.tolist())
    for dtype in (torch.float32, torch.float64):
        assert_same(run(cpp, **inputs, dtype=dtype, positive=positive, normalize=False), expected)


def test_two_zeros_are_one(target):
    """-0 is 0: such embeddings are the same, and an embedding of 0 has similarity 0 with everything."""
    text = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, -0.0], [0.0, 0.0, 0.0]])
    image = torch.tensor([[0.3, 0.0, 0.7], [0.3, -0.0, 0.7], [-1.0, 0.0, 0.0]])
    counts = run(target, text, image)
    # rows a a b | a a b | 0 0 0 with a > 0 > b; columns a a 0 | a a 0 | b b 0
    assert [x.tolist() for x in counts] == [[0, 0, 0], [1, 1, 2], [0, 0, 0], [1, 1, 0]]
    assert_same(run(target, text, image, normalize=False), counts)


@pytest.mark.parametrize("scales", [(1e25, 1e25), (1e-25, 1e-25), (1e-25, 1e25), (1e-6, 1.0)])
def test_products_beyond_the_range_of_float32_are_counted(scales, cpp):
    generator = torch.Generator().manual_seed(4)
    text, image = (scale * torch.randn(60, 5, generator=generator) for scale in scales)
    with fastcap.backend("reference"):
        expected = retrieval_counts(text, image, normalize=False)
    assert_same(run(cpp, text, image, normalize=False), expected)
    with fastcap.backend("reference"):
        expected = retrieval_counts(text, image)
    assert_same(run(cpp, text, image), expected)


def test_one_outlier_in_length_leaves_the_others_ranks(cpp):
    generator = torch.Generator().manual_seed(5)
    text, image = (torch.randn(90, 5, generator=generator) for _ in range(2))
    image[7] *= 1e18
    with fastcap.backend("reference"):
        expected = retrieval_counts(text, image, normalize=False)
    assert_same(run(cpp, text, image, normalize=False), expected)


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn.matmul, "fp32_precision"), reason="this torch always multiplies in full"
)
def test_a_coarse_precision_of_products_does_not_matter(cpp):
    generator = torch.Generator().manual_seed(6)
    text, image = (torch.randn(300, 256, generator=generator) for _ in range(2))
    before = torch.backends.mkldnn.matmul.fp32_precision
    expected = run(cpp, text, image)
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert not _rank_blocks._multiplies_in_full()
        assert_same(run(cpp, text, image), expected)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert _rank_blocks._multiplies_in_full()


# What is no number -----------------------------------------------------------------------------------------------------


@each_dtype
def test_nan_reaches_the_ranks_of_its_own_pair_only(dtype, target):
    inputs = make_embeddings(12, 15, 4, copies=False)
    clean = by_hand(whole_scores(**inputs), list(range(12)))
    text, image = inputs["text"].clone(), inputs["image"].clone()
    text[3, 1] = image[5, 0] = image[13, 2] = math.nan
    found = run(target, text, image, dtype, normalize=False)
    kept_texts, kept_images = [p for p in range(12) if p not in (3, 5)], [q for q in range(15) if q not in (5, 13)]
    scores = whole_scores(inputs["text"][[p for p in range(12) if p != 3]], inputs["image"][kept_images])
    rows = [p for p in range(12) if p != 3]
    for p in kept_texts:
        row = scores[rows.index(p)]
        own = row[kept_images.index(p)]
        column = [s[kept_images.index(p)] for s in scores]
        expected = [sum(s > own for s in row), row.count(own) - 1, sum(s > own for s in column), column.count(own) - 1]
        assert [x[p].item() for x in found] == expected
    for p in (3, 5):  # all others are above
        assert [x[p].item() for x in found] == [14, 0, 11, 0]
    with fastcap.backend(target.backend):
        given = (x.to(target.device, dtype) for x in (text, image))
        for ranks in retrieval_ranks(*given, normalize=False):
            assert ranks.isnan().nonzero().flatten().tolist() == [3, 5]
    assert len(clean) == 4


def test_infinite_scores_are_scores(cpp, reference):
    """Without norms an infinite embedding has infinite scores, which tie with each other; with them it has none."""
    inputs = make_embeddings(12, 12, 3, copies=False)
    inputs["image"][4] = torch.tensor([math.inf, 1.0, 1.0])
    inputs["image"][6] = torch.tensor([math.inf, 2.0, 1.0])
    inputs["text"][2, 0] = math.inf
    for dtype in (torch.float32, torch.float64):
        for normalize in (True, False):
            found = (run(place, **inputs, dtype=dtype, normalize=normalize) for place in (cpp, reference))
            assert_same(*found)


def test_nothing_to_rank(target):
    for P, Q in ((0, 0), (0, 5)):
        assert all(x.numel() == 0 for x in run(target, torch.zeros(P, 3), torch.zeros(Q, 3)))
    assert [x.tolist() for x in run(target, torch.ones(1, 3), torch.ones(1, 3))] == [[0], [0], [0], [0]]


# How it runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 5), (64, 1000), (65, 128), (200, 129)])
def test_blocks_of_any_size_give_the_same(rows, cols, cpp, monkeypatch, one_thread):
    inputs = make_embeddings(150, 140, 6, seed=2)
    positive = make_positive(150, 140)
    expected = run(cpp, **inputs, positive=positive)
    monkeypatch.setattr(_rank_blocks, "BLOCK_ROWS", rows)
    monkeypatch.setattr(_rank_blocks, "BLOCK_COLS", cols)
    for dtype in DTYPES:
        assert_same(run(cpp, **inputs, dtype=dtype, positive=positive), expected)


def test_counts_do_not_depend_on_the_number_of_threads(cpp):
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(7)
    text, image = (torch.randn(700, 33, generator=generator) for _ in range(2))
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(cpp, text, image))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])


def test_progress_counts_rows_and_changes_nothing(target, monkeypatch):
    monkeypatch.setattr(story, "_STEP", {"cpp": 16, "triton": 16})
    inputs, positive = make_embeddings(50, 9, 4, seed=9), make_positive(50, 9)
    calls = []
    found = run(target, **inputs, positive=positive, progress=lambda *done: calls.append(done))
    assert_same(found, run(target, **inputs, positive=positive))
    steps = [50] if target.backend == "reference" else [16, 32, 48, 50]
    assert calls == [(done, 50) for done in steps]


def test_an_error_in_progress_reaches_the_caller(cpp):
    def stop(done, total):
        raise KeyboardInterrupt

    with fastcap.backend("cpp"), pytest.raises(KeyboardInterrupt):
        retrieval_ranks(TEXT, IMAGE, progress=stop)


def test_memory_does_not_grow_with_the_square(cpp, one_thread, monkeypatch):
    """6,000 x 6,000 scores are 144 MB; the scratch is 2 MB, and 4 more where float64 decides."""
    P, D = 6000, 8
    monkeypatch.setattr(story, "_STEP", {"cpp": 100})
    text, image = (torch.randn(P, D, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    watch = Allocations()
    with fastcap.backend("cpp"), watch:
        retrieval_ranks(text, image)
    assert 0 < watch.largest <= 8 * _rank_blocks.BLOCK_ROWS * _rank_blocks.BLOCK_COLS
    for options in ({}, {"progress": lambda done, total: None}):
        extra, method = peak_extra(lambda options=options: run(cpp, text, image, **options), "cpu")
        if extra is None:
            pytest.skip(method)
        assert extra < 16e6, options


def test_copies_do_not_cost_dot_products(cpp):
    """All captions alike, the worst of ties: each element is within rounding, and none is multiplied again in float64."""
    one = torch.randn(1, 16, generator=torch.Generator().manual_seed(8)).expand(500, 16)
    dtypes = []
    original = _rank_blocks._products
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rank_blocks, "_products", lambda t, v, dtype, s: dtypes.append(dtype) or original(t, v, dtype, s))
        run(cpp, one, one)
    assert dtypes == [torch.float32]


def test_gradients_are_neither_given_nor_in_the_way(target):
    leaves = [x.to(target.device).clone().requires_grad_() for x in (TEXT, IMAGE)]
    with fastcap.backend(target.backend):
        for result in (*retrieval_counts(*leaves), *retrieval_ranks(*leaves)):
            assert not result.requires_grad and result.grad_fn is None


def test_equal_rows_are_found_in_any_dtype():
    x = torch.tensor(
        [[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [0.0, 1.0], [-0.0, 1.0], [math.nan, 1.0], [math.nan, 1.0], [2.0, 1.0]]
    )
    for dtype in DTYPES:
        assert story._same_rows(x.to(dtype)).tolist() == [0, 1, 0, 3, 3, 5, 6, 1]
        if fastcap.backends()["cpp"]:
            norm, same = torch.empty(8, dtype=torch.float64), torch.empty(8, dtype=torch.int64)
            _backend.extension().retrieval_ranks_rows_cpu(x.to(dtype), norm, same, 1)
            assert same.tolist() == [0, 1, 0, 3, 3, 5, 6, 1]
            torch.testing.assert_close(norm, x.double().norm(dim=1), equal_nan=True)


def test_equal_rows_are_found_among_many(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)[torch.randint(400, (1500,), generator=generator)]
    rows = x.tolist()
    expected = [rows.index(row) for row in rows]
    monkeypatch.setattr(story, "_ROWS_AT_ONCE", 999)
    assert story._same_rows(x).tolist() == expected
    assert story._same_rows(x.double()).tolist() == expected  # whose low bits are 0


# Errors ----------------------------------------------------------------------------------------------------------------

T, V = torch.zeros(3, 4), torch.zeros(5, 4)
WRONG = {
    "text must be a torch.Tensor": ([1.0], V, {}),
    "text must be float32 or": (T.long(), V, {}),
    "text must be dense": (T.to_sparse(), V, {}),
    "text must have shape [P, D], D >= 1, got [12]": (T.flatten(), V, {}),
    "image must have the width of text, 4, got 3": (T, V[:, :3], {}),
    "image must have the dtype of text, float32, got 'float16'": (T, V.half(), {}),
    "positive must be given where there are more texts than images": (V, T, {}),
    "positive must be int64 or int32": (T, V, {"positive": torch.zeros(3)}),
    "positive must have shape [P] = [3], got [2]": (T, V, {"positive": torch.zeros(2, dtype=torch.int64)}),
    "positive must lie in [0, 5), the rows of image, got 5": (T, V, {"positive": torch.tensor([0, 5, 0])}),
    "positive must lie in [0, 5), the rows of image, got -1": (T, V, {"positive": torch.tensor([0, 1, -1])}),
    "normalize must be True or False, got 1": (T, V, {"normalize": 1}),
    "progress must be None or a function of (rows done, rows in all), got True": (T, V, {"progress": True}),
}


@pytest.mark.parametrize("function", [retrieval_ranks, retrieval_counts], ids=lambda f: f.__name__)
@pytest.mark.parametrize("message", WRONG)
def test_bad_arguments_are_named(message, function):
    text, image, options = WRONG[message]
    with pytest.raises(FastcapError) as raised:
        function(text, image, **options)
    assert str(raised.value).startswith(f"fastcap.{function.__name__}: ") and message in str(raised.value)


def test_there_is_no_cuda_backend_by_name():
    with pytest.raises(BackendUnavailable), fastcap.backend("cuda"):
        retrieval_ranks(T, V)


NAMES = ("own", "text_norm", "image_norm", "text_same", "image_same", "order")
RAW = ("text", "image", "positive", *NAMES, "normalize", "begin", "end", "backend")


def raw(backend="cpp"):
    """The arguments RAW of the raw `fwd` operator, 3 texts and 5 images."""
    inputs = make_embeddings(3, 5, 4)
    text, image, positive = inputs["text"].float(), inputs["image"].float(), torch.tensor([4, 0, 4])
    made = torch.ops.fastcap.retrieval_ranks_own(text, image, positive, True, backend)
    return text, image, positive, *made, True, 0, 3, backend


BAD_RAW = {
    "backend": ["cuda", "reference", ""],
    "text": [torch.zeros(4, 4), torch.zeros(3, 5), torch.zeros(12), torch.zeros(3, 4).double(), torch.zeros(3, 4).long()],
    "image": [torch.zeros(6, 4), torch.zeros(5, 3), torch.zeros(5, 4).half()],
    "positive": [torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(3, dtype=torch.int32)],
    "own": [torch.zeros(3), torch.zeros(4).double()],
    "text_norm": [torch.zeros(3), torch.zeros(2).double()],
    "image_norm": [torch.zeros(3).double()],
    "text_same": [torch.zeros(5, dtype=torch.int64), torch.zeros(3)],
    "image_same": [torch.zeros(3, dtype=torch.int64)],
    "order": [torch.zeros(5, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)],
    "begin": [-1, 4],
    "end": [-1, 4],
}


@pytest.mark.parametrize("name", BAD_RAW)
def test_the_operators_check_what_they_are_given(name, cpp):
    fwd, own = torch.ops.fastcap.retrieval_ranks_fwd, torch.ops.fastcap.retrieval_ranks_own
    right = raw()
    fwd(*right)
    for wrong in BAD_RAW[name]:
        given = [wrong if key == name else value for key, value in zip(RAW, right, strict=True)]
        with pytest.raises(FastcapError):
            fwd(*given)
        if name in ("text", "positive", "backend"):
            with pytest.raises(FastcapError):
                own(*given[:3], True, given[-1])


@pytest.mark.parametrize("wrong", [[0, 3, 1], [-1, 0, 2], [2**40, 0, 1], [0, 0, 2], [2, 1, 0]])
def test_an_order_that_is_none_is_refused_or_harmless(wrong, cpp):
    """What is followed is checked: an order by hand gives an error or counts of some texts, never a wrong read."""
    given = [torch.tensor(wrong) if key == "order" else value for key, value in zip(RAW, raw(), strict=True)]
    try:
        counts = torch.ops.fastcap.retrieval_ranks_fwd(*given)
    except (FastcapError, IndexError):
        return
    assert all((x >= 0).all() and (x <= 10).all() for x in counts)


def test_a_row_range_is_a_part_of_the_whole(target):
    if target.backend == "reference":
        pytest.skip("has no operator")
    if target.device == "cuda":
        pytest.skip("its arguments are made on the CPU")
    given = raw(target.backend)
    whole = torch.ops.fastcap.retrieval_ranks_fwd(*given)
    ranges = (0, 2), (2, 2), (2, 3)
    parts = [torch.ops.fastcap.retrieval_ranks_fwd(*given[:10], *range, target.backend) for range in ranges]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
        assert torch.equal(sum(part[2 + i] for part in parts), whole[2 + i])


def test_an_index_out_of_range_has_no_score_and_no_wrong_read(target):
    """The public functions refuse it on the CPU; on a GPU, where looking costs a synchronisation, the kernel answers so."""
    if target.backend == "reference":
        pytest.skip("has no operator")
    inputs = make_embeddings(4, 5, 3)
    text, image = (x.float().to(target.device) for x in inputs.values())
    positive = torch.tensor([2, -1, 5, 2**40], device=target.device)
    own, *of = torch.ops.fastcap.retrieval_ranks_own(text, image, positive, False, target.backend)
    assert own.isnan().tolist() == [False, True, True, True]
    counts = torch.ops.fastcap.retrieval_ranks_fwd(text, image, positive, own, *of, False, 0, 4, target.backend)
    expected = by_hand(whole_scores(**inputs), [2, 0, 0, 0])
    for found, wanted in zip(counts, expected, strict=True):
        assert found.tolist() == [wanted[0].item(), 0, 0, 0]


def block(**other):
    """The arguments of the extension's block kernel: rows 1 and 2 of 3 texts, columns 1 to 3 of 5 images."""
    given = {
        "text": torch.ones(3, 4), "image": torch.ones(5, 4), "positive": torch.tensor([1, 3, 0]),
        "text_norm": torch.ones(3).double(), "image_norm": torch.ones(5).double(), "own": torch.zeros(3).double(),
        "normalize": True, "scores": torch.zeros(2, 3), "row": 1, "col": 1, "text_same": torch.arange(3),
        "image_same": torch.arange(5), "texts": torch.tensor([0, 1]), "above_images": torch.zeros(2, dtype=torch.int64),
        "tied_images": torch.zeros(2, dtype=torch.int64), "above_texts": torch.zeros(3, dtype=torch.int64),
        "tied_texts": torch.zeros(3, dtype=torch.int64), "last": True, "threads": 1,
    }  # fmt: skip
    return list({**given, **other}.values())


def call_block(arguments):
    pairs = _backend.extension().RankPairs(*arguments[:7])
    return _backend.extension().retrieval_ranks_block_cpu(pairs, *arguments[7:])


BAD_BLOCK = {
    "text": [
        torch.ones(3, 5),
        torch.ones(4, 4),
        torch.ones(12),
        torch.ones(3, 4).half(),
        torch.ones(3, 4, device="meta"),
        None,
    ],
    "image": [torch.ones(6, 4), torch.ones(5, 3), None],
    "positive": [torch.zeros(3), torch.zeros(4, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)[::2]],
    "text_norm": [torch.ones(3), torch.ones(2).double()],
    "image_norm": [torch.ones(3).double(), None],
    "own": [torch.zeros(3), torch.zeros(6).double()[::2]],
    "scores": [torch.zeros(3, 2).T, torch.zeros(2, 3).half(), torch.zeros(6), torch.zeros(3, 3), torch.zeros(2, 5), None],
    "row": [-1, 2, 2**62],
    "col": [-1, 3],
    "text_same": [torch.arange(2), torch.arange(3).int()],
    "image_same": [torch.arange(3)],
    "texts": [
        torch.tensor([0, 3]),
        torch.tensor([-1, 0]),
        torch.tensor([1, 0]),
        torch.tensor([0, 2]),
        torch.zeros(1, 1).long(),
    ],
    "above_images": [torch.zeros(3, dtype=torch.int64), torch.zeros(2)],
    "tied_images": [torch.zeros(1, dtype=torch.int64), None],
    "above_texts": [torch.zeros(2, dtype=torch.int64), torch.zeros(3)],
    "tied_texts": [torch.zeros(6, dtype=torch.int64)[::2]],
}


@pytest.mark.parametrize("name", BAD_BLOCK)
def test_the_extension_checks_what_it_is_given(name, cpp):
    """Called by hand with wrong shapes, dtypes, layouts or indices it raises: it never follows a pointer too far."""
    assert call_block(block())
    for wrong in BAD_BLOCK[name]:
        with pytest.raises((FastcapError, TypeError, RuntimeError)):
            call_block(block(**{name: wrong}))


def test_the_extension_checks_rows_and_own(cpp):
    extension = _backend.extension()
    x, norm, same = torch.ones(3, 4), torch.zeros(3).double(), torch.zeros(3, dtype=torch.int64)
    extension.retrieval_ranks_rows_cpu(x, norm, same, 1)
    assert norm.tolist() == [2.0] * 3 and same.tolist() == [0] * 3
    for wrong in (
        (x[0], norm, same),
        (x, norm.float(), same),
        (x, norm[:2], same),
        (x, norm, same[:2]),
        (x.long(), norm, same),
    ):
        with pytest.raises((FastcapError, TypeError)):
            extension.retrieval_ranks_rows_cpu(*wrong, 1)
    with pytest.raises(FastcapError):
        extension.retrieval_ranks_own_cpu(extension.RankPairs(*block(own=torch.zeros(2).double())[:7]), 1)


def test_a_block_that_is_too_coarse_adds_nothing(cpp):
    """Two texts, 4,000 images that differ by less than float32 sees: refused in float32, and counted in float64."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 8, generator=generator)
    image = torch.randn(1, 8, generator=generator) + 1e-7 * torch.randn(4000, 8, generator=generator)
    own, *of = torch.ops.fastcap.retrieval_ranks_own(text, image, torch.tensor([0, 1]), True, "cpp")
    text_norm, image_norm, text_same, image_same, order = of
    for last, dtype in ((False, torch.float32), (True, torch.float64)):
        counts = [torch.zeros(2, dtype=torch.int64) for _ in range(4)]
        pairs = _backend.extension().RankPairs(text, image, torch.tensor([0, 1]), text_norm, image_norm, own, True)
        scores = text.to(dtype) @ image.to(dtype).T
        counted = _backend.extension().retrieval_ranks_block_cpu(
            pairs, scores, 0, 0, text_same, image_same, order, *counts, last, 1
        )
        assert counted == last and (counts[0].sum() > 0) == last
    assert_same(counts, run(cpp, text, image))
