"""Java programs that pycocoevalcap carries: found, run to their end, and why not where they cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from fastcap.errors import FastcapError

INSTALL_JAVA = "install a Java runtime, 8 or newer (Debian: apt install default-jre-headless), and put java on the PATH"
INSTALL_PACKAGE = "pip install 'fastcap[train]', or pip install pycocoevalcap"
_TIMEOUT = 120.0  # seconds to start, and
_PER_LINE = 0.1  # for each line of input: METEOR, the slower, needs a twentieth of it on one slow core


class Unavailable(FastcapError):
    """Something outside Python is missing or failed: `reason` says what, `remedy` what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"fastcap.eval: {reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


def java() -> str:
    """The path of the Java launcher: $FASTCAP_JAVA, or on the PATH, or in $JAVA_HOME. Raises Unavailable.

    An empty FASTCAP_JAVA does without Java, for those who do not want to wait for METEOR.
    """
    named = os.environ.get("FASTCAP_JAVA")
    if named is not None:
        if not named:
            raise Unavailable("FASTCAP_JAVA is empty, which does without Java", "unset FASTCAP_JAVA")
        return os.path.abspath(named) if os.path.dirname(named) else named  # programs run in folders of their own
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java") or (shutil.which("java", path=os.path.join(home, "bin")) if home else None)
    if found is None:
        raise Unavailable("no Java was found", INSTALL_JAVA)
    return os.path.abspath(found)


def coco_file(*parts: str) -> Path:
    """A file of the installed pycocoevalcap. Raises Unavailable."""
    try:
        spec = importlib.util.find_spec("pycocoevalcap")
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *parts)
        if path.is_file():
            return path
    if spec is None:
        raise Unavailable("pycocoevalcap is not installed", INSTALL_PACKAGE)
    raise Unavailable(f"pycocoevalcap has no {'/'.join(parts)}", "install pycocoevalcap 1.2 anew")


def run(
    what: str, arguments: list[str], lines: list[str], *, cwd: Path | None = None, limit: float | None = None
) -> list[str]:
    """The lines that a Java program writes when it reads `lines` on its standard input; the program has ended then.

    Raises Unavailable where it cannot start, fails or does not end in time.
    """
    limit = limit or _TIMEOUT + _PER_LINE * len(lines)
    text = "".join(line + "\n" for line in lines).encode("utf-8", "replace")
    try:
        # The encoding is fixed: a Java before 18 otherwise reads in the locale's, which may be ASCII.
        command = [java(), "-Dfile.encoding=UTF-8", *arguments]
        done = subprocess.run(command, input=text, capture_output=True, timeout=limit, cwd=cwd, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{what} did not end within {limit:.0f} s", "try again on a less busy machine") from error
    except OSError as error:
        raise Unavailable(f"{what} could not be started ({error.strerror})", INSTALL_JAVA) from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise Unavailable(f"{what} failed ({said[0] if said else f'status {done.returncode}'})", "check java -version")
    return done.stdout.decode("utf-8", "replace").split("\n")[:-1]
