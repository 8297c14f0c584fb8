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
    """Cross-entropy and the doubly stochastic penalty, of annotations [B, L, D], inputs and target [B, T].

    The captions are sorted, the longest first, and leave the batch as they end.
    """
    (B, T), lengths = inputs.shape, (target != IGNORED).sum(1).tolist()
    rows = [n for t in range(T) if (n := sum(length > t for length in lengths))]
    keys = model.keys(annotations)
    h, c = torch.tanh(model.start_state(annotations.mean(1))).chunk(2, 1)
    words = torch.cat([model.embed(inputs[:n, t]) for t, n in enumerate(rows)])
    states, contexts, alphas = [], [], []
    for n, gates in zip(rows, model.word_gates(words).split(rows), strict=True):
        h, c = h[:n], c[:n]
        z, alpha = attend(keys[:n], model.query(h), model.score.weight[0], annotations[:n])
        z = z * torch.sigmoid(model.gate(h))
        into, forget, out, new = (gates + model.state_gates(torch.cat((z, h), dim=1))).chunk(4, dim=1)
        c = torch.sigmoid(forget) * c + torch.sigmoid(into) * torch.tanh(new)
        h = torch.sigmoid(out) * torch.tanh(c)
        states.append(h)
        contexts.append(z)
        alphas.append(F.pad(alpha, (0, 0, 0, B - n)))
    hidden = torch.tanh(model.output_h(torch.cat(states)) + words + model.output_z(torch.cat(contexts)))
    loss = F.cross_entropy(model.head(hidden), torch.cat([target[:n, t] for t, n in enumerate(rows)]))
    return loss + coverage * ((1 - torch.stack(alphas, 1).sum(1)) ** 2).mean()
