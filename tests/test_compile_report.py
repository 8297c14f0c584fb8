"""The compile report: its occupancy by hand, its reading of machine code, and that it finds what it is there to find."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("nothing can be compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402
from fastcap.benchmarks import compile_objects, compile_plans, compile_report, compile_rules, disassembly  # noqa: E402
from fastcap.benchmarks.compile_excuses import Excuse, Known  # noqa: E402
from fastcap.benchmarks.compile_plans import Planned  # noqa: E402
from fastcap.benchmarks.disassembly import Resources  # noqa: E402
from fastcap.benchmarks.occupancy import occupancy  # noqa: E402
from fastcap.kernels._common import Launch, compile_for  # noqa: E402

from fastcap.testing import OPERATIONS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TARGETS = compile_plans.TARGETS


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default now, without its warning


def needs_disassembler():
    try:
        for name in ("cuobjdump", "nvdisasm"):
            disassembly.tool(name)
    except disassembly.ToolMissing as error:
        pytest.skip(str(error))


# Occupancy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "registers", "shared", "block", "warps", "limit"),
    [
        # 32 registers: 1,024 a warp, 64 warps of 65,536
        ("sm_80", 32, 0, 8, 64, "warps"),
        # 33: 1,056, allotted as 1,280; 51.2 warps, of which 48 are a multiple of 4
        ("sm_80", 33, 0, 8, 48, "registers"),
        # blocks of 3: 16 of 48 warps, of 51 it would be 17
        ("sm_80", 33, 0, 3, 48, "registers"),
        ("sm_80", 64, 0, 8, 32, "registers"),
        # 72: 2,304 a warp, 28 warps, 3 blocks of 8
        ("sm_80", 72, 0, 8, 24, "registers"),
        # 40: 1,280 a warp, 51 warps, 48; blocks of 12 warps: 4, and 64 warps would hold 5
        ("sm_90", 40, 0, 12, 48, "registers"),
        ("sm_90", 255, 0, 4, 8, "registers"),
        ("sm_100", 168, 0, 4, 12, "registers"),
        # a block's limit of 32
        ("sm_90", 16, 0, 1, 32, "blocks"),
        # 48 KiB and the 1 KiB that a block takes besides: 3 of 164 KiB, 4 of 228
        ("sm_80", 32, 48 << 10, 4, 12, "shared"),
        ("sm_90", 32, 48 << 10, 4, 16, "shared"),
        # 82 KiB would be two of 164, were it not for that
        ("sm_80", 32, 82 << 10, 4, 4, "shared"),
        # 227 KiB is the most, and it is one block; none fits of 163 KiB
        ("sm_90", 32, 227 << 10, 8, 8, "shared"),
        ("sm_80", 32, 164 << 10, 8, 0, "shared"),
        # one byte is allotted as 128, beside 1 KiB: 145 blocks
        ("sm_80", 32, 1, 2, 64, "warps"),
        # 85 of a lane's 512 registers, allotted as 88: 5 waves on each of 4 SIMDs
        ("gfx942", 85, 0, 4, 20, "registers"),
        ("gfx942", 64, 0, 4, 32, "warps"),
        ("gfx942", 65, 0, 4, 28, "registers"),
        ("gfx942", 256, 0, 8, 8, "registers"),
        # 16 blocks of two waves; one wave needs no barrier, and 32 fit
        ("gfx942", 32, 0, 2, 32, "warps"),
        ("gfx942", 32, 0, 1, 32, "warps"),
        ("gfx942", 32, 24 << 10, 4, 8, "shared"),
    ],
)
def test_occupancy_by_hand(target, registers, shared, block, warps, limit):
    found = occupancy(target, Resources(registers), shared, block)
    assert (found.warps, found.limit) == (warps, limit)
    assert found.most == (32 if target == "gfx942" else 64)


def test_tensor_memory_keeps_blocks_away():
    """512 columns a multiprocessor, in powers of two of 32 at least."""
    for columns, blocks in ((0, 16), (16, 16), (64, 8), (65, 4), (512, 1)):
        assert occupancy("sm_100", Resources(32), 0, 4, columns).warps == 4 * blocks
    assert occupancy("sm_100", Resources(32), 0, 4, 256).limit == "tensor memory"


def test_many_scalar_registers_keep_waves_away():
    assert occupancy("gfx942", Resources(32, scalars=100), 0, 4).warps == 32
    assert occupancy("gfx942", Resources(32, scalars=102), 0, 4).warps == 28


# Reading machine code --------------------------------------------------------------------------------------------------

SASS = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.64.CONSTANT R4, desc[UR4][R4.64] ;
        /*0030*/              @P1  LDG.E.128 R8, desc[UR6][R8.64+0x100] ;
        /*0040*/                   LDG.E.U16 R2, [R2.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R6.64] ;
        /*0060*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0090*/                   HFMA2.MMA R4, -RZ, RZ, 0, 0 ;
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*00b0*/                   STG.E.U8 desc[UR4][R2.64], R8 ;
        /*00c0*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*00d0*/                   STL [R1], R5 ;
        /*00e0*/                   LDL.LU R5, [R1] ;
        /*00f0*/                   STS.128 [R5], R8 ;
        /*10000*/                  UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4], tmem[UR12], idesc[UR13], UP0 ;
"""


