"""Packed sequences and lengths, as loops that sort their captions have them; and the recipe for the most copied of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastcap
from fastcap import FastcapError
from fastcap import functional as F_cap
from fastcap.data import ignore_padding
from fastcap.ops import _checks

RECIPE = Path(__file__).resolve().parent.parent / "docs" / "recipes" / "show-attend-tell.md"
B, T, V, H, L, D = 4, 6, 11, 5, 9, 7
LENGTHS = [6, 4, 4, 2]
OPTIONS = [
    {"subset": "full"},
    {},
    {"first_token": "subset", "label_smoothing": 0.1},
    {"subset": "reverse", "reduction": "sum"},
]


def make(*sizes, dtype=torch.float64, seed=0):
    return torch.randn(sizes, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def labels(seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]], ids=["sorted", "unsorted"])
def test_packed_sequences_give_the_loss_of_padded_ones(options, order):
    lengths = [LENGTHS[i] for i in order]
    x, y = make(B, T, V), labels()
    packed = [pack_padded_sequence(z, lengths, batch_first=True, enforce_sorted=False) for z in (x, y)]
    loss = F_cap.subset_cross_entropy(*packed, **options)
    plain = F_cap.subset_cross_entropy(x, ignore_padding(y, lengths), **options)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(z, x)[0] for z in (loss, plain)), rtol=1e-12, atol=1e-15)
    h, w = make(B, T, H), make(V, H, seed=2)
    packed[0] = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
    loss = F_cap.linear_subset_cross_entropy(packed[0], w, packed[1], **options)
    plain = F_cap.linear_subset_cross_entropy(h, w, ignore_padding(y, lengths), **options)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    both = [torch.autograd.grad(z, (h, w)) for z in (loss, plain)]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-15)


def test_the_losses_of_packed_tokens_come_padded_in_the_order_from_before_sorting():
    lengths = [2, 6, 4, 4]
    x, y = make(B, T, V), labels()
    packed = [pack_padded_sequence(z, lengths, batch_first=True, enforce_sorted=False) for z in (x, y)]
    loss = F_cap.subset_cross_entropy(*packed, subset="full", reduction="none")
    assert [(row != 0).sum().item() for row in loss] == lengths


def test_sequences_packed_differently_are_refused():
    x, y = make(B, T, V), labels()
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True)
    with pytest.raises(
        FastcapError, match=r"subset_cross_entropy: input and target must both be PackedSequence, or neither, "
    ):
        F_cap.subset_cross_entropy(packed, y)
    for other in ([6, 5, 4, 2], [6, 4, 2, 4]):
        wrong = pack_padded_sequence(y, other, batch_first=True, enforce_sorted=False)
        with pytest.raises(
            FastcapError, match=r"subset_cross_entropy: target must be packed as input is, got .*; pack both"
        ):
            F_cap.subset_cross_entropy(packed, wrong)
    turned = [
        pack_padded_sequence(z, n, batch_first=True, enforce_sorted=False) for z, n in ((x, [6, 4, 2, 4]), (y, [2, 4, 6, 4]))
    ]
    with pytest.raises(FastcapError, match=r"as input is, got 'captions in the order \[2, 1, .* against \[0, .*; pack both"):
        F_cap.subset_cross_entropy(*turned)
    alike = [pack_padded_sequence(z, LENGTHS, batch_first=True, enforce_sorted=s) for z, s in ((x, True), (y, False))]
    F_cap.subset_cross_entropy(*alike)


def test_unpacking_copies_nothing_to_the_host(monkeypatch):
    """On a GPU that would wait for it; pad_packed_sequence does."""
    lengths = [2, 6, 4, 4]
    packed = [pack_padded_sequence(z, lengths, batch_first=True, enforce_sorted=False) for z in (make(B, T, V), labels())]
    monkeypatch.setattr(_checks, "checks_values", lambda tensor: False)
    for name in ("cpu", "tolist", "item"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, name=name: pytest.fail(f"called {name}"))
    with fastcap.backend("reference"):
        F_cap.subset_cross_entropy(*packed, subset="full")


@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)])
def test_padding_is_ignored_from_each_length_on(lengths):
    y = labels()
    marked = ignore_padding(y, lengths)
    for b, length in enumerate(LENGTHS):
        assert torch.equal(marked[b, :length], y[b, :length]) and (marked[b, length:] == -100).all()
    assert (y != -100).all()


@pytest.mark.parametrize(
    ("target", "lengths", "message"),
    [
        (torch.zeros(2, 3), [1, 1], r"target must be an int64 tensor \[B, T\], got 'torch.float32 \[2, 3\]'"),
        (torch.zeros(2, 3).long(), [1], r"lengths must be 2 integers"),
        (torch.zeros(2, 3).long(), [1.0, 2.0], r"lengths must be 2 integers"),
        (torch.zeros(2, 3).long(), [1, 4], r"lengths must lie in \[0, 3\], got \[1, 4\]"),
        (torch.zeros(2, 3).long(), [-1, 3], r"lengths must lie in \[0, 3\]"),
        ([[1]], [1], r"target must be an int64 tensor \[B, T\], got 'list'"),
    ],
)
def test_bad_lengths_are_answered(target, lengths, message):
    with pytest.raises(FastcapError, match=r"fastcap\.data\.ignore_padding: " + message):
        ignore_padding(target, lengths)


def test_the_recipe_runs_as_it_is_written_and_its_losses_agree():
    """Every snippet, one after the other, with a small decoder in place of the one it speaks of."""
    torch.manual_seed(0)
    A, E = 6, 5
    attention = torch.nn.Module()
    attention.encoder_att, attention.decoder_att = torch.nn.Linear(D, A), torch.nn.Linear(H, A)
    attention.full_att = torch.nn.Linear(A, 1)
    f_beta, cell, fc = torch.nn.Linear(H, D), torch.nn.LSTMCell(E + D, H), torch.nn.Linear(H, V)
    embedding = torch.nn.Embedding(V, E)
    encoder_out = torch.randn(B, L, D)
    captions = torch.randint(V, (B, T + 5))  # padded further than the longest

    def decoder(imgs, caps, caplens):
        lengths = [n - 1 for n in caplens]
        scores, alphas = torch.zeros(B, T, V), torch.zeros(B, T, L)
        h = c = torch.zeros(B, H)
        for t in range(max(lengths)):
            n = sum(length > t for length in lengths)
            hidden = torch.relu(attention.encoder_att(imgs[:n]) + attention.decoder_att(h[:n]).unsqueeze(1))
            alpha = attention.full_att(hidden).squeeze(2).softmax(1)
            z = torch.sigmoid(f_beta(h[:n])) * (imgs[:n] * alpha.unsqueeze(2)).sum(1)
            h, c = cell(torch.cat([embedding(caps[:n, t]), z], dim=1), (h[:n], c[:n]))
            scores[:n, t], alphas[:n, t] = fc(h), alpha
        return scores, caps, lengths, alphas, torch.arange(B)

    names = {
        "decoder": decoder, "imgs": encoder_out, "encoder_out": encoder_out, "caps": captions, "alpha_c": 1.0,
        "caplens": [n + 1 for n in LENGTHS], "criterion": torch.nn.CrossEntropyLoss(), "attention": attention,
        "f_beta": f_beta, "decode_step": cell, "fc": fc, "embeddings": embedding(captions), "h": torch.zeros(B, H),
        "c": torch.zeros(B, H), "dropout": torch.nn.Identity(),
    }  # fmt: skip
    snippets = re.findall(r"```python\n(.*?)```", RECIPE.read_text(encoding="utf-8"), re.DOTALL)
    losses = []
    for snippet in snippets:
        exec(compile(snippet, str(RECIPE), "exec"), names)
        losses.append(names["loss"].item())
    before, two_lines, unpacked = losses[:3]
    assert two_lines == pytest.approx(before, rel=1e-5) and unpacked == pytest.approx(before, rel=1e-5)
    penalty = ((1 - names["alphas"].sum(1)) ** 2).mean().item()
    assert losses[-1] == pytest.approx(before - penalty, rel=1e-5)  # the last snippet's loss is the likelihood alone
    assert names["formula"] == pytest.approx(1 / L)
