"""BLIP: the model against transformers' own, its checkpoints and tokenizers, its training."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

import transformers

import fastcap
from fastcap import data, models
from fastcap import functional as F_cap
from fastcap.errors import FastcapError
from fastcap.models import pretrained
from fastcap.objectives import OBJECTIVES
from fastcap.testing import Allocations
from fastcap.train import Captioner, TrainConfig, Trainer, checkpoint, train

START, END, PAD, V = 1, 2, 0, 23
PROMPT = [5, 6, 5]
WORDS = "a the of picture two red blue green circle square star small large and in on".split()


pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def _model(prompt=PROMPT):
    torch.manual_seed(2)
    architecture = models.small_architecture(V, image_size=32, width=16, dropout=0.0, max_tokens=20)
    model = models.build("blip", architecture=architecture, prompt=list(prompt))
    for parameter in model.parameters():  # weights of .02 make all logits nearly alike, and zero biases hide theirs
        parameter.copy_(torch.randn_like(parameter) * 0.5 + (parameter.dim() == 1) * parameter)
    model.head.bias[END] -= 3  # so that captions have some length
    return model.double().eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@pytest.fixture
def captions():
    """Inputs [4, 6] and targets of captions of 5, 3, 1 and 5 words."""
    words = torch.randint(7, V, (4, 5), generator=torch.Generator().manual_seed(1))
    inputs, target = torch.full((4, 6), PAD), torch.full((4, 6), -100)
    for b, n in enumerate((5, 3, 1, 5)):
        inputs[b, 0], inputs[b, 1 : n + 1] = START, words[b, :n]
        target[b, :n], target[b, n] = words[b, :n], END
    return inputs, target


def _theirs(model, images, inputs, target):
    """What transformers makes of the same weights, its prompt and pads masked in the labels as users do it."""
    B, P = len(inputs), len(model.prompt)
    prompt = model.prompt.expand(B, -1)
    tokens = torch.cat((inputs[:, :1], prompt, inputs[:, 1:], torch.full((B, 1), PAD)), 1)
    labels = torch.cat((torch.full((B, 1 + P), -100), target), 1)
    pixels = ((images + 1) / 2 - model.mean) / model.std
    return model.blip(pixel_values=pixels, input_ids=tokens, labels=labels)


@pytest.mark.parametrize("prompt", [PROMPT, []])
def test_logits_and_loss_are_those_of_transformers_with_the_prompt_masked(images, captions, prompt):
    model, (inputs, target) = _model(prompt), captions
    expected = _theirs(model, images, inputs, target)
    logits, alphas = model(images, inputs)
    assert logits.shape == (4, 6, V) and alphas is None
    torch.testing.assert_close(logits, expected.logits[:, len(prompt) : -1])
    hidden = model.hidden_states(images, inputs)
    loss = F_cap.linear_subset_cross_entropy(hidden, model.head.weight, target, linear_bias=model.head.bias, subset="full")
    torch.testing.assert_close(loss, expected.loss)
    ours = torch.autograd.grad(loss, model.parameters())
    for one, other in zip(ours, torch.autograd.grad(expected.loss, model.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_the_prompt_is_read(images, captions):
    inputs, _ = captions
    one, other = (_model(prompt)(images, inputs)[0] for prompt in ([5, 6], [8, 9]))
    assert (one - other).abs().max() > 0.01


def test_the_head_of_the_hidden_states_is_the_logits(images, captions):
    model, (inputs, _) = _model(), captions
    torch.testing.assert_close(model.head(model.hidden_states(images, inputs)), model(images, inputs)[0])
    assert model.head.weight is model.blip.get_input_embeddings().weight


class Uncached:
    """The same model, which reads everything anew at each step."""

    def __init__(self, model):
        self.model = model

    def encode(self, images):
        return images

    def start(self, memory):
        return torch.zeros(len(memory), 0, dtype=torch.int64)

    def step(self, token, state, memory):
        state = torch.cat((state, token.unsqueeze(1)), 1)
        return self.model(memory, state)[0][:, -1], state


@pytest.mark.parametrize("prompt", [PROMPT, []])
def test_a_step_at_a_time_gives_the_logits_of_the_forward_pass(images, prompt):
    model, inputs = _model(prompt), torch.randint(7, V, (4, 6))
    expected, _ = model(images, inputs)
    memory = model.encode(images)
    state = model.start(memory)
    for t in range(6):
        logits, state = model.step(inputs[:, t], state, memory)
        torch.testing.assert_close(logits, expected[:, t])


def test_captions_with_caches_are_those_without(images):
    model = _model()
    options = {"max_length": 7, "start_id": START, "end_id": END, "forbidden": (PAD, START)}
    for search, extra in ((models.greedy, {}), (models.beam_search, {"beam_size": 3, "length_penalty": 0.5})):
        found, wanted = (search(one, images, **options, **extra) for one in (model, Uncached(model)))
        assert torch.equal(found.tokens, wanted.tokens) and len(set(map(tuple, found.lists()))) >= 3
        torch.testing.assert_close(found.scores, wanted.scores)


def test_no_images_give_no_captions(images):
    for search in (models.greedy, models.beam_search):
        assert search(_model(), images[:0]).lists() == []


def test_greedy_captions_are_those_of_transformers(images):
    model = _model()
    found = models.greedy(model, images, max_length=8, end_id=END).lists()
    tokens = torch.tensor([[START, *PROMPT, END]] * 4)  # transformers cuts the last one
    pixels = ((images + 1) / 2 - model.mean) / model.std
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 8, "suppress_tokens": [PAD, START]}
    theirs = model.blip.generate(pixel_values=pixels, input_ids=tokens, **options)[:, 1 + len(PROMPT) :].tolist()
    assert found == [row[: row.index(END)] if END in row else row for row in theirs]


def test_a_saved_model_is_loaded_bit_for_bit_and_stays_tied(images, captions, tmp_path):
    from safetensors.torch import load_file

    model = _model().float()
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert again.config == model.config and not again.training
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    predictions = again.blip.text_decoder.cls.predictions
    assert again.head.weight is again.blip.get_input_embeddings().weight and again.head.bias is predictions.bias
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())
    assert torch.equal(again(images.float(), captions[0])[0], model(images.float(), captions[0])[0])


def test_a_file_that_lacks_a_weight_is_not_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    models.save(_model().float(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["blip.text_decoder.bert.embeddings.word_embeddings.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(FastcapError) as caught:
        models.load(tmp_path)
    text = str(caught.value)
    assert text.startswith("fastcap.models: folder must hold a model.json and the weights of the model that it describes")
    assert "Missing key(s)" in text and text.endswith("; use another checkpoint, or the fastcap that wrote it")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 50}, "image_size must be a multiple of 16, the patch, got 50; pass image_size=48"),
        ({"image_size": 0}, "image_size must be at least 1, got 0; pass a positive image_size"),
        ({"width": 0}, "width must be at least 1, got 0; pass a positive width"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0; pass dropout=0.0"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(FastcapError) as caught:
        models.small_architecture(V, **options)
    assert str(caught.value) == f"fastcap.models: {message}"


# A checkpoint of transformers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as `save_pretrained` leaves it; like BLIP's, the model has ids beyond its tokenizer's: the start."""
    folder = tmp_path_factory.mktemp("published")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": len(vocabulary), "sep_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 24}
    text = {**sizes, **ids, "vocab_size": len(vocabulary) + 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8, "initializer_range": 0.02}
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_published_checkpoint_keeps_its_weights_and_its_words(published, images):
    model, tokenizer = models.load_blip(str(published), prompt="a picture of")
    theirs = transformers.BlipForConditionalGeneration.from_pretrained(published).state_dict()
    ours = model.blip.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (22, 3, 0)
    ids = tokenizer.encode("The RED circles. (in)")
    assert tokenizer.decode([*ids, 3, 9]) == "the red circles in"
    assert model.config.prompt == tokenizer.encode("a picture of") and 1 not in model.config.prompt
    assert str(published) not in json.dumps(dataclasses.asdict(model.config))


