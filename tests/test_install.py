"""What an installation needs: neither triton, nor the extension, nor the extras, and no shadowing of other packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastcap

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = (
    "transformers", "tokenizers", "safetensors", "PIL", "emoji", "typer", "rich", "matplotlib", "tensorboard",
    "pycocoevalcap", "h5py",
)  # fmt: skip

# A name that is None in sys.modules cannot be imported, and importlib finds no spec for it: as if it were not installed.
BLOCK = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"
USE = """
import torch
import fastcap
from fastcap import functional, nn
x = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
y = torch.tensor([[1, 2, 1, -100], [3, 3, 8, 0]])
loss = functional.subset_cross_entropy(x, y) + nn.SubsetCrossEntropyLoss(subset="reverse")(x, y)
loss.backward()
assert x.grad.isfinite().all() and x.grad[0, 3].abs().sum() == 0
"""


def run(code, *, blocked=(), cwd=None, env=None):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTCAP_BACKEND")}
    result = subprocess.run(
        [sys.executable, "-c", BLOCK.format(names=blocked) + code],
        capture_output=True, text=True, cwd=cwd or Path(__file__).parent, env={**environment, **(env or {})},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_fastcap_imports_no_triton_and_no_extra():
    code = f"""
import torch
before = set(sys.modules)
import fastcap, fastcap.functional, fastcap.nn, fastcap.testing
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & {{"triton", *{EXTRAS!r}}}))
print("fastcap.kernels" in sys.modules, "triton" in sys.modules and "triton" not in before)
"""
    assert run(code) == "[]\nFalse False\n"


def test_the_loss_on_a_cpu_tensor_imports_no_triton():
    assert run(USE + "print('triton' in sys.modules)").strip() == "False"


@pytest.mark.parametrize(
    "blocked",
    [("triton",), ("fastcap._C",), ("triton", "fastcap._C"), EXTRAS, ("numpy",), ("triton", "fastcap._C", "numpy", *EXTRAS)],
    ids=["triton", "extension", "neither", "extras", "numpy", "all"],
)
def test_the_losses_run_without(blocked):
    expected = "reference" if "fastcap._C" in blocked or not fastcap.backends()["cpp"] else "cpp"
    code = USE + "from fastcap.ops import _backend; print('backend', _backend.select('some_op', 'cpu'))"
    assert run(code, blocked=blocked).strip() == f"backend {expected}"


def test_a_missing_extension_or_triton_says_how_to_get_it():
    code = """
import fastcap
for name in ("cpp", "triton", "cuda"):
    try:
        with fastcap.backend(name):
            print("runs")
    except fastcap.BackendUnavailable as error:
        print(error)
"""
    lines = run(code, blocked=("triton", "fastcap._C")).splitlines()
    assert "got 'cpp'; fastcap._C is missing" in lines[0] and "install a C++17 compiler" in lines[0]
    assert "got 'triton'; triton is not installed; pip install triton" in lines[1]
    assert "got 'cuda'; fastcap._C was built without CUDA" in lines[2] or "is missing" in lines[2]


def test_kernels_of_the_source_tree_are_not_importable_as_kernels(tmp_path):
    """Hugging Face's `kernels` is a package that transformers looks for; ours is fastcap.kernels, from the root as well."""
    if not (ROOT / "kernels").is_dir():
        pytest.skip("not a source tree")
    script = tmp_path / "probe.py"
    script.write_text(
        "import importlib.util, fastcap, sys\n"
        "spec = importlib.util.find_spec('kernels')\n"
        f"print(spec is None or not str(spec.origin).startswith({str(ROOT)!r}))\n"
        "print(importlib.util.find_spec('fastcap.kernels') is not None)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.stdout == "True\nTrue\n", result.stderr


def test_transformers_imports_beside_fastcap_from_the_root(tmp_path):
    pytest.importorskip("transformers")
    script = tmp_path / "probe.py"
    script.write_text(
        "import fastcap, transformers\n"
        "from transformers.utils import import_utils\n"
        "from transformers import BlipForConditionalGeneration, VisionEncoderDecoderModel\n"
        "print(import_utils.is_kernels_available())\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    try:
        from importlib.metadata import version

        version("kernels")
    except ImportError:
        assert result.stdout.strip() == "False"  # ours was not taken for it


def test_every_package_is_named_in_pyproject():
    """A folder that is left out of the list is missing from the wheel, and only there."""
    pyproject = ROOT / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("not a source tree")
    text = pyproject.read_text()
    listed = text.split("packages = [", 1)[1].split("]", 1)[0]
    named = {line.strip().strip(",").strip('"') for line in listed.splitlines()} - {""}
    found = {
        ".".join(folder.relative_to(ROOT).parts)
        for folder in [ROOT / "fastcap", *(ROOT / "fastcap").rglob("*")]
        if folder.is_dir() and (folder / "__init__.py").is_file()
    }
    found |= {"fastcap.kernels", "fastcap.benchmarks"}
    assert named == found
    assert (ROOT / "fastcap" / "py.typed").is_file()


def test_the_source_tree_holds_every_file_that_a_build_needs():
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not a source tree")
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py", "MANIFEST.in"):
        assert (ROOT / name).is_file(), name
    # setuptools adds the sources that it would compile: without nvcc a source distribution would lack the CUDA files
    assert "csrc" in (ROOT / "MANIFEST.in").read_text()


def test_no_file_is_named_like_a_module_of_the_standard_library():
    """Python would find `types.py` or `bench.py`'s neighbours first when a file is run as a script."""
    for path in (ROOT / "fastcap").glob("*.py"):
        assert path.stem not in sys.stdlib_module_names or path.stem == "__init__", path
