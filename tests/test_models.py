"""The encoders, Show, Attend and Tell, and models in folders."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from fastcap import models
from fastcap.errors import FastcapError
from fastcap.models import BackboneEncoder, ConvEncoder, build_encoder

TINY = {"vocab_size": 20, "embed_width": 24, "hidden_width": 16, "attention_width": 8}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images():
    return torch.rand(5, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _model(**options):
    torch.manual_seed(0)
    encoder = {"kind": "conv", "width": 12, "channels": [8, 8, 16]}
    return models.build("show-attend-tell", **{**TINY, "encoder": encoder, "dropout": 0.0, **options})


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of tiny random models: a grid of 4 x 4 patches, or 6 x 6 maps of a 48 x 48 picture."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 32, "patch_size": 8}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    made = {
        "vit": transformers.ViTModel(transformers.ViTConfig(**vision)),
        "resnet": transformers.ResNetModel(transformers.ResNetConfig(**resnet)),
        "clip": transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)),
        "clip vision": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)),
        "bert": transformers.BertModel(transformers.BertConfig(**text)),
    }
    folder = tmp_path_factory.mktemp("backbones")
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return folder


def test_a_picture_of_48_pixels_has_36_locations(images):
    assert ConvEncoder(width=32)(images).shape == (5, 36, 32)


def test_a_picture_is_encoded_alike_alone_in_a_batch_and_while_training(images):
    encoder = ConvEncoder(width=32).double()
    together = encoder.train()(images.double())
    alone = encoder.eval()(images[2:3].double())
    torch.testing.assert_close(together[2:3], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "locations"), [("vit", 16), ("resnet", 36), ("clip", 16), ("clip vision", 16)])
def test_any_vision_backbone_gives_one_vector_per_location(backbones, images, name, locations):
    encoder = BackboneEncoder(str(backbones / name))
    assert encoder(images).shape == (5, locations, 16) == (5, locations, encoder.width)


def test_the_class_token_is_dropped(backbones, images):
    encoder = BackboneEncoder(str(backbones / "vit"))
    small = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    hidden = encoder.model(pixel_values=((small + 1) / 2 - mean) / std).last_hidden_state
    torch.testing.assert_close(encoder(images), hidden[:, 1:])


def test_a_frozen_backbone_has_no_gradient_and_a_fine_tuned_one_has(backbones, images):
    for trainable in (False, True):
        encoder = BackboneEncoder(str(backbones / "resnet"), trainable=trainable)
        assert encoder(images).requires_grad is trainable
        assert {p.requires_grad for p in encoder.parameters()} == {trainable}


def test_a_backbone_stays_in_evaluation_mode(backbones, images):
    encoder = BackboneEncoder(str(backbones / "resnet"), trainable=True).train()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    encoder(images)
    assert encoder.training and not encoder.model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())


@pytest.mark.parametrize("name", ["vit", "resnet", "clip"])
def test_a_backbone_is_made_again_from_plain_values(backbones, images, name):
    encoder = BackboneEncoder(str(backbones / name))
    again = build_encoder(json.loads(json.dumps(encoder.config)))
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(images), encoder(images))


def test_wrong_encoders_are_refused(backbones, tmp_path):
    with pytest.raises(FastcapError, match="encoder must be a vision model, got .*bert.*; name one that takes pictures"):
        BackboneEncoder(str(backbones / "bert"))
    with pytest.raises(FastcapError, match="encoder must be 'conv', 'vgg16' or a transformers vision model, got .*empty"):
        BackboneEncoder(str(tmp_path / "empty"))
    with pytest.raises(FastcapError, match="encoder kind must be one of 'conv', 'vgg16', 'features', 'backbone', got 'mlp'"):
        build_encoder({"kind": "mlp"})


def test_logits_and_alphas_have_a_row_per_word(images):
    logits, alphas = _model()(images, torch.ones(5, 7, dtype=torch.int64))
    assert logits.shape == (5, 7, 20) and alphas.shape == (5, 7, 36)
    torch.testing.assert_close(alphas.sum(2), torch.ones(5, 7))
    assert (alphas >= 0).all()


def test_the_forward_pass_is_the_equations_of_the_paper(images):
    model, inputs = _model(), torch.randint(0, 20, (5, 4))
    a = model.encoder(images)
    h, c = torch.tanh(model.start_state(a.mean(1))).chunk(2, 1)
    H, expected = h.shape[1], []
    for t in range(4):
        y = model.embed(inputs[:, t])
        e = model.score(torch.tanh(model.keys(a) + model.query(h).unsqueeze(1)))
        z = torch.sigmoid(model.gate(h)) * (torch.softmax(e, 1) * a).sum(1)
        weight = torch.cat([model.word_gates.weight, model.state_gates.weight[:, : a.shape[2]]], 1)
        cell = torch.nn.LSTMCell(weight.shape[1], H)
        cell.weight_ih.data, cell.weight_hh.data = weight, model.state_gates.weight[:, a.shape[2] :]
        cell.bias_ih.data, cell.bias_hh.data = model.word_gates.bias, torch.zeros(4 * H)
        # torch's LSTM orders its gates in, forget, new, out; ours in, forget, out, new
        order = torch.cat([torch.arange(2 * H), torch.arange(3 * H, 4 * H), torch.arange(2 * H, 3 * H)])
        for name in ("weight_ih", "weight_hh", "bias_ih"):
            getattr(cell, name).data = getattr(cell, name).data[order]
        h, c = cell(torch.cat([y, z], 1), (h, c))
        expected.append(model.head(torch.tanh(model.output_h(h) + y + model.output_z(z))))
    torch.testing.assert_close(model(images, inputs)[0], torch.stack(expected, 1), rtol=1e-5, atol=1e-6)


def test_the_head_of_the_hidden_states_is_the_logits(images):
    model, inputs = _model(), torch.randint(0, 20, (5, 6))
    hidden = model.hidden_states(images, inputs)
    assert hidden.shape == (5, 6, 24) and isinstance(model.head, torch.nn.Linear)
    torch.testing.assert_close(model.head(hidden), model(images, inputs)[0])


def test_lengths_skip_work_and_change_nothing_that_counts():
    model, generator = _model().double(), torch.Generator().manual_seed(1)
    images = torch.rand(40, 3, 48, 48, generator=generator, dtype=torch.float64)
    inputs = torch.randint(0, 20, (40, 9), generator=generator)
    lengths = torch.randint(1, 10, (40,), generator=generator)
    counts = torch.arange(9) < lengths.unsqueeze(1)
    full, full_alphas = model(images, inputs)
    part, part_alphas = model(images, inputs, lengths)
    torch.testing.assert_close(part[counts], full[counts])
    torch.testing.assert_close(part_alphas[counts], full_alphas[counts])
    assert (part[~counts] == 0).all() and (part_alphas[~counts] == 0).all()
    wanted = torch.autograd.grad(full[counts].square().sum(), model.parameters())
    found = torch.autograd.grad(part[counts].square().sum(), model.parameters())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_step_at_a_time_gives_the_logits_of_the_forward_pass(images):
    model, inputs = _model(), torch.randint(0, 20, (5, 6))
    expected, _ = model(images, inputs)
    memory = model.encode(images)
    state = model.start(memory)
    for t in range(6):
        logits, state = model.step(inputs[:, t], state, memory)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["soft", "hard", "mean"])
def test_a_beam_repeats_what_the_memory_holds_and_leaves_out_what_it_does_not(images, attention):
    model = _model(attention=attention, output="linear", gate="vector")
    memory = model.encode(images)
    assert memory.mask is None and (memory.keys is None) == (attention == "mean")
    found = models.beam_search(model, images, beam_size=3, max_length=5)
    alone = [models.beam_search(model, image.unsqueeze(0), beam_size=3, max_length=5).lists()[0] for image in images]
    assert found.lists() == alone


def test_dropout_is_off_while_decoding_and_the_mode_is_kept(images):
    model = _model(dropout=0.9).train()
    first, second = (models.greedy(model, images).scores for _ in range(2))
    assert torch.equal(first, second) and model.training


@pytest.mark.parametrize("encoder", [None, "vit"])
def test_a_saved_model_is_loaded_bit_for_bit_without_its_backbone(backbones, images, tmp_path, encoder):
    model = _model() if encoder is None else _model(encoder=str(backbones / encoder))
    models.save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert str(backbones) not in (tmp_path / "model.json").read_text()
    again = models.load(tmp_path)
    assert again.config == model.config and not again.training
    inputs = torch.randint(0, 20, (5, 4))
    assert torch.equal(again(images, inputs)[0], model.eval()(images, inputs)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, r"a whole model.json .* \(model.json names no model\)'; use an earlier checkpoint"),
        ({"vocab_size": 21}, r"a model.json and the weights .* \(RuntimeError: .* size mismatch .*; use another checkpoint"),
        ({"encoder": {"kind": "conv"}}, r"a model.json and the weights .* size mismatch .*; use another checkpoint"),
        ({"embed_width": "wide"}, r"a model.json and the weights .* \(TypeError: .*; use another checkpoint, or the fast"),
    ],
)
def test_a_model_that_its_weights_do_not_fit_is_not_loaded(tmp_path, changes, message):
    models.save(_model(), tmp_path)
    file = tmp_path / "model.json"
    file.write_text("{}" if changes is None else json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(FastcapError, match=f"fastcap.models: folder must hold {message}"):
        models.load(tmp_path)


def test_weights_that_are_missing_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    models.save(_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(FastcapError, match=r"folder must hold a model.json and the weights .* Missing key.*\"head.bias\""):
        models.load(tmp_path)


def test_a_backbone_without_transformers_is_one_error_with_a_remedy(backbones, tmp_path, monkeypatch):
    models.save(_model(encoder=str(backbones / "vit")), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (lambda: models.load(tmp_path), lambda: _model(encoder="google/vit")):
        with pytest.raises(FastcapError, match="fastcap.models: transformers must be installed, got .*; run: pip install"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: models.build("rnn", vocab_size=5),
            "fastcap.models: model must be one of show-attend-tell, show-and-tell, glied, blip, clip, got 'rnn'",
        ),
        (lambda: _model(vocab_size=0), "fastcap.models: vocab_size must be at least 1, got 0"),
        (lambda: _model(dropout=1.0), "fastcap.models: dropout must be in [0, 1), got 1.0"),
        (lambda: _model(depth=2), "fastcap.models: options must be among activation, attention, "),
        (
            lambda: ConvEncoder(channels=(0,)),
            "fastcap.models: channels must be positive, at least one, got (0,)",
        ),
        (
            lambda: models.load("nowhere"),
            "fastcap.models: folder must hold model.json and model.safetensors, got 'nowhere'",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(FastcapError) as caught:
        call()
    assert str(caught.value).startswith(message)
