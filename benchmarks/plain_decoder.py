"""A training step of Show, Attend and Tell as plain torch has it: the peer of bench_training.

The parameters are those of a fastcap.models.ShowAttendTell, original variant, soft attention, and so are the numbers;
but each word keeps its [B, L, A] activation, keys get a gradient a word, and the logits [B, T, V] are made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastcap.benchmarks.plain import IGNORED, attend
from torch import Tensor, nn


def loss_of(model: nn.Module, annotations: Tensor, inputs: Tensor, target: Tensor, coverage: float) -> Tensor:
    """Cross-entropy and the doubly stochastic penalty, of annotations [B, L, D], inputs and target [B, T]."""
    keys = model.keys(annotations)
    h, c = torch.tanh(model.start_state(annotations.mean(1))).chunk(2, 1)
    words = model.embed(inputs)
    word_gates = model.word_gates(words)
    states, contexts, alphas = [], [], []
    for t in range(inputs.shape[1]):
        z, alpha = attend(keys, model.query(h), model.score.weight[0], annotations)
        z = z * torch.sigmoid(model.gate(h))
        into, forget, out, new = (word_gates[:, t] + model.state_gates(torch.cat((z, h), dim=1))).chunk(4, dim=1)
        c = torch.sigmoid(forget) * c + torch.sigmoid(into) * torch.tanh(new)
        h = torch.sigmoid(out) * torch.tanh(c)
        states.append(h)
        contexts.append(z)
        alphas.append(alpha)
    hidden = torch.tanh(model.output_h(torch.stack(states, 1)) + words + model.output_z(torch.stack(contexts, 1)))
    loss = F.cross_entropy(model.head(hidden).flatten(0, 1), target.flatten(), ignore_index=IGNORED)
    valid = (target != IGNORED).unsqueeze(2)
    return loss + coverage * ((1 - (torch.stack(alphas, 1) * valid).sum(1)) ** 2).mean()
