"""Encoders: VGG-16's shape and weights, features of regions, masks, and how locations lie on the picture."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from fastcap import models
from fastcap.errors import FastcapError
from fastcap.models import BackboneEncoder, ConvEncoder, FeatureEncoder, VggEncoder, build_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

# The layers of torchvision.models.vgg16().features up to conv5_3: index -> channels of a convolution
CONVOLUTIONS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
CONVOLUTIONS |= {17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
POOLS = (4, 9, 16, 23)


@pytest.fixture(scope="module")
def vgg_weights():
    """A state dict with torchvision's names, a part of the classifier among them."""
    generator = torch.Generator().manual_seed(0)
    weights = {"classifier.6.bias": torch.zeros(1000)}
    for index, (before, after) in CONVOLUTIONS.items():
        scale = (2 / (9 * before)) ** 0.5
        weights[f"features.{index}.weight"] = torch.randn(after, before, 3, 3, generator=generator) * scale
        weights[f"features.{index}.bias"] = torch.randn(after, generator=generator) * 0.1
    return weights


@pytest.fixture(scope="module")
def vgg_file(vgg_weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(vgg_weights, file)
    return file


def pictures(*size):
    return torch.rand(*size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_vgg_makes_14_by_14_annotations_of_512_values():
    encoder = build_encoder("vgg16")
    images = pictures(1, 3, 224, 224)
    with torch.no_grad():
        assert encoder(images).shape == (1, 196, 512) == (1, 196, encoder.width)
    assert encoder.grid(images) == (14, 14) and encoder.mask(images) is None
    convolutions = [layer for layer in encoder.features if isinstance(layer, torch.nn.Conv2d)]
    assert sum(p.numel() for p in encoder.parameters()) == 14_714_688  # torchvision's features
    assert len(convolutions) == 13


def test_vgg_computes_the_layers_of_torchvision_by_their_names(vgg_weights, vgg_file):
    images = pictures(2, 3, 48, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for index in range(30):
        if index in CONVOLUTIONS:
            weight, bias = (vgg_weights[f"features.{index}.{name}"] for name in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
        elif index in POOLS:
            x = F.max_pool2d(x, 2)
    expected = x.flatten(2).transpose(1, 2)
    assert expected.shape == (2, 6, 512)
    plain = VggEncoder(vgg_file, normalise=False)
    torch.testing.assert_close(plain(images), expected)
    torch.testing.assert_close(build_encoder(f"vgg16:{vgg_file}")(images), F.layer_norm(expected, (512,)))
    assert plain.grid(images) == (3, 2)


def test_random_vgg_weights_keep_the_scale_of_the_picture():
    torch.manual_seed(0)
    with torch.no_grad():
        found = VggEncoder(normalise=False)(pictures(2, 3, 64, 64))
    assert 0.1 < found.square().mean().sqrt() < 10  # 13 layers of torch's default would leave 1e-4


def test_vgg_from_a_file_is_frozen_and_random_vgg_is_not(vgg_file):
    images = pictures(1, 3, 16, 16)
    for encoder, trained in [
        (build_encoder("vgg16"), True),
        (build_encoder(f"vgg16:{vgg_file}"), False),
        (build_encoder({"kind": "vgg16", "weights": str(vgg_file), "trainable": True}), True),
        (build_encoder({"kind": "vgg16", "trainable": False}), False),
    ]:
        assert encoder(images).requires_grad is trained
        assert {p.requires_grad for p in encoder.parameters()} == {trained}


def test_vgg_reads_safetensors_and_half_precision(vgg_weights, vgg_file, tmp_path):
    from safetensors.torch import save_file

    save_file({name: value.half() for name, value in vgg_weights.items()}, tmp_path / "vgg.safetensors")
    found = build_encoder(f"vgg16:{tmp_path / 'vgg.safetensors'}").state_dict()
    for name, value in VggEncoder(vgg_file).state_dict().items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value.half().float())


@pytest.mark.parametrize("name", ["show-attend-tell", "show-and-tell"])
def test_a_saved_model_needs_no_weights_file_and_names_none(vgg_file, tmp_path, name):
    sizes = {"vocab_size": 20, "embed_width": 8, "hidden_width": 8}
    model = models.build(name, encoder=f"vgg16:{vgg_file}", **sizes).eval()
    models.save(model, tmp_path)
    assert str(vgg_file) not in (tmp_path / "model.json").read_text()
    again = models.load(tmp_path)
    assert again.config == model.config
    assert {p.requires_grad for p in again.encoder.parameters()} == {False}
    images, inputs = pictures(2, 3, 32, 32), torch.randint(0, 20, (2, 4))
    assert torch.equal(again(images, inputs)[0], model(images, inputs)[0])


def test_wrong_vgg_weights_are_refused(vgg_weights, tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("this must not run",))

    bn = {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}
    torch.save(bn, tmp_path / "bn.pth")
    torch.save({**vgg_weights, "features.28.bias": torch.zeros(5)}, tmp_path / "shape.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save(Code(), tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("weights")
    for name, message in {
        "bn.pth": r"hold a features.2.weight of shape \(64, 64, 3, 3\), got 'nothing in .*bn.pth'; give torchvision's vgg",
        "shape.pth": r"hold a features.28.bias of shape \(512,\), got '\(5,\) in ",
        "list.pth": "hold a state dict, got 'list in .*list.pth'; save the model's state_dict()",
        "code.pth": "be a file of tensors, got .*code.pth .*; give a state dict",
        "text.pth": "be a file of tensors, got .*text.pth ",
        "empty.pth": "be a file of tensors, got .*empty.pth ",
        "text.safetensors": "be a file of tensors, got .*text.safetensors ",
        "none.pth": "be a file, got '.*none.pth'; check the path",
    }.items():
        with pytest.raises(FastcapError, match=f"fastcap.models: vgg16 weights must {message}"):
            build_encoder(f"vgg16:{tmp_path / name}")


@pytest.mark.parametrize("size", [(3, 40, 48), (3, 48, 8), (3, 0, 16)])
def test_vgg_takes_sides_that_16_divides(size):
    with pytest.raises(FastcapError, match="images of vgg16 must have sides that 16 divides, got .*; resize them"):
        VggEncoder()(torch.zeros(1, *size))


def test_features_are_normalised_and_projected():
    features = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)) * 9 + 4
    plain, projected = FeatureEncoder(12), FeatureEncoder(12, width=7)
    torch.testing.assert_close(plain(features), F.layer_norm(features, (12,)))
    torch.testing.assert_close(projected(features), projected.project(F.layer_norm(features, (12,))))
    assert (plain.width, projected.width) == (12, 7)
    assert plain.grid(features) is projected.grid(features) is None


def test_rows_of_zeros_are_no_regions():
    encoder = FeatureEncoder(4, width=3).double()
    short = torch.randn(1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short[0, 1, :3] = 0  # one value is enough to be a region
    padded = F.pad(short, (0, 0, 0, 3))
    assert encoder.mask(padded).tolist() == [[True, True, False, False, False]]
    torch.testing.assert_close(encoder(padded)[:, :2], encoder(short))
    assert not encoder(padded)[:, 2:].any()
    loss = encoder(padded).sin().sum()
    for one, two in zip(
        torch.autograd.grad(loss, encoder.parameters()),
        torch.autograd.grad(encoder(short).sin().sum(), encoder.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("shape", [(2, 5, 11), (2, 12), (2, 3, 48, 48)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(FastcapError, match=r"images of a model of features must be features \[B, R, 12\], got "):
        FeatureEncoder(12)(torch.zeros(shape))


def test_an_encoder_is_made_again_from_its_config():
    for encoder in (ConvEncoder(width=8, channels=(4,)), VggEncoder(trainable=False, normalise=False), FeatureEncoder(6, 4)):
        again = build_encoder(json.loads(json.dumps(encoder.config)))
        assert type(again) is type(encoder) and again.config == encoder.config and again.width == encoder.width
        again.load_state_dict(encoder.state_dict())
    for wrong, message in [
        ("features", "encoder must say how wide its features are, got 'features'; pass {'kind': 'features'"),
        ({"kind": "vgg19"}, "encoder kind must be one of 'conv', 'vgg16', 'features', 'backbone', got 'vgg19'"),
        ({"kind": "features", "width_in": 0}, "width_in must be at least 1, got 0"),
        ({"kind": "features", "width_in": 4, "width": 2.5}, "width must be at least 1, got 2.5"),
    ]:
        with pytest.raises(FastcapError) as caught:
            build_encoder(wrong)
        assert str(caught.value).startswith(f"fastcap.models: {message}")


@pytest.mark.parametrize("channels", [(4,), (4, 4), (4, 4, 4)])
@pytest.mark.parametrize("size", [(48, 48), (33, 50), (7, 9)])
def test_the_convolutional_encoder_knows_its_grid(channels, size):
    encoder, images = ConvEncoder(width=8, channels=channels), torch.zeros(2, 3, *size)
    rows, columns = encoder.grid(images)
    maps = encoder.layers(images)
    assert maps.shape[2:] == (rows, columns) and encoder(images).shape[1] == rows * columns
    assert encoder.mask(images) is None


def test_the_convolutional_encoders_locations_look_at_their_centres():
    """The pixels that an annotation depends on lie evenly around its centre, where they do not reach the border."""
    encoder, images = ConvEncoder(width=8, channels=(4, 4)).double(), pictures(1, 3, 64, 48).double().requires_grad_()
    encoder.normalise = torch.nn.Identity()
    for layer in encoder.layers:  # every filter counts every pixel it sees
        if isinstance(layer, torch.nn.Conv2d):
            layer.forward = lambda x, layer=layer: F.conv2d(
                x, torch.ones_like(layer.weight), None, layer.stride, layer.padding
            )
    rows, columns = encoder.grid(images)
    heights, widths = encoder.centres(images)
    assert (len(heights), len(widths)) == (rows, columns) == (16, 12)
    for row, column in ((7, 5), (8, 6)):
        annotation = encoder(images.abs())[0, row * columns + column].sum()
        seen = torch.autograd.grad(annotation, images)[0][0].abs().sum(0)
        assert (seen.sum(1).nonzero().double().mean() + 0.5) / 64 == pytest.approx(heights[row])
        assert (seen.sum(0).nonzero().double().mean() + 0.5) / 48 == pytest.approx(widths[column])
    assert VggEncoder().centres(images) is FeatureEncoder(3).centres(images) is None


def test_a_backbone_knows_its_grid(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 4, "depths": [1, 1, 1], "num_heads": [1, 1, 1]}
    grids = {
        (4, 4): transformers.ViTConfig(**sizes, image_size=32, patch_size=8),
        (6, 5): transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        # patches of 4 of a picture of 32, merged twice
        (2, 2): transformers.SwinConfig(**swin, window_size=2),
    }  # fmt: skip
    images = torch.zeros(3, 3, 48, 40)
    for grid, config in grids.items():
        encoder = BackboneEncoder(backbone=config.to_dict())
        assert encoder.grid(images) == grid and encoder.mask(images) is None
        assert encoder(images).shape == (3, grid[0] * grid[1], encoder.width)
