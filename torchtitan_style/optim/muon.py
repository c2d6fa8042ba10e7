"""Muon: momentum whose matrices are made orthogonal before they are taken as the step (Jordan 2024).

For the matrices between hidden states, those of attention and MLP; everything else is AdamW's. A sharded
matrix is orthogonalised whole, by one rank (``exchange.py``). With ``normuon_beta2`` its rows are then normalised
(``normuon.py``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import zeros as dtensor_zeros

from torchtitan_style.config.schema import Muon as MuonConfig
from torchtitan_style.distributed.local import local_tensor

from .exchange import OWNED_ELEMENTS, Exchange, Transfer
from .normuon import normalize_rows
from .orthogonalize import orthogonalize, step_scale


class Muon(torch.optim.Optimizer):
    """All ``matrices`` in one parameter group. Made and stepped by all ranks of ``group`` together.

    A matrix may be a stack of several, [S, M, N].

    block_rows: for each matrix, how many rows, of all in a stack, are a matrix of their own; None: all of them. group:
    the ranks that hold the matrices; None: all ranks.
    dtype: type that matrices are orthogonalised, and sent, in. The state is one fp32 "momentum_buffer" a matrix,
    sharded as the matrix is, and with ``normuon_beta2`` its "row_mean_squares", [..., M, 1], which ranks with other
    columns of the same rows have copies of. It is made here, so that a checkpoint can be read into it.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        config: MuonConfig,
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        block_rows: Sequence[int | None] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.matrices, self.config, self.dtype = list(matrices), config, dtype
        self.block_rows = list(block_rows or [None] * len(self.matrices))
        for matrix in self.matrices:
            self.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
            if config.normuon_beta2:
                self.state[matrix]["row_mean_squares"] = _zero_for_each_row(matrix)
        self.exchange: Exchange | None = None
        alone = list(range(len(self.matrices)))
        if _ranks(group) > 1:
            alone = [i for i in alone if _is_cut_between_matrices(self.matrices[i])]
            self.shared = [i for i in range(len(self.matrices)) if i not in alone]
            """Those that are made whole to be made orthogonal; the exchange numbers them from 0."""
            rows = [self.state[self.matrices[i]]["row_mean_squares"] for i in self.shared if config.normuon_beta2]
            self.exchange = Exchange([self.matrices[i] for i in self.shared], rows, dtype=dtype, group=group)
        self.alone = self._batches(alone)
        """Those that no rank needs more of than it has: all, or stacks that are cut between matrices."""

    @torch.no_grad()
    def step_if(self, sound: Tensor) -> None:
        """Update the weights, or leave them and the momentum as they are unless ``sound``.

        sound: a 0-dim bool on the device, which nobody waits for; the same on all ranks.
        """
        for batch in self.alone:
            directions = {i: self._direction(i, sound) for i in batch}
            rows = {i: self._rows(i) for i in batch if self.config.normuon_beta2}
            for i, update in self._updates(directions, rows, sound).items():
                self._apply(i, update, sound)
        if self.exchange is None:
            return
        # While a round is computed, the next one is on its way in and the last one on its way out.
        rounds = self.exchange.rounds
        incoming: Transfer | None = self._collect(rounds[0], sound) if rounds else None
        outgoing: tuple[list[int], Transfer] | None = None
        for this, following in zip(rounds, [*rounds[1:], None], strict=True):
            arriving = incoming
            incoming = self._collect(following, sound) if following else None
            assert arriving is not None
            results = self._results(self.exchange.assemble(this, arriving), sound)
            if outgoing:
                self._apply_round(*outgoing, sound)
            outgoing = this, self.exchange.distribute(this, results)
        if outgoing:
            self._apply_round(*outgoing, sound)

    def _collect(self, indices: list[int], sound: Tensor) -> Transfer:
        assert self.exchange is not None
        matrices = {i: self._direction(self.shared[i], sound) for i in indices if i < len(self.shared)}
        rows = {i: self._row_bits(i) for i in indices if i >= len(self.shared)}
        return self.exchange.collect(indices, matrices | rows)

    def _results(self, whole: Mapping[int, Tensor], sound: Tensor) -> dict[int, Tensor]:
        """What the owner of ``whole`` matrices, and of their rows' numbers, sends back; by the exchange's indices."""
        count = len(self.shared)
        directions = {self.shared[i]: matrix for i, matrix in whole.items() if i < count}
        rows = {self.shared[i - count]: bits.view(torch.float32) for i, bits in whole.items() if i >= count}
        updates = self._updates(directions, rows, sound)  # changes the rows in place, so their bits in ``whole``
        return {i: updates[self.shared[i]] if i < count else tensor for i, tensor in whole.items()}

    def _apply_round(self, indices: list[int], transfer: Transfer, sound: Tensor) -> None:
        assert self.exchange is not None
        for i, piece in self.exchange.pieces(indices, transfer).items():
            if i < len(self.shared):
                self._apply(self.shared[i], piece, sound)
            else:
                self._row_bits(i).copy_(piece)

    def _rows(self, index: int) -> Tensor:
        """This rank's part of the mean squares of a matrix's rows."""
        return local_tensor(self.state[self.matrices[index]]["row_mean_squares"])

    def _row_bits(self, index: int) -> Tensor:
        """The same memory as the exchange has it, by its index."""
        return self._rows(self.shared[index - len(self.shared)]).view(self.dtype)

    def _direction(self, index: int, sound: Tensor) -> Tensor:
        """Take the gradient into the momentum; this rank's part of what is to be made orthogonal."""
        matrix = self.matrices[index]
        momentum, gradient = local_tensor(self.state[matrix]["momentum_buffer"]), local_tensor(matrix.grad)
        gradient = torch.where(sound, gradient, momentum)
        momentum.lerp_(gradient, 1 - self.config.momentum)
        direction = gradient.lerp_(momentum, self.config.momentum) if self.config.nesterov else momentum
        return direction.to(self.dtype)

    def _updates(
        self, directions: Mapping[int, Tensor], rows: Mapping[int, Tensor], sound: Tensor
    ) -> dict[int, Tensor]:
        """Whole matrices made orthogonal and, where there are ``rows``, normalised by these; all by index. Those of one
        shape are multiplied together: several small products at once keep all threads, or a GPU, busy."""
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i in directions:
            alike[self._block_shape(i)].append(i)
        updates = {}
        for shape, indices in alike.items():
            stacks = [directions[i].reshape(-1, *shape) for i in indices]
            results = orthogonalize(torch.cat(stacks), rounds=self.config.ns_steps)
            for i, result in zip(indices, results.split([len(stack) for stack in stacks]), strict=True):
                if i in rows:
                    mean_squares = rows[i].view(*result.shape[:-1], 1)
                    normalize_rows(result, mean_squares, sound, beta2=self.config.normuon_beta2)
                updates[i] = result.reshape(directions[i].shape)
        return updates

    def _batches(self, matrices: Sequence[int]) -> list[list[int]]:
        """Those of ``matrices`` that this rank has something of, by shape, and not more together than it owns of a
        round of an exchange."""
        batches: list[list[int]] = []
        shape, room = None, 0
        for i in sorted(matrices, key=self._block_shape):
            size = local_tensor(self.matrices[i]).numel()
            if size and (self._block_shape(i) != shape or size > room):
                batches.append([])
                shape, room = self._block_shape(i), max(OWNED_ELEMENTS, size)
            if size:
                batches[-1].append(i)
                room -= size
        return batches

    def _block_shape(self, index: int) -> tuple[int, int]:
        """[M, N] of what is made orthogonal by itself: the matrix, each of a stack, or a head."""
        *_, rows, columns = self.matrices[index].shape
        return self.block_rows[index] or rows, columns

    def _apply(self, index: int, update: Tensor, sound: Tensor) -> None:
        """Decay and update this rank's part of a matrix."""
        group, matrix = self.param_groups[0], self.matrices[index]
        lr = group["lr"] * sound  # 0 if not
        weight = local_tensor(matrix)
        weight.mul_(1 - lr * group["weight_decay"])
        weight.sub_(update.to(weight.dtype) * (lr * self._scale(index)))

    def _scale(self, index: int) -> float:
        return step_scale(*self._block_shape(index), self.config.adjust_lr)


def _zero_for_each_row(matrix: Tensor) -> Tensor:
    """[..., M, N] → fp32 [..., M, 1], sharded as the rows of ``matrix`` are."""
    shape = (*matrix.shape[:-1], 1)
    if not isinstance(matrix, DTensor):
        return torch.zeros(shape, dtype=torch.float32, device=matrix.device)
    columns = matrix.ndim - 1
    placements = [Replicate() if getattr(p, "dim", None) == columns else p for p in matrix.placements]
    return dtensor_zeros(shape, dtype=torch.float32, device_mesh=matrix.device_mesh, placements=placements)


def _is_cut_between_matrices(matrix: Tensor) -> bool:
    """Whether ``matrix`` is a stack of which each rank has whole matrices."""
    if matrix.ndim < 3:
        return False
    placements = matrix.placements if isinstance(matrix, DTensor) else ()
    return all(getattr(placement, "dim", 0) == 0 for placement in placements)  # a replica has none


def _ranks(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1
