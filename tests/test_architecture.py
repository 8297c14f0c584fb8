"""The rules of the house, read off the source: who may import whom, one stem in every layer, short files."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from fastcap.testing import OPERATIONS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastcap"
if not (ROOT / "csrc").is_dir():
    pytest.skip("reads the source tree", allow_module_level=True)

# "use" layers, a later one may import an earlier one. A module of its own and a folder count alike; nothing imports cli.
USE = ("memory", "objectives", "data", "rewards", "eval", "models", "hf", "train", "doctor", "bench", "cli")
SPEAK = {"fastcap", "fastcap.functional", "fastcap.nn", "fastcap.errors"}  # what "use" layers see of the layers below
MAX_LINES = 400
REWARD = "fastcap.rewards.cider_d"  # an operation on captions, not on tensors: its story stands among the rewards
STEMS = {operation.stem or name: operation for name, operation in OPERATIONS.items()}


def python_files():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    return sorted(path for path in files if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("kernels", "benchmarks"):
        parts.insert(0, "fastcap")  # as they are installed
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top level) of every import; `from a import b` counts as a.b where b is a module of ours."""
    found = []

    def visit(node, top):
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                source = child.module
                if child.level:
                    package = module_name(path).split(".")[: None if path.stem == "__init__" else -1]
                    source = ".".join([*package[: len(package) - child.level + 1], *filter(None, [child.module])])
                for alias in child.names:
                    full = f"{source}.{alias.name}"
                    found.append((full if full in MODULES or full == "fastcap._C" else source, top))
            elif isinstance(child, ast.Call) and ast.unparse(child.func) in ("importlib.import_module", "__import__"):
                if child.args and isinstance(child.args[0], ast.Constant):
                    found.append((child.args[0].value, top))
            visit(child, top and not inside)

    visit(ast.parse(path.read_text()), True)
    return found


FILES = python_files()
MODULES = {module_name(path) for path in FILES}
IMPORTS = {module_name(path): imports_of(path) for path in FILES}


def ours(module):
    return [(name, top) for name, top in IMPORTS[module] if name.split(".")[0] == "fastcap"]


def test_the_rules_see_the_imports():
    """Guards this file: an empty table would pass every rule."""
    assert ("fastcap.ops._backend", True) in IMPORTS["fastcap.ops.subset_cross_entropy"]
    assert ("fastcap.kernels.subset_cross_entropy", False) in IMPORTS["fastcap.ops.subset_cross_entropy"]
    assert ("triton", True) in IMPORTS["fastcap.kernels.subset_cross_entropy"]
    assert ("fastcap._C", False) in IMPORTS["fastcap.ops._backend"]


def operation_modules(layer):
    return [m for m in MODULES if m.startswith(f"fastcap.{layer}.") and not m.rsplit(".", 1)[1].startswith("_")]


@pytest.mark.parametrize("layer", ["ops", "kernels"])
def test_no_operation_imports_another(layer):
    for module in operation_modules(layer):
        stem = module.rsplit(".", 1)[1]
        for name, _ in ours(module):
            parts = name.split(".")
            if len(parts) > 2 and parts[1] in ("ops", "kernels"):
                assert parts[2] == stem or parts[2].startswith("_"), f"{module} imports {name}"