def test_nvidia_instructions_are_counted_by_width():
    found = disassembly.parse_sass(SASS)
    assert found.tensor == {"HGMMA": 1, "HMMA": 1, "UTCHMMA": 1}
    assert found.loads == {16: 1, 32: 1, 64: 1, 128: 2} and found.stores == {8: 1, 128: 1}
    assert (found.copies, found.bulk, found.atomics, found.spills) == (1, 1, 1, 2)


def test_nvidia_resources_are_read_by_kernel():
    text = """Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:40 STACK:0 SHARED:512 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z6second:
  REG:255 STACK:48 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    found = disassembly.parse_usage(text)
    assert found == {"first": Resources(40, 0, 0, 512), "_Z6second": Resources(255, 48)}
    assert [used.spill for used in found.values()] == [0, 48]
    with pytest.raises(Exception, match="fastcap.compile_report: cuobjdump must name a kernel"):
        disassembly.parse_usage("no kernel")


def test_amd_instructions_and_registers_are_read():
    text = """
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	global_load_dword v1, v[2:3], off
	global_load_dwordx4 v[4:7], v[2:3], off offset:16
	buffer_load_dwordx3 v[4:6], v1, s[0:3], 0 offen
	buffer_load_dword v1, s[0:3], 0 offen lds
	global_load_ushort v1, v[2:3], off
	global_store_short_d16_hi v[2:3], v1, off
	buffer_store_dwordx2 v[4:5], v1, s[0:3], 0 offen
	global_atomic_add_x2 v[2:3], v[4:5], off
	scratch_store_dword off, v1, s32
	ds_write_b128 v1, v[2:5]
	v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
	buffer_wbl2 sc1
  - .agpr_count:     16
    .group_segment_fixed_size: 512
    .private_segment_fixed_size: 8
    .sgpr_count:     77
    .vgpr_count:     85
    .vgpr_spill_count: 3
"""
    used, found = disassembly.parse_amdgcn(text)
    assert used == Resources(85, 8, 0, 512, 16, 77, 3) and used.spill == 12
    assert found.loads == {16: 1, 32: 2, 96: 1, 128: 1} and found.stores == {16: 1, 64: 1}
    assert found.tensor == {"mfma": 1} and (found.copies, found.atomics, found.spills) == (1, 1, 1)


def test_accesses_are_followed_to_their_arguments():
    llir = """
