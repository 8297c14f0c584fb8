"""contrastive_reward's Triton plans, rectangles of tiles and blocks of the backward, and their results."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from fastcap.kernels import contrastive_reward as kernels

from fastcap.testing import assert_close_to_float64
from fastcap.testing.contrastive import make_pairs, plan_contrastive_reward

HOPPER = kernels.Device(9, 132, 227 << 10)


def statistics(P, Q, dtype=torch.bfloat16, **options):
    """The first launch of a forward on an H100."""
    return plan_contrastive_reward((P, Q, 64), dtype, device=HOPPER, **options)[0]


# Plans -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(1, 1), (1, 500), (500, 1), (12, 12), (512, 256), (256, 512), (7, 1031)])
@pytest.mark.parametrize("programs", [1, 2, 132, 264])
def test_rectangles_cover_all_tiles_and_run_at_once(blocks, programs):
    rows, cols = kernels._rectangle(*blocks, programs)
    groups = math.ceil(blocks[0] / rows), math.ceil(blocks[1] / cols)
    assert groups[0] * groups[1] <= programs
    assert (groups[0] - 1) * rows < blocks[0] and (groups[1] - 1) * cols < blocks[1]  # no program without a tile
    # the longest program has at most twice its share: it can have no less where a row of tiles has one more than programs
    assert rows * cols <= 2 * math.ceil(blocks[0] * blocks[1] / programs)


def test_a_large_batch_keeps_a_hopper_busy():
    launch = statistics(65_536, 65_536)
    tiles = 256 * 512
    assert (launch.args["BLOCK_P"], launch.args["BLOCK_Q"]) == (256, 128)
    assert 120 <= launch.grid[0] <= 132
    assert launch.args["ROW_BLOCKS"] * launch.args["COL_BLOCKS"] <= 1.05 * tiles / 132


def test_a_small_batch_is_cut_into_as_many_programs_as_processors():
    launch = statistics(768, 768)
    assert launch.grid[0] == 144 and launch.args["ROW_BLOCKS"] == launch.args["COL_BLOCKS"] == 1


@pytest.mark.parametrize("P", [768, 8192, 65_536, 1_000_000])
def test_partial_results_are_a_few_numbers_a_row_and_column(P):
    args = statistics(P, P).args
    partial = sum(args[f"{name}_{which}_ptr"].numel() for name in ("row", "col") for which in ("first", "second"))
    assert partial <= 2 * P * 2 * 24


@pytest.mark.parametrize("shape", [(1, 1), (65_536, 65_536), (3, 200_000), (200_000, 3), (5000, 40), (1, 10**9)])
@pytest.mark.parametrize("most", [16 << 20, 32 << 20])
def test_blocks_of_the_backward_fit_the_scratch(shape, most):
    rows, cols = kernels._block_of_scores(*shape, most)
    assert 1 <= rows <= shape[0] and 1 <= cols <= shape[1] and rows * cols <= most
    assert rows % 256 == 0 or rows == shape[0]
    assert cols % 256 == 0 or cols == shape[1]
    assert rows * cols >= min(shape[0] * shape[1], most // 3)


def test_the_backward_has_one_block_where_the_scores_fit():
    x, n = torch.empty(768, 64, device="meta"), torch.empty(768, device="meta")
    blocks = list(kernels.plan_contrastive_reward_bwd(n, n, n, x, x, n.long(), n, n, n, n, "ieee"))
    assert len(blocks) == 1 and blocks[0].weights.shape == (768, 768)


def test_a_tile_for_another_gpu_is_not_taken():
    devices = HOPPER, HOPPER._replace(major=12), HOPPER._replace(shared=64 << 10)
    hopper, *others = (kernels._tile_of(kernels.TILES["half"], 65_536, 65_536, device) for device in devices)
    assert hopper.majors == (9,) and all(tile.majors == () for tile in others)


# What they compute -----------------------------------------------------------------------------------------------------


def call(P, Q, D, dtype, baseline="logsumexp", rows=True, cols=True, stretch=1.0, precision="highest"):
    """(results, gradients) of the launchers, and the same in float64, dense; with pairs out of range."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = make_pairs(P, Q, D, seed=P + Q)
    text, image = (torch.nn.functional.normalize(pairs[k], dim=1).to(dtype) for k in ("text", "image"))
    generator = torch.Generator().manual_seed(P)
    positive = torch.randint(Q, (P,), generator=generator)
    positive[1], positive[2] = -1, Q + 3
    row_factor = (torch.rand(P, generator=generator) + 0.5).mul(20).to(acc)
    col_factor = (torch.rand(Q, generator=generator) + 0.5).to(acc)
    col_factor[::3] *= stretch
    down, drow, dcol = (torch.randn(n, generator=generator).to(acc) for n in (P, P if rows else 0, Q if cols else 0))

    def unwritten(*size, dtype=acc):
        return torch.full(size, torch.nan if dtype.is_floating_point else -999).to(dtype)

    largest = baseline == "max"
    p, q = P if rows else 0, Q if cols else 0
    row_index, col_index = (unwritten(n if largest else 0, dtype=torch.int64) for n in (p, q))
    own, row, col = unwritten(P), unwritten(p), unwritten(q)
    given = text, image, positive, row_factor, col_factor
    kernels.contrastive_reward_fwd(*given, own, row, row_index, col, col_index, baseline, precision)
    found = {"own": own, "row": row, "row_index": row_index, "col": col, "col_index": col_index}

    def dense(dtype):
        s = text.to(dtype) @ image.to(dtype).T * row_factor.to(dtype)[:, None] * col_factor.to(dtype)
        pair = torch.arange(Q) == positive[:, None]
        here = (positive >= 0) & (positive < Q)
        result = {"own": s.gather(1, positive.clamp(0, Q - 1)[:, None])[:, 0].where(here, torch.nan)}
        left = s.masked_fill(pair, -torch.inf)
        for name, axis, wanted in (("row", 1, rows), ("col", 0, cols)):
            value, index = left.max(axis)
            value = value if largest else left.logsumexp(axis)
            result[name] = value if wanted else value[:0]
            result[f"{name}_index"] = index.where(value > -torch.inf, -1) if wanted and largest else index[:0]
        if not largest:
            ds = torch.zeros_like(s)
            if rows:
                ds += drow.to(dtype)[:, None] * (left - result["row"][:, None]).exp()
            if cols:
                ds += dcol.to(dtype) * (left - result["col"]).exp()
            ds = torch.where(pair, down.to(dtype)[:, None], ds)
            weights = ds * row_factor.to(dtype)[:, None] * col_factor.to(dtype)
            result.update(dtext=weights @ image.to(dtype), dimage=weights.T @ text.to(dtype))
        return result

    if not largest:
        found.update(dtext=unwritten(P, D), dimage=unwritten(Q, D))
        kernels.contrastive_reward_bwd(
            down, drow, dcol, *given, row, col, found["dtext"], found["dimage"], precision
        )  # fmt: skip
    return found, dense(torch.float64), dense(acc)


