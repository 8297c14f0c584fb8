"""`fastcap.hf`: a model of every family, attached, has its own loss, or SMILE on its own logits; detached, it is as before.

The models are random, of one layer, and made from configurations: nothing is downloaded.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

import transformers as tf

import fastcap
from fastcap import functional as F_cap
from fastcap import hf
from fastcap.errors import FastcapError
from fastcap.hf.attach import _SETTINGS
from fastcap.testing import Allocations

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

V, H, B, L = 1009, 16, 3, 7
IMAGE = V - 1  # the id that stands for a piece of the image
SMALL = {"hidden_size": H, "intermediate_size": H, "num_hidden_layers": 1, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PICTURE = {**SMALL, "image_size": 8, "patch_size": 4}


# Models ------------------------------------------------------------------------------------------------------------------


def captions():
    """[B, L] ids: one caption with a word twice, one that is shorter."""
    labels = torch.randint(5, V - 2, (B, L))
    labels[0, 5] = labels[0, 3]
    labels[1, 5:] = -100
    return labels


def images():
    return torch.randn(B, 3, 8, 8)


def after_image(pieces):
    """ids and labels of captions behind `pieces` tokens of an image, which the labels ignore."""
    caption = captions()
    ids = torch.cat([torch.full((B, pieces), IMAGE), caption.clamp(min=0)], 1)
    return ids, torch.cat([torch.full((B, pieces), -100), caption], 1)


def blip(**text):
    text = {**SMALL, "vocab_size": V, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2} | text
    config = tf.BlipConfig(vision_config=dict(PICTURE), text_config=dict(text, sep_token_id=2))
    labels = captions()
    inputs = {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long()}
    return tf.BlipForConditionalGeneration(config), {"pixel_values": images(), **inputs, "labels": labels}


def _blip2(text):
    qformer = {**SMALL, **NO_DROPOUT, "cross_attention_frequency": 1, "vocab_size": 32}
    config = tf.Blip2Config(
        vision_config=dict(PICTURE), qformer_config=qformer, text_config=text, num_query_tokens=2, image_token_index=IMAGE
    )
    ids, labels = after_image(2)
    return tf.Blip2ForConditionalGeneration(config), {"pixel_values": images(), "input_ids": ids, "labels": labels}


def blip2_opt():
    sizes = {"hidden_size": H, "word_embed_proj_dim": H, "ffn_dim": H, "num_hidden_layers": 1, "num_attention_heads": 2}
    return _blip2({"model_type": "opt", "vocab_size": V, **sizes, "max_position_embeddings": 32, "dropout": 0.0})


def blip2_t5():
    sizes = {"d_model": H, "d_kv": 8, "d_ff": H, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    model, inputs = _blip2({"model_type": "t5", "vocab_size": V, **sizes, "decoder_start_token_id": 0, "pad_token_id": 0})
    return model, {**inputs, "labels": captions()}


def blip2_llama():
    text = {**SMALL, "model_type": "llama", "vocab_size": V, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return _blip2(text)


def git():
    config = tf.GitConfig(vision_config=dict(PICTURE), **SMALL, **NO_DROPOUT, vocab_size=V, max_position_embeddings=32)
    labels = captions()
    return tf.GitForCausalLM(config), {"pixel_values": images(), "input_ids": labels.clamp(min=0), "labels": labels}


def florence2():
    vision = {
        "depths": (1,), "patch_size": (4,), "patch_stride": (4,), "patch_padding": (0,), "patch_prenorm": (False,),
        "embed_dim": (H,), "num_heads": (2,), "num_groups": (2,), "window_size": 2, "projection_dim": H,
        "drop_path_rate": 0.0, "max_position_embeddings": 4, "max_temporal_embeddings": 2,
    }  # fmt: skip
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder")
             for name, size in (("layers", 1), ("ffn_dim", H), ("attention_heads", 2))}  # fmt: skip
    text = {"model_type": "bart", "vocab_size": V, "d_model": H, **sizes, "dropout": 0.0, "max_position_embeddings": 32}
    config = tf.Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ids, _ = after_image(5)
    inputs = {"pixel_values": images(), "input_ids": ids, "labels": captions()}
    return tf.Florence2ForConditionalGeneration(config), inputs


def qwen2_5_vl():
    vision = {
        "depth": 1, "hidden_size": H, "intermediate_size": H, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 8, "out_hidden_size": H, "fullatt_block_indexes": (0,),
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**SMALL, "vocab_size": V, "num_key_value_heads": 1, "max_position_embeddings": 64, "rope_parameters": rope}
    config = tf.Qwen2_5_VLConfig(
        vision_config=vision, text_config={**text, "bos_token_id": 1, "eos_token_id": 2}, image_token_id=IMAGE,
        video_token_id=V - 2, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=True,
    )  # fmt: skip
    ids, labels = after_image(4)
    inputs = {"pixel_values": torch.randn(B * 16, 3 * 2 * 2 * 2), "image_grid_thw": torch.tensor([[1, 4, 4]] * B)}
    inputs |= {"input_ids": ids, "labels": labels, "mm_token_type_ids": (ids == IMAGE).int()}
    return tf.Qwen2_5_VLForConditionalGeneration(config), inputs


def paligemma():
    text = {
        **SMALL, "model_type": "gemma2", "vocab_size": V, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 64,
        "max_position_embeddings": 32, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8,
    }  # fmt: skip
    vision = {**PICTURE, "model_type": "siglip_vision_model", "vision_use_head": False}
    config = tf.PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=H, hidden_size=H, image_token_index=IMAGE
    )
    ids, labels = after_image(4)
    inputs = {"pixel_values": images(), "input_ids": ids, "labels": labels, "token_type_ids": (labels >= 0).long()}
    return tf.PaliGemmaForConditionalGeneration(config), inputs


def _vision_encoder_decoder(decoder):
    encoder = {**PICTURE, **NO_DROPOUT, "model_type": "vit"}
    decoder = {**decoder, "vocab_size": V, "add_cross_attention": True, "is_decoder": True}
    config = tf.VisionEncoderDecoderConfig(encoder=encoder, decoder=decoder, decoder_start_token_id=1, pad_token_id=0)
    return tf.VisionEncoderDecoderModel(config), {"pixel_values": images(), "labels": captions()}


def vit_gpt2():
    sizes = {"n_embd": H, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
    return _vision_encoder_decoder({"model_type": "gpt2", **sizes, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0})


def vit_bert():
    return _vision_encoder_decoder({"model_type": "bert", **SMALL, **NO_DROPOUT, "max_position_embeddings": 16})


MODELS = (blip, blip2_opt, blip2_t5, blip2_llama, git, florence2, qwen2_5_vl, paligemma, vit_gpt2, vit_bert)
MODELS = {f.__name__: f for f in MODELS}
SHIFTS_INPUTS = ("blip2_t5", "florence2", "vit_gpt2", "vit_bert")  # the others shift labels


def build(name, dtype=torch.float32, **options):
    """A model in training mode, with weights large enough that the loss depends on all of them, and its inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[name](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    return model.to(dtype).train(), inputs


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def gradients(model, loss):
    """The gradient of every parameter that has one, by name; the model keeps none."""
    model.zero_grad()
    loss.backward()
    found = {key: p.grad.to_dense().clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(got, wanted, tolerance):
    """Within `tolerance` of the largest of each, and of the rounding of the largest of all: a key's bias has only noise."""
    assert got.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert largest > 1e-3
    for key, gradient in wanted.items():
        allowed = tolerance * float(gradient.abs().max()) + 8 * torch.finfo(gradient.dtype).eps * largest
        assert float((got[key] - gradient).abs().max()) <= allowed, key


def own_logits(name, model, inputs):
    """The unattached model's logits [B, T, V] at its targets, and the targets [B, T]."""
    labels = inputs["labels"]
    logits = model(**inputs).logits[:, -labels.shape[1] :]
    return (logits, labels) if name in SHIFTS_INPUTS else (logits[:, :-1], labels[:, 1:])


def masked_smile(logits, target, first_token):
    """SMILE as the paper writes it: words that are not in the caption are masked."""
    allowed = torch.zeros(len(target), V, dtype=torch.bool)
    for caption, words in zip(allowed, target, strict=True):
        caption[words[words >= 0]] = True
    allowed = allowed[:, None].expand(logits.shape).clone()
    if first_token == "full":
        for caption, words in zip(allowed, target, strict=True):
            caption[int((words >= 0).nonzero()[0])] = True
    return F.cross_entropy(logits.masked_fill(~allowed, -torch.inf).flatten(0, 1), target.flatten())


# Every family ------------------------------------------------------------------------------------------------------------


def test_every_family_has_a_model_here():
    classes = {type(build(name)[0]).__name__ for name in MODELS}
    assert classes == {family.model for family in hf.FAMILIES}


def test_mle_is_the_models_own_loss(name):
    model, inputs = build(name)
    own = model(**inputs).loss
    wanted = gradients(model, own)
    output = hf.attach(model, "mle")(**inputs)
    torch.testing.assert_close(output.loss, own, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(model, output.loss), wanted, 1e-4)


def test_mle_has_the_gradients_of_cross_entropy_on_the_models_own_logits(name):
    """In float64, in which transformers' own loss rounds to float32."""
    model, inputs = build(name, torch.float64)
    logits, target = own_logits(name, model, inputs)
    own = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    wanted = gradients(model, own)
    loss = hf.attach(model, "mle")(**inputs).loss
    torch.testing.assert_close(loss, own, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, loss), wanted, 1e-9)


@pytest.mark.parametrize("first_token", ["full", "subset"])
def test_smile_is_the_masked_loss_of_the_models_own_logits(name, first_token):
    model, inputs = build(name, torch.float64)
    own = masked_smile(*own_logits(name, model, inputs), first_token)
    wanted = gradients(model, own)
    loss = hf.attach(model, first_token=first_token)(**inputs).loss
    torch.testing.assert_close(loss, own, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, loss), wanted, 1e-9)


