"""Every kernel is compiled ahead of time, with no GPU, for the GPUs that it is meant for; a register that spills fails.

Triton's by triton.compile for each launch that a plan makes at real shapes; CUDA's by nvcc, where there is one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from fastcap.benchmarks import disassembly
from fastcap.benchmarks.compile_plans import TARGETS
from fastcap.benchmarks.disassembly import Resources, output_of

from fastcap.testing import OPERATIONS
from fastcap.testing.launches import plan_subset_cross_entropy

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("nothing can be compiled under TRITON_INTERPRET=1", allow_module_level=True)

from fastcap.kernels._common import compile_for  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_compiler")

ROOT = Path(__file__).resolve().parent.parent
LAUNCHES = [pytest.param(name, case, id=f"{name}-{case}") for name, op in OPERATIONS.items() for case, _ in op.launches()]
_plans = {(name, case): plan for name, op in OPERATIONS.items() for case, plan in op.launches()}


def found_or_skipped(find, *given) -> str:
    try:
        return find(*given)
    except disassembly.ToolMissing as error:
        pytest.skip(str(error))


def assert_no_spill(cubin: Path, what: str) -> dict[str, Resources]:
    found_or_skipped(disassembly.tool, "cuobjdump")
    used = disassembly.resources_of_cubin(cubin)
    for name, use in used.items():
        if use.spill:
            moves = disassembly.parse_sass(disassembly.code_of_cubin(cubin)[name]).spills
            pytest.fail(f"{what}: {name} uses {use}, with {moves} loads and stores of local memory", pytrace=False)
        assert 0 < use.registers <= 255
    return used


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "case"), LAUNCHES)
def test_triton_kernels_compile_without_spills(name, case, target, tmp_path, record_property):
    backend, arch, _ = TARGETS[target]
    for i, launch in enumerate(_plans[name, case]):
        if launch.majors and (backend != "cuda" or arch // 10 not in launch.majors):
            continue  # a plan for another GPU
        compiled = compile_for(launch, *TARGETS[target])
        kernel = launch.kernel.fn.__name__
        if "cubin" not in compiled.asm:
            assert len(compiled.asm["hsaco"]) > 1000
            scratch = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])
            # scalar registers spill into lanes of vector registers, as masks do: no memory, or scratch would not be 0
            spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
            assert scratch and spills and not any(map(int, scratch + spills)), (
                f"{kernel}: scratch {scratch}, spills {spills}"
            )
            continue
        cubin = tmp_path / f"{i}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        used = assert_no_spill(cubin, f"{target} {kernel}")
        record_property(f"{case}-{target}-{kernel}", str(used[kernel]))
        assert compiled.metadata.shared <= launch.shared


@pytest.mark.parametrize("case", ["caption-first-in-subset-float32", "caption-first-in-subset-bfloat16", "caption-float32"])
def test_the_backward_fills_with_zeros_by_16_bytes_a_store(case, tmp_path):
    """A store of 4 bytes a thread would need four times the instructions for the one large write of the backward."""
    *_, backward = _plans["subset_cross_entropy", case]
    cubin = tmp_path / "backward.cubin"
    cubin.write_bytes(compile_for(backward, *TARGETS["sm_90"]).asm["cubin"])
    assert "STG.E.128" in output_of(found_or_skipped(disassembly.tool, "nvdisasm"), cubin)


def test_rows_of_whole_words_are_read_by_16_bytes_a_load():
    """compile_for specialises as Triton's launcher does: a stride of 1 is a constant, a size divisible by 16 is known."""
    forward, *_ = plan_subset_cross_entropy(4, 8, 32_768, torch.float32, subset="full")
    assert "ld.global.v4" in compile_for(forward, *TARGETS["sm_90"]).asm["ptx"]


# CUDA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if "cuda" in operation.backends])
def test_cuda_kernels_compile_without_spills(name, arch, tmp_path, record_property):
    source = ROOT / "csrc" / name / f"{name}_cuda.cu"
    if not (ROOT / "csrc").is_dir():
        pytest.skip("not a source tree")
    cubin = tmp_path / f"{name}.cubin"
    nvcc = found_or_skipped(disassembly.find_nvcc)
    output_of(nvcc, "-O3", "-std=c++17", f"-arch=sm_{arch}", "-cubin", source, "-o", cubin)
    for kernel, used in assert_no_spill(cubin, f"sm_{arch} {name}").items():
        record_property(f"{arch}-{kernel}", str(used))
    for kernel, code in disassembly.code_of_cubin(cubin).items():
        if "backward_kernel" in kernel and "Li1E" not in kernel:  # of one element at a time, where rows allow no more
            assert "STG.E.128" in code, f"{kernel} writes the gradient by less than 16 bytes a store"