define ptx_kernel void @k(ptr addrspace(1) %0, ptr addrspace(1) noalias captures(none) %1, i32 %2, ptr addrspace(1) %3) {
  %5 = getelementptr float, ptr addrspace(1) %0, i64 %9, !dbg !1
  br label %6
6:
  %7 = phi ptr addrspace(1) [ %5, %4 ], [ %8, %6 ]
  %8 = getelementptr i8, ptr addrspace(1) %7, i64 16
  %9 = tail call { i32, i32, i32, i32 } asm sideeffect "mov.u32 $0, 0x0;\\0A\\09ld.global.L1::evict_last.v4.b32 \
{ $0 }, [ $4 + 0 ];", "=r,l"(\
ptr addrspace(1) %7, i1 true)
  %10 = getelementptr bfloat, ptr addrspace(1) %1, i64 %9
  tail call void asm sideeffect "cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x10, $2;", "r,l,r"(\
ptr addrspace(3) %11, ptr addrspace(1) %10, i32 16)
  %12 = load <2 x float>, ptr addrspace(3) %11, align 8
  store <4 x bfloat> %13, ptr addrspace(1) %10, align 8
  %14 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %3, i16 0, i64 7, i32 1)
  %15 = tail call i64 @llvm.amdgcn.raw.ptr.buffer.load.v2i32(ptr addrspace(8) %14, i32 %1, i32 0, i32 0)
  %16 = atomicrmw add ptr addrspace(1) %3, i64 %2 syncscope("agent") acq_rel
  ret void
}
define void @other(ptr addrspace(1) %0) {
  store i32 1, ptr addrspace(1) %0, align 4
}
"""
    assert disassembly.accesses(llir, ["a", "b", "c"]) == {
        "a": {"load": {128: 1}},
        "b": {"load": {128: 1}, "store": {64: 1}},
        "c": {"load": {64: 1}, "atomic": {64: 1}},
    }


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN7fastcap66_GLOBAL__N__07c8e7c1_26_attention_coverage_cuda_cu_4a7b12ee_314forward_kernelIfLi4EEEvNS_2E", 0),
        ("_ZN7fastcap66_GLOBAL__N__07c8e7c1_26_attention_coverage_cuda_cu_4a7b12e815backward_kernelI13__nv_bfloat16EEv", 1),
        ("_ZN7fastcap12_GLOBAL__N_113reduce_kernelIdEEvPKT_lS3_PS3_b", 2),
        ("_Z12plain_kernelPf", 3),
    ],
)
def test_names_of_cuda_kernels_do_not_depend_on_the_machine(mangled, name):
    names = "forward_kernel<float, 4>", "backward_kernel<nv_bfloat16>", "reduce_kernel<double>", "plain_kernel"
    assert compile_objects.template_name(mangled) == names[name]


# Tiny kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _copy_kernel(x_ptr, out_ptr, N, SHIFT, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (o + SHIFT), mask=o + SHIFT < N)
    tl.store(out_ptr + o, x, mask=o < N)


@triton.jit
def _greedy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    for _ in range(3):
        x = x * tl.sum(x, 0)
    tl.store(out_ptr + o, x)


@triton.jit
def _product_kernel(x_ptr, out_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    at = o[:, None] * BLOCK + o[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, tl.trans(x), input_precision=PRECISION))


def empty(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")


def copy(n=4096, shift=16):
    return Launch(_copy_kernel, (n // 1024,), dict(x_ptr=empty(n), out_ptr=empty(n), N=n, SHIFT=shift, BLOCK=1024))


def product(dtype, precision="ieee", block=64):
    x, out = empty(block, block, dtype=dtype), empty(block, block)
    return Launch(_product_kernel, (1,), dict(x_ptr=x, out_ptr=out, PRECISION=precision, BLOCK=block))


def planned(launch):
    return Planned("tiny", "case", [(launch, 1)])


@pytest.mark.parametrize("target", TARGETS)
def test_a_wide_copy_keeps_every_rule(target):
    needs_disassembler()
    launch = copy()
    found = compile_objects.compile_triton(launch, target)
    assert list(found["loads"]) == [128] and list(found["stores"]) == [128]
    assert {name: list(kinds) for name, kinds in found["accesses"].items()} == {"x_ptr": ["load"], "out_ptr": ["store"]}
    assert not list(compile_rules.check_widths(target, launch, found, planned(launch)))
    assert not list(compile_rules.check_program(target, "tiny", found))
    assert found["warps"] == found["most"] and found["block"] == 4
    assert sum(compile_rules.argument_bytes(launch, found["accesses"], planned(launch)).values()) == 2 * 4 * 4096


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_narrow_load_is_found_and_may_be_excused(target, monkeypatch):
    needs_disassembler()
    launch = copy(shift=5)  # no 16 bytes begin where a thread's first number lies
    found = compile_objects.compile_triton(launch, target)
    [failure] = compile_rules.check_widths(target, launch, found, planned(launch))
    assert failure.rule == "narrow" and "_copy_kernel" in failure.where
    assert failure.what == "x_ptr [4096] float32: loads of at most 32 bits (case)"
    odd = copy(4099, shift=5)  # no whole number of 16 bytes
    assert not list(compile_rules.check_widths(target, odd, found, planned(odd)))
    excuses, key = compile_rules.NARROW, ("_copy_kernel", "x_ptr", "load")
    monkeypatch.setitem(excuses, key, Excuse("elsewhere", targets=("sm_80",)))
    assert len(list(compile_rules.check_widths(target, launch, found, planned(launch)))) == 1
    monkeypatch.setitem(excuses, key, Excuse("of others", when=lambda of: of.rows == "none"))
    assert len(list(compile_rules.check_widths(target, launch, found, planned(launch)))) == 1
    monkeypatch.setitem(excuses, key, Excuse("the test says so"))
    assert not list(compile_rules.check_widths(target, launch, found, planned(launch)))


def test_a_layout_that_does_not_allow_16_bytes_is_not_judged():
    assert compile_rules.allows_16_bytes(empty(7, 4)) and compile_rules.allows_16_bytes(empty(8, 3).T[:, 4:]) is False
    assert not compile_rules.allows_16_bytes(empty(7, 6))
    assert not compile_rules.allows_16_bytes(empty(7, 8)[:, 2:])
    assert not compile_rules.allows_16_bytes(empty(6, dtype=torch.bfloat16))
    assert compile_rules.allows_16_bytes(empty(8, dtype=torch.bfloat16).expand(3, 8))
    assert not compile_rules.allows_16_bytes(empty())
    assert compile_rules.bytes_of(empty(8).expand(3, 8)) == 32


def test_a_spill_is_found():
    needs_disassembler()
    target = "sm_90"
    launch = Launch(_greedy_kernel, (1,), dict(x_ptr=empty(16384), out_ptr=empty(16384), BLOCK=16384), num_warps=1)
    found = compile_objects.compile_triton(launch, target)
    [failure] = compile_rules.check_program(target, "greedy", found)
    assert failure.rule == "spill" and str(found["spill"]) in failure.what and found["spill"] > 0


@pytest.mark.parametrize(
    ("target", "family"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTC"), ("gfx942", "mfma")]
)
def test_a_product_without_tensor_cores_is_found(target, family):
    needs_disassembler()
    found = compile_objects.compile_triton(product(torch.bfloat16), target)
    assert found["dots"] == [[64, 64, 64, "bf16", "ieee"]] and [name[:5] for name in found["tensor"]] == [
        name[:5] for name in found["tensor"] if name.startswith(family)
    ]
    assert not list(compile_rules.check_program(target, "product", found))
    [failure] = compile_rules.check_program(target, "product", {**found, "tensor": {}})
    assert failure.rule == "tensor cores" and failure.what.endswith("has none")


def test_full_float32_needs_no_tensor_cores_and_tf32_does():
    needs_disassembler()
    full, fast = (compile_objects.compile_triton(product(torch.float32, name, 32), "sm_80") for name in ("ieee", "tf32"))
    assert "tensor" not in full and not list(compile_rules.check_program("sm_80", "product", full))
    assert full["dots"][0][3:] == ["f32", "ieee"] and fast["dots"][0][3:] == ["f32", "tf32"]
    assert list(compile_rules.check_program("sm_80", "product", {**fast, "tensor": {}}))


def test_amd_occupancy_is_what_its_compiler_says():
    for launch in (copy(), product(torch.bfloat16, block=128)):
        text = compile_for(launch, *TARGETS["gfx942"]).asm["amdgcn"]
        used, _ = disassembly.parse_amdgcn(text)
        said = int(re.search(r"; Occupancy: (\d+)", text).group(1))
        assert occupancy("gfx942", used, 0, launch.num_warps).warps == 4 * said


# The comparison --------------------------------------------------------------------------------------------------------

PROGRAM = {
    "registers": 100, "spill": 0, "stack": 0, "shared": 1000, "block": 4, "warps": 20, "most": 64, "limit": "registers",
    "tensor": {"HGMMA": 8}, "loads": {"128": 10}, "stores": {"128": 10},
}  # fmt: skip


@pytest.mark.parametrize("much", [1.09, 1.11])
@pytest.mark.parametrize("name", ["registers", "shared", "warps", "loads", "stores"])
def test_eleven_percent_worse_is_found_and_nine_is_not(name, much):
    now = dict(PROGRAM)
    if name in ("loads", "stores"):
        now[name] = {"128": 100, "32": 100 * (1 - 1 / much) / (1 / much - 0.25)}  # a mean of 128 / much
    else:
        now[name] = PROGRAM[name] / much if name == "warps" else PROGRAM[name] * much
    found = list(compile_rules.compare_programs("here", now, PROGRAM))
    assert len(found) == (much > 1.1)
    assert not list(compile_rules.compare_programs("here", PROGRAM, now))  # better is not worse


def test_tensor_cores_that_are_gone_are_found():
    [failure] = compile_rules.compare_programs("here", {**PROGRAM, "tensor": {"HMMA": 8}}, PROGRAM)
    assert failure.what == "no HGMMA any more"


def test_the_report_is_written_read_and_compared(tmp_path, monkeypatch, capsys):
    needs_disassembler()
    monkeypatch.setattr(compile_report, "planned", lambda target, only: iter([planned(copy())._replace(name="shape bf16")]))
    monkeypatch.setattr(compile_objects, "cuda_tasks", lambda *given: [])
    run = ["--target", "sm_80", "--target", "sm_90", "--jobs", "1"]
    assert compile_report.main([*run, "--against", str(tmp_path), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "sm_90: 1 programs" in said and "_copy_kernel" in said and "compared with nothing" in said
    assert compile_report.main([*run, "--against", str(tmp_path), "--long"]) == 0
    path = tmp_path / "sm_90.json"
    committed = json.loads(path.read_text())
    assert list(committed["cases"]) == ["tiny shape bf16"] and committed["versions"]["triton"] == triton.__version__
    [program] = committed["programs"].values()
    program["registers"] = int(program["registers"] / 1.2)
    path.write_text(json.dumps(committed))
    capsys.readouterr()
    assert compile_report.main([*run, "--against", str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1 and re.match(r"FAILED worse: sm_90 _copy_kernel-\w+ \(tiny shape bf16\): registers: ", failed[0])


def test_what_is_known_is_told_and_does_not_fail(monkeypatch, capsys, tmp_path):
    needs_disassembler()
    monkeypatch.setattr(compile_report, "planned", lambda target, only: iter([planned(copy(shift=5))]))
    monkeypatch.setattr(compile_objects, "cuda_tasks", lambda *given: [])
    run = ["--target", "sm_90", "--jobs", "1", "--against", str(tmp_path)]
    assert compile_report.main(run) == 1 and "FAILED narrow: sm_90 tiny _copy_kernel: x_ptr" in capsys.readouterr().out
    entry = Known("narrow", "_copy_kernel", "loads of at most 32 bits", "it is shifted")
    for other in (entry._replace(rule="spill"), entry._replace(kernel="copy_kernel"), entry._replace(targets=("sm_80",))):
        monkeypatch.setattr(compile_rules, "KNOWN", [other])
        assert compile_report.main(run) == 1
    monkeypatch.setattr(compile_rules, "KNOWN", [entry])
    capsys.readouterr()
    assert compile_report.main(run) == 0
    said = capsys.readouterr().out
    assert "known, 1 times: narrow: sm_90 tiny _copy_kernel: x_ptr" in said and "it is shifted" in said


def test_a_missing_tool_is_reported_and_not_fatal(monkeypatch, capsys, tmp_path):
    def missing(*given):
        raise disassembly.ToolMissing("nothing is here")

    monkeypatch.setattr(compile_report, "tool", missing)
    monkeypatch.setattr(compile_report, "find_nvcc", missing)
    monkeypatch.setattr(compile_report, "planned", lambda target, only: iter([planned(copy())]))
    assert compile_report.main(["--target", "sm_90", "--target", "gfx942", "--jobs", "1", "--against", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "sm_90: left out: nothing is here" in said and "gfx942: 1 programs" in said


def test_a_target_that_nvcc_does_not_know_is_reported(monkeypatch):
    monkeypatch.setattr(compile_report, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(compile_report, "output_of", lambda *command: "compute_80\ncompute_90\n")
    report = compile_report.Report()
    assert compile_report._known_to_nvcc(["sm_80", "sm_100", "gfx942"], report) == ["sm_80"]
    assert report.notes == ["CUDA kernels for sm_100: left out: this nvcc does not know it"]


def test_a_kernel_that_does_not_compile_is_a_failure_and_hides_no_other(monkeypatch, capsys, tmp_path):
    needs_disassembler()
    wrong = copy()
    wrong.args["BLOCK"] = 1000  # no power of two
    monkeypatch.setattr(compile_report, "planned", lambda target, only: iter([planned(wrong), planned(copy())]))
    monkeypatch.setattr(compile_objects, "cuda_tasks", lambda *given: [])
    assert compile_report.main(["--target", "sm_90", "--jobs", "1", "--against", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "FAILED compile: sm_90 _copy_kernel-" in said and "sm_90: 1 programs" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "nothing"], "--only must be among subset_cross_entropy, "),
        (["--target", "sm_70"], "--target must be among sm_80, sm_90, sm_100, gfx942, got 'sm_70'; leave it out for all"),
        (["--write", "--target", "sm_90"], "--write must come without --only and --target"),
        (["--against", "nowhere.json"], "--against must be a file or folder, got 'nowhere.json'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_a_mistake_in_the_command_is_told(given, said, capsys):
    assert compile_report.main(given) == 2
    assert f"fastcap.compile_report: {said}" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="runs from a source tree")
def test_it_runs_from_the_root_and_shadows_nobodys_kernels():
    code = """