def test_detached_is_as_before(name):
    model, inputs = build(name)
    before = model(**inputs).loss
    own_class, forward, keys = type(model), model.forward, set(model.__dict__)
    inner = {key: set(module.__dict__) for key, module in model.named_modules()}
    hf.attach(model)
    assert type(model) is not own_class
    model(**inputs).loss.backward()
    assert hf.detach(model) is model
    assert type(model) is own_class and model.forward == forward
    assert set(model.__dict__) == keys
    assert {key: set(module.__dict__) for key, module in model.named_modules()} == inner
    after = model(**inputs)
    assert torch.equal(after.loss, before) and after.logits.shape[-1] == V


def test_only_training_with_labels_is_touched(name):
    model, inputs = build(name)
    asked = {key: x for key, x in inputs.items() if key != "labels"}
    if name in SHIFTS_INPUTS:
        asked["decoder_input_ids"] = inputs["labels"].clamp(min=0)

    def untouched():
        evaluated = model.eval()(**inputs)
        with torch.no_grad():
            prompt = {key: x.clone() for key, x in asked.items() if key != "decoder_input_ids"}  # BLIP writes into it
            words = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        trained = model.train()(**asked)
        return evaluated.loss, evaluated.logits, words, trained.logits

    before = untouched()
    hf.attach(model)
    for got, wanted in zip(untouched(), before, strict=True):
        assert torch.equal(got, wanted)
    output = model(**inputs)
    assert output.logits is None and "logits" not in output
    assert output[0] is output.loss and output.loss.shape == ()


def test_saved_while_attached_it_loads_unattached(name, tmp_path):
    model, inputs = build(name)
    keys, own_class = list(model.state_dict()), type(model)
    wanted = model.eval()(**inputs)
    hf.attach(model.train())
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = own_class.from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == [own_class.__name__]
    assert type(loaded) is own_class and _SETTINGS not in loaded.__dict__
    assert torch.equal(loaded(**inputs).logits, wanted.logits)


