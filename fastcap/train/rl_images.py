"""The training images in the eyes of the reward's CLIP, made once: their embeddings, and the images most similar to each.

They lie in OUT/reward/images.safetensors with a fingerprint of what made them, and are made again where it does not match.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fastcap.data import read_pixels
from fastcap.errors import bad

BLOCK = 64 * 2**20  # bytes of similarities at a time
BATCH = 64


class Images(NamedTuple):
    """embeddings [N, D] of unit length; neighbours [N, k] int64, the most similar first, never the image itself."""

    embeddings: Tensor
    neighbours: Tensor

    def to(self, device: torch.device) -> Images:
        return Images(*(x.to(device) for x in self))


class Around(NamedTuple):
    """The images of a step, each once: rows [Q] of all images, sorted; own [B], where each caption's image is among them;
    similar [B, k], where its neighbours are."""

    rows: Tensor
    own: Tensor
    similar: Tensor


def around(rows: Tensor, neighbours: Tensor) -> Around:
    """The images `rows` [B] of a batch, in which an image may occur more than once, and their neighbours."""
    near = neighbours[rows]
    chosen = torch.cat((rows, near.flatten())).unique()
    return Around(chosen, torch.searchsorted(chosen, rows), torch.searchsorted(chosen, near))


def find(
    embedder: Any,
    records: Sequence[dict],
    k: int,
    folder: str | Path,
    *,
    workers: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> Images:
    """The embeddings and the k nearest neighbours of images, from `folder` where it has those of just this question.

    Args:
        embedder: an image and text encoder; see `fastcap.train.embedders`.
        records: of `KarpathyDataset`, with the file of each picture as "path".
        k: neighbours by cosine, exactly; fewer than there are images.
        workers: processes that read pictures.
        note: told what is made.

    Raises:
        FastcapError: k is too large, a picture cannot be read, or an embedding is not finite.
    """
    if not 0 <= k < len(records):
        rule = f"lie in [0, {len(records) - 1}], for there are {len(records)} images"
        raise bad("train", "neighbours", rule, k, "pass --neighbours 2, or 0 for none")
    made_by, file = _fingerprint(embedder, records, k), Path(folder) / "images.safetensors"
    found = _read(file, made_by)
    if found is None:
        note(f"embedding {len(records)} pictures with the reward's CLIP, and finding {k} neighbours of each")
        embeddings = embed(embedder, [record["path"] for record in records], workers)
        found = Images(embeddings, nearest(embeddings, k))
        _write(file, found, made_by)
    return found


def embed(embedder: Any, paths: Sequence[str | Path], workers: int = 0) -> Tensor:
    """[N, D] of unit length, float32 on the CPU, of picture files, read at the embedder's own size."""
    loader = DataLoader(_Pictures(paths, embedder.image_size), batch_size=BATCH, num_workers=workers)
    with torch.no_grad():
        parts = [embedder.images(images).float().cpu() for images in loader]
    embeddings = torch.cat(parts)
    broken = (~embeddings.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        remedy = "check the weights of the reward CLIP, or leave the picture out of the data"
        raise bad("train", "reward_clip", "embed every picture in finite numbers", f"NaN for {paths[broken[0]]}", remedy)
    return F.normalize(embeddings, dim=1)


def nearest(embeddings: Tensor, k: int) -> Tensor:
    """[N, k] int64: of each row of embeddings [N, D] of unit length the k others of the largest product, exactly.

    By faiss where it is installed (pip install faiss-cpu), else by torch, in blocks of at most BLOCK bytes.
    """
    N = len(embeddings)
    if k == 0:
        return torch.empty(N, 0, dtype=torch.int64)
    return _by_faiss(embeddings, k) if importlib.util.find_spec("faiss") else _by_torch(embeddings, k)


def _by_torch(embeddings: Tensor, k: int) -> Tensor:
    N, found = len(embeddings), []
    for rows in torch.arange(N).split(max(1, BLOCK // (4 * N))):
        scores = embeddings[rows] @ embeddings.T
        scores[torch.arange(len(rows)), rows] = -torch.inf
        found.append(scores.topk(k, dim=1).indices)
    return torch.cat(found)


def _by_faiss(embeddings: Tensor, k: int) -> Tensor:
    import faiss

    index = faiss.IndexFlatIP(embeddings.shape[1])
    vectors = embeddings.contiguous().numpy()
    index.add(vectors)
    found = torch.from_numpy(index.search(vectors, k + 1)[1])
    itself = found == torch.arange(len(found)).unsqueeze(1)
    itself[~itself.any(1), -1] = True  # equals of it came first: any of them may go
    return found[~itself].view(-1, k)


class _Pictures(Dataset):
    """Picture files as [3, S, S] in [-1, 1]."""

    def __init__(self, paths: Sequence[str | Path], size: int) -> None:
        self._paths, self._size = paths, size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> Tensor:
        try:
            pixels = read_pixels(self._paths[i], self._size)
        except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error, ...
            remedy = "the reward looks at the pictures, even where the captioner reads features: put them beside the data"
            raise bad("train", "data", "have every picture", f"{self._paths[i]} ({error})", remedy) from error
        return torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1


def _fingerprint(embedder: Any, records: Sequence[dict], k: int) -> str:
    """Of the embedder's weights, of the pictures' names and sizes, wherever they lie, and of k."""
    pictures = [[record["imgid"], Path(record["path"]).name, _bytes_of(record["path"])] for record in records]
    told = {"form": 1, "embedder": embedder.fingerprint, "image_size": embedder.image_size, "k": k, "pictures": pictures}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _bytes_of(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # reading it will say what is wrong


def _read(file: Path, made_by: str) -> Images | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as kept:
            if (kept.metadata() or {}).get("made_by") == made_by:
                return Images(kept.get_tensor("embeddings"), kept.get_tensor("neighbours"))
    except (OSError, SafetensorError):  # there is none, or it was cut short
        pass
    return None


def _write(file: Path, images: Images, made_by: str) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: x.contiguous() for name, x in images._asdict().items()}, partial, metadata={"made_by": made_by})
    os.replace(partial, file)
