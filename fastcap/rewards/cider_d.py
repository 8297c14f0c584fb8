"""CIDEr-D: how much of what people say of an image a caption says, in n-grams weighted by how rare they are.

With tf the number of times an n-gram stands in a caption, df the number of images with a reference that has it, N of them,

    g_k(c)_w = tf_w(c) (log N - log max(1, df_w))                          of the n-grams w of k words, k = 1 .. n
    s_k(c, r) = sum_w min(g_k(c)_w, g_k(r)_w) g_k(r)_w / (|g_k(c)| |g_k(r)|) exp(-(l(c) - l(r))^2 / (2 sigma^2))
    CIDEr-D(c, R) = 10 mean_k mean_{r in R} s_k(c, r)

where l counts the pairs of neighbouring words, one less than the words. docs/math/cider_d.md has a worked example. C++ where
the extension is there (csrc/cider_d), plain Python where not, with the same numbers.

Source: Vedantam, Zitnick and Parikh, CIDEr: Consensus-based Image Description Evaluation (arXiv:1411.5726), its
variant "-D", as the `Cider` of pycocoevalcap computes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _backend

from ._cider_d_plain import Plain, check_sequence
from ._cider_d_table import OP, Table

Caption = str | Sequence[str] | Sequence[int]


class CiderD:
    """CIDEr-D of candidate captions against the reference captions of their images.

    A caption is a string, cut at white space, or a sequence of words, or one of integers: a tokenizer's ids. One scorer
    takes words or ids, never both. Tokenise before: "Dog." and "dog" are two words. In training by reinforcement let the
    end of a caption be a word of it, of candidates and references alike; else captions learn to stop in mid-sentence.

    Args:
        documents: for each image the list of its reference captions, such as those of a training set. The document
            frequencies come from them, and unless other references are given, candidates are compared with them.
        n: longest n-grams.
        sigma: in words, of the Gaussian that punishes a difference in length.

    Raises:
        FastcapError: fewer than two images, an image without a caption, or something that is no caption.

    Memory: 32 bytes for each word of the references and about 70 for each different n-gram: for as many captions as COCO has
    to train on, 566,435, about .5 GB, and .7 while they are counted. Scoring releases the interpreter's lock and takes as
    many threads as torch does; the result does not depend on their number.

    >>> scorer = CiderD([["a red bus", "a bus"], ["a cat on a mat", "a cat sits"]])
    >>> [round(score, 4) for score in scorer(["a red bus", "a dog"]).tolist()]
    [4.6217, 0.0]
    """

    def __init__(self, documents: Sequence[Sequence[Caption]], *, n: int = 4, sigma: float = 6.0) -> None:
        _check_settings(n, sigma)
        check_sequence("documents", documents)
        if len(documents) < 2:
            remedy = (
                "with one, every n-gram is in all of them, its weight log(1/1) is 0 and so is every score; "
                "pass the references of a whole data set"
            )
            raise bad(OP, "documents", "be of at least 2 images", len(documents), remedy)
        self.n, self.sigma = n, float(sigma)
        self._backend = _backend.select(OP, "cpu", ("reference", "cpp"))
        self._scorer = self._scorer_class()(documents, n, self.sigma, torch.get_num_threads())
        self._documents: Any = self._scorer.documents()

    @classmethod
    def from_frequencies(
        cls, frequencies: Mapping[tuple, int], num_documents: int, *, n: int = 4, sigma: float = 6.0
    ) -> CiderD:
        """A scorer whose document frequencies were counted before, which so needs `references` in every call.

        Args:
            frequencies: n-gram, a tuple of words or of ids, to the number of images with a reference that has it. An n-gram
                that is not there is in none.
            num_documents: how many images were counted, at least 2.
        """
        _check_settings(n, sigma)
        if not isinstance(frequencies, Mapping):
            raise bad(OP, "frequencies", "be a mapping of n-grams to counts", type(frequencies).__name__, "pass a dict")
        return cls._from_table(Table.of_counts(frequencies, n), num_documents, n, sigma)

    def __call__(
        self,
        candidates: Sequence[Caption],
        references: Sequence[Sequence[Caption]] | References | None = None,
        rows: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """[C] float64 on the CPU, in [0, 10]; 10 is that of a caption of n words or more which equals all its references.

        Args:
            candidates: C captions. One without a word scores 0.
            references: for each image its captions, or what `prepare` made of them; None: the scorer's own documents.
            rows: [C], the entry of `references` that each candidate describes; None: candidate i describes entry i, and
                there is one for each.

        Raises:
            FastcapError: something that is no caption, rows outside the references, or an image without a reference.
        """
        check_sequence("candidates", candidates)
        prepared = self._prepared(references)
        rows = _rows(rows, len(candidates), len(prepared))
        found = torch.empty(len(candidates), dtype=torch.float64)
        self._scorer.score(candidates, prepared._kept, rows, found, torch.get_num_threads())
        return found

    def prepare(self, references: Sequence[Sequence[Caption]]) -> References:
        """References to score against many times: their n-grams are counted and weighted once.

        Args:
            references: for each image its captions, at least one.
        """
        check_sequence("references", references)
        return References(self._scorer.prepare(references, torch.get_num_threads()), len(references), self._scorer)

    @property
    def num_documents(self) -> int:
        """Of how many images the document frequencies are."""
        return self._scorer.num_documents()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the document frequencies, not the captions, as an npz file of plain arrays, whole or not at all."""
        import numpy as np

        table = Table.of_scorer(self._scorer)
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        settings = {"num_documents": self.num_documents, "n": self.n, "sigma": self.sigma, "format": _FORMAT}
        arrays = {name: value.numpy() for name, value in table._asdict().items()}
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(file, **arrays, **{name: np.asarray(value) for name, value in settings.items()})
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            got = f"{path} ({error.strerror or error})"
            raise bad(OP, "path", "be a file that can be written", got, "name one in a folder that is there") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> CiderD:
        """A scorer with the document frequencies that `save` wrote; it needs `references` in every call.

        Raises:
            FastcapError: the file is missing, cut short, or no such file.
        """
        import numpy as np

        remedy = "pass a file that CiderD.save wrote"
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["format"]) != _FORMAT:
                    raise ValueError(f"format {int(file['format'])}, not {_FORMAT}")
                table = Table(*(torch.from_numpy(file[name]) for name in Table._fields))
                settings = int(file["num_documents"]), int(file["n"]), float(file["sigma"])
            table.check()
        except FileNotFoundError as error:
            raise bad(OP, "path", "be a file", str(path), remedy) from error
        except Exception as error:  # numpy and zipfile have one for each way in which a file can be broken
            got = f"{path} ({type(error).__name__}: {error})"
            raise bad(OP, "path", "be a whole file of document frequencies", got, remedy) from error
        return cls._from_table(table, *settings)

    @classmethod
    def _from_table(cls, table: Table, num_documents: int, n: int, sigma: float) -> CiderD:
        _check_settings(n, sigma)
        if isinstance(num_documents, bool) or not isinstance(num_documents, int) or not 2 <= num_documents < _MOST:
            remedy = "with one image log(1/1) = 0 is the weight of every n-gram"
            raise bad(OP, "num_documents", "be an integer of at least 2, below 2^32", num_documents, remedy)
        if len(table.count) and int(table.count.max()) > num_documents:
            rule = f"be at most num_documents, {num_documents}"
            raise bad(OP, "frequencies", rule, int(table.count.max()), "pass the number of images that were counted")
        made = cls.__new__(cls)
        made.n, made.sigma = n, float(sigma)
        made._backend = _backend.select(OP, "cpu", ("reference", "cpp"))
        made._scorer = made._scorer_class().from_table(*table, num_documents, n, made.sigma)
        made._documents = None
        return made

    def _scorer_class(self) -> Any:
        return _backend.extension().CiderD if self._backend == "cpp" else Plain

    def _prepared(self, references: Any) -> References:
        if references is None:
            if self._documents is None:
                remedy = "this scorer was made of document frequencies alone; pass the candidates' references"
                raise bad(OP, "references", "be given", None, remedy)
            return References(self._documents, self.num_documents, self._scorer)
        if not isinstance(references, References):
            return self.prepare(references)
        if references._of is not self._scorer:
            remedy = "prepare them with this one: its document frequencies weigh them"
            raise bad(OP, "references", "be prepared by the same scorer", "those of another", remedy)
        return references