import importlib.util, runpy, sys
sys.argv = ["compile_report", "--target", "nothing"]
try:
    runpy.run_module("benchmarks.compile_report", run_name="__main__", alter_sys=True)
except SystemExit as end:
    found = importlib.util.find_spec("kernels")
    print(end.code, found and found.origin)
"""
    for command in (["-c", code], ["-m", "benchmarks.compile_report", "--target", "nothing"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
        assert "fastcap.compile_report: --target must be among" in done.stderr, done.stderr
        if command[0] == "-m":
            assert done.returncode == 2
        else:
            status, _, origin = done.stdout.strip().partition(" ")
            assert status == "2" and not origin.startswith(str(ROOT / "kernels"))


# What is planned -------------------------------------------------------------------------------------------------------


def launched_kernels():
    """The names of all functions in kernels/ that are given to a Launch."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("Launch", "_launch") and node.args:
                found.add(ast.unparse(node.args[0]))
    return {name for name in found if name.endswith("_kernel")}


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="reads the source tree")
def test_every_kernel_that_is_launched_is_planned():
    launched = launched_kernels()
    assert len(launched) > 20
    cases = list(compile_plans.planned("sm_90"))
    reached = {launch.kernel.fn.__name__ for case in cases for launch, _ in case.launches}
    assert launched == reached
    assert {case.operation for case in cases} == set(compile_plans.PLANNERS)
    assert {OPERATIONS[name].stem or name for name in OPERATIONS if OPERATIONS[name].operators} == set(
        compile_plans.PLANNERS
    )


