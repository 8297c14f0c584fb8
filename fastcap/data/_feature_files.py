"""The files that `RegionFeatures` reads: which array of which image they hold, and how to read one.

A file is a container of named arrays, `Npz` or `Hdf5`; a folder's files are its arrays. All have the same methods:

    members()      {id: member}; a member is the name of an array, and a row of it where one array holds all images
    shape(member)  of an image's array
    read(member)   an image's array, the caller's own
    close()
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastcap.errors import FastcapError, bad

from ._checks import require

OP = "data.features"
_ALL, _IDS, _SUFFIX = "features", "ids", "_features"


class Member(NamedTuple):
    name: str
    row: int | None = None


def open_store(path: Path) -> Folder | Npz | Hdf5:
    """The reader of a path, by what the file is and not by its name."""
    if path.is_dir():
        return Folder(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except FileNotFoundError as error:
        raise bad(OP, "path", "be a file or folder", str(path), "check the path") from error
    try:
        if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):  # the second is an archive of nothing
            return Npz(path)
        if start == b"\x89HDF\r\n\x1a\n":
            return Hdf5(path)
    except FastcapError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise bad(OP, "path", "be a whole file", f"{path} ({error})", "copy or write the file again") from error
    raise bad(OP, "path", "be HDF5, npz, or a folder of .npy or .npz", str(path), "convert it to one of them")


class Folder:
    """`<id>.npy` or `<id>.npz`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def members(self) -> dict[str, Member]:
        found: dict[str, Member] = {}
        for file in sorted(self.path.iterdir()):
            if file.suffix not in (".npy", ".npz"):
                continue
            if file.stem in found:
                got = f"{found[file.stem].name} and {file.name} in {self.path}"
                raise bad(OP, "path", "hold one file of an image", got, "remove one of them")
            found[file.stem] = Member(file.name)
        return found

    def shape(self, member: Member) -> tuple[int, ...]:
        return self.read(member).shape

    def read(self, member: Member) -> np.ndarray:
        found = np.load(self.path / member.name, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            names = [name for name in (_ALL, "feat") if name in found.files] or found.files
            if len(names) != 1:
                raise ValueError(f"it holds {', '.join(names) or 'no array'}, not one array or one named features or feat")
            return found[names[0]]

    def close(self) -> None:
        pass


class _Container:
    """A file of named arrays. Below it: `_names()`, `_read(name)`, `_shape(name)`, `_row(name, row)`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def members(self) -> dict[str, Member]:
        names = self._names()
        if _IDS in names:
            return self._rows_of_one(names)
        if _ALL in names and len(self._shape(_ALL)) == 3:
            raise bad(OP, "path", "say whose features it holds", str(self.path), "store the images' ids [N] as 'ids'")
        suffixed = [name for name in names if name.endswith(_SUFFIX)]
        if suffixed:
            return {name[: -len(_SUFFIX)]: Member(name) for name in suffixed}
        return {name: Member(name) for name in names}

    def _rows_of_one(self, names: list[str]) -> dict[str, Member]:
        if _ALL not in names:
            raise bad(OP, "path", "hold 'features' with its 'ids'", f"{', '.join(names)} in {self.path}", "rename the array")
        ids, shape = np.asarray(self._read(_IDS)), self._shape(_ALL)
        if ids.ndim != 1 or ids.dtype.kind not in "iuSUO" or len(shape) != 3 or len(ids) != shape[0]:
            rule = "hold 'features' [N, R, D] with 'ids' [N] of integers or strings"
            got = f"features {shape} with ids {ids.shape} of {ids.dtype} in {self.path}"
            raise bad(OP, "path", rule, got, "store one id for each image")
        texts = [id.decode() if isinstance(id, bytes) else str(id) for id in ids.tolist()]
        found = {id: Member(_ALL, row) for row, id in enumerate(texts)}
        if len(found) != len(texts):
            twice = next(id for row, id in enumerate(texts) if found[id].row != row)
            raise bad(OP, f"ids of {self.path}", "differ", f"{twice} twice", "keep one row of each image")
        self._check_rows(_ALL)
        return found

    def _check_rows(self, name: str) -> None:
        """Raises if a row cannot be read without the others."""

    def shape(self, member: Member) -> tuple[int, ...]:
        shape = self._shape(member.name)
        return shape if member.row is None else shape[1:]

    def read(self, member: Member) -> np.ndarray:
        return self._read(member.name) if member.row is None else self._row(member.name, member.row)


class Npz(_Container):
    """numpy maps only .npy files into memory, and of an npz it reads whole members; here a member that is not compressed is
    mapped where it lies in the archive, so that a row of it is read alone."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._archive = zipfile.ZipFile(path)
        self._maps: dict[str, np.ndarray] = {}

    def _names(self) -> list[str]:
        return [name.removesuffix(".npy") for name in self._archive.namelist() if name.endswith(".npy")]

    def _read(self, name: str) -> np.ndarray:
        with self._archive.open(name + ".npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._header(name)[0]

    def _row(self, name: str, row: int) -> np.ndarray:
        if name not in self._maps:
            shape, fortran, dtype, length = self._header(name)
            info = self._archive.getinfo(name + ".npy")
            with open(self.path, "rb") as file:  # the file's own header may be longer than the directory's entry for it
                file.seek(info.header_offset + 26)
                names = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
            offset = info.header_offset + 30 + names + length
            self._maps[name] = np.memmap(self.path, dtype, "r", offset, shape, "F" if fortran else "C")
        return np.array(self._maps[name][row])

    def _header(self, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
        """Shape, whether in Fortran's order, dtype, and how many bytes of the member lie before the values."""
        with self._archive.open(name + ".npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return (*read(file), file.tell())

    def _check_rows(self, name: str) -> None:
        if self._archive.getinfo(name + ".npy").compress_type != zipfile.ZIP_STORED:
            remedy = "write it with np.savez, or with one array for each image"
            raise bad(OP, f"'{name}' in {self.path}", "be stored without compression", "a compressed array", remedy)

    def close(self) -> None:
        self._maps.clear()
        self._archive.close()


class Hdf5(_Container):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        h5py = require("h5py", OP)
        self._file = h5py.File(path, "r", locking="best-effort")  # some network file systems have no locks

    def _names(self) -> list[str]:
        return list(self._file)

    def _read(self, name: str) -> np.ndarray:
        return self._array(name)[()]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._array(name).shape

    def _row(self, name: str, row: int) -> np.ndarray:
        return self._array(name)[row]

    def _array(self, name: str) -> Any:
        found = self._file[name]
        if not hasattr(found, "shape"):
            raise ValueError(f"{name!r} is a group, not an array")
        return found

    def close(self) -> None:
        self._file.close()
