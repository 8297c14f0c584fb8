"""Reading a JSON file, with one error for all that can be wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from fastcap.errors import bad


def read_json(op: str, argument: str, path: Path, remedy: str) -> Any:
    """What the file holds. Raises FastcapError, which names the file: it is missing, a folder, no UTF-8 or no JSON.

    NaN and Infinity, which Python's own reader takes, are no JSON; a byte order mark at the beginning is left out.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_no_json)
    except FileNotFoundError as error:
        raise bad(op, argument, "be a file", str(path), remedy) from error
    except OSError as error:
        raise bad(op, argument, "be a readable file", f"{path} ({error.strerror})", remedy) from error
    except (ValueError, RecursionError) as error:  # its message gives the place; text that is not UTF-8 is one too
        raise bad(op, argument, "be valid JSON in UTF-8", f"{path} ({error})", remedy) from error


def is_id(value: object) -> bool:
    """An image's id: a number without fraction, or a string."""
    return is_text(value) and value != "" or isinstance(value, int) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """A string that can be written again: JSON can name half of a surrogate pair, UTF-8 cannot."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def kind(value: object) -> str:
    """What a JSON value is, in JSON's words."""
    if isinstance(value, dict):
        return "an object with " + (", ".join(map(repr, list(value)[:4])) if value else "nothing in it")
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