def check(found, exact, plain, size):
    for name, value in found.items():
        if value.dtype == torch.int64:
            assert torch.equal(value, exact[name]), name
        else:  # scores are sums of products of numbers below 1, times factors of `size`
            assert_close_to_float64(value, exact[name], plain[name], name, 0.0 if name.startswith("d") else size)


@pytest.fixture(params=[(1, 16, 1 << 20), (2, 16, 1 << 20), (5, 16, 600), (7, 32, 5000)], ids=str)
def small_plan(request, monkeypatch):
    """Few programs with many tiles each, and a scratch of few tiles."""
    processors, side, scratch = request.param
    tiles = dict.fromkeys(kernels.TILES, (kernels.Tile(2 * side, side, 16, 4, 2, 1),))
    for name in ("TILES", "TILES_OF_ONE_DIRECTION", "TILES_OF_MAX", "TILES_OF_WEIGHTS"):
        monkeypatch.setattr(kernels, name, tiles)
    monkeypatch.setattr(kernels, "_device_of", lambda x: kernels.Device(0, processors, 48 << 10))
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", scratch * 4)
    return processors


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(150, 67, 19), (67, 150, 35), (32, 96, 16)], ids=str)
def test_any_rectangles_and_blocks_give_the_dense_result(shape, dtype, small_plan):
    args = (launch := plan_contrastive_reward(shape, dtype)[0]).args
    if shape[0] == 150:  # one rectangle of many tiles; several, in both directions
        assert small_plan > 1 or (launch.grid == (1,) and args["ROW_BLOCKS"] > 1 and args["COL_BLOCKS"] > 1)
        assert small_plan < 7 or launch.grid[0] > args["GROUPS"] > 1
    check(*call(*shape, dtype), size=30.0)


@pytest.mark.interpreter
def test_any_rectangles_find_the_first_of_the_largest(small_plan):
    for rows, cols in ((True, True), (True, False), (False, True)):
        check(*call(90, 67, 19, torch.float32, "max", rows, cols), size=30.0)


