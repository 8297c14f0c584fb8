"""What `fastcap doctor` says, and that it says it with next to nothing installed."""

from __future__ import annotations

import platform

import pytest
import torch

import fastcap
from fastcap import doctor
from fastcap.ops import _backend


def test_each_backend_is_there_with_its_reason():
    lines = doctor.report().splitlines()
    lines = lines[lines.index("backends") + 1 :]
    for name, status in fastcap.backends().items():
        line = next(line for line in lines if line.split()[:1] == [name])
        assert line.split()[1] == ("yes" if status else "no") and " ".join(status.reason.split()) in line


def test_versions_are_there():
    text = doctor.report()
    assert torch.__version__ in text and platform.python_version() in text and fastcap.__version__ in text
    assert torch.backends.cpu.get_cpu_capability() in text


def test_missing_extension_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_backend, "extension", lambda: ImportError("no module named fastcap._C"))
    assert "install a C++17 compiler, then pip install fastcap again" in doctor.report()


def test_missing_extras_give_the_pip_command(monkeypatch):
    monkeypatch.setattr(doctor, "_has", lambda package: False)
    text = doctor.report()
    assert "pip install 'fastcap[train]'" in text and "pip install 'fastcap[bench]'" in text


def test_missing_font_and_java_say_how_to_get_them(monkeypatch):
    data = pytest.importorskip("fastcap.data")
    from fastcap.errors import bad

    def none():
        raise bad("data.emoji", "font", "be installed", "none at a, b", "run: apt-get install fonts-noto-color-emoji")

    monkeypatch.setattr(data, "find_font", none, raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    text = doctor.report()
    assert "no  run: apt-get install fonts-noto-color-emoji".split() == doctor._font().split()
    assert "apt-get install default-jre-headless" in text


def test_lines_are_aligned_and_short(capsys):
    doctor.main()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("  ") or line.isalpha() for line in lines) and len(lines) < 35
