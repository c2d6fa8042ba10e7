"""Sharded matrices made whole on one rank each, and back: the communication of Muon.

Every matrix has an owner. Matrices are taken in rounds, those of like size together and as many for each
rank; in one all-to-all each rank sends its pieces of all of them to their owners, and in another each owner
sends the pieces of its results to all who hold them. What a rank owns of a round is one matrix, or several
small ones, so that memory is bounded and small models need few rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style.distributed.local import local_part

Slices = tuple[slice, ...]

OWNED_ELEMENTS = 2**24
"""What a rank owns of a round, at most, unless one matrix alone is more: 32 MiB in bf16."""


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
    """The plan for a list of matrices, plain or DTensors, the same list on all ranks of ``group``. Made by all of them
    together. group: None for all ranks.

    rows: for each matrix [..., M, N] a fp32 number of each row, [..., M, 1], that goes to its owner and back with it.
    These have the indices after those of the matrices, and are given and returned as their bits, [..., M, K] of
    ``dtype``: one message, and nothing is rounded.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        rows: Sequence[Tensor] = (),
        *,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.dtype, self.group = dtype, group
        bits = torch.float32.itemsize // dtype.itemsize
        self.shapes = [tuple(matrix.shape) for matrix in matrices] + [(*row.shape[:-1], bits) for row in rows]
        held = [local_part(matrix)[1] for matrix in matrices]
        held += [(*local_part(row)[1][:-1], slice(0, bits)) for row in rows]
        self.device = matrices[0].device if matrices else torch.device("cpu")
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = range(self.world_size)
        everyone: list[list[Slices]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(everyone, held, group=group)
        self.places = [[everyone[rank][i] for rank in self.ranks] for i in range(len(held))]
        by_size = sorted(range(len(matrices)), key=lambda i: -matrices[i].numel())
        self.owners = {i: position % self.world_size for position, i in enumerate(by_size)}
        self.owners |= {len(matrices) + i: self.owners[i] for i in range(len(rows))}
        self.senders = [self._senders(places, owner=self.owners[i]) for i, places in enumerate(self.places)]
        self.rounds: list[list[int]] = []
        """Indices of the matrices of each round, then those of their rows."""
        room = 0
        for start in range(0, len(by_size), self.world_size):
            one_each = by_size[start : start + self.world_size]
            largest = matrices[one_each[0]].numel()
            if largest > room:
                self.rounds.append([])
                room = max(OWNED_ELEMENTS, largest)
            self.rounds[-1] += one_each
            room -= largest
        if rows:
            self.rounds = [[*indices, *(len(rows) + i for i in indices)] for indices in self.rounds]

    def _senders(self, places: list[Slices], *, owner: int) -> set[int]:
        """Of ranks that hold the same piece of a matrix, the one nearest to its owner."""
        nearest: dict[tuple[tuple[int, int], ...], int] = {}
        for rank in sorted(self.ranks, key=lambda rank: abs(rank - owner)):
            nearest.setdefault(tuple((part.start, part.stop) for part in places[rank]), rank)
        return set(nearest.values())

    def collect(self, matrices: list[int], pieces: Mapping[int, Tensor]) -> Transfer:
        """Send this rank's ``pieces`` (by index) of the ``matrices`` of a round to their owners."""
        outgoing = [[i for i in self._of(matrices, rank) if self.rank in self.senders[i]] for rank in self.ranks]
        return self._start(
            [pieces[i] for to_rank in outgoing for i in to_rank],
            [sum(self._size(i, self.rank) for i in to_rank) for to_rank in outgoing],
            [sum(self._size(i, rank) for i in self._sent_by(rank, matrices)) for rank in self.ranks],
        )

    def assemble(self, matrices: list[int], transfer: Transfer) -> dict[int, Tensor]:
        """The whole matrices of the round that this rank owns, by index."""
        whole = {
            i: torch.empty(self.shapes[i], dtype=self.dtype, device=self.device) for i in self._of(matrices, self.rank)
        }
        for rank, arrived in enumerate(transfer.wait()):
            indices = self._sent_by(rank, matrices)
            for i, piece in zip(indices, arrived.split([self._size(i, rank) for i in indices]), strict=True):
                part = whole[i][self.places[i][rank]]
                part.copy_(piece.view(part.shape))
        return whole

    def distribute(self, matrices: list[int], results: Mapping[int, Tensor]) -> Transfer:
        """Send every rank its pieces of the ``results`` that this rank has for its matrices of the round."""
        mine = self._of(matrices, self.rank)
        return self._start(
            [results[i][self.places[i][rank]] for rank in self.ranks for i in mine],
            [sum(self._size(i, rank) for i in mine) for rank in self.ranks],
            [sum(self._size(i, self.rank) for i in self._of(matrices, rank)) for rank in self.ranks],
        )

    def pieces(self, matrices: list[int], transfer: Transfer) -> dict[int, Tensor]:
        """This rank's pieces of the results of a round, by index."""
        found = {}
        for rank, arrived in enumerate(transfer.wait()):
            indices = self._of(matrices, rank)
            for i, piece in zip(indices, arrived.split([self._size(i, self.rank) for i in indices]), strict=True):
                found[i] = piece.view([part.stop - part.start for part in self.places[i][self.rank]])
        return found

    def _of(self, matrices: list[int], rank: int) -> list[int]:
        """Those of ``matrices`` that ``rank`` owns."""
        return [i for i in matrices if self.owners[i] == rank]

    def _sent_by(self, rank: int, matrices: list[int]) -> list[int]:
        """Those of this rank's own among ``matrices`` of which ``rank`` sends its piece."""
        return [i for i in self._of(matrices, self.rank) if rank in self.senders[i]]

    def _size(self, matrix: int, rank: int) -> int:
        return math.prod(part.stop - part.start for part in self.places[matrix][rank])

    def _start(self, sends: list[Tensor], send_counts: list[int], receive_counts: list[int]) -> Transfer:
        """The all-to-all of ``sends``, in the order of the ranks they go to."""
        buffer = torch.empty(sum(receive_counts), dtype=self.dtype, device=self.device)
        sent = torch.cat([tensor.reshape(-1) for tensor in sends]) if sends else buffer.new_empty(0)
        work = dist.all_to_all_single(buffer, sent, receive_counts, send_counts, group=self.group, async_op=True)
        return Transfer(work, buffer, receive_counts, sent)
