"""CLIP: the model, its losses against dense formulas, its training, and the embedders of ours and of transformers."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("PIL")

from fastcap import data, models
from fastcap.errors import FastcapError
from fastcap.eval import retrieval
from fastcap.train import Captioner, TrainConfig, Trainer, checkpoint, embedders, train
from fastcap.train.clip_loss import contrastive_loss, grouped

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"model": "clip", "width": 32, "embed_width": 16, "batch_size": 24, "steps": 8, "warmup": 2, "validate_every": 0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    data.write_scenes(folder, num_images=60, seed=0)
    return str(folder)


@pytest.fixture
def config(scenes, tmp_path):
    return TrainConfig(data=scenes, out=str(tmp_path / "run"), **SMALL)


def _with(config, **changes):
    return dataclasses.replace(config, **changes)


def _quiet(config, **options):
    return train(config, progress=False, **options)


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _log(config):
    with open(f"{config.out}/log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _model(**changes):
    torch.manual_seed(0)
    options = {"vocab_size": 30, "image_size": 24, "width": 32, "embed_width": 16, "context": 9, **changes}
    return models.build("clip", **options).eval()


# The model -------------------------------------------------------------------------------------------------------------


def test_embeddings_have_their_width_and_a_scale():
    model = _model()
    images, ids = torch.rand(5, 3, 24, 24) * 2 - 1, torch.randint(4, 30, (7, 6))
    lengths = torch.tensor([1, 2, 3, 4, 5, 6, 6])
    assert model.encode_image(images).shape == (5, 16) and model.encode_text(ids, lengths).shape == (7, 16)
    assert model.encode_image(images[:0]).shape == (0, 16) and model.encode_text(ids[:0], lengths[:0]).shape == (0, 16)
    assert model.logit_scale.item() == pytest.approx(1 / 0.07)
    for value, bounded in ((9.0, 100.0), (-3.0, 1.0)):
        with torch.no_grad():
            model.log_scale.fill_(value)
        assert model.logit_scale.item() <= 100.001
        model.limit_scale()
        assert model.logit_scale.item() == pytest.approx(bounded)
        (slope,) = torch.autograd.grad(model.logit_scale, model.log_scale)
        assert slope.item() == pytest.approx(bounded)  # so it can come back


@pytest.mark.parametrize("count", [3, 150])
def test_a_text_is_embedded_alike_whatever_else_is_in_its_batch(count):
    model, generator = _model(), torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 10, (count,), generator=generator)
    ids = torch.randint(4, 30, (count, 9), generator=generator)
    together = model.encode_text(ids, lengths)
    alone = torch.cat([model.encode_text(ids[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together - together.mean(0)).abs().max() > 0.05  # or nothing was tested


def test_the_order_of_words_and_the_place_of_things_matter():
    model = _model()
    one, other = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[7, 6, 5, 2]])
    lengths = torch.tensor([4])
    assert (model.encode_text(one, lengths) - model.encode_text(other, lengths)).abs().max() > 1e-4
    images = torch.zeros(2, 3, 24, 24)
    images[0, :, :8, :8], images[1, :, 16:, 16:] = 1, 1
    left, right = model.encode_image(images)
    assert (left - right).abs().max() > 1e-3


def test_texts_that_do_not_fit_are_refused():
    model = _model()
    for lengths in ([0, 2], [2, 10]):
        with pytest.raises(FastcapError, match=r"fastcap.models: lengths must lie in \[1, 9\], got .*; cut the texts"):
            model.encode_text(torch.zeros(2, 12, dtype=torch.int64), torch.tensor(lengths))
    with pytest.raises(FastcapError, match=r"texts must be ids \[N, T\] with lengths \[N\], got .*; pass ids"):
        model.encode_text(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([1]))
    with pytest.raises(FastcapError, match="width must be a multiple of 32 with clip, got 40; pass width=32"):
        _model(width=40)


def test_a_saved_model_is_the_same_model(tmp_path):
    model = _model(encoder={"kind": "conv", "width": 16, "channels": [8, 8]}, text_layers=2)
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert isinstance(again, models.Clip) and again.config == model.config and _equal(_weights(again), _weights(model))


# Its losses ------------------------------------------------------------------------------------------------------------


def _dense(text, image, positive, scale, kind):
    s = scale * F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    P, same = len(text), positive[:, None] == positive
    to_text = s.T[positive]  # row p: the image of text p over all texts
    own = s.gather(1, positive[:, None]).squeeze(1)
    if kind == "symmetric":
        siblings = same & ~torch.eye(P, dtype=torch.bool)
        columns = F.cross_entropy(to_text.masked_fill(siblings, -math.inf), torch.arange(P))
        return (F.cross_entropy(s, positive) + columns) / 2
    over_images = s.scatter(1, positive[:, None], -math.inf).logsumexp(1)
    over_texts = to_text.masked_fill(same, -math.inf).logsumexp(1)
    return ((over_images + over_texts) / 2 - own).mean()


@pytest.mark.parametrize("kind", ["symmetric", "decoupled"])
@pytest.mark.parametrize("positive", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 2, 2], [3, 3, 1, 0, 2, 3]], ids=str)
def test_losses_and_gradients_are_those_of_dense_torch(kind, positive):
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3
    image = torch.randn(max(positive) + 1, 5, generator=generator, dtype=torch.float64)
    text[4] = text[1]  # the same caption of two images is a negative of each
    inputs = [x.requires_grad_() for x in (text, image, torch.tensor(20.0, dtype=torch.float64))]
    positive = torch.tensor(positive)
    loss = contrastive_loss(*inputs[:2], positive, inputs[2], kind)
    expected = _dense(*inputs[:2], positive, inputs[2], kind)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(each, inputs) for each in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_an_image_alone_has_nothing_to_be_told_from():
    text, image = torch.randn(3, 4, requires_grad=True), torch.randn(1, 4)
    loss = contrastive_loss(text, image, torch.zeros(3, dtype=torch.int64), 10.0, "symmetric")
    (gradient,) = torch.autograd.grad(loss, text)
    assert loss.item() == 0 and not gradient.any()
    decoupled = contrastive_loss(text, image, torch.zeros(3, dtype=torch.int64), 10.0, "decoupled")
    torch.testing.assert_close(decoupled, -10 * F.cosine_similarity(text, image).mean())


def test_each_image_of_a_batch_stands_once():
    rows, positive = grouped(["b", "a", "b", "c", "a", "b"])
    assert rows.tolist() == [0, 1, 3] and positive.tolist() == [0, 1, 0, 2, 1, 0]


# Its training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["symmetric", "decoupled"])
def test_training_lowers_the_loss_and_finds_more_than_chance(config, kind):
    sizes = {"width": 64, "embed_width": 64, "batch_size": 48}
    config = _with(config, **sizes, contrastive=kind, steps=40, warmup=8, validate_every=40, validate_batches=2)
    result = _quiet(config)
    log = _log(config)
    losses = [record["loss"] for record in log]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 2  # symmetric: from 3.8 of the ln 48 of chance
    assert {"logit_scale", "grad_norm", "val_loss", "val_t2i_r1", "val_i2t_r10"} <= set(log[-1])
    assert result.val_mle is None and result.retrieval["images"] == log[-1]["val_images"]
    pairs = data.KarpathyDataset(config.data, "train").images()
    items = [pairs[i] for i in range(len(pairs))]
    embedder = embedders.load(config.out)
    image = embedder.images(torch.stack([item["image"] for item in items]))
    text = embedder.texts([item["captions"][0] for item in items])
    assert retrieval(text, image)["t2i_r1"] > 0.5  # of captions it has seen; chance is 1 in 51


def test_validation_is_the_mean_loss_of_its_batches_and_retrieval_among_all_of_them(config):
    trainer = Trainer(_with(config, validate_every=1, validate_batches=2, batch_size=11), progress=False)
    found = trainer.validate()
    assert not trainer.model.training
    texts, images, losses, imgids, captions = [], {}, [], [], []
    with torch.no_grad():
        for batch in trainer._validator:
            text = trainer.model.encode_text(batch["target"].clamp(min=0), batch["lengths"])
            rows, positive = grouped(batch["imgids"])
            image = trainer.model.encode_image(batch["images"][rows])
            losses += [contrastive_loss(text, image, positive, trainer.model.logit_scale, "symmetric").item()] * len(text)
            images.update(zip((batch["imgids"][row] for row in rows), image, strict=True))
            imgids += batch["imgids"]
            texts.append(text)
            captions += batch["captions"]
    assert len(imgids) == 20 and len(set(imgids)) == 4 and len(texts[0]) != len(texts[1])
    assert found["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    place = {imgid: row for row, imgid in enumerate(images)}
    positive = torch.tensor([place[imgid] for imgid in imgids])
    s = F.normalize(torch.cat(texts), dim=1) @ F.normalize(torch.stack(list(images.values())), dim=1).T
    rank = (s > s.gather(1, positive[:, None]) + 1e-6).sum(1)
    assert found["val_t2i_r5"] == pytest.approx((rank < 5).float().mean().item(), abs=0.05)
    assert found["val_images"] == len(images)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_interrupted_run_ends_with_the_same_weights_bit_for_bit(config, accumulate):
    config = _with(config, dropout=0.3, accumulate=accumulate)
    whole = _quiet(config)
    halted = _with(config, out=config.out + "-halted")
    first = _quiet(halted, callbacks=[lambda trainer, record: trainer.stop() if record["step"] == 3 else None])
    assert first.interrupted
    torch.rand(100)
    assert _equal(_weights(_quiet(halted, resume=True).model), _weights(whole.model))


@pytest.mark.parametrize("kind", ["symmetric", "decoupled"])
def test_a_step_in_parts_is_the_step_of_all_pairs_together(config, kind):
    logged, gradients = [], []
    for accumulate in (1, 4):
        run = _with(config, accumulate=accumulate, contrastive=kind, clip=1e9, dropout=0.0)
        trainer = Trainer(run, progress=False)
        trainer.model.double()
        batch = next(iter(trainer._loader))
        assert len(set(batch["imgids"])) < len(batch["imgids"]) - 3  # some images stand in several parts
        batch["images"] = batch["images"].double()
        trainer._began = time.perf_counter()
        record = trainer._train_step(0, batch)
        logged.append([record[name] for name in ("loss", "logit_scale", "grad_norm")])
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    assert logged[1] == pytest.approx(logged[0], rel=1e-9)
    for name, one in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], one, rtol=1e-9, atol=1e-9 * one.abs().max().item(), msg=name)


def test_the_parts_of_a_step_draw_the_same_dropout_twice(config):
    trainer = Trainer(_with(config, accumulate=3, dropout=0.5), progress=False)
    made, embed = [], trainer._training._embed
    trainer._training._embed = lambda *given: made.append(embed(*given)) or made[-1]
    trainer._began = time.perf_counter()
    trainer._train_step(0, next(iter(trainer._loader)))
    assert len(made) == 6
    for (text, image), (again, image_again) in zip(made[:3], made[3:], strict=True):
        assert torch.equal(text, again) and torch.equal(image, image_again) and again.requires_grad
    assert not torch.equal(made[0][0], made[1][0])


def test_an_optimisers_step_leaves_the_scale_within_its_bounds(config):
    trainer = Trainer(config, progress=False)
    with torch.no_grad():
        trainer.model.log_scale.fill_(9.0)
    trainer._began = time.perf_counter()
    record = trainer._train_step(0, next(iter(trainer._loader)))
    assert record["logit_scale"] == pytest.approx(100) == trainer.model.logit_scale.item()
    assert trainer.model.log_scale.item() == pytest.approx(math.log(100))


def test_bf16_trains_on_the_cpu(config):
    config = _with(config, precision="bf16", validate_every=8, validate_batches=1)
    result = _quiet(config)
    assert math.isfinite(result.loss) and math.isfinite(result.val_loss)
    assert next(result.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "smile"}, "objective must be left out with clip, got 'smile'; a clip's loss is chosen by"),
        ({"memory_budget": 1}, "memory_budget must be left out with clip, got 1; "),
        ({"coverage": 1.0}, "coverage must be 0 with clip, got 1.0; or pass --model show-attend-tell"),
        ({"scheduled_sampling": 0.5}, "scheduled_sampling must be 0 with clip, got 0.5; or pass --model show-attend-tell"),
        ({"prompt": "a"}, "prompt must be left out with clip, got 'a'; that model has no such setting"),
        ({"label_smoothing": 0.1}, "label_smoothing must be left out with clip, got 0.1; that model has no such setting"),
        ({"attention_width": 3}, "attention_width must be left out with clip, got 3; that model has no such setting"),
        ({"features": "regions"}, "features must be left out with clip, got 'regions'; "),
        ({"model": "show-and-tell", "embed_width": None, "contrastive": "decoupled"}, "contrastive must be left out with"),
        ({"model": "show-and-tell"}, "embed_width must be left out with show-and-tell, got 16; that model has no"),
        ({"width": 40}, "width must be a multiple of 32"),
        ({"batch_size": 1}, "batch_size must be at least 2 with clip, got 1; "),
    ],
)
def test_what_a_clip_does_not_have_is_refused(config, changes, message):
    with pytest.raises(FastcapError) as caught:
        _quiet(_with(config, **changes))
    assert message in str(caught.value)


def test_what_a_run_does_not_bring_is_checked_too(config, scenes, tmp_path):
    _quiet(_with(config, steps=1))
    again = {"data": scenes, "out": str(tmp_path / "again"), "init_from": config.out}
    with pytest.raises(FastcapError, match=r"label_smoothing must be left out with clip, got 0\.2"):
        Trainer(TrainConfig(label_smoothing=0.2, **again), progress=False)
    with pytest.raises(FastcapError, match=r"init_from must be a captioner's run with objective wtf-rl, got '.*, a clip'"):
        Trainer(TrainConfig(objective="wtf-rl", reward_clip=config.out, **again), progress=False)
    captioner = str(tmp_path / "captioner")
    options = {"model": "show-and-tell", "width": 16, "steps": 1, "batch_size": 8, "validate_every": 0}
    _quiet(TrainConfig(data=scenes, out=captioner, **options))
    with pytest.raises(FastcapError, match="contrastive must be left out with show-and-tell, got 'decoupled'"):
        Trainer(TrainConfig(contrastive="decoupled", **{**again, "init_from": captioner}), progress=False)


def test_a_loss_of_ones_own_is_refused_and_another_loss_has_its_name(config):
    with pytest.raises(FastcapError, match="loss_fn must be left out with model 'clip', got .*; choose its loss"):
        Trainer(config, progress=False, loss_fn=lambda logits, target: logits.mean())
    with pytest.raises(FastcapError, match="contrastive must be one of 'symmetric', 'decoupled', got 'cosine'; pass contr"):
        _with(config, contrastive="cosine")


def test_the_command_line_trains_one_and_says_how_it_retrieves(scenes, tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer")
    from fastcap import cli

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["fastcap", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    out = tmp_path / "clip"
    options = "--model clip --steps 4 --batch-size 16 --width 32 --validate-every 2 --validate-batches 2 --warmup 1"
    status, said = run("train", "--data", scenes, "--out", out, *options.split())
    assert status == 0, said.err
    assert "symmetric, fp32 on cpu" in said.err and "text to image" in said.err
    assert "the image of a caption: among 1 " in said.out and "a caption of an image: among 1 " in said.out
    status, said = run("caption", "picture.png", "--checkpoint", out)
    assert status == 2 and said.err.startswith("fastcap.caption: checkpoint must be a captioner's, got ")
    assert "it embeds and cannot caption" in said.err
    status, said = run("train", "--out", out, "--resume")
    assert status == 0 and "the image of a caption" in said.out


# Embedders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return data.CaptionTokenizer.train_words(["a red circle and two blue squares on a white background"])


@pytest.fixture
def embedder(tokenizer):
    return models.ClipEmbedder(_model(vocab_size=tokenizer.vocab_size), tokenizer)


def test_a_long_text_is_cut_before_its_end_and_counted(embedder):
    long = "a red circle and two blue squares on a white background"
    kept = "a red circle and two blue squares on"  # 8 words and the end: the context of 9
    made = embedder.texts([long, "a red circle", kept])
    assert embedder.truncated == 1
    assert torch.equal(made[0], made[2]) and made.shape == (3, embedder.width) and not made.requires_grad
    embedder.texts([long, long])
    assert embedder.truncated == 3


def test_unknown_words_are_one_unknown_word_and_a_text_may_be_empty(embedder):
    made = embedder.texts(["a zebra", "a <unk>", "a giraffe", "", "a"])
    assert torch.equal(made[0], made[2]) and embedder.truncated == 0 and made.isfinite().all()
    assert not torch.equal(made[0], made[4]) and not torch.equal(made[3], made[4])
    assert embedder.texts([]).shape == (0, 16) and embedder.images(torch.zeros(0, 3, 24, 24)).shape == (0, 16)


def test_many_texts_and_images_are_embedded_in_batches_in_their_order(embedder):
    texts = [" ".join(["a", "red", "blue", "circle", "on"][: 1 + i % 5] + ["white"] * (i % 3)) for i in range(600)]
    sizes = []
    embedder.model.words.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    made = embedder.texts(texts)
    assert max(sizes) <= 256 and sum(sizes) == 600
    for i in (0, 1, 299, 599):
        torch.testing.assert_close(made[i], embedder.texts([texts[i]])[0], rtol=1e-4, atol=1e-5)
    images = torch.rand(130, 3, 24, 24) * 2 - 1
    torch.testing.assert_close(embedder.images(images)[129], embedder.images(images[129:])[0], rtol=1e-4, atol=1e-5)


def test_pictures_of_another_size_are_resized_as_pillow_does(embedder):
    from PIL import Image

    pixels = torch.randint(64, 192, (40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = Image.fromarray(pixels.numpy()).resize((24, 24), Image.Resampling.BICUBIC)
    theirs = torch.tensor(list(theirs.tobytes())).view(24, 24, 3).permute(2, 0, 1)[None] / 127.5 - 1
    ours = models.clip_embedder.resized(pixels.permute(2, 0, 1)[None] / 127.5 - 1, 24)
    assert (ours - theirs).abs().max() < 2.1 / 127.5  # Pillow rounds twice


def test_what_is_given_is_cast_and_the_callers_autocast_does_not_reach_in(embedder):
    images = (torch.rand(2, 3, 24, 24) * 2 - 1).half()
    with torch.autocast("cpu", torch.bfloat16):
        image, text = embedder.images(images), embedder.texts(["a red circle"])
    assert image.dtype == text.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(image, embedder.model.encode_image(images.float()))
    assert torch.equal(text, embedder.texts(["a red circle"]))


def test_the_fingerprint_is_that_of_all_that_embeddings_depend_on(embedder, tokenizer):
    again = models.ClipEmbedder(_model(vocab_size=tokenizer.vocab_size), tokenizer)
    assert again.fingerprint == embedder.fingerprint
    changed = _model(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        changed.log_scale += 1e-3
    others = data.CaptionTokenizer.train_words(["a red circle and two blue squares on a black background"])
    found = {
        embedder.fingerprint,
        models.ClipEmbedder(changed, tokenizer).fingerprint,
        models.ClipEmbedder(_model(vocab_size=tokenizer.vocab_size), others).fingerprint,
        models.ClipEmbedder(_model(vocab_size=tokenizer.vocab_size, image_size=32), tokenizer).fingerprint,
    }
    assert len(found) == 4


def test_what_cannot_be_embedded_is_refused(embedder):
    for call, message in (
        (lambda: embedder.texts("a red circle"), "captions must be several texts, got 'a red circle'; pass a list of them"),
        (lambda: embedder.texts(["a", 3]), "captions must be texts, got 3; pass a list of strings"),
        (lambda: embedder.images(torch.zeros(2, 3, 8, 9)), r"images must have shape [B, 3, S, S], got [2, 3, 8, 9]; pass"),
        (lambda: embedder.images(torch.zeros(3, 8, 8)), r"images must have shape [B, 3, S, S], got [3, 8, 8]; pass square"),
        (lambda: embedder.images(torch.zeros(2, 3, 8, 8).byte()), "images must be a float tensor, got 'torch.uint8'; pass"),
    ):
        with pytest.raises(FastcapError) as caught:
            call()
        assert str(caught.value).startswith(f"fastcap.embedder: {message}")


def test_a_run_is_loaded_with_its_words_and_size_and_in_evaluation_mode(config):
    result = _quiet(_with(config, dropout=0.5, image_size=32, max_length=6))
    embedder = embedders.load(config.out)
    assert isinstance(embedder, models.ClipEmbedder) and not embedder.model.training
    assert (embedder.width, embedder.image_size, embedder.context) == (16, 32, 7)
    assert embedder.logit_scale == pytest.approx(result.model.logit_scale.item())
    assert embedder.fingerprint == embedders.load(result.checkpoint).fingerprint
    assert torch.equal(embedder.texts(["a circle"]), embedder.texts(["a circle"]))
    assert torch.equal(embedder.images(torch.ones(1, 3, 32, 32)), embedder.images(torch.ones(1, 3, 32, 32)))


def test_a_captioners_run_embeds_nothing_and_a_clip_captions_nothing(config, scenes):
    options = {**SMALL, "model": "show-and-tell", "embed_width": None}
    captioner = TrainConfig(data=scenes, out=config.out + "-captioner", **options)
    _quiet(_with(captioner, steps=1))
    with pytest.raises(FastcapError, match="clip must embed images and texts, got .*, a show-and-tell'; pass a run of"):
        embedders.load(captioner.out)
    _quiet(_with(config, steps=1))
    with pytest.raises(FastcapError, match="checkpoint must be a captioner's, got .*; it embeds and cannot caption"):
        Captioner.load(checkpoint.find(config.out))


# A CLIP of transformers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as `save_pretrained` of model and processor leaves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("published")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in ("red", "circle", "and"):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    text = {**sizes, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    model = transformers.CLIPModel(config)
    with torch.no_grad():  # weights of .02 make all embeddings nearly alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop, image_mean=[0.4, 0.5, 0.6])
    images.save_pretrained(folder)
    return folder


def _theirs(folder):
    transformers = pytest.importorskip("transformers")
    images = transformers.CLIPImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.CLIPModel.from_pretrained(folder).eval(), transformers.CLIPProcessor(images, tokenizer)


def _pictures(size):
    """A smooth picture, as [1, 3, S, S] in [-1, 1] and as Pillow's."""
    from PIL import Image

    x = torch.linspace(0, 3, size)
    waves = torch.stack([torch.sin(x)[:, None] * torch.cos(k * x) for k in (1, 2, 3)], -1)
    pixels = ((waves + 1) / 2 * 255).round().to(torch.uint8)
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1, Image.fromarray(pixels.numpy())


