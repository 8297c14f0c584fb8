"""Builds fastcap._C: C++ always, CUDA where nvcc is found. Neither needs torch, and neither is needed: where the compiler
is missing the package installs without it, and `fastcap doctor` says what that costs.

FASTCAP_CUDA   auto (default), 1 (fail without nvcc) or 0 (leave the CUDA kernels out)
FASTCAP_ARCHS  compute capabilities, default "80;90;100"; the last one's PTX is kept for later GPUs
FASTCAP_EXTENSION=0  build no extension at all
"""

import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
CSRC = Path("csrc")


def pybind11_include() -> str:
    """pybind11's headers: the package's own, else the copy that every torch carries (a machine without network)."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise
        return str(Path(torch.origin).parent / "include")


def find_nvcc() -> "str | None":
    wanted = os.environ.get("FASTCAP_CUDA", "auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None and wanted == "1":
        raise SystemExit("fastcap.setup: FASTCAP_CUDA must be 0 or auto without nvcc, got '1'; install the CUDA toolkit")
    return nvcc


def usable_archs(nvcc: str) -> "list[str]":
    """Those asked for that this nvcc knows: compute capability 10.0 came with CUDA 12.8."""
    wanted = os.environ.get("FASTCAP_ARCHS", "80;90;100").split(";")
    shown = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [arch for arch in wanted if f"compute_{arch}" in shown.split()] or wanted


def cuda_library_dirs(nvcc: str) -> "list[str]":
    """Where nvcc itself links from: it may be a wrapper far from its toolkit."""
    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return re.findall(r'"-L([^"]+)"', "".join(line for line in shown.splitlines() if "LIBRARIES" in line))


class BuildExt(build_ext):
    """setuptools' build_ext, with .cu files compiled by nvcc and all files compiled side by side."""

    def build_extension(self, ext):
        sources = [s for s in ext.sources if s.endswith(".cpp")]
        cuda_sources = [s for s in ext.sources if s.endswith(".cu")]
        nvcc = find_nvcc() if cuda_sources else None
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args = ["/O2", "/std:c++17", "/openmp", "/EHsc"]
        else:
            ext.extra_compile_args = ["-O3", "-std=c++17", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
            if sys.platform != "darwin":
                ext.extra_compile_args.append("-fopenmp")
                ext.extra_link_args.append("-fopenmp")
        objects = []
        archs = usable_archs(nvcc) if nvcc else []
        if nvcc:
            try:
                for source in cuda_sources:
                    objects += self.compile_cuda(nvcc, source, archs)
                libraries = cuda_library_dirs(nvcc)
            except (OSError, subprocess.CalledProcessError) as error:
                if os.environ.get("FASTCAP_CUDA") == "1":
                    raise
                print(f"fastcap: leaving the CUDA kernels out, for nvcc failed: {error}", file=sys.stderr)
                nvcc, objects = None, []
        if nvcc:
            ext.define_macros.append(("FASTCAP_WITH_CUDA", f'"{" ".join("sm_" + a for a in archs)}"'))
            ext.library_dirs += libraries
            ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for compiled in pool.map(lambda source: self.compile_cpp(ext, source), sources):
                objects += compiled
        ext.sources, ext.extra_objects = [], objects
        super().build_extension(ext)

    def compile_cpp(self, ext, source):
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )

    def compile_cuda(self, nvcc, source, archs):
        output = Path(self.build_temp) / source.replace(".cu", ".cu.o")
        output.parent.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        options = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
        command = [nvcc, *options, *targets, "-c", source, "-o", str(output)]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
        return [str(output)]

    def run(self):
        try:
            super().run()
        except Exception as error:
            if os.environ.get("FASTCAP_CUDA") == "1" or os.environ.get("FASTCAP_EXTENSION") == "1":
                raise
            # A missing or too old compiler must not stop the installation: the reference needs none.
            print(f"fastcap: installing without fastcap._C, the CPU kernels: {error}", file=sys.stderr)
            self.extensions = []


def extensions():
    if os.environ.get("FASTCAP_EXTENSION") == "0":
        return []
    os.chdir(HERE)
    sources = sorted(str(p) for p in CSRC.rglob("*.cpp"))
    if find_nvcc():
        sources += sorted(str(p) for p in CSRC.rglob("*.cu"))
    depends = sorted(str(p) for p in CSRC.rglob("*.h")) + sorted(str(p) for p in CSRC.rglob("*.cuh"))
    return [Extension("fastcap._C", sources, include_dirs=[pybind11_include()], depends=depends, language="c++")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
