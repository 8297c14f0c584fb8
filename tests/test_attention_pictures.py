"""Where a captioner looked for each word: the maps, and the figures drawn of them."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

from fastcap import cli, data, models
from fastcap.errors import FastcapError
from fastcap.train import Captioner
from fastcap.train import attention_pictures as pictures
from fastcap.train.captioner import Attended

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = ["a large red circle at the top left", "a star", "two small boxes", "a box and a star"]


def captioner_of(model="show-attend-tell", tokenizer=None, encoder=None, **options):
    torch.manual_seed(0)
    tokenizer = tokenizer or data.CaptionTokenizer.train_words(CAPTIONS)
    encoder = encoder or {"kind": "conv", "width": 16, "channels": [8, 8, 8]}
    model = models.build(
        model, vocab_size=tokenizer.vocab_size, encoder=encoder, embed_width=16, hidden_width=16, dropout=0.5, **options
    )
    return Captioner(model, tokenizer, image_size=48, max_length=12)


@pytest.fixture(scope="module")
def captioner():
    return captioner_of(attention_width=8)


def some_images(n, height=48, width=48):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


# The maps ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_map_of_a_word_is_the_attention_with_which_it_was_predicted(captioner):
    """One word at a time: the words before it alone are read, and the last attention is the word's."""
    images = some_images(1)
    ((words, maps),) = captioner.attention(images, ["a large red circle"])
    assert words == ["a", "large", "red", "circle"] and maps.shape == (4, 6, 6)
    ids = captioner.tokenizer.encode("a large red circle")
    for t in range(4):
        before = torch.tensor([[captioner.tokenizer.start_id, *ids[:t]]])
        alpha = captioner.model(images, before)[1][0, -1]
        torch.testing.assert_close(maps[t].flatten(), alpha)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(4))
    assert (maps[0] - maps[3]).abs().max() > 1e-6  # words look at different things, or this file tests nothing


def test_captions_of_one_batch_do_not_touch_each_other(captioner):
    images = some_images(3)
    together = captioner.attention(images, ["a star", "a large red circle at the top left", "two small boxes"])
    for i, (words, maps) in enumerate(together):
        ((alone_words, alone),) = captioner.attention(images[i : i + 1], [" ".join(words)])
        assert words == alone_words
        torch.testing.assert_close(maps, alone)


@pytest.mark.parametrize("beam", [1, 3])
def test_the_ids_of_a_caption_and_its_text_have_the_same_maps(captioner, beam):
    images = some_images(2)
    ids = captioner.ids(images, beam=beam)
    texts = captioner(images, beam=beam)
    with_end = [[*row, captioner.tokenizer.end_id, 5] for row in ids]
    for one, text, other, cut in zip(
        captioner.attention(images, ids),
        texts,
        captioner.attention(images, texts),
        captioner.attention(images, with_end),
        strict=True,
    ):
        assert one.words == other.words == cut.words == text.split()
        assert torch.equal(one.maps, other.maps) and torch.equal(one.maps, cut.maps)


def test_a_word_in_pieces_has_the_mean_of_its_pieces_maps():
    tokenizer = data.CaptionTokenizer.train_wordpiece(CAPTIONS, vocab_size=60)
    captioner = captioner_of(tokenizer=tokenizer, attention_width=8)
    caption = "a circle star"
    lengths = [len(tokenizer.encode(word)) for word in caption.split()]
    assert max(lengths) > 1
    ((words, maps),) = captioner.attention(some_images(1), [caption])
    assert words == caption.split()
    ids = tokenizer.encode(caption)
    with torch.no_grad():
        alphas = captioner.model(some_images(1), torch.tensor([[tokenizer.start_id, *ids[:-1]]]))[1][0]
    expected = torch.stack([part.mean(0) for part in alphas.split(lengths)])
    torch.testing.assert_close(maps.flatten(1), expected)


def test_an_unknown_word_is_shown_as_the_model_saw_it(captioner):
    ((words, maps),) = captioner.attention(some_images(1), ["a zebra star"])
    assert words == ["a", "<unk>", "star"] and len(maps) == 3
    unknown = captioner.tokenizer.unk_id
    ((words, _),) = captioner.attention(some_images(1), [[unknown, unknown]])
    assert words == ["<unk>", "<unk>"]


