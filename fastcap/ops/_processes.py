"""Rows that lie on several processes: what the processes tell each other before they begin, vectors that they sum, and
shards of a matrix that visit one process after another.

All of it is collective: every process of the group makes the same calls in the same order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _checks

MESSAGE = 480  # bytes of an error that reach the other processes
_BIG = 1 << 62  # above any index


def check_group(op: str, group: object) -> None:
    """`group` is a group of torch.distributed that this process belongs to."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        rule = "be None where torch.distributed is not initialised"
        raise bad(op, "group", rule, group, "call torch.distributed.init_process_group first")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        remedy = "call this on the processes of the group only"
        raise bad(op, "group", "be one that this process belongs to", f"none of rank {dist.get_rank()}", remedy)
    if not isinstance(group, dist.ProcessGroup):
        remedy = "pass torch.distributed.group.WORLD, the result of new_group, or mesh.get_group()"
        raise bad(op, "group", "be a torch.distributed.ProcessGroup or None", group, remedy)


class Ring:
    """The processes of a group in a circle: each passes on to the next in rank, and takes from the one before."""

    def __init__(self, group) -> None:
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self._before = dist.get_global_rank(group, (self.rank - 1) % self.size)
        self._backends = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))

    # Before the beginning

    def check_device(self, op: str, name: str, tensor: Tensor) -> None:
        """The group can send and sum tensors on the device of `tensor`."""
        device = tensor.device.type
        backend = self._backends.get(device)
        if backend is None or (backend == "gloo" and device != "cpu"):  # gloo sends host memory only
            rule = f"have a backend that sends tensors on {device}, where {name} is"
            got = ",".join(f"{key}:{value}" for key, value in self._backends.items())
            raise bad(op, "group", rule, got, "call init_process_group('cpu:gloo,cuda:nccl')")
        current = None if device == "cpu" else torch.get_device_module(device).current_device()
        if current not in (None, tensor.device.index):
            rule = f"be on the current device of its process, {device}:{current}"
            raise bad(op, name, rule, str(tensor.device), f"call torch.{device}.set_device first")

    @property
    def _device(self) -> torch.device:
        """Where facts are exchanged: it depends on the group alone, so that a process with bad arguments agrees on it."""
        if "cpu" in self._backends:
            return torch.device("cpu")
        device = next(iter(self._backends))
        return torch.device(device, torch.get_device_module(device).current_device())

    def reads(self, tensor: Tensor) -> bool:
        """Whether the value of `tensor` can be exchanged without a synchronisation of its own, or is checked anyway."""
        return tensor.device.type == self._device.type or _checks.checks_values(tensor)

    def exchange(self, facts: Sequence[int | Tensor], error: Exception | None) -> list[tuple[list[int], str | None]]:
        """(the facts, the first words of the error or None) of every process, by rank. One collective, one synchronisation.

        facts: integers, as many on every process; a tensor [] int64, on the device of the exchange, is read with the rest.
        """
        told = b"" if error is None else (str(error) or type(error).__name__).encode()[:MESSAGE]
        words = struct.unpack(f"{MESSAGE // 8}q", told.ljust(MESSAGE, b"\0"))
        numbers = [0 if isinstance(fact, Tensor) else int(fact) for fact in facts]
        record = torch.tensor([error is not None, *numbers, *words], dtype=torch.int64).to(self._device)
        for i, fact in enumerate(facts, 1):
            if isinstance(fact, Tensor):
                record[i] = fact
        every, n = [], len(facts)
        for failed, *rest in self.gather(record, [record.numel()] * self.size).view(self.size, -1).tolist():
            message = struct.pack(f"{len(words)}q", *rest[n:]).rstrip(b"\0").decode(errors="ignore")
            every.append((rest[:n], message if failed else None))
        return every

    # Vectors

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes; the same bits on all."""
        return self._reduce(x.clone(memory_format=torch.contiguous_format), self._dist.ReduceOp.SUM)

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """x [sizes[rank]] of all processes, in the order of their ranks."""
        begin = sum(sizes[: self.rank])
        whole = x.new_zeros(sum(sizes))
        whole[begin : begin + x.shape[0]] = x
        return self._reduce(whole, self._dist.ReduceOp.SUM)

    def logsumexp(self, x: Tensor) -> Tensor:
        """log(sum(exp(x))) over the processes, per element."""
        top = self._reduce(x.masked_fill(x.isnan(), -torch.inf), self._dist.ReduceOp.MAX)
        top = top.masked_fill(top.isinf(), 0.0)
        return top + self._reduce((x - top).exp(), self._dist.ReduceOp.SUM).log()

    def largest(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Per element the largest over the processes, NaN above all, and the first of their indices; -1 if all are -inf."""
        broken = x.isnan()  # reductions need not keep NaN, so it goes by the index, as one below 0
        top = self._reduce(x.masked_fill(broken, torch.inf), self._dist.ReduceOp.MAX)
        holds = (x == top) & (top > -torch.inf)
        key = (index - _BIG).where(broken, index.masked_fill(~holds, _BIG))
        key = self._reduce(key, self._dist.ReduceOp.MIN)
        first = (key + _BIG).where(key < 0, key.masked_fill(key == _BIG, -1))
        return top.masked_fill(key < 0, torch.nan), first

    def _reduce(self, x: Tensor, op) -> Tensor:
        if x.numel():
            self._dist.all_reduce(x, op, group=self._group)
        return x

    # Shards

    def visits(self, rows: Tensor, sizes: list[int], whole: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Yields (rank, its rows) of every process, this one's first; the next rows travel meanwhile.

        rows: [sizes[rank], ...]. At most two other shards are held at a time. whole=False: this process' own only.
        """
        owner, rows = self.rank, rows.contiguous()
        for left in reversed(range(self.size if whole else 1)):
            passing = self.pass_on(rows, owner, sizes) if left else None
            yield owner, rows
            if passing:
                owner, rows = (owner - 1) % self.size, passing.arrived()

    def pass_on(self, rows: Tensor, owner: int, sizes: list[int], tag: int = 0) -> Passing:
        """Sends the rows of `owner` to the next process, and takes the rows of the owner before it."""
        if self.size == 1:
            return Passing([], rows, rows)
        dist = self._dist
        coming = rows.new_empty(sizes[(owner - 1) % self.size], *rows.shape[1:])
        operations = []
        if rows.shape[0]:
            operations.append(dist.P2POp(dist.isend, rows, self._next, self._group, tag))
        if coming.shape[0]:
            operations.append(dist.P2POp(dist.irecv, coming, self._before, self._group, tag))
        return Passing(dist.batch_isend_irecv(operations) if operations else [], rows, coming)


class Passing(NamedTuple):
    """Rows on their way. Keeps what is sent until it has gone."""

    works: list
    leaving: Tensor
    coming: Tensor

    def arrived(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.coming
