"""Theoretical occupancy: how many warps of a kernel a processor holds at once, of the most that it can.

The rules of NVIDIA's occupancy calculator, and for AMD those of LLVM's AMDGPU backend. What really runs may be less: a grid
may have fewer blocks than a GPU has places.
"""

from __future__ import annotations

from typing import NamedTuple

from fastcap.benchmarks.disassembly import Resources


class Architecture(NamedTuple):
    """What a streaming multiprocessor (or a compute unit) has. Bytes are of shared memory (LDS)."""

    warp: int  # threads
    warps: int
    blocks: int
    registers: int  # 32-bit ones, of all threads; AMD: of one lane of one SIMD
    register_unit: int  # in which they are allotted, to a warp; AMD: to a lane
    shared: int
    shared_unit: int
    reserved: int  # bytes that a block takes besides its own
    most_shared: int  # that a block may take
    simds: int = 0  # AMD: a compute unit's, each with its own registers and an equal share of the waves
    columns: int = 0  # of tensor memory


_KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(32, 64, 32, 65_536, 256, 164 * _KIB, 128, _KIB, 163 * _KIB),
    "sm_90": Architecture(32, 64, 32, 65_536, 256, 228 * _KIB, 128, _KIB, 227 * _KIB),
    "sm_100": Architecture(32, 64, 32, 65_536, 256, 228 * _KIB, 128, _KIB, 227 * _KIB, columns=512),
    "gfx942": Architecture(64, 32, 16, 512, 8, 64 * _KIB, 512, 0, 64 * _KIB, simds=4),
}
WARP_UNIT = 4  # NVIDIA: warps for which registers suffice, rounded down to it: one for each of four partitions


class Occupancy(NamedTuple):
    """Warps that are resident at once, the most that a processor holds, and what keeps more away."""

    warps: int
    most: int
    limit: str  # "warps", "blocks", "registers", "shared" or "tensor memory"

    @property
    def share(self) -> float:
        return self.warps / self.most


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def occupancy(target: str, used: Resources, shared: int, warps: int, columns: int = 0) -> Occupancy:
    """Of blocks of `warps` warps whose threads take `used.registers` registers.

    Args:
        target: a name of ARCHITECTURES.
        used: registers of a thread; AMD: scalar registers of a wave, too. Its `shared` is not looked at.
        shared: bytes of shared memory of a block, those that are fixed and those that come with the launch.
        warps: of a block.
        columns: of tensor memory that a block takes; allotted are powers of two, 32 at least.
    """
    of = ARCHITECTURES[target]
    registers = max(1, used.registers)
    if of.simds:
        # a wave lies on one SIMD; a block of several waves is spread over all
        per_simd = min(of.warps // of.simds, of.registers // _up(registers, of.register_unit), _by_scalars(used.scalars))
        by_registers = per_simd * of.simds // warps
        by_blocks = of.warps if warps == 1 else of.blocks  # the limit is that of barriers, which one wave does not need
    else:
        held = of.registers // _up(registers * of.warp, of.register_unit)
        by_registers = held // WARP_UNIT * WARP_UNIT // warps
        by_blocks = of.blocks
    taken = _up(shared + of.reserved, of.shared_unit)
    limits = {
        "warps": of.warps // warps,
        "blocks": by_blocks,
        "registers": by_registers,
        "shared": of.shared // taken if taken else by_blocks,
    }
    if columns:
        limits["tensor memory"] = of.columns // max(32, 1 << (columns - 1).bit_length())
    if shared > of.most_shared:
        limits["shared"] = 0
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit] * warps, of.warps, limit)


def _by_scalars(scalars: int) -> int:
    """Waves that a SIMD of gfx9 has scalar registers for."""
    return 10 if scalars <= 80 else 9 if scalars <= 88 else 8 if scalars <= 100 else 7