def test_gradient_checkpointing_changes_nothing(name):
    model, inputs = build(name)
    wanted = gradients(model, hf.attach(model)(**inputs).loss)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_same_gradients(gradients(model, model(**inputs).loss), wanted, 1e-4)


def test_bf16_autocast_trains(name):
    model, inputs = build(name)
    logits, target = own_logits(name, model, inputs)
    wanted = masked_smile(logits, target, "full")
    hf.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=2e-2, atol=0)  # bf16 has 8 bits
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, loss).values())


def test_a_model_in_half_precision_has_a_loss_in_float32(name):
    """In bfloat16 a loss of some units has steps of 1/32; divided by num_items_in_batch, it would scale all gradients so."""
    model, inputs = build(name, torch.bfloat16)
    logits, target = own_logits(name, model, inputs)
    loss = hf.attach(model)(**inputs).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, masked_smile(logits.float(), target, "full"), rtol=1e-2, atol=0)
    assert {gradient.dtype for gradient in gradients(model, loss).values()} == {torch.bfloat16}


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same(name):
    model, inputs = build(name)
    loss = hf.attach(model, weight=torch.rand(V))(**inputs).loss  # the weights stay where they are
    wanted = gradients(model, loss)
    there = model.cuda()(**{key: x.cuda() for key, x in inputs.items()}).loss
    torch.testing.assert_close(there.cpu(), loss, rtol=1e-4, atol=0)
    assert_same_gradients({key: x.cpu() for key, x in gradients(model, there).items()}, wanted, 1e-2)


@pytest.mark.parametrize("grad_weight", ["sparse", "accumulate"])
def test_tied_heads_get_the_dense_gradient_in_every_way(name, grad_weight):
    model, inputs = build(name, torch.float64)
    wanted = gradients(model, hf.attach(model, first_token="subset")(**inputs).loss)
    loss = hf.attach(model, first_token="subset", grad_weight=grad_weight)(**inputs).loss
    assert_same_gradients(gradients(model, loss), wanted, 1e-12)


# One family stands for all from here -------------------------------------------------------------------------------------


def test_attached_and_detached_train_alike():
    losses = []
    for attached in (False, True):
        model, inputs = build("blip", label_smoothing=0.1)
        if attached:
            hf.attach(model, "mle")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        losses.append([])
        for _ in range(20):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=0)


def _largest_allocation(model, inputs):
    with Allocations() as watch:
        model(**inputs).loss.backward()
    model.zero_grad()
    return watch.largest


@pytest.mark.parametrize("objective", ["mle", "smile", "smile+mle", "resmile"])
def test_a_training_step_never_holds_16_rows_of_logits(objective, cpp):
    """Forward and backward, 32 targets. Hidden states have 8 numbers: the head and its gradient are as large as 8 rows."""
    words = 20_011  # so that 16 rows are more than the operation's smallest scratch, 1 MiB
    model, inputs = build("blip", hidden_size=8, vocab_size=words)
    ids = torch.randint(5, words, (4, 9))
    inputs = {"pixel_values": torch.randn(4, 3, 8, 8), "input_ids": ids, "labels": ids}
    assert _largest_allocation(model, inputs) >= 32 * words * 4  # it does see the model's own logits
    hf.attach(model, objective, memory_budget=0)
    with fastcap.backend(cpp.backend):
        assert _largest_allocation(model, inputs) < 16 * words * 4


def test_what_of_the_logits_is_made_is_bounded_by_the_budget(cpp):
    """The words of the recipe, in rows of V: 32 targets of 4 captions; head and gradient are as large as 8 rows."""
    words = 20_011
    model, inputs = build("blip", hidden_size=8, vocab_size=words)
    ids = torch.randint(5, words, (4, 9))
    inputs = {"pixel_values": torch.randn(4, 3, 8, 8), "input_ids": ids, "labels": ids}
    largest = {}
    with fastcap.backend(cpp.backend):
        for objective in ("mle", "smile", "smile+mle", "resmile"):
            hf.attach(model, objective)
            largest[objective] = _largest_allocation(model, inputs) / (words * 4)
        budget = 20 * words * 4  # more than the smallest scratch, 1 MiB
        hf.attach(model, "mle", memory_budget=budget)
        assert _largest_allocation(model, inputs) <= budget
    assert largest["smile"] <= 8  # no [B, T, V]; first tokens make [B, V], 4 rows
    assert all(largest[objective] == 32 for objective in ("mle", "smile+mle", "resmile"))  # 2.5 MB of the 256 MiB


def test_the_models_own_label_smoothing_is_for_mle_only():
    model, inputs = build("blip", torch.float64, label_smoothing=0.1)
    logits, target = own_logits("blip", model, inputs)

    def smoothed(e):
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=e)

    torch.testing.assert_close(hf.attach(model, "mle")(**inputs).loss, smoothed(0.1))
    torch.testing.assert_close(hf.attach(model, "mle", label_smoothing=0.2)(**inputs).loss, smoothed(0.2))
    torch.testing.assert_close(hf.attach(model, "smile")(**inputs).loss, masked_smile(logits, target, "full"))


def test_objectives_are_settings_of_the_operation():
    model, inputs = build("blip", torch.float64)
    logits, target = own_logits("blip", model, inputs)
    weight = torch.rand(V, dtype=torch.float64)
    for objective, given, options in (
        ("smile+mle", {}, {"mle_weight": 0.01}),
        ("smile+mle", {"mle_weight": 0.3}, {"mle_weight": 0.3}),
        ("smile", {"mle_weight": 0.3, "z_loss": 0.1}, {"mle_weight": 0.3, "z_loss": 0.1}),
        ("resmile", {"label_smoothing": 0.1}, {"subset": "reverse", "label_smoothing": 0.1}),
        ("mle", {"weight": weight}, {"subset": "full", "weight": weight}),
    ):
        wanted = F_cap.subset_cross_entropy(logits, target, **options)
        torch.testing.assert_close(hf.attach(model, objective, **given)(**inputs).loss, wanted)