def test_pictures_of_another_size_get_interpolated_positions(published):
    model, _ = models.load_blip(str(published), image_size=32)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    theirs = transformers.BlipForConditionalGeneration.from_pretrained(published).eval().vision_model
    pixels = ((images + 1) / 2 - model.mean) / model.std
    expected = theirs(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(model.eval()._patches(images), expected)
    with pytest.raises(FastcapError, match="image_size must be a multiple of 8, the patch, got 20; pass image_size=16"):
        models.load_blip(str(published), image_size=20)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_normalisation_is_the_checkpoints(published, tmp_path, file):
    folder = shutil.copytree(published, tmp_path / "copy")
    found = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / file).write_text(json.dumps({"image_processor": found} if file.startswith("processor") else found))
    config = models.load_blip(str(folder))[0].config
    assert (config.mean, config.std) == (found["image_mean"], found["image_std"])
    assert models.load_blip(str(published))[0].config.mean == [0.48145466, 0.4578275, 0.40821073]


def _broken(kind, published, folder):
    """A folder in which something is wrong, and what is said of it."""
    if kind == "not there":
        return "be a folder or a hub name that can be loaded, got"
    if kind == "another model":
        transformers.ViTConfig().save_pretrained(folder)
        return r"be a BLIP checkpoint, got '.*\(vit\)'; pass one such as Salesforce/"
    if kind == "no decoder":
        config = transformers.BlipConfig.from_pretrained(published)
        transformers.BlipForImageTextRetrieval(config).save_pretrained(folder)
        return "hold the weights of BlipForConditionalGeneration, got .* which lacks text_decoder.*pass a captioner"
    if kind == "answers questions":
        shutil.copytree(published, folder)
        config = transformers.BlipConfig.from_pretrained(published)
        config.text_config.encoder_hidden_size = 16
        transformers.BlipForQuestionAnswering(config).save_pretrained(folder)
        return "hold the weights of BlipForConditionalGeneration, got .* which also has text_encoder.*pass a captioner"
    shutil.copytree(published, folder)
    if kind == "no tokenizer":
        for file in ("vocab.txt", "tokenizer.json"):
            (folder / file).unlink()
        return "hold tokenizer.json or vocab.txt, got .*; save the tokenizer there too: tokenizer.save_pretrained"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return "be a folder or a hub name that can be loaded, got .*; check the name and the network"


