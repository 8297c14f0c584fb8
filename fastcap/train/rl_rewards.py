"""The rewards of a step: what the CLIP and the discriminator make of what was drawn, and of the batch's own captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcap.errors import bad
from fastcap.rewards import Adversary, SimilarityReward

from . import rl_images
from .config import TrainConfig

USUAL_SCALE = 100.0  # CLIP's own, where an embedder does not say


class Rewards(NamedTuple):
    """Of a step of B captions, for whose images n each were drawn: drawn [B n] and own [B], their rewards; similarity [B n],
    the cosines of what was drawn; values, the means that are logged."""

    drawn: Tensor
    own: Tensor
    similarity: Tensor
    values: dict[str, float]


class Rewarder:
    """r = alpha r_sim + (1 - alpha) r_disc, and the discriminator's learning.

    Args:
        config: the run's `reward_*`, `neighbours`, `alpha` and `discriminator_lr`.
        embedder: the reward's CLIP, see `fastcap.train.embedders`.
        records: of the training images, in `KarpathyDataset`'s order.
        folder: where the images' embeddings are kept.
        note: told what takes a while.
    """

    def __init__(
        self, config: TrainConfig, embedder: Any, records: Sequence[dict], folder: Path, device: torch.device,
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._row_of = row_of_each(records)
        self._alpha, self._embedder, self._device = config.alpha, embedder, device
        scale = config.reward_scale or float(getattr(embedder, "logit_scale", USUAL_SCALE))
        self._similarity = SimilarityReward(config.reward_baseline, scale, config.reward_exclude)
        self._two_way = SimilarityReward("two-way", scale, config.reward_exclude)
        self.adversary = None
        if config.alpha < 1:
            self.adversary = Adversary(embedder.width, config.discriminator_lr, config.seed, device)
        options = {"workers": config.workers, "note": note}
        self._images = rl_images.find(embedder, records, config.neighbours, folder, **options).to(device)
        self._validated: dict[Any, Tensor] = {}  # the embeddings of images that are validated on

    @property
    def uses_greedy(self) -> bool:
        """Whether the rewards ask for greedy captions: as the baseline, or among the other texts."""
        return self._similarity.baseline in ("two-way", "one-way", "greedy")

    def __call__(self, imgids: list, drawn: list[str], own: list[str], greedy: list[str] | None) -> Rewards:
        """The rewards of a batch, of which the discriminator then learns.

        Args:
            imgids: [B], of each pair's image; one may occur more than once.
            drawn: [B n], those of a pair together.
            own: [B].
            greedy: [B], where the rewards use them.
        """
        B, n = len(own), len(drawn) // len(own)
        rows = torch.tensor([self._row_of[imgid] for imgid in imgids], device=self._device)
        near = rl_images.around(rows, self._images.neighbours)
        texts, of = drawn + own, [torch.arange(B).repeat_interleave(n), torch.arange(B)]  # whose image each text describes
        first, which = first_of_each(imgids)
        if greedy is not None:
            texts, of = texts + [greedy[i] for i in first.tolist()], [*of, first]
        of = torch.cat(of)
        cut = getattr(self._embedder, "truncated", 0)
        text, image = self.embed(texts), self._images.embeddings[near.rows]
        cut = getattr(self._embedder, "truncated", 0) - cut
        positive = near.own[of.to(self._device)]
        given = {"similar": near.similar[of.to(self._device)], "greedy": (B * n + B + which[of]).to(self._device)}
        found = self._similarity(text, image, positive, **given)
        total, values, image = found.reward, {"texts_cut": float(cut)}, image[positive]
        generated, human = slice(B * n), slice(B * n, B * n + B)
        if self.adversary is not None:
            chance = self.adversary.reward(image, text)
            total = self._alpha * total + (1 - self._alpha) * chance
            values["reward_discriminator"] = chance[generated].mean().item()
            learnt = self.adversary.learn(image[human], text[human], image[generated], text[generated])
            values.update(disc_accuracy=learnt.accuracy, disc_loss=learnt.loss)
        if greedy is not None:
            values["reward_greedy"] = found.reward[B * n + B :].mean().item()
        told = {
            "reward": total[generated].mean(),
            "reward_similarity": found.own[generated].mean(),
            "reward_baseline": (found.own - found.reward)[generated].mean(),
            "reward_gt": total[human].mean(),
            "reward_spread": total[generated].std(correction=0),
        }
        values = {**{name: value.item() for name, value in told.items()}, **values}
        return Rewards(total[generated], total[human], found.own[generated], values)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """[N, D] of unit length, of texts."""
        return embed_texts(self._embedder, texts, self._device)

    @torch.no_grad()
    def of_validation(self, imgids: list, images: Tensor, greedy: list[str], own: list[str]) -> Tensor:
        """[U], the two-way rewards of the greedy captions of the U images of a validation batch, among its images and
        captions: whatever the run's baseline, so that runs compare.

        images: [B, 3, S, S], of each pair; greedy, own: [B].
        """
        first, which = first_of_each(imgids)
        new = [i for i in first.tolist() if imgids[i] not in self._validated]
        if new:
            made = self._embedder.images(images[new]).float().to(self._device)
            self._validated.update(zip((imgids[i] for i in new), made, strict=True))
        image = torch.stack([self._validated[imgids[i]] for i in first.tolist()])
        text = self.embed([greedy[i] for i in first.tolist()] + own)
        positive = torch.cat((torch.arange(len(first)), which)).to(self._device)
        return self._two_way(text, image, positive).reward[: len(first)]


def embed_texts(embedder: Any, texts: Sequence[str], device: torch.device) -> Tensor:
    """[N, D] of unit length, of texts: each different one is embedded once, and equal ones are equal to the bit."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    with torch.no_grad():
        found = embedder.texts(list(place)).float().to(device)
    return F.normalize(found, dim=1)[torch.tensor([place[text] for text in texts], device=device)]


def row_of_each(records: Sequence[dict]) -> dict[Any, int]:
    """Where each image stands, by its imgid; raises where two have the same."""
    rows = {record["imgid"]: row for row, record in enumerate(records)}
    if len(rows) < len(records):
        got = f"{len(rows)} imgids for {len(records)} pictures"
        raise bad("train", "data", "give each picture an imgid of its own", got, "number them in the dataset's JSON")
    return rows


def first_of_each(imgids: list) -> tuple[Tensor, Tensor]:
    """(where each different image of a batch stands first [U], which of these each one is [B])."""
    order = {imgid: u for u, imgid in enumerate(dict.fromkeys(imgids))}
    which = [order[imgid] for imgid in imgids]
    return torch.tensor([which.index(u) for u in range(len(order))]), torch.tensor(which)