@pytest.mark.parametrize("name", ["blip", "qwen2_5_vl", "florence2"], indirect=True)
def test_prompts_are_ignored(name):
    """The first two targets: behind the image in one model, behind the start token in another."""
    model, inputs = build(name, torch.float64)
    masked = inputs["labels"].clone()
    if name not in SHIFTS_INPUTS:
        masked[:, 0] = -100  # never a target
    for caption in masked:
        caption[(caption >= 0).nonzero()[:2]] = -100
    given = {**inputs, "labels": masked}
    if name in SHIFTS_INPUTS:  # the decoder still reads the prompt
        config = model.config.text_config
        words = inputs["labels"][:, :-1]
        words = torch.where(words < 0, config.pad_token_id, words)
        given["decoder_input_ids"] = F.pad(words, (1, 0), value=config.decoder_start_token_id)
    wanted = hf.attach(model)(**given).loss
    assert not torch.allclose(hf.attach(model)(**inputs).loss, wanted)
    loss = hf.attach(model, prompt_length=2)(**inputs).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, wanted), 1e-9)


def test_a_prompt_longer_than_the_caption_leaves_no_loss():
    model, inputs = build("blip")
    loss = hf.attach(model, prompt_length=L)(**inputs, num_items_in_batch=torch.tensor(9)).loss
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_num_items_in_batch_divides_the_sum(name):
    model, inputs = build(name, torch.float64)
    loss = hf.attach(model)(**inputs).loss
    target = inputs["labels"] if name in SHIFTS_INPUTS else inputs["labels"][:, 1:]
    tokens = int((target >= 0).sum())
    for items in (40, torch.tensor(40)):
        torch.testing.assert_close(model(**inputs, num_items_in_batch=items).loss, loss * tokens / 40)


def test_items_counted_with_prompts_are_counted_without():
    model, inputs = build("blip", torch.float64)
    loss = hf.attach(model, prompt_length=2)(**inputs).loss
    items = (inputs["labels"][:, 1:] >= 0).sum()  # as Trainer counts, prompts included
    torch.testing.assert_close(model(**inputs, num_items_in_batch=items).loss, loss)


def test_token_weights_scale_each_tokens_loss():
    model, inputs = build("blip", torch.float64)
    logits, target = own_logits("blip", model, inputs)
    hf.attach(model)
    for weight in (torch.rand(B, L), torch.rand(B, 1)):
        aligned = weight[:, 1:] if weight.shape[1] > 1 else weight
        wanted = F_cap.subset_cross_entropy(logits, target, token_weight=aligned)
        torch.testing.assert_close(model(**inputs, token_weight=weight).loss, wanted)
    assert torch.equal(model.eval()(**inputs, token_weight=weight).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(SHIFTS_INPUTS)), indirect=True)
def test_labels_that_are_shifted_already_are_not_shifted_again(name):
    model, inputs = build(name, torch.float64)
    wanted = hf.attach(model)(**inputs).loss
    shifted = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, wanted)


def test_decoder_inputs_that_are_given_are_used():
    model, inputs = build("vit_gpt2", torch.float64)
    given = torch.randint(5, V, (B, L))
    own = F.cross_entropy(
        model(pixel_values=inputs["pixel_values"], decoder_input_ids=given).logits.flatten(0, 1), inputs["labels"].flatten()
    )
    torch.testing.assert_close(hf.attach(model, "mle")(**inputs, decoder_input_ids=given).loss, own)


def test_positional_arguments_and_tuples_work():
    model, inputs = build("blip")
    wanted = hf.attach(model)(**inputs).loss
    inputs = [inputs[key] for key in ("pixel_values", "input_ids", "attention_mask", "labels")]
    output = model(*inputs, return_dict=False)
    assert isinstance(output, tuple) and torch.equal(output[0], wanted)
    assert output[1].shape == (B, 5, H)  # what follows the logits: the image's features
    with pytest.raises(TypeError, match="labels"):
        model(*inputs, labels=inputs[3])


def test_copies_and_pickles_are_attached_and_apart():
    model, inputs = build("blip")
    wanted = hf.attach(model, prompt_length=1)(**inputs).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(other) is type(model)
        assert torch.equal(other(**inputs).loss, wanted)
        with torch.no_grad():
            other.text_decoder.cls.predictions.bias += 1.0 * torch.arange(V)
        assert not torch.equal(other(**inputs).loss, wanted)
        assert model(**inputs).loss == wanted
        hf.detach(other)
        assert other(**inputs).logits is not None and model(**inputs).logits is None


def test_replicas_run_themselves():
    """As DataParallel makes them: an instance that held a bound forward would run the first device's model on all."""
    model, _ = build("blip")
    replica = hf.attach(model)._replicate_for_data_parallel()
    assert replica is not model and replica.forward.__self__ is replica and type(replica) is type(model)


