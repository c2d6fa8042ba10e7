"""Sharded matrices made whole on one rank each, and back: the communication of Muon.

Every matrix has an owner. Matrices are taken in rounds of as many as there are ranks, those of like size
together; in one all-to-all each rank sends its pieces of all of them to their owners, and in another each
owner sends the pieces of its result to all who hold them. A rank holds one whole matrix of a round, and
at most two rounds are under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style.distributed.init import local_part

__all__ = ["Exchange"]

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Transfer:
    """An all-to-all under way."""

    work: dist.Work
    buffer: Tensor
    counts: list[int]
    sent: Tensor
    """Kept until it has gone out."""

    def wait(self) -> tuple[Tensor, ...]:
        """What each rank has sent, flat, in the order of ranks."""
        self.work.wait()
        return self.buffer.split(self.counts)


class Exchange:
    """The plan for a list of matrices, plain or DTensors, the same list on all ranks. Made by all ranks together."""

    def __init__(self, matrices: Sequence[Tensor], *, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.shapes = [matrix.shape for matrix in matrices]
        self.device = matrices[0].device if matrices else torch.device("cpu")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        everyone: list[list[Slices]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(everyone, [local_part(matrix)[1] for matrix in matrices])
        self.places = [[everyone[rank][i] for rank in range(self.world_size)] for i in range(len(matrices))]
        by_size = sorted(range(len(matrices)), key=lambda i: -matrices[i].numel())
        self.rounds = [by_size[i : i + self.world_size] for i in range(0, len(by_size), self.world_size)]
        """Indices of the matrices of each round; the n-th belongs to rank n."""
        self.senders = [
            self._senders(places, owner=by_size.index(i) % self.world_size) for i, places in enumerate(self.places)
        ]

    def _senders(self, places: list[Slices], *, owner: int) -> set[int]:
        """Of ranks that hold the same piece of a matrix, the one nearest to its owner."""
        nearest: dict[tuple[tuple[int, int], ...], int] = {}
        for rank in sorted(range(self.world_size), key=lambda rank: abs(rank - owner)):
            nearest.setdefault(tuple((part.start, part.stop) for part in places[rank]), rank)
        return set(nearest.values())

    def collect(self, matrices: list[int], pieces: dict[int, Tensor]) -> Transfer:
        """Send this rank's ``pieces`` (by index) of the ``matrices`` of a round to their owners."""
        sends = [pieces[i].reshape(-1) for i in matrices if self.rank in self.senders[i]]
        send_counts = [self._size(i, self.rank) if self.rank in self.senders[i] else 0 for i in matrices]
        mine = self._owned(matrices)
        receive_counts = [
            self._size(mine, rank) if mine is not None and rank in self.senders[mine] else 0
            for rank in range(self.world_size)
        ]
        return self._start(sends, send_counts, receive_counts)

    def assemble(self, matrices: list[int], transfer: Transfer) -> Tensor | None:
        """The whole matrix of the round that this rank owns, if it owns one."""
        arrived = transfer.wait()
        mine = self._owned(matrices)
        if mine is None:
            return None
        whole = torch.empty(self.shapes[mine], dtype=self.dtype, device=self.device)
        for rank in self.senders[mine]:
            part = whole[self.places[mine][rank]]
            part.copy_(arrived[rank].view(part.shape))
        return whole

    def distribute(self, matrices: list[int], result: Tensor | None) -> Transfer:
        """Send every rank its piece of the ``result`` that this rank has for its matrix of the round."""
        mine = self._owned(matrices)
        sends, send_counts = [], [0] * self.world_size
        if mine is not None and result is not None:
            sends = [result[place].reshape(-1) for place in self.places[mine]]
            send_counts = [self._size(mine, rank) for rank in range(self.world_size)]
        receive_counts = [self._size(i, self.rank) for i in matrices]
        return self._start(sends, send_counts, receive_counts)

    def pieces(self, matrices: list[int], transfer: Transfer) -> dict[int, Tensor]:
        """This rank's pieces of the results of a round, by index."""
        arrived = transfer.wait()
        return {
            i: arrived[owner].view([part.stop - part.start for part in self.places[i][self.rank]])
            for owner, i in enumerate(matrices)
        }

    def _owned(self, matrices: list[int]) -> int | None:
        return matrices[self.rank] if self.rank < len(matrices) else None

    def _size(self, matrix: int, rank: int) -> int:
        rows, columns = self.places[matrix][rank]
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def _start(self, sends: list[Tensor], send_counts: list[int], receive_counts: list[int]) -> Transfer:
        send_counts = send_counts + [0] * (self.world_size - len(send_counts))
        receive_counts = receive_counts + [0] * (self.world_size - len(receive_counts))
        buffer = torch.empty(sum(receive_counts), dtype=self.dtype, device=self.device)
        sent = torch.cat(sends).to(self.dtype) if sends else buffer.new_empty(0)
        work = dist.all_to_all_single(buffer, sent, receive_counts, send_counts, async_op=True)
        return Transfer(work, buffer, receive_counts, sent)
