"""What the training of a CLIP minimises, in the form of `fastcap.train.objectives.TrainingLoss`, and its validation.

The pairs of a step are compared all with all, in as many parts as the step is computed. With `accumulate` parts, embeddings
are first made of every part without gradients, then the loss of all of them and its gradient, and then each part is embedded
again and hands that gradient on (Gao et al., 2021, arXiv:2101.06983): one part's memory, and the result of one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcap.errors import bad
from fastcap.eval import retrieval
from fastcap.functional import decoupled_contrastive_loss

from .config import TrainConfig

DIRECTIONS = ("text_to_image", "image_to_text")
KS = (1, 5, 10)
_MEASURED = [f"{way}_{name}" for way in ("t2i", "i2t") for name in (*(f"r{k}" for k in KS), "mean_rank", "median_rank")]


def contrastive_loss(text: Tensor, image: Tensor, positive: Tensor, logit_scale: float | Tensor, kind: str) -> Tensor:
    """The loss of texts and their images against all others of the batch; no [P, Q] tensor is made.

    "symmetric" is CLIP's, the mean over texts of two cross-entropies::

        s = logit_scale * cosines                                                       # [P, Q]
        to_image = cross_entropy(s, positive)
        others = (positive[:, None] == positive) & ~eye(P)                              # texts of the same image
        to_text = cross_entropy(s.T[positive].masked_fill(others, -inf), arange(P))
        loss = (to_image + to_text) / 2

    as softplus(-r) of each direction's log-ratio r of the pair and the others, which is logaddexp(s_pair, others) - s_pair.
    "decoupled" leaves the pair out of its own denominator: the mean of -r (`fastcap.functional.decoupled_contrastive_loss`).

    An image stands once, however many of its texts there are, and its texts are no negatives of each other. Equal texts of
    different images are: such a text says of each of these images that it fits as well as the others.

    Args:
        text: [P, D]; image: [Q, D], of any length, each with a text; positive: [P] int64, the row of each text's image.
        logit_scale: the inverse temperature, a number or a tensor [].
        kind: "symmetric" or "decoupled".

    Returns:
        A scalar. With a single image there is nothing to tell apart: 0 if symmetric, -logit_scale * similarity if decoupled.
    """
    options = {"positive": positive, "logit_scale": logit_scale, "exclude": "group"}
    if kind == "decoupled":
        return decoupled_contrastive_loss(text, image, **options)
    if len(image) == 1:
        return 0.0 * (text.sum() + image.sum() + logit_scale)
    behind = [decoupled_contrastive_loss(text, image, **options, direction=one, reduction="none") for one in DIRECTIONS]
    return sum(F.softplus(each).mean() for each in behind) / len(behind)


def grouped(imgids: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(rows [Q], the first caption of each different image, in their order; positive [P], which of these each one is of)."""
    first: dict[Any, int] = {}
    for row, imgid in enumerate(imgids):
        first.setdefault(imgid, row)
    place = {imgid: q for q, imgid in enumerate(first)}
    return torch.tensor(list(first.values())), torch.tensor([place[imgid] for imgid in imgids])