def test_torch_compile_compiles_it_once():
    model, inputs = build("blip")
    wanted = hf.attach(model)(**inputs).loss
    gradient = gradients(model, wanted)
    compiled = torch.compile(model, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs = []
    for _ in range(3):
        output = compiled(**inputs)
        torch.testing.assert_close(output.loss, wanted)
        assert_same_gradients(gradients(model, output.loss), gradient, 1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
    torch._dynamo.reset()


def test_attaching_again_replaces_the_settings():
    model, inputs = build("blip")
    own_class = type(model)
    hf.attach(model, "mle", prompt_length=2)
    once = hf.attach(model, "smile")(**inputs).loss
    assert torch.equal(hf.attach(hf.detach(model), "smile")(**inputs).loss, once)
    assert type(hf.detach(model)) is own_class
    assert type(hf.detach(model)) is own_class  # nothing left to undo


def test_a_failed_step_leaves_the_head_alone():
    model, inputs = build("blip")
    head = hf.attach(model).text_decoder.cls.predictions.decoder
    with pytest.raises(ValueError):
        model(**{**inputs, "pixel_values": None})
    assert "forward" not in head.__dict__
    assert head(torch.zeros(1, H)).shape == (1, V)


def test_a_subclass_counts_as_its_base():
    class Mine(tf.BlipForConditionalGeneration):
        pass

    model, inputs = build("blip")
    model.__class__ = Mine
    assert hf.attach(model)(**inputs).logits is None
    assert type(hf.detach(model)) is Mine


def test_paligemma_is_capped_only_where_transformers_caps_it(monkeypatch):
    """Before 5.23 no code read the configuration's cap."""
    model, inputs = build("paligemma", torch.float64)
    key, forward = "final_logit_softcapping", tf.PaliGemmaForConditionalGeneration.forward

    def older(self, *args, **kwargs):
        cap = getattr(self.config.text_config, key)
        setattr(self.config.text_config, key, None)
        output = forward(self, *args, **kwargs)
        setattr(self.config.text_config, key, cap)
        return output

    monkeypatch.setattr(tf.PaliGemmaForConditionalGeneration, "forward", older)
    logits, target = own_logits("paligemma", model, inputs)
    own = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    cap = getattr(model.config.text_config, key)
    assert not torch.allclose(own, F.cross_entropy(cap * (logits / cap).tanh().flatten(0, 1), target.flatten()))
    torch.testing.assert_close(hf.attach(model, "mle")(**inputs).loss, own)


# Models inside others ----------------------------------------------------------------------------------------------------


def test_a_model_with_accelerates_hooks_is_attached_and_detached():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build("blip")
    wanted = hf.attach(copy.deepcopy(model))(**inputs).loss
    own = copy.deepcopy(model)(**inputs)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    hooked = model.__dict__["forward"]
    output = hf.attach(model)(**inputs)
    assert output.logits is None and torch.equal(output.loss, wanted)
    assert model.__dict__["forward"] is hooked  # and so are the hooks
    hf.detach(model)
    assert torch.equal(model(**inputs).loss, own.loss) and model._old_forward.__func__ is type(model).forward
    accelerate.hooks.remove_hook_from_module(hf.attach(model), recurse=True)
    assert model(**inputs).logits is None


def test_an_offloaded_head_is_an_error(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build("vit_gpt2")
    model.decoder.lm_head.weight = torch.nn.Parameter(model.decoder.lm_head.weight.detach().clone())  # not tied
    accelerate.cpu_offload(model.decoder.lm_head, torch.device("cpu"))
    with pytest.raises(FastcapError, match=r"model must have its head in memory while it trains, got 'an offloaded head'; "):
        hf.attach(model)(**inputs)


def test_a_model_with_a_forward_of_its_own_is_an_error():
    model, _ = build("blip")
    own_class = type(model)
    model.forward = torch.no_grad()(model.forward)
    with pytest.raises(FastcapError, match=r"model must carry no forward of its own, got '.*'; attach before training or"):
        hf.attach(model)
    assert type(model) is own_class and _SETTINGS not in model.__dict__
    del model.forward
    hf.attach(model)


def _wrappers():
    yield "compiled", lambda model: torch.compile(model, backend="eager")
    yield "data parallel", torch.nn.DataParallel
    yield "both", lambda model: torch.compile(torch.nn.DataParallel(model), backend="eager")


@pytest.mark.parametrize(("kind", "wrap"), _wrappers(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_model_inside_a_wrapper_is_attached_and_detached(kind, wrap):
    model, inputs = build("blip")
    own_class, wrapped = type(model), wrap(model)
    assert hf.attach(wrapped) is wrapped
    assert type(model) is not own_class and model(**inputs).logits is None
    assert hf.detach(wrapped) is wrapped
    assert type(model) is own_class and _SETTINGS not in model.__dict__


def test_the_model_inside_distributed_data_parallel_is_found(tmp_path):
    model, inputs = build("blip")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        assert hf.attach(parallel)(**inputs).logits is None
        assert hf.detach(parallel)(**inputs).logits is not None
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model_that_ran_before_it_was_attached_trains_attached():
    model, inputs = build("blip")
    compiled = torch.compile(model, backend="eager")
    assert compiled(**inputs).logits is not None
    assert hf.attach(compiled)(**inputs).logits is None
    assert hf.detach(compiled)(**inputs).logits is not None
    torch._dynamo.reset()


def test_detaching_what_only_holds_an_attached_model_is_an_error():
    model, _ = build("blip")
    holder = torch.nn.Sequential(hf.attach(model))
    with pytest.raises(
        FastcapError, match=r"detach: model must be the attached model itself, got 'Sequential'; pass its module '0'"
    ):
        hf.detach(holder)
    assert hf.detach(torch.nn.Sequential(hf.detach(model)))[0] is model


def test_a_head_in_a_shard_of_its_own_is_an_error(tmp_path):
    """Of two ways to call fully_shard, the first leaves the head with the model, gathered while the model runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, inputs = build("blip")
    wanted = hf.attach(model)(**inputs).loss.detach()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole, parts = copy.deepcopy(model), copy.deepcopy(model)
        torch.testing.assert_close(fully_shard(whole, mesh=mesh)(**inputs).loss, wanted)
        fully_shard(parts.text_decoder, mesh=mesh)
        with pytest.raises(FastcapError, match=r"model must have its head gathered while it trains, got 'a DTensor'; call "):
            fully_shard(parts, mesh=mesh)(**inputs)
    finally:
        torch.distributed.destroy_process_group()


# Trainer -----------------------------------------------------------------------------------------------------------------


def trainer(model, folder, **options):
    pytest.importorskip("accelerate")
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    data = {key: options.pop(key) for key in ("train_dataset", "eval_dataset") if key in options}
    return tf.Trainer(model=model, args=tf.TrainingArguments(**(arguments | options)), **data)


def four_examples(inputs):
    """A data set of four captions of unlike lengths, so that a mean of means is not the mean."""
    torch.manual_seed(1)
    labels = torch.randint(5, V - 2, (4, L))
    for caption, length in zip(labels, (3, 7, 4, 5), strict=True):
        caption[length:] = -100
    examples = []
    for i in range(4):
        example = {"pixel_values": torch.randn(3, 8, 8), "labels": labels[i]}
        if "input_ids" in inputs:
            example["input_ids"] = labels[i].clamp(min=0)
        examples.append(example)
    return examples


def qwen_examples(inputs):
    """The same captions with nothing to see, for a model that takes an image as rows of patches."""
    return [{key: example[key] for key in ("input_ids", "labels")} for example in four_examples(inputs)]


@pytest.mark.parametrize("objective", ["mle", "smile"])
@pytest.mark.parametrize("name", ["blip", "qwen2_5_vl", "vit_gpt2"], indirect=True)
def test_a_trainers_step_is_the_same_in_1_2_and_4_parts(name, objective, tmp_path):
    """transformers' own BLIP and VisionEncoderDecoder ignore num_items_in_batch, Qwen2.5-VL asks not to be given it."""
    start, inputs = build(name)
    examples = (qwen_examples if name == "qwen2_5_vl" else four_examples)(inputs)
    whole = hf.attach(copy.deepcopy(start), objective)
    whole(**torch.utils.data.default_collate(examples)).loss.backward()
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    wanted = whole.state_dict()
    for parts in (1, 2, 4):
        model = hf.attach(copy.deepcopy(start), objective)
        sizes = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        trainer(model, tmp_path, train_dataset=examples, **sizes).train()
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, wanted[key]) for key, tensor in start.state_dict().items())


def test_a_trainer_evaluates_with_logits_checkpoints_and_saves(tmp_path):
    model, inputs = build("blip")
    examples = four_examples(inputs)
    own = trainer(model, tmp_path).predict(examples)
    prediction = trainer(hf.attach(model), tmp_path).predict(examples)
    assert prediction.metrics["test_loss"] == own.metrics["test_loss"]
    assert prediction.predictions[0].shape == (4, L, V)
    assert (prediction.predictions[0] == own.predictions[0]).all()

    options = {
        "max_steps": 2,
        "learning_rate": 0.0,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    options |= {"gradient_checkpointing": True, "bf16": True, "save_strategy": "steps", "save_steps": 2}
    its = trainer(model, tmp_path, train_dataset=examples, eval_dataset=examples, **options)
    its.train()
    losses = [entry["eval_loss"] for entry in its.state.log_history if "eval_loss" in entry]
    assert losses == pytest.approx([own.metrics["test_loss"]] * 2, rel=2e-2)  # in bf16
    loaded = tf.BlipForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    assert type(loaded) is tf.BlipForConditionalGeneration
    # accelerate keeps a forward of its own on the model, around the attached one
    assert hf.detach(model).train()(**inputs).logits.shape[-1] == V


def test_a_trainer_passes_token_weights_of_the_data_set_on(name, tmp_path):
    """And asks for the same labels as before."""
    model, _ = build(name)
    own = trainer(model, tmp_path).label_names
    its = trainer(hf.attach(model), tmp_path)
    its._set_signature_columns_if_needed()
    assert its.label_names == own and "token_weight" in its._signature_columns


def test_a_trainers_step_weighs_tokens_by_a_column(tmp_path):
    start, inputs = build("blip")
    examples = [{**example, "token_weight": torch.rand(L)} for example in four_examples(inputs)]
    whole = hf.attach(copy.deepcopy(start))
    whole(**torch.utils.data.default_collate(examples)).loss.backward()
    wanted = {key: p.detach() - 0.1 * p.grad for key, p in whole.named_parameters() if p.grad is not None}
    model = hf.attach(copy.deepcopy(start))
    trainer(model, tmp_path, train_dataset=examples, per_device_train_batch_size=4).train()
    for key, parameter in wanted.items():
        torch.testing.assert_close(model.get_parameter(key).detach(), parameter, rtol=1e-5, atol=1e-6)
    plain = hf.attach(copy.deepcopy(start))
    trainer(plain, tmp_path, train_dataset=four_examples(inputs), per_device_train_batch_size=4).train()
    assert any(not torch.allclose(plain.get_parameter(key), parameter) for key, parameter in wanted.items())


def test_a_model_that_a_trainer_has_trained_is_attached_once_it_is_unwrapped(tmp_path):
    """Trainer with bf16 leaves a forward on the model, which would hide the attached one."""
    pytest.importorskip("accelerate")
    from accelerate.utils import extract_model_from_parallel

    model, inputs = build("blip")
    trainer(model, tmp_path, train_dataset=four_examples(inputs), bf16=True).train()
    with pytest.raises(FastcapError, match=r"model must carry no forward of its own, .*keep_fp32_wrapper=False"):
        hf.attach(model)
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert hf.attach(model)(**inputs).logits is None
    assert hf.detach(model)(**inputs).logits is not None


def test_a_model_that_a_trainer_has_trained_attached_is_attached_again(tmp_path):
    pytest.importorskip("accelerate")
    from accelerate.utils import extract_model_from_parallel

    model, inputs = build("blip")
    trainer(hf.attach(model), tmp_path, train_dataset=four_examples(inputs), bf16=True).train()
    assert "forward" in model.__dict__ and model(**inputs).logits is None
    assert hf.detach(model)(**inputs).logits is not None
    assert hf.attach(model)(**inputs).logits is None
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert model(**inputs).logits is None
    assert hf.attach(hf.detach(model))(**inputs).logits is None


# LoRA --------------------------------------------------------------------------------------------------------------------


def lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    options = {"target_modules": ["query", "value"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options))


@pytest.mark.parametrize("grad_weight", ["dense", "sparse", "accumulate"])
@pytest.mark.parametrize("attached", ["before", "after"])
def test_lora_trains_its_own_weights_only(attached, grad_weight):
    model, inputs = build("blip", torch.float64)
    own = lora(copy.deepcopy(model))
    logits, target = own_logits("blip", own, inputs)
    wanted = gradients(own, masked_smile(logits, target, "subset"))
    options = {"first_token": "subset", "grad_weight": grad_weight}
    if attached == "before":
        model = lora(hf.attach(model, **options))
    else:
        model = lora(model)
        assert hf.attach(model, **options) is model
    output = model(**inputs)
    assert output.logits is None
    found = gradients(model, output.loss)
    assert found and all("lora" in key for key in found)
    assert_same_gradients(found, wanted, 1e-9)
    assert torch.equal(hf.detach(model)(**inputs).logits[:, :-1], logits)


def test_a_head_that_peft_trains_in_full_is_the_one_that_is_used():
    model, inputs = build("vit_gpt2", torch.float64)
    model = lora(model, target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    with torch.no_grad():
        model.get_base_model().decoder.lm_head.modules_to_save["default"].weight += 0.1
    own = masked_smile(*own_logits("vit_gpt2", model, inputs), "full")
    wanted = gradients(model, own)
    loss = hf.attach(model)(**inputs).loss
    torch.testing.assert_close(loss, own)
    assert_same_gradients(gradients(model, loss), wanted, 1e-9)


def test_a_head_with_lora_is_an_error():
    model, _ = build("git")
    model = lora(model, target_modules="output")  # by its whole name
    with pytest.raises(FastcapError, match="model must have a plain linear head, got 'Linear'; leave the head out"):
        hf.attach(model)


@pytest.mark.parametrize("attached", ["before", "after"])
def test_tokens_that_peft_trains_in_a_tied_head_are_an_error(attached):
    model, inputs = build("vit_gpt2")
    head = model.decoder.lm_head
    assert head.weight is model.decoder.get_input_embeddings().weight
    tokens = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": {"lm_head": [7, 8]}}
    with pytest.raises(FastcapError, match="model must have a plain linear head, got 'TrainableTokensWrapper'; leave the "):
        lora(hf.attach(model), **tokens)(**inputs) if attached == "before" else hf.attach(lora(model, **tokens))


# The recipe --------------------------------------------------------------------------------------------------------------

RECIPE = Path(__file__).resolve().parent.parent / "docs" / "recipes" / "transformers.md"


def tiny_processor(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "red", "dog", "blue", "square"]
    (folder / "vocab.txt").write_text("\n".join(words))
    size = {"height": 8, "width": 8}
    return tf.BlipProcessor(tf.BlipImageProcessor(size=size), tf.BertTokenizer(str(folder / "vocab.txt")))


@pytest.mark.skipif(not RECIPE.is_file(), reason="reads the source tree")
def test_the_recipe_runs_as_it_is_written(tmp_path, monkeypatch):
    """Every snippet, one after the other, with a tiny model in place of the one it downloads."""
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    image = pytest.importorskip("PIL.Image")
    model, _ = build("blip")
    processor = tiny_processor(tmp_path)
    monkeypatch.setattr(tf.BlipForConditionalGeneration, "from_pretrained", lambda name: model)
    monkeypatch.setattr(tf.AutoProcessor, "from_pretrained", lambda name: processor)
    monkeypatch.chdir(tmp_path)
    pictures = [image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    texts = ["a red dog", "a blue square of a dog"]
    names = {
        "torch": torch,
        "pictures": pictures,
        "captions": texts,
        "examples": list(zip(pictures, texts, strict=True)) * 2,
    }
    snippets = re.findall(r"```python\n(.*?)```", RECIPE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) > 5
    for snippet in snippets:
        exec(compile(snippet, str(RECIPE), "exec"), names)
    assert names["prompt_length"] == 3
    labels = names["collate"](names["examples"])["labels"]
    assert (labels[0] >= 0).sum() == 4  # "a red dog" and the end
    assert type(names["lora"].get_base_model()) is tf.BlipForConditionalGeneration


# Errors ------------------------------------------------------------------------------------------------------------------


def test_an_unsupported_model_is_answered_with_a_recipe_that_works():
    config = tf.GPT2Config(vocab_size=V, n_embd=H, n_layer=1, n_head=2, n_positions=16)
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(config).double().eval()
    with pytest.raises(FastcapError, match="must be one of BLIP .*VisionEncoderDecoder.*, got 'GPT2LMHeadModel'; ") as error:
        hf.attach(model)
    for family in hf.FAMILIES:
        assert family.name in str(error.value)
    labels = torch.randint(V, (B, L))
    inputs = {"input_ids": labels}
    logits = model(**inputs).logits
    recipe = str(error.value).split("given:\n")[1]
    names = {"model": model, "inputs": inputs, "labels": labels, "fastcap": fastcap}
    exec("\n".join(line.removeprefix("    ") for line in recipe.splitlines()), names)
    torch.testing.assert_close(names["loss"], masked_smile(logits[:, :-1], labels[:, 1:], "full"))
    del names["head"].forward
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "bleu"}, r"fastcap\.hf\.attach: objective must be one of 'mle', .*, got 'bleu'; "),
        ({"prompt_length": -1}, r"fastcap\.hf\.attach: prompt_length must be an int of at least 0, got -1; "),
        ({"mle_weight": 2}, r"mle_weight must be a number in \[0, 1\], got 2; "),
        ({"first_token": "bos"}, r"first_token must be one of 'full', 'subset', got 'bos'; "),
        ({"label_smoothing": -1}, r"label_smoothing must .*, got -1; "),
        ({"weight": [1.0]}, r"weight must be a torch.Tensor, got 'list'; "),
        ({"weight": torch.ones(3)}, rf"weight must have shape \[V\] = \[{V}\], got \[3\]; "),
        ({"ignore_index": None}, r"ignore_index must be an int, got None; "),
        ({"grad_weight": "csr"}, r"grad_weight must be one of 'dense', .*, got 'csr'; "),
        ({"grad_weight": "sparse", "first_token": "full"}, r"grad_weight must .*, got 'sparse'; "),
        (
            {"objective": "mle", "grad_weight": "sparse"},
            r"^fastcap\.hf\.attach: grad_weight must be .*; pass objective='smile' with first_token='subset'",
        ),
        (
            {"objective": "smile+mle", "first_token": "subset", "grad_weight": "sparse"},
            r"grad_weight must .*, got 'sparse'; ",
        ),
        ({"z_loss": -1}, r"^fastcap\.hf\.attach: z_loss must .*, got -1; "),
        ({"objective": "mle", "mle_weight": 0.5}, r"mle_weight must be left out with objective 'mle', got 0\.5; "),
        ({"memory_budget": -1}, r"memory_budget must .*, got -1; "),
    ],
)
def test_options_are_checked_when_attached(options, message):
    model, _ = build("blip")
    own_class = type(model)
    with pytest.raises(FastcapError, match=message):
        hf.attach(model, **options)
    assert type(model) is own_class and _SETTINGS not in model.__dict__


def test_what_is_no_model_is_an_error():
    with pytest.raises(FastcapError, match=r"fastcap\.hf\.attach: model must be one of .*, got 'str'; "):
        hf.attach("blip")
    with pytest.raises(FastcapError, match=r"fastcap\.hf\.detach: model must be a torch\.nn\.Module, got 'str'; "):
        hf.detach("blip")


@pytest.mark.parametrize("change", [-2, 1])
def test_labels_that_are_not_as_long_as_the_text_are_an_error(name, change):
    """transformers' BLIP-2 would take short ones for the last tokens of the text; attached, every family did."""
    model, inputs = build(name)
    text = "input_ids"
    if name in SHIFTS_INPUTS:
        text = "decoder_input_ids"
        inputs[text] = inputs["labels"].clamp(min=0)
    shape = list(inputs["labels"].shape)
    inputs["labels"] = F.pad(inputs["labels"], (0, change), value=7)
    rule = rf"labels must have the shape \[B, T\] of {text}, {re.escape(str(shape))}, got "
    with pytest.raises(FastcapError, match=rule + re.escape(str([B, shape[1] + change])) + "; pad labels and "):
        hf.attach(model)(**inputs)


def test_labels_of_another_length_than_the_logits_kept_are_an_error():
    model, inputs = build("qwen2_5_vl")
    with pytest.raises(FastcapError, match=r"labels must be \[B, T\] with a position .* \[3, 3\], got \[3, 11\]; "):
        hf.attach(model)(**inputs, logits_to_keep=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.ones(L, dtype=torch.int64)}, r"labels must be a torch\.Tensor \[B, T\], got \[7\]; "),
        ({"labels": [[7] * L] * B}, r"labels must be a torch\.Tensor \[B, T\], got 'list'; "),
        ({"labels": torch.ones(2, L, dtype=torch.int64)}, r"labels must have the shape .*, \[3, 7\], got \[2, 7\]; "),
        ({"shift_labels": torch.ones(B, 4, dtype=torch.int64)}, r"shift_labels must have the shape .*, got \[3, 4\]; "),
        ({"token_weight": torch.ones(B)}, r"token_weight must be .* or \[B, 1\], got \[3\]; pass token_weight\[:, None\]"),
        ({"token_weight": torch.ones(B, 5)}, r"token_weight must be .* = \[3, 7\] or \[B, 1\], got \[3, 5\]; "),
        ({"token_weight": [1.0] * B}, r"token_weight must be .*, got 'list'; "),
        ({"token_weight": 1.0}, r"token_weight must be .*, got 'float'; "),
        ({"num_items_in_batch": torch.tensor([5, 5])}, r"num_items_in_batch must be one number, got \[2\]; "),
        ({"num_items_in_batch": "5"}, r"num_items_in_batch must be one number, got 'str'; "),
    ],
)
def test_a_call_with_wrong_labels_or_weights_is_an_error(change, message):
    model, inputs = build("blip")
    with pytest.raises(FastcapError, match=r"^fastcap\.hf\.attach: " + message):
        hf.attach(model)(**(inputs | change))