def test_a_caption_without_words_has_no_maps(captioner):
    empty, other = captioner.attention(some_images(2), ["", "a star"])
    assert empty.words == [] and empty.maps.shape == (0, 6, 6) and other.words == ["a", "star"]
    assert captioner.attention(some_images(0), []) == []


def test_pictures_that_are_not_square_have_grids_that_are_not():
    captioner = captioner_of(attention_width=8)
    ((_, maps),) = captioner.attention(some_images(1, 32, 64), ["a star"])
    assert maps.shape == (2, 4, 8)


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (2, ["a star"], "captions must be one for each image, got '1 for 2 images'; pass a list of them"),
        (1, "a star", "captions must be one for each image, got 'a star'; pass a list of them"),
        (1, [[4, 99]], r"captions must have ids in \[0, 18\), got 99; pass what `ids` of the same captioner gave"),
    ],
)
def test_captions_that_do_not_fit_are_an_error(captioner, images, captions, message):
    with pytest.raises(FastcapError, match=message):
        captioner.attention(some_images(images), captions)


def test_a_model_without_attention_says_which_have_it():
    message = "model must have attention to show, got 'show-and-tell'; caption with a checkpoint of show-attend-tell"
    with pytest.raises(FastcapError, match=message):
        captioner_of("show-and-tell").attention(some_images(1), ["a star"])


def test_a_tokenizer_of_a_model_without_attention_needs_no_more_than_ids():
    """That of a transformers checkpoint does not tell which token is the unknown one."""
    captioner = captioner_of("show-and-tell")
    captioner.tokenizer = SimpleNamespace(encode=lambda text: [4, 5], pad_id=0, start_id=1)
    with pytest.raises(FastcapError, match="model must have attention to show"):
        captioner.attention(some_images(1), ["a star"])


def test_maps_are_drawn_where_the_encoder_looks(captioner, monkeypatch):
    """Three strides of the small encoder look around every eighth pixel from the first."""
    rows, columns = captioner.centres(some_images(1))
    assert rows == columns == [(8 * i + 0.5) / 48 for i in range(6)]
    monkeypatch.delattr(type(captioner.model.encoder), "centres")
    assert captioner.centres(some_images(1)) is None


def test_regions_are_no_grid_to_draw_on():
    captioner = captioner_of(encoder={"kind": "features", "width_in": 5}, attention_width=8)
    with pytest.raises(FastcapError, match="attention must lie on a grid of the picture, got '9 locations'; regions of"):
        captioner.attention(torch.rand(1, 9, 5) + 0.1, ["a star"])


def test_an_encoder_that_knows_no_grid_is_taken_for_a_square_one(monkeypatch):
    captioner = captioner_of(attention_width=8)
    monkeypatch.setattr(type(captioner.model.encoder), "grid", None)
    assert captioner.attention(some_images(1), ["a star"])[0].maps.shape == (2, 6, 6)
    with pytest.raises(FastcapError, match="lie on a grid of the picture, got '32 locations for a grid of 5 x 5'"):
        captioner.attention(some_images(1, 32, 64), ["a star"])


# Light on the picture ----------------------------------------------------------------------------------------------------


def test_smoothing_keeps_an_even_map_even_and_any_map_in_its_range():
    np.testing.assert_allclose(pictures.smooth(np.full((6, 6), 1 / 36), (50, 40)), np.full((50, 40), 1 / 36), rtol=1e-12)
    alpha = np.random.default_rng(0).dirichlet(np.ones(14 * 14)).reshape(14, 14)
    fine = pictures.smooth(alpha, (200, 200))
    assert alpha.min() <= fine.min() and fine.max() <= alpha.max()