class ClipLoss:
    """A step is `begin` with its batch, `part` for each part in which it is computed, and `end`.

    Args:
        autocast: makes the context in which the model runs.
    """

    def __init__(
        self, config: TrainConfig, model: nn.Module, device: torch.device, autocast: Callable[[], AbstractContextManager]
    ) -> None:  # fmt: skip
        self._config, self._model, self._device, self._autocast = config, model, device, autocast

    def begin(self, images: Tensor, batch: dict[str, Any], step: int) -> None:
        """Looks for images that the batch holds twice; where it is computed in parts, embeds it and takes the loss."""
        self._rows, self._positive = grouped(batch["imgids"])
        self._positive = self._positive.to(self._device)
        self._first, self._gradients = 0, None
        sizes = [len(part) for part in batch["target"].chunk(self._config.accumulate)]
        if len(sizes) == 1:
            return
        self._states, text, image, first = [], [], [], 0
        with torch.no_grad(), self._autocast():
            for size in sizes:
                self._states.append(_random_state(self._device))
                part = slice(first, first + size)
                target, lengths = batch["target"][part].to(self._device), batch["lengths"][part]
                found = self._embed(images[part], target, lengths, self._images_of(first, size))
                text.append(found[0])
                image.append(found[1])
                first += size
        text, image = (torch.cat(each).detach().requires_grad_() for each in (text, image))
        scale = self._model.log_scale
        with torch.enable_grad():
            loss = contrastive_loss(text, image, self._positive, self._model.logit_scale, self._config.contrastive)
        self._loss, self._gradients = loss.detach(), torch.autograd.grad(loss, (text, image, scale))

    def part(self, images: Tensor, inputs: Tensor, target: Tensor, lengths: Tensor, tokens: int) -> Tensor:
        """The loss, or of a step in parts what has the gradient of the loss with respect to this part, to run backward."""
        first, self._first = self._first, self._first + len(target)
        rows = self._images_of(first, len(target))
        if self._gradients is None:
            text, image = self._embed(images, target, lengths, rows)
            loss = contrastive_loss(text, image, self._positive, self._model.logit_scale, self._config.contrastive)
            self._loss = loss.detach()
            return loss
        _set_random_state(self._states.pop(0), self._device)  # the same dropout as before
        text, image = self._embed(images, target, lengths, rows)
        dtext, dimage, dscale = self._gradients
        before = int((self._rows < first).sum())
        loss = (text * dtext[first : self._first]).sum() + (image * dimage[before : before + len(rows)]).sum()
        return loss + self._model.log_scale * dscale if first == 0 else loss

    def values(self) -> dict[str, float]:
        """`loss`, of the whole step, and the `logit_scale` that it was taken with."""
        return {"loss": self._loss.item(), "logit_scale": self._model.logit_scale.item()}

    def end(self) -> dict[str, float]:
        """After the optimiser's step: keeps the scale in its bounds."""
        self._model.limit_scale()
        return {}

    @torch.no_grad()
    def validate(self, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
        """`val_loss`, the mean over texts of the batches' losses, and retrieval among all their texts and images."""
        texts: dict[str, Tensor] = {}  # each different one is embedded once: ties stay ties
        images: dict[Any, Tensor] = {}
        told, total = [], 0.0
        for batch in batches:
            imgids, captions = batch["imgids"], batch["captions"]
            new_texts = [row for row, text in enumerate(captions) if text not in texts and captions.index(text) == row]
            new_images = [row for row in grouped(imgids)[0].tolist() if imgids[row] not in images]
            pictures, target = (batch[name].to(self._device) for name in ("images", "target"))
            with self._autocast():
                made = self._embed(pictures, target[new_texts], batch["lengths"][new_texts], torch.tensor(new_images).long())
            texts.update(zip((captions[row] for row in new_texts), made[0], strict=True))
            images.update(zip((imgids[row] for row in new_images), made[1], strict=True))
            rows, positive = grouped(imgids)
            text = torch.stack([texts[caption] for caption in captions])
            image = torch.stack([images[imgids[row]] for row in rows.tolist()])
            given = positive.to(self._device), self._model.logit_scale, self._config.contrastive
            total += contrastive_loss(text, image, *given).item() * len(text)
            told += zip(captions, imgids, strict=True)
        place = {imgid: row for row, imgid in enumerate(images)}
        positive = torch.tensor([place[imgid] for _, imgid in told], device=self._device)
        text, image = torch.stack([texts[caption] for caption, _ in told]), torch.stack(list(images.values()))
        found = retrieval(text, image, positive, ks=KS)
        return {"val_loss": total / len(told), "val_images": len(images), **{f"val_{name}": x for name, x in found.items()}}

    def _images_of(self, first: int, size: int) -> Tensor:
        """Of `size` captions from `first` on, those whose image stands there for the first time, counted from `first`."""
        return self._rows[(self._rows >= first) & (self._rows < first + size)] - first

    def _embed(self, images: Tensor, target: Tensor, lengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the texts of `target` and of the images in `rows`, in float32 or float64."""
        text = self._model.encode_text(target.clamp(min=0), lengths)
        image = self._model.encode_image(images[rows.to(images.device)]) if len(rows) else text[:0]
        return tuple(x if x.dtype == torch.float64 else x.float() for x in (text, image))


def retrieval_of(record: dict[str, Any]) -> dict[str, float] | None:
    """What `ClipLoss.validate` measured beside the loss, as `fastcap.eval.retrieval` names it, and of how many images."""
    found = {name: record[f"val_{name}"] for name in ("images", *_MEASURED) if f"val_{name}" in record}
    return found or None


def check(config: TrainConfig, loss_fn: Any, embedder: Any) -> None:
    """Raises for what a run cannot be given with a CLIP."""
    for name, value in (("loss_fn", loss_fn), ("embedder", embedder)):
        if value is not None:
            raise bad("train", name, "be left out with model 'clip'", value, "choose its loss by contrastive")


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