@pytest.mark.parametrize("items", [0, torch.tensor(0), torch.tensor([[0]])], ids=str)
def test_no_items_make_no_loss(items):
    """All ignored, as Trainer counts them; DataParallel turns its number into [1, 1]."""
    model, inputs = build("blip")
    inputs["labels"].fill_(-100)
    loss = hf.attach(model)(**inputs, num_items_in_batch=items).loss
    assert loss == 0 and loss.shape == ()
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_a_text_model_that_is_not_tested_is_an_error():
    """Gemma 2 caps its logits, which the loss would not."""
    text = {**SMALL, "model_type": "gemma2", "vocab_size": V, "num_key_value_heads": 1, "head_dim": 8}
    model, _ = _blip2(text)
    with pytest.raises(FastcapError, match="model must have a text model of type 'opt', 't5', 'llama', got 'gemma2'; train"):
        hf.attach(model)


def test_gradients_in_place_are_refused_where_processes_must_average_them(monkeypatch):
    model, inputs = build("blip")
    monkeypatch.setattr("fastcap.hf.loss._world_size", lambda: 2)
    hf.attach(model)(**inputs).loss.backward()
    with pytest.raises(
        FastcapError, match="grad_weight must not be 'accumulate' in distributed training, got 'accumulate'; "
    ):
        hf.attach(model, grad_weight="accumulate")(**inputs)


def test_a_start_token_that_is_not_set_is_an_error():
    model, inputs = build("vit_gpt2")
    model.config.decoder_start_token_id = None
    with pytest.raises(FastcapError, match=r"config\.decoder_start_token_id must be set, got None; "):
        hf.attach(model)(**inputs)


def test_importing_it_does_not_import_transformers():
    code = "import sys, fastcap.hf; assert not {'transformers', 'triton', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.expanduser("~"))