@pytest.mark.parametrize(
    ("centres", "expected"),
    [(None, (1.5 / 4, 2.5 / 5)), (([0.1, 0.3, 0.5, 0.7], [0.0, 0.2, 0.4, 0.6, 0.8]), (0.3, 0.4))],
    ids=["tiles", "given centres"],
)
def test_a_single_location_lights_up_where_it_lies(centres, expected):
    alpha = np.zeros((4, 5))
    alpha[1, 2] = 1.0
    fine = pictures.smooth(alpha, (401, 301), centres)
    row, column = np.unravel_index(fine.argmax(), fine.shape)
    assert ((row + 0.5) / 401, (column + 0.5) / 301) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("background", [0, 128, 255])
def test_the_attended_part_is_lighter_on_any_background(background):
    picture = np.full((64, 64, 3), background, np.uint8)
    alpha = np.zeros((4, 4))
    alpha[1, 1] = 1.0
    shown = pictures.lit(picture, alpha).astype(int)
    assert shown.shape == picture.shape
    assert (shown[24, 24] - shown[60, 60]).min() > 50


def test_the_picture_is_to_be_made_out_where_the_model_did_not_look():
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[40:60, 40:60] = (20, 40, 160)
    alpha = np.zeros((4, 4))
    alpha[0, 0] = 1.0
    shown = pictures.lit(picture, alpha).astype(int)
    assert (shown[36, 36] - shown[50, 50]).min() > 15
    even = pictures.lit(picture, np.full((4, 4), 1 / 16)).astype(int)
    assert even[50, 50, 2] - even[50, 50, 0] > 60  # and has its colours where it did


# The figure --------------------------------------------------------------------------------------------------------------


def row(caption, title="", aspect=1.0, picture=None):
    words = caption.split()
    maps = torch.rand(len(words), 3, 3).flatten(1).softmax(1).view(-1, 3, 3)
    picture = np.full((16, 16, 3), 200, np.uint8) if picture is None else picture
    return pictures.Row(picture, Attended(words, maps), title, aspect)


def test_every_word_stands_over_its_own_tile_and_inside_the_figure():
    long = "a pneumonoultramicroscopicsilicovolcanoconiosis o'clock $x$ " + "word " * 20
    rows = [
        row(long, title="soft + coverage of all"),
        row("wide one", aspect=3.0),
        row("", aspect=0.1),
        row("tall", aspect=0.5),
    ]
    figure = pictures.figure(rows)
    figure.canvas.draw()
    shown = [axes.texts[0].get_text() if axes.texts else "" for axes in figure.axes]
    assert shown == [label for one in rows for label in (one.title, *one.attended.words)]
    tiles = [axes.get_window_extent() for axes in figure.axes]
    for i, (axes, tile) in enumerate(zip(figure.axes, tiles, strict=True)):
        assert 0 <= tile.x0 and tile.x1 <= figure.bbox.width and 0 <= tile.y0 and tile.y1 <= figure.bbox.height
        for text in axes.texts:
            box = text.get_window_extent()
            assert tile.x0 - 4 <= box.x0 and box.x1 <= tile.x1 + 4 and box.y1 <= figure.bbox.height
            assert not any(box.overlaps(other) for other in tiles[:i] + tiles[i + 1 :])
    for i, tile in enumerate(tiles):
        assert not any(tile.overlaps(other) for other in tiles[:i])


def test_a_long_caption_goes_on_under_its_words_not_under_its_picture():
    figure = pictures.figure([row("word " * (3 * (pictures.COLUMNS - 1)))])
    left = [round(axes.get_position().x0, 6) for axes in figure.axes]
    assert len(set(left)) == pictures.COLUMNS and left.count(left[0]) == 1
    assert figure.get_figwidth() < 10.5


def test_a_short_caption_makes_a_narrow_figure():
    width = pictures.figure([row("one two")]).get_figwidth()
    assert width == pytest.approx(3 * pictures.TILE + 2 * pictures.GAP + 2 * pictures.EDGE)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg", "PNG"])
def test_the_suffix_names_the_format(tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    pictures.draw(path, [row("a star")])
    head = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "jpg": b"\xff\xd8"}[suffix.lower()]
    assert path.read_bytes().startswith(head)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_figure_that_fails_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(b"earlier")
    broken = pictures.Row(np.zeros((4, 4, 3), np.uint8), Attended(["a"], torch.zeros(1, 2)))  # a map that is none
    with pytest.raises(ValueError):
        pictures.draw(path, [broken])
    assert path.read_bytes() == b"earlier" and [each.name for each in tmp_path.iterdir()] == ["figure.png"]


