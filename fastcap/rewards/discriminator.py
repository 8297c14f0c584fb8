"""A classifier of (image, caption) pairs, human or generated, that learns beside the captioner: its doubt is a reward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HUMAN = 1  # of the two classes


class Discriminator(nn.Module):
    """An MLP 2D-512-256-2 on the embeddings of an image and a caption.

    The embeddings are scaled to mean square 1, so that the learning rate means the same whatever their width and length.

    Args:
        width: D, of each embedding.
        seed: of the first weights; torch's global generator is left as it is.
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(2 * width, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 2)
            )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits [N, 2] of image and text [N, D]; column 1 is human. No gradient reaches the embeddings."""
        pair = [F.normalize(x.detach().float(), dim=1) * x.shape[1] ** 0.5 for x in (image, text)]
        return self.layers(torch.cat(pair, dim=1))


class Learnt(NamedTuple):
    """What a step of the discriminator saw before it moved: cross-entropy in nats, and the share of pairs it had right."""

    loss: float
    accuracy: float


class Adversary:
    """A discriminator with its own optimiser, Adam.

    >>> adversary = Adversary(width=64)
    >>> image, human, generated = torch.randn(3, 8, 64).unbind(0)
    >>> reward = adversary.reward(image, generated)      # [8], before it learns from them
    >>> loss, accuracy = adversary.learn(image, human, image, generated)

    Source: Chaffin, Claveau and Kijak, Distinctive Image Captioning (arXiv:2402.13936).
    """

    def __init__(self, width: int, lr: float = 7e-5, seed: int = 0, device: str | torch.device = "cpu") -> None:
        self.discriminator = Discriminator(width, seed).to(device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=lr)

    @torch.no_grad()
    def reward(self, image: Tensor, text: Tensor) -> Tensor:
        """The probability [N] that a human wrote `text` [N, D] of `image` [N, D]."""
        return self.discriminator(image, text).softmax(1)[:, HUMAN]

    def learn(self, human_image: Tensor, human: Tensor, generated_image: Tensor, generated: Tensor) -> Learnt:
        """One step on the mean cross-entropy of the two kinds, each of which counts half whatever its number."""
        kinds = ((human_image, human, HUMAN), (generated_image, generated, 1 - HUMAN))
        losses, right = [], []
        for image, text, kind in kinds:
            logits = self.discriminator(image, text)
            target = torch.full((len(logits),), kind, device=logits.device)
            losses.append(F.cross_entropy(logits, target))
            right.append((logits.argmax(1) == kind).float().mean())
        loss = sum(losses) / 2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return Learnt(loss.item(), (sum(right) / 2).item())

    def state(self) -> dict[str, Tensor]:
        """All its tensors by name, of the discriminator and of its optimiser."""
        tensors = {f"model/{name}": tensor for name, tensor in self.discriminator.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer/{i}/{name}": tensor for name, tensor in values.items()})
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `state` gave."""
        model = {name[len("model/") :]: tensor for name, tensor in tensors.items() if name.startswith("model/")}
        self.discriminator.load_state_dict(model)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, i, key = name.split("/")
                moments.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
