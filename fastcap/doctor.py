"""`fastcap doctor`: what runs here, what does not, and how to get it. Needs none of the extras."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata

_MODULES = {"pillow": "PIL"}  # distributions whose module has another name; the others only change - to _
_EXTRAS = {  # where fastcap is not installed (a source tree), what pyproject.toml says
    "train": "transformers tokenizers safetensors pillow emoji typer rich matplotlib tensorboard pycocoevalcap h5py".split(),
    "bench": ["pytest", "pytest-benchmark", "matplotlib"],
}


def report() -> str:
    """All that `fastcap doctor` prints: versions, the machine, backends, the extension, extras, font and Java."""
    sections = {
        "versions": _versions,
        "machine": _machine,
        "backends": _backends,
        "extension": _extension,
        "extras": _extras,
        "tools": _tools,
    }
    return "\n".join(line for title, find in sections.items() for line in _lines(title, find()))


def main(arguments: list[str] | None = None) -> None:
    """Prints the report."""
    print(report())


def _lines(title: str, pairs: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [title, *(f"  {name.ljust(max(width, 10))}  {' '.join(value.split())}" for name, value in pairs)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    import torch

    import fastcap

    installed = _version("fastcap")
    source = "" if installed else ", run from its sources"
    rocm = getattr(torch.version, "hip", None)
    return [
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("fastcap", fastcap.__version__ + source),
        ("torch", torch.__version__),
        ("triton", _version("triton") or "not installed; pip install triton (Linux)"),
        ("CUDA", torch.version.cuda or (f"none: ROCm {rocm}" if rocm else "none: a CPU build of torch")),
    ]


def _machine() -> list[tuple[str, str]]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    chosen = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "FASTCAP_BACKEND") if os.environ.get(name)]
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        ("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch uses {capability}"),
        ("GPU", ", ".join(gpus) or "none that torch sees"),
        *([("set", ", ".join(chosen))] if chosen else []),
    ]


def _backends() -> list[tuple[str, str]]:
    import fastcap
    from fastcap.ops._backend import AUTO

    statuses = fastcap.backends()
    first = {device: next((name for name in names if statuses[name]), "reference") for device, names in AUTO.items()}
    shown = [(name, f"{'yes' if status else 'no ':3} {status.reason}") for name, status in statuses.items()]
    return [*shown, ("auto", f"{first['cpu']} on a CPU, {first['cuda']} on a GPU")]


def _extension() -> list[tuple[str, str]]:
    from fastcap.ops._backend import extension

    built = extension()
    if isinstance(built, ImportError):
        return [("fastcap._C", f"missing ({built}); install a C++17 compiler, then pip install fastcap again")]
    cuda = built.cuda or "no; install the CUDA toolkit (nvcc) and pip install fastcap again"
    openmp = "yes" if built.openmp else "no: one thread; build it with a compiler that has OpenMP"
    return [("fastcap._C", built.__file__ or "built in"), ("OpenMP", openmp), ("CUDA", cuda)]


def _extras() -> list[tuple[str, str]]:
    shown = []
    for extra, packages in _find_extras().items():
        missing = [name for name in packages if not _has(name)]
        if missing:
            shown.append((extra, f"no  {', '.join(missing)} missing; pip install 'fastcap[{extra}]'"))
        else:
            shown.append((extra, "yes"))
    return shown


def _has(package: str) -> bool:
    if importlib.util.find_spec(_MODULES.get(package, package.replace("-", "_"))) is not None:
        return True
    return _version(package) is not None


def _find_extras() -> dict[str, list[str]]:
    """extra -> its packages, from the metadata of the installed fastcap; `dev` and links to other extras are left out."""
    found: dict[str, list[str]] = {}
    try:
        needed = metadata.requires("fastcap") or []
    except metadata.PackageNotFoundError:
        needed = []
    for line in needed:
        named = re.match(r"([A-Za-z0-9_.-]+)[^;]*;.*extra\s*==\s*[\"']([\w-]+)[\"']", line)
        if named and named[2] != "dev" and named[1] != "fastcap":
            found.setdefault(named[2], []).append(named[1].lower())
    return found or _EXTRAS


def _tools() -> list[tuple[str, str]]:
    return [("emoji font", _font()), ("Java", _java())]


def _font() -> str:
    try:
        return f"yes {importlib.import_module('fastcap.data').find_font()}"
    except Exception as error:  # its message says where it looked, at length; a broken import must not stop the report
        remedy = str(error).rpartition("; ")[2]
        return f"no  {remedy or type(error).__name__}"


def _java() -> str:
    path = shutil.which("java")
    if path is None:
        return "no  needed for METEOR and the PTB tokenizer; run: apt-get install default-jre-headless"
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no  {path} does not start ({type(error).__name__})"
    said = re.search(r'"([^"]+)"', done.stderr + done.stdout)
    return f"yes {said[1] if said else ''} {path}" if done.returncode == 0 else f"no  {path} does not start"


if __name__ == "__main__":
    main()
