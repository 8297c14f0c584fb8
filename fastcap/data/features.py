"""Features of regions that were computed before: one array [R, D] for each image, from HDF5, npz, or a folder."""

from __future__ import annotations

import os
import weakref
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcap.errors import FastcapError, bad

from ._feature_files import OP, open_store

_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
KEYS = ("imgid", "cocoid", "stem")  # of a Karpathy-format record; the stem is its filename's, without the extension


class RegionFeatures:
    """The features of images by their ids, read one image at a time.

    `path` is one of

    - a folder of `<id>.npy`, or `<id>.npz` with one array or one named `features` or `feat`;
    - an HDF5 or npz file with one array [R, D] for each image, named `<id>` or, where any name ends so, `<id>_features`
      (other names, such as `<id>_boxes`, are then left alone);
    - an HDF5 or npz file with `features` [N, R, D] and `ids` [N], integers or strings. Such an npz must be written without
      compression (`np.savez`), else reading one image would unpack all of them.

    R may differ from image to image, D may not. Values are stored as fp16, fp32 or fp64 and read as fp32.

    An id is the text of a record's imgid, of its cocoid, or the stem of its filename. Which of them is a property of the
    file: `key`, or, as it is None, the one under which the most records have features (`choose_key`), in the order of `KEYS`
    where they agree; it is never chosen image by image, for the same number can be an imgid and another image's cocoid.

    Construction reads the names and closes the file again. It is opened when the first image is read, once in each process:
    pickling leaves the open file behind, and a fork closes it first, since two processes must not share a file's position.
    One object serves one thread at a time. An image of 36 x 2,048 in fp32 takes 0.03 ms from a stacked npz, 0.2 to 0.3 from
    the other forms and 1.1 where it is compressed; fp16 is half the file, and 0.3 ms more (one core, files in memory).

    Raises FastcapError for what is none of the above, and when an image is read that is missing, of another shape or D, or
    not finite.

    >>> features = RegionFeatures("cocobu_att")          # doctest: +SKIP
    >>> features[391895].shape                           # doctest: +SKIP
    (36, 2048)
    """

    def __init__(self, path: str | os.PathLike, key: str | None = None) -> None:
        if key not in (None, *KEYS):
            rule = f"be one of {', '.join(map(repr, KEYS))}, or None"
            raise bad(OP, "key", rule, key, "pass what the features are named by")
        self.path, self.key = Path(path), key
        self._store: Any = None
        store = open_store(self.path)
        try:
            self._members = store.members()
            if not self._members:
                raise bad(OP, "path", "hold the features of an image", str(self.path), "name arrays [R, D] by the images")
            first = next(iter(self._members))
            self._width = self._checked(first, store.shape(self._members[first]))[1]
        except FastcapError:
            raise
        except _UNREADABLE as error:
            raise bad(OP, "path", "be readable", f"{self.path} ({error})", "copy or write the file again") from error
        finally:
            store.close()

    @property
    def width(self) -> int:
        """D."""
        return self._width

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, id: int | str) -> bool:
        return str(id) in self._members

    def __getitem__(self, id: int | str) -> np.ndarray:
        """The features of one image, float32 [R, D], the caller's own."""
        if str(id) not in self._members:
            remedy = f"pass one such as {next(iter(self._members))!r}"
            raise bad(OP, "id", f"be one of the {len(self)} in {self.path}", str(id), remedy)
        member = self._members[str(id)]
        try:
            found = self._opened().read(member)
        except _UNREADABLE as error:
            got = f"{error} ({member.name!r} in {self.path})"
            raise bad(OP, f"features of image {id}", "be readable", got, "copy or write them again") from error
        if self._checked(id, found.shape)[1] != self.width:
            rule, remedy = f"be {self.width} wide, as the first image's", "compute all features by one network"
            raise self._wrong(id, rule, found.shape, remedy)
        if found.dtype.kind != "f":
            raise self._wrong(id, "be floating-point numbers", found.dtype, "store them as float16 or float32")
        values = found.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            got = f"{np.count_nonzero(~np.isfinite(values))} values that are not"
            raise self._wrong(id, "be finite", got, "compute them again, in float32 where float16 overflows")
        return values

    def _checked(self, id: int | str, shape: tuple[int, ...]) -> tuple[int, int]:
        if len(shape) != 2 or 0 in shape:
            remedy = "reshape a grid to [rows * columns, D], and leave out images without regions"
            raise self._wrong(id, "be one array [R, D] that is not empty", shape, remedy)
        return shape

    def choose_key(self, records: Sequence[dict]) -> str:
        """`key`, or the one of `KEYS` under which the most of these records of a Karpathy-format file have features.

        Raises FastcapError where two of them name features of as many records, and not the same ones.
        """
        if self.key is not None:
            return self.key
        named = {key: [self.id_of(record, key) for record in records] for key in KEYS}
        counts = {key: sum(id is not None for id in ids) for key, ids in named.items()}
        first, *others = [key for key in KEYS if counts[key] == max(counts.values())]
        for other in others:
            for record, one, two in zip(records, named[first], named[other], strict=True):
                if one != two:
                    got = f"{one} by its {first} and {two} by its {other}, as {counts[first]} images have features by each"
                    rule, remedy = f"have one name in {self.path}", f"pass key={first!r} or {other!r}"
                    raise bad(OP, f"image {record['filename']}", rule, got, remedy)
        return first

    def id_of(self, record: dict, key: str) -> str | None:
        """The id of a record's features, or None where there are none."""
        id = name_of(record, key)
        return id if id in self._members else None

    def of(self, record: dict, key: str) -> np.ndarray:
        """The features of a record, float32 [R, D]."""
        id = self.id_of(record, key)
        if id is None:
            got = f"none named {name_of(record, key)!r}, its {key}"
            rule, remedy = f"have features in {self.path}", "compute them, or construct with verify=True to skip such images"
            raise bad(OP, f"image {record['filename']}", rule, got, remedy)
        return self[id]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_store": None}

    def _opened(self) -> Any:
        if self._store is None:
            self._store = open_store(self.path)
            _OPEN.add(self)
        return self._store

    def close(self) -> None:
        """Closes the file; the next image opens it again."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _wrong(self, id: int | str, rule: str, got: object, remedy: str) -> ValueError:
        return bad(OP, f"features of image {id}", rule, f"{got} in {self.path}", remedy)


def name_of(record: dict, key: str) -> str | None:
    """What a record of a Karpathy-format file is called by a key of `KEYS`; None where it has no such entry."""
    if key == "stem":
        return Path(record["filename"]).stem
    return str(record[key]) if key in record else None


_OPEN: weakref.WeakSet[RegionFeatures] = weakref.WeakSet()


def _close_all() -> None:
    for features in list(_OPEN):
        features.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_all)