@pytest.mark.parametrize(("size", "tolerance"), [(32, 1e-5), (48, 2e-2), (20, 2e-2)])
def test_images_are_embedded_as_by_transformers(published, size, tolerance):
    embedder, (model, processor) = embedders.load(str(published)), _theirs(published)
    tensor, picture = _pictures(size)
    with torch.no_grad():
        expected = model(**processor(text=["a"], images=[picture], return_tensors="pt")).image_embeds
    found = embedder.images(tensor)
    assert found.shape == (1, 16) and embedder.width == 16 and embedder.image_size == 32 and not found.requires_grad
    torch.testing.assert_close(F.normalize(found, dim=1), expected, rtol=0, atol=tolerance)
    mirrored = F.normalize(embedder.images(tensor.flip(3)), dim=1)
    assert (mirrored - expected).abs().max() > 3 * max(tolerance, 1e-2)  # so the tolerance tells pictures apart


def test_texts_are_embedded_as_by_transformers_and_cut_where_it_cuts(published):
    embedder, (model, processor) = embedders.load(str(published)), _theirs(published)
    texts = ["a red circle", "red", "", "a red circle and a red circle and a red circle and a red", "and and and and and"]
    inputs = processor(text=texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**inputs)
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(embedder.texts(texts), expected, rtol=1e-4, atol=1e-4)
    assert embedder.truncated == 1 and embedder.context == 12
    assert embedder.logit_scale == pytest.approx(model.logit_scale.exp().item())
    kept = processor.tokenizer.decode(inputs["input_ids"][3][1:-1])
    torch.testing.assert_close(embedder.texts([kept])[0], expected[3], rtol=1e-4, atol=1e-4)
    assert embedder.truncated == 1
    assert embedder.fingerprint == embedders.load(str(published)).fingerprint


