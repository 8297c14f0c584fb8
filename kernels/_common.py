"""What two kernels share, and how a kernel is compiled for a GPU that is not there."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Launch(NamedTuple):
    """A kernel with its grid and arguments: what a launcher runs, and what `compile_for` compiles, are one and the same."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    args: dict[str, object]
    num_warps: int = 4
    num_stages: int = 2
    majors: tuple[int, ...] = ()  # the compute capabilities that it is made for, in numbers of their first digit; empty: any
    shared: int = 48 << 10  # bytes of shared memory that it may take: what every GPU gives, or what the plan has asked for

    def run(self) -> None:
        self.kernel[self.grid](**self.args, num_warps=self.num_warps, num_stages=self.num_stages)


def run(launches: list[Launch], on: torch.Tensor) -> None:
    """Runs the launches in order on the device of `on`, in torch's current stream."""
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def source_of(launch: Launch):
    """What Triton compiles for `launch`, specialised as its launcher does: an argument that is None or 1 is a constant, one
    divisible by 16 is marked so."""
    from triton.compiler import ASTSource

    signature, constants, divisible = {}, {}, []
    for index, param in enumerate(launch.kernel.params):
        value = launch.args[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[param.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = f"*{TYPE_NAMES[value.dtype]}"
            divisible.append(index)
        elif isinstance(value, tuple):
            names = tuple("constexpr" if v == 1 else "i64" if abs(v) >= 2**31 else "i32" for v in value)
            signature[param.name] = names
            for place, v in enumerate(value):
                if v == 1:
                    constants[(index, place)] = 1
                elif v % 16 == 0:
                    divisible.append((index, place))
        elif isinstance(value, float):
            signature[param.name] = param.annotation_type or "fp32"
        else:
            signature[param.name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0:
                divisible.append(index)
    attrs = {(i if isinstance(i, tuple) else (i,)): [["tt.divisibility", 16]] for i in divisible}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)


def compile_for(launch: Launch, backend: str, arch: int | str, warp_size: int):
    """The object that `launch` would run on a GPU of that kind, compiled without one."""
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source_of(launch), target=GPUTarget(backend, arch, warp_size), options=options)


def block_of(n: int, most: int) -> int:
    """A block's size for n elements: a power of two of 16 to `most`."""
    return max(16, min(most, triton.next_power_of_2(max(n, 1))))


def acc_of(tensor: torch.Tensor) -> tl.dtype:
    """What sums of its elements run in."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def factors_of(x: torch.Tensor) -> tuple[str, tl.dtype]:
    """How tl.dot multiplies factors that come as `x` is, and in what dtype: float32 as torch has been told."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    factor = TYPES[x.dtype]
    if not x.is_cuda and x.device.type != "meta" and factor == tl.bfloat16:
        factor = tl.float32  # Triton's interpreter multiplies the bits of bfloat16
    return "tf32" if x.dtype == torch.float32 and allowed else "ieee", factor


@triton.jit
def counting(mask_ptr, mask_strides, i_b, o, N):
    """Which of the steps or locations o there are, and count: mask [B, N] of numbers, or none."""
    counts = o < N
    if mask_ptr is not None:
        p_mask = mask_ptr + i_b * mask_strides[0] + o.to(tl.int64) * mask_strides[1]
        counts = counts & (tl.load(p_mask, mask=counts, other=0) != 0)
    return counts


@triton.jit
def softcap(z, CAP: tl.constexpr):
    """CAP * tanh(z / CAP), or z where CAP is 0. tanh by exp of a negative number, which cannot overflow; near 0, where that
    would cancel, by its series, exact to float64 there."""
    if CAP > 0:
        u = z / CAP
        a = tl.abs(u)
        e = tl.exp(-2 * a)
        large = (1 - e) / (1 + e)
        q = u * u
        p = 21844 / 6081075 + q * (-929569 / 638512875 + q * (6404582 / 10854718875))
        p = -17 / 315 + q * (62 / 2835 + q * (-1382 / 155925 + q * p))
        small = a * (1 + q * (-1 / 3 + q * (2 / 15 + q * p)))
        t = tl.where(a < 0.15, small, large)
        return CAP * tl.where(u < 0, -t, t)
    else:
        return z