def test_a_picture_of_the_model_is_shown_in_its_colours():
    image = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1).expand(3, 8, 8)
    shown = pictures.row_of_image(image, Attended([], torch.zeros(0, 2, 2))).picture
    assert shown.shape == (pictures.PIXELS, pictures.PIXELS, 3) and (shown == np.array([255, 0, 128])).all()


# The command line --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    data.write_scenes(folder, num_images=40, seed=0)
    return folder


def trained(scenes, out, **options):
    from fastcap.train import TrainConfig, train

    config = TrainConfig(data=str(scenes), out=str(out), steps=2, width=16, batch_size=8, validate_every=0, **options)
    train(config, progress=False)
    return out


@pytest.fixture(scope="module")
def attending_run(scenes, tmp_path_factory):
    return trained(scenes, tmp_path_factory.mktemp("attending") / "run", attention_width=8)


@pytest.fixture(scope="module")
def telling_run(scenes, tmp_path_factory):
    return trained(scenes, tmp_path_factory.mktemp("telling") / "run", model="show-and-tell")


@pytest.fixture
def fastcap(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastcap", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_caption_draws_what_it_prints(fastcap, attending_run, scenes, tmp_path):
    run, figure = attending_run, tmp_path / "figure.png"
    Image.new("RGBA", (90, 30), (0, 200, 0, 128)).save(tmp_path / "wide.png")
    (tmp_path / "bad.png").write_text("no picture")
    named = [scenes / "images" / "scene_000001.png", tmp_path / "bad.png", tmp_path / "wide.png"]
    status, out, err = fastcap("caption", "--checkpoint", run, "--attention", figure, *named)
    assert status == 1 and err.splitlines()[1:] == [
        "fastcap caption: 1 of 3 pictures could not be read",
        f"attention: {figure}",
    ]
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(named[0]), str(named[2])]
    plain = fastcap("caption", "--checkpoint", run, *named)
    assert (plain[0], plain[1]) == (1, out)
    with Image.open(figure) as image:
        assert image.width > 100 and image.height > 200


def test_pictures_none_of_which_can_be_read_make_no_figure(fastcap, attending_run, tmp_path):
    figure = tmp_path / "a.png"
    status, out, err = fastcap("caption", "--checkpoint", attending_run, "--attention", figure, tmp_path / "none.png")
    assert (status, out) == (1, "") and "1 of 1 pictures could not be read" in err and not figure.exists()


def test_a_model_without_attention_captions_all_the_same(fastcap, telling_run, scenes, tmp_path):
    run, picture = telling_run, scenes / "images" / "scene_000001.png"
    status, out, err = fastcap("caption", "--checkpoint", run, "--attention", tmp_path / "a.png", picture)
    assert status == 2 and out.startswith(f"{picture}\t") and err.count("\n") == 1
    assert err.startswith("fastcap.caption: model must have attention to show, got 'show-and-tell'; caption with a check")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("path", "count", "message"),
    [
        ("figure.doc", 1, "--attention must end in one of .png, .jpg,"),
        ("figure", 1, "--attention must end in one of"),
        ("none/figure.png", 1, "--attention must lie in a folder that exists, got 'none/figure.png'; run: mkdir -p none"),
        ("folder.png", 1, "--attention must be a file to write, got 'folder.png'; name one in it: folder.png/attention.png"),
        ("figure.png", 17, "--attention must show at most 16 pictures, got 17; name fewer"),
    ],
)
def test_a_figure_that_cannot_be_is_said_before_anything_is_computed(fastcap, tmp_path, monkeypatch, path, count, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    status, out, err = fastcap("caption", "--checkpoint", "none", "--attention", path, *["a.png"] * count)
    assert (status, out) == (2, "") and err.startswith(f"fastcap.caption: {message}") and err.count("\n") == 1