class References:
    """What `CiderD.prepare` makes of references, for that scorer."""

    def __init__(self, kept: Any, count: int, of: Any) -> None:
        self._kept, self._count, self._of = kept, count, of

    def __len__(self) -> int:
        """Of how many images."""
        return self._count


_FORMAT = 1
_MOST = 2**32  # documents: C++ counts in 32 bits
_SQUARED = 1e150  # beyond it, or below its inverse, the square of sigma is no number any more


def _check_settings(n: int, sigma: float) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 8:
        raise bad(OP, "n", "be an integer in [1, 8]", n, "pass n=4, the published one")
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 1 / _SQUARED < sigma < _SQUARED:
        rule = "be a positive finite number, and its square too"
        raise bad(OP, "sigma", rule, sigma, "pass sigma=6.0, the published one")


def _rows(rows: Any, count: int, images: int) -> Tensor:
    """[C] int64 in [0, images)."""
    if rows is None:
        if count != images:
            remedy = "pass rows, the entry that each candidate describes"
            raise bad(OP, "candidates", f"be one for each of the {images} entries of references", count, remedy)
        return torch.arange(count)
    try:
        found = torch.as_tensor(rows).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise bad(OP, "rows", "be integers", type(rows).__name__, "pass a list or an int64 tensor") from error
    if found.shape != (count,):
        rule, remedy = f"be one for each of the {count} candidates", "pass one entry for each"
        raise bad(OP, "rows", rule, list(found.shape), remedy)
    if count and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise bad(OP, "rows", "be integers", str(found.dtype), "pass a list or an int64 tensor")
    found = found.to(torch.int64).contiguous()
    outside = (found < 0) | (found >= images)
    if bool(outside.any()):
        raise bad(OP, "rows", f"lie in [0, {images})", int(found[outside][0]), "count the entries of references from 0")
    return found