@pytest.mark.interpreter
def test_of_equal_largest_in_several_tiles_the_first_is_found(small_plan):
    P, Q = 90, 67
    text, image, positive = torch.ones(P, 3), torch.ones(Q, 3), torch.arange(P) % Q
    own, row, col = torch.empty(P), torch.empty(P), torch.empty(Q)
    row_index, col_index = torch.empty(P, dtype=torch.int64), torch.empty(Q, dtype=torch.int64)
    factors = torch.ones(P), torch.ones(Q)
    given = text, image, positive, *factors, own, row, row_index, col, col_index
    kernels.contrastive_reward_fwd(*given, "max", "highest")
    assert torch.equal(row_index, (positive == 0).long())  # image 0, and image 1 where 0 is the text's own
    assert torch.equal(col_index, (torch.arange(Q) == 0).long())  # text 0, whose own image is 0
    assert (torch.cat([own, row, col]) == 3).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(("rows", "cols"), [(True, False), (False, True)])
def test_one_direction_alone(rows, cols, small_plan):
    check(*call(90, 67, 19, torch.float32, rows=rows, cols=cols), size=30.0)


@pytest.mark.interpreter
@pytest.mark.parametrize("stretch", [4.0, 100.0])
def test_columns_that_lie_hundreds_of_nats_apart_in_one_tile(stretch, small_plan):
    """Relative to a tile's largest score their exponentials are 0 in float32: the tile must go the long way."""
    found, exact, plain = call(70, 67, 19, torch.float32, stretch=stretch)
    spread = exact["col"].max() - exact["col"].min()
    assert spread > (100 if stretch > 50 else 30)
    check(found, exact, plain, size=30.0 * stretch)


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_less_precise_products_are_near(precision):
    found, exact, _ = call(40, 50, 19, torch.float32, precision=precision)
    allowed = 30 * 2**-8 * 2 if precision == "medium" else 30 * 2**-10 * 2
    for name in ("own", "row", "col"):
        assert (found[name] - exact[name]).nan_to_num(0).abs().max() <= allowed


@pytest.mark.interpreter
@pytest.mark.parametrize("baseline", ["logsumexp", "max"])
def test_infinities_and_nan_are_what_plain_torch_makes_of_them(baseline):
    text, image = torch.ones(5, 2), torch.ones(4, 2)
    text[0], text[3, 0], text[2] = torch.nan, torch.inf, -torch.inf
    positive, ones = torch.tensor([0, 1, 2, 3, 1]), torch.ones(5)
    row, col, own = torch.empty(5), torch.empty(4), torch.empty(5)
    index = [torch.empty(n if baseline == "max" else 0, dtype=torch.int64) for n in (5, 4)]
    kernels.contrastive_reward_fwd(
        text, image, positive, ones, ones[:4], own, row, index[0], col, index[1], baseline, "highest"
    )
    s = (text @ image.T).masked_fill(torch.arange(4) == positive[:, None], -torch.inf)
    for value, axis in ((row, 1), (col, 0)):
        expected = s.max(axis).values if baseline == "max" else s.logsumexp(axis)
        torch.testing.assert_close(value, expected, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", [[1], [2], [3, 0, 1], [0, 40, 1, 2], [1100]], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_others_of_groups_of_any_size(sizes, ties):
    """Each text without itself, in groups of none, one and more than a block has, shuffled; two texts have no image."""
    generator = torch.Generator().manual_seed(len(sizes))
    positive = torch.tensor([q for q, n in enumerate(sizes) for _ in range(n)] + [-1, len(sizes)])
    positive = positive[torch.randperm(positive.numel(), generator=generator)]
    P = positive.numel()
    own = 10 * torch.randn(P, generator=generator)
    own = own.round() if ties else own
    if P > 4:
        own[3] += 60  # leads by more than float32 has digits for
    siblings = (positive == positive[:, None]) & (torch.arange(P) != torch.arange(P)[:, None])
    siblings &= ((positive >= 0) & (positive < len(sizes)))[:, None]
    s = own.double().expand(P, P).masked_fill(~siblings, -torch.inf)
    value, index = torch.full((P,), torch.nan), torch.full((P,), -999)
    kernels.contrastive_reward_others_fwd(own, positive, len(sizes), value, index)
    assert torch.equal(value, s.max(1).values.float())
    assert torch.equal(index, s.max(1).indices.where(siblings.any(1), -1))
    kernels.contrastive_reward_others_fwd(own, positive, len(sizes), value, index[:0])
    exact = s.logsumexp(1)
    torch.testing.assert_close(value, exact.float(), rtol=3e-7, atol=3e-6)
    down, dvalue = torch.full((P,), torch.nan), torch.randn(P, generator=generator)
    kernels.contrastive_reward_others_bwd(dvalue, value, own, positive, len(sizes), down)
    weights = (s - exact.masked_fill(exact.isinf(), 0.0)[:, None]).exp()
    torch.testing.assert_close(down.double(), dvalue.double() @ weights, rtol=1e-4, atol=1e-5)