def test_pictures_are_resized_and_cut_as_the_processor_says(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"shortest_edge": 40}}))
    embedder, (model, processor) = embedders.load(str(folder)), _theirs(folder)
    tensor, picture = _pictures(40)
    with torch.no_grad():
        expected = model(**processor(text=["a"], images=[picture], return_tensors="pt")).image_embeds
    torch.testing.assert_close(F.normalize(embedder.images(tensor), dim=1), expected, rtol=0, atol=1e-5)
    assert embedder.fingerprint != embedders.load(str(published)).fingerprint
    file.unlink()
    assert embedders.load(str(folder)).mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def _broken(kind, published, folder):
    """A folder in which something is wrong, and what is said of it."""
    transformers = pytest.importorskip("transformers")
    a_clip = "be a run of fastcap train --model clip, or a transformers CLIP by folder or hub name, got "
    if kind == "not there":
        return a_clip + ".*; check the name and the network"
    if kind == "empty":
        folder.mkdir()
        return a_clip + ".*; it is a folder without checkpoints and without config.json"
    if kind == "another model":
        transformers.SiglipConfig().save_pretrained(folder)
        return a_clip + ".*, a siglip'; pass one of model_type clip"
    shutil.copytree(published, folder)
    if kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        return "hold tokenizer.json or vocab.json, got .*; save the tokenizer there too"
    if kind == "no texts":
        transformers.CLIPVisionModel.from_pretrained(published).save_pretrained(folder)
        shutil.copy(published / "config.json", folder)
        return "hold the weights of CLIPModel, got .*, which lacks "
    if kind == "cut config":
        (folder / "config.json").write_text("{")
        return a_clip
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return a_clip + ".*; check the name and the network"


@pytest.mark.parametrize(
    "kind", ["not there", "empty", "another model", "no tokenizer", "no texts", "cut config", "cut weights"]
)
def test_what_is_no_whole_clip_is_refused(published, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = _broken(kind, published, tmp_path / "broken")
    with pytest.raises(FastcapError, match=f"fastcap.models: clip must {message}"):
        embedders.load(str(tmp_path / "broken"))


def test_a_hub_name_that_cannot_be_reached_is_one_error_with_a_remedy(monkeypatch):
    pytest.importorskip("transformers")
    import huggingface_hub

    def unreachable(name, **options):
        raise OSError("Got: ConnectError: Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FastcapError) as caught:
        embedders.load("someone/clip")
    assert str(caught.value) == (
        "fastcap.models: clip must be a run of fastcap train --model clip, or a transformers CLIP by folder or hub name, "
        "got 'someone/clip'; check the name and the network (Got: ConnectError: Name or service not known)"
    )