def test_no_operation_includes_another_in_csrc():
    for path in [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.c*")]:
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for include in re.findall(r'#include\s+"([^"]+)"', path.read_text()):
            target = (path.parent / include).resolve()
            assert target.is_file() or (ROOT / "csrc" / include).is_file(), f"{path} includes {include}"
            stem = Path(include).stem
            owner = max((other for other in STEMS if stem.startswith(other)), key=len, default=folder)
            assert owner == folder or folder not in STEMS, f"{path} includes {include}"


def test_operations_reach_kernels_and_the_extension_inside_functions_only():
    for module in MODULES:
        if module.startswith("fastcap.ops") or module.count(".") <= 1 and not module.startswith("fastcap.kernels"):
            for name, top in IMPORTS[module]:
                below = name.startswith(("fastcap.kernels", "fastcap._C", "triton"))
                assert not (below and top), f"{module} imports {name} when it is imported"


def test_only_ops_and_testing_reach_kernels_and_the_extension():
    allowed = ("fastcap.ops", "fastcap.kernels", "fastcap.testing", "fastcap.benchmarks", "fastcap.doctor")
    for module in MODULES:
        for name, _ in ours(module):
            if name.startswith(("fastcap.kernels", "fastcap._C")):
                assert module.startswith(allowed), f"{module} imports {name}"


def test_kernels_import_torch_triton_and_kernels_only():
    for module in MODULES:
        if module.startswith("fastcap.kernels"):
            for name, _ in IMPORTS[module]:
                allowed = name.split(".")[0] in ("torch", "triton", *sys.stdlib_module_names)
                assert allowed or name.startswith("fastcap.kernels"), f"{module} imports {name}"


def test_operations_import_nothing_above_them():
    for module in MODULES:
        if module.startswith("fastcap.ops"):
            for name, _ in ours(module):
                below = name.startswith(("fastcap.ops", "fastcap.kernels", "fastcap._C")) or name == "fastcap.errors"
                assert below, f"{module} imports {name}"


def test_the_public_modules_import_operations_only():
    for module in ("fastcap.functional", "fastcap.nn", "fastcap.errors", "fastcap"):
        for name, _ in ours(module):
            assert name.startswith("fastcap.ops") or name in SPEAK, f"{module} imports {name}"
    for module in ("fastcap.functional", "fastcap.errors", "fastcap.testing"):
        for name, _ in IMPORTS[module]:
            known = ("torch", "fastcap", "__future__", *sys.stdlib_module_names)
            assert name.split(".")[0] in known, f"{module} imports {name}"


def test_use_layers_import_only_downwards():
    for module in MODULES:
        layer = module.split(".")[1] if "." in module else ""
        if layer not in USE:
            continue
        for name, _ in ours(module):
            other = name.split(".")[1] if "." in name else ""
            if other in USE:
                assert other == layer or USE.index(other) < USE.index(layer), f"{module} imports {name}, which is above it"
            elif layer not in ("doctor", "bench"):  # they report what lies below
                if (module, name) == (REWARD, "fastcap.ops._backend"):
                    continue
                assert name in SPEAK, f"{module} imports {name}; take it from functional or nn"


def test_every_module_has_a_layer():
    for module in MODULES:
        layer = module.split(".")[1] if "." in module else ""
        known = {"", "functional", "nn", "errors", "ops", "kernels", "benchmarks", "testing", *USE}
        assert layer in known, f"{module} belongs to no layer: name it in USE, in its place"


def test_nothing_imports_the_command_line():
    for module in MODULES:
        if not module.startswith("fastcap.cli"):
            assert not any(name.startswith("fastcap.cli") for name, _ in IMPORTS[module]), module


def test_csrc_includes_no_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 5
    for path in sources:
        for include in re.findall(r"#include\s+[<\"]([^>\"]+)", path.read_text()):
            assert not include.startswith(("torch/", "ATen/", "c10/", "caffe2/")), f"{path} includes {include}"


@pytest.mark.parametrize("stem", STEMS)
def test_an_operation_has_its_file_in_every_layer(stem):
    names = [
        f"fastcap/ops/{stem}.py", f"kernels/{stem}.py", f"csrc/{stem}/{stem}.h", f"csrc/{stem}/{stem}_cpu.cpp",
        f"tests/test_{stem}.py", f"benchmarks/bench_{stem}.py", f"docs/math/{stem}.md",
    ]  # fmt: skip
    if "cuda" in STEMS[stem].backends:
        names.append(f"csrc/{stem}/{stem}_cuda.cu")
    for name in names:
        assert (ROOT / name).is_file(), f"{name} is missing"


def test_cider_d_has_its_file_in_every_layer_too():
    names = ["fastcap/rewards/cider_d.py", "csrc/cider_d/cider_d.h", "csrc/cider_d/cider_d_cpu.cpp", "tests/test_cider_d.py"]
    for name in (*names, "benchmarks/bench_cider_d.py", "docs/math/cider_d.md"):
        assert (ROOT / name).is_file(), f"{name} is missing"


def test_every_operation_is_registered_for_the_contract():
    stems = {module.rsplit(".", 1)[1] for module in operation_modules("ops")}
    assert stems == set(STEMS), "add an entry to fastcap.testing.OPERATIONS"
    assert {m.rsplit(".", 1)[1] for m in operation_modules("kernels")} <= stems
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"common"}
    assert folders <= stems | {"cider_d"}


def test_files_are_short():
    sources = [*FILES, *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    long = {
        str(path.relative_to(ROOT)): lines for path in sources if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"more than {MAX_LINES} lines"


def test_no_test_folder_is_a_package():
    """With an __init__.py pytest would put the root on sys.path, and our kernels/ in front of Hugging Face's package."""
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert "--import-mode=importlib" in (ROOT / "pyproject.toml").read_text()