def test_excuses_name_arguments_that_there_are():
    arguments = {
        (launch.kernel.fn.__name__, name)
        for operation in OPERATIONS.values()
        for _, plan in operation.launches()
        for launch in plan
        for name in launch.args
    }
    named = {key[:2] for key in (*compile_rules.NARROW, *compile_rules.GATHERED)}
    assert named <= arguments, named - arguments
    assert {kind for *_, kind in (*compile_rules.NARROW, *compile_rules.GATHERED)} == {"load", "store"}
    kernels = {kernel for kernel, _ in arguments}
    assert {entry.kernel for entry in compile_rules.KNOWN if "backward_kernel" not in entry.kernel} <= kernels


def test_launches_are_one_program_exactly_where_triton_makes_one(monkeypatch):
    sources = {}
    monkeypatch.setattr(triton, "compile", lambda source, target, options: (source.hash(), str(options)))
    for operation in OPERATIONS.values():
        for _, plan in operation.launches():
            for launch in plan:
                key = launch.kernel.cache_key + compile_plans.specialisation(launch)
                sources.setdefault(key, set()).add(compile_for(launch, *TARGETS["sm_90"]))
    assert all(len(hashes) == 1 for hashes in sources.values())
    assert len(set().union(*sources.values())) == len(sources) > 50


@pytest.mark.slow
@pytest.mark.skipif(not compile_report.RESULTS.is_dir(), reason="reads the source tree")
def test_the_committed_report_holds(capsys):
    """Minutes without what an earlier run has left in Triton's cache."""
    status = compile_report.main([])
    said = capsys.readouterr().out
    if "committed by other compilers" in said:
        pytest.skip("the committed numbers are another compiler's")
    assert status == 0, said