@pytest.mark.parametrize(
    "kind", ["not there", "another model", "no decoder", "answers questions", "no tokenizer", "cut weights"]
)
def test_what_is_no_whole_captioner_is_refused(published, tmp_path, kind):
    message = _broken(kind, published, tmp_path / "broken")
    with pytest.raises(FastcapError, match=f"fastcap.models: pretrained must {message}"):
        models.load_blip(str(tmp_path / "broken"))


def test_a_hub_name_that_cannot_be_reached_is_one_error_with_a_remedy(monkeypatch):
    import huggingface_hub

    def unreachable(name, **options):
        raise OSError("Got: ConnectError: Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FastcapError) as caught:
        models.load_blip("someone/blip")
    assert str(caught.value) == (
        "fastcap.models: pretrained must be a folder or a hub name that can be loaded, "
        "got 'someone/blip'; check the name and the network (Got: ConnectError: Name or service not known), "
        "or pass --pretrained none for a small model with random weights"
    )


def test_a_checkpoint_is_cached_once_its_weights_and_words_are(published, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert not pretrained.is_cached("someone/blip")
    snapshot = tmp_path / "models--someone--blip" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--blip" / "refs").mkdir()
    (tmp_path / "models--someone--blip" / "refs" / "main").write_text("0" * 40)
    shutil.copy(published / "config.json", snapshot)
    for file in ("model.safetensors", "tokenizer.json"):
        assert not pretrained.is_cached("someone/blip")
        shutil.copy(published / file, snapshot)
    assert pretrained.is_cached("someone/blip")
    model, tokenizer = models.load_blip("someone/blip")
    assert _same_weights(model, models.load_blip(str(published))[0]) and tokenizer.vocab_size == 22


# Training --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    data.write_scenes(folder, num_images=16, seed=0)
    return folder


@pytest.fixture
def config(scenes, tmp_path):
    return TrainConfig(
        data=str(scenes), out=str(tmp_path / "run"), model="blip", pretrained="none", width=16, image_size=16, batch_size=8,
        steps=6, warmup=2, lr=5e-3, validate_every=0,
    )  # fmt: skip


def _with(config, **changes):
    return dataclasses.replace(config, **changes)


def _quiet(config, **options):
    return train(config, progress=False, **options)


def _same_weights(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_training_lowers_the_loss_and_the_captions_are_without_the_prompt(config, scenes):
    result = _quiet(_with(config, steps=80, prompt="behold my"))
    with open(f"{config.out}/log.jsonl") as file:
        losses = [json.loads(line)["loss"] for line in file]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    captioner = Captioner.load(config.out)
    seen = data.KarpathyDataset(scenes, "train", image_size=16).images()
    said = captioner(torch.stack([seen[i]["image"] for i in range(4)]))
    for caption in said:
        assert caption.split()[0] in ("a", "two", "three", "there", "on") and "my" not in caption.split()
    assert captioner.tokenizer.decode(result.model.config.prompt) == "behold my"


def test_interrupted_and_resumed_is_bitwise_uninterrupted(config):
    config = _with(config, dropout=0.3)
    whole = _quiet(config)
    halted = _with(config, out=config.out + "-halted")
    first = _quiet(halted, callbacks=[lambda trainer, record: trainer.stop() if record["step"] == 3 else None])
    assert first.interrupted and first.step == 3
    torch.rand(100)
    second = _quiet(halted, resume=True)
    assert second.step == 6 and _same_weights(second.model, whole.model)
    assert second.model.head.weight is second.model.blip.get_input_embeddings().weight


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_trains_without_running_the_head(config, objective):
    trainer = Trainer(_with(config, objective=objective, steps=2, validate_every=2), progress=False)
    trainer.model.head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    result = trainer.run()
    assert result.val_mle > 0 and result.config.label_smoothing == (0.1 if objective == "mle" else 0.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_the_smallest_budget_no_step_and_no_validation_holds_16_rows_of_logits(config, objective, cpp, monkeypatch):
    """The optimiser's step as well. Hidden states have 8 numbers: the head and its gradient are as large as 8 rows."""
    words = 20_011  # so that 16 rows are more than the operation's smallest scratch, 1 MiB
    small = models.small_architecture
    monkeypatch.setattr(models, "small_architecture", lambda vocab_size, **sizes: small(words, **sizes))
    config = _with(config, objective=objective, width=8, batch_size=16, validate_every=1, validate_batches=1)

    def rows(part, **changes):
        trainer = Trainer(_with(config, **changes), progress=False)
        batch, trainer._began = next(iter(trainer._loader)), time.perf_counter()
        with fastcap.backend(cpp.backend), Allocations() as watch:
            trainer._train_step(0, batch) if part == "step" else trainer.validate()
        return watch.largest / (4 * words)

    for part in ("step", "validation"):
        assert 8 <= rows(part, memory_budget=0) < 16
        assert rows(part) >= 16  # with the usual budget: it does see logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulating_2_times_4_is_one_batch_of_8(config, precision):
    losses = []
    for accumulate in (1, 2):
        changes = {"accumulate": accumulate, "dropout": 0.0, "steps": 3, "precision": precision, "lr": 1e-4}
        losses.append(_quiet(_with(config, out=f"{config.out}{accumulate}", **changes)).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 1e-2)


def test_a_run_from_a_checkpoint_takes_the_recipe_and_needs_the_folder_no_more(config, published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    open_settings = {name: None for name in ("width", "image_size", "lr", "warmup")}
    config = _with(config, pretrained=str(folder), max_length=10, **open_settings)
    first = _quiet(config, callbacks=[lambda trainer, record: trainer.stop() if record["step"] == 3 else None])
    saved = checkpoint.read_config(first.checkpoint)
    assert saved.pretrained == str(folder) and (saved.image_size, saved.width, saved.tokenizer) == (16, None, None)
    assert (saved.lr, saved.weight_decay, saved.label_smoothing, saved.prompt) == (1e-5, 0.05, 0.1, "a picture of")
    folder.rename(tmp_path / "gone")
    second = _quiet(config, resume=True)
    assert second.step == 6
    captioner = Captioner.load(config.out)
    said = captioner(torch.zeros(1, 3, 16, 16), beam=2)
    assert set(" ".join(said).split()) <= {*WORDS, *(word + "s" for word in WORDS)}
    third = _with(config, out=config.out + "-smile", objective="smile", init_from=config.out, pretrained=None)
    trainer = Trainer(third, progress=False)
    assert _same_weights(trainer.model, second.model) and trainer.config.lr == 1e-5
    assert trainer.tokenizer.encode("two red stars") == second.tokenizer.encode("two red stars")


def test_captions_longer_than_the_positions_are_refused(config, published):
    open_settings = {name: None for name in ("width", "image_size")}
    with pytest.raises(FastcapError) as caught:
        _quiet(_with(config, pretrained=str(published), **open_settings))
    assert str(caught.value) == (
        "fastcap.train: max_length must be at most 20, the positions that the prompt leaves, got 30; pass --max-length 20"
    )
    _quiet(_with(config, pretrained=str(published), max_length=20, steps=1, **open_settings))


def test_what_comes_with_a_checkpoint_is_not_chosen(config, published):
    with pytest.raises(FastcapError) as caught:
        _quiet(_with(config, pretrained=str(published), image_size=None))
    assert str(caught.value) == (
        "fastcap.train: width must be left out with blip from a checkpoint, got 16; that model has no such setting to choose"
    )


def test_without_a_name_the_standard_checkpoint_is_taken_from_the_cache_or_none(config, published, monkeypatch, capsys):
    open_settings = {name: None for name in ("pretrained", "width", "image_size")}
    config = _with(config, steps=1, max_length=10, **open_settings)
    monkeypatch.setattr(pretrained, "STANDARD", str(published))
    for cached in (False, True):
        monkeypatch.setattr(pretrained, "is_cached", lambda name, cached=cached: cached)
        result = train(_with(config, out=f"{config.out}{cached}", width=None if cached else 16))
        assert result.config.pretrained == (str(published) if cached else "none")
        assert ("a small blip with random weights" in capsys.readouterr().err) is not cached


def test_without_transformers_the_error_says_how_to_get_it(config, tmp_path, monkeypatch):
    model = _model().float()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FastcapError) as caught:
        _quiet(config)
    assert str(caught.value) == (
        "fastcap.train: model must be show-attend-tell where transformers is missing, got 'blip'; "
        "run: pip install 'fastcap[train]'"
    )
    models.save(model, tmp_path)
    with pytest.raises(FastcapError, match="fastcap.models: transformers must be installed, got .*; run: pip install 'fa"):
        models.load(tmp_path)


@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_a_run_of_fastcap_is_no_pretrained_checkpoint_and_the_error_says_how_to_start_from_it(config, named):
    result = _quiet(_with(config, steps=1))
    folder = config.out if named == "run" else str(result.checkpoint)
    with pytest.raises(FastcapError) as caught:
        _quiet(_with(config, out=config.out + "-more", pretrained=folder))
    assert str(caught.value) == (
        f"fastcap.train: pretrained must be a checkpoint of transformers, got {folder!r}; "
        f"that is a run of fastcap: pass --init-from {folder}, without --model and --pretrained"
    )


@pytest.mark.parametrize("tokenizer", ["words", "wordpiece"])
def test_the_command_line_trains_resumes_and_captions(config, scenes, monkeypatch, capsys, tokenizer):
    from fastcap import cli

    def fastcap(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastcap", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    options = "--model blip --pretrained none --width 16 --image-size 16 --steps 3 --batch-size 8 --validate-batches 1"
    status, out, err = fastcap(
        "train", "--data", scenes, "--out", config.out, "--tokenizer", tokenizer, "--vocab-size", 90, *options.split()
    )
    assert status == 0 and "greedy captions" in out and "a small blip with random weights" in err, err
    status, _, err = fastcap("train", "--out", config.out, "--resume")
    assert status == 0 and "resumed at step 3 of 3" in err
    picture = sorted((scenes / "images").iterdir())[0]
    status, out, err = fastcap("caption", "--checkpoint", config.out, "--beam", 2, picture)
    assert (status, err) == (0, "") and out.startswith(f"{picture}\t")
