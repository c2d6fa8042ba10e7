"""The batches of one rank, read ahead by worker processes if so wished.

A ``StepSource`` says which rows make up a step, from a state that belongs to the run as a whole. The ``Loader`` shares
them out among ranks and workers, and decides nothing else.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.common.program import STOP_SIGNALS, begin
from torchtitan_style.common.typed import Content, typed
from torchtitan_style.config.layout import BatchPlan, RowPart

from .mixture import choose
from .rows import Rows, RowSource, batch_hash, row_order
from .sources.problems import Problem
from .streams import Stream, StreamedCorpus
from .tokenizer.tokenizer import Tokenizer

__all__ = ["Batch", "Loader", "Microbatch", "PreparedSteps", "StepSource", "StreamedSteps", "validation_batches"]

WHOLE = RowPart()

State = dict[str, Any]
"""Where the data is, in JSON's types. Parts of it, from ranks and workers, are put together by ``|``."""


class Microbatch(NamedTuple):
    """What goes through the model at once: each [local_batch_size, seq_len], or a part of the positions."""

    inputs: Tensor
    labels: Tensor
    documents: Tensor | None = None
    """Which document of its row each position belongs to, always of whole rows; None if all may attend to all before
    them."""
    positions: Tensor | None = None
    """Counted from the first token of each position's document; None: from the first of the row, which is whole."""

    def of_part(self, part: RowPart) -> Microbatch:
        """The positions of ``part``, with the documents of the whole rows."""
        if part.ranks == 1:
            return self
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.inputs.shape[1], device=self.inputs.device).expand_as(self.inputs)
        return Microbatch(
            take_part(self.inputs, part), take_part(self.labels, part), self.documents, take_part(positions, part)
        )


def take_part(rows: Tensor, part: RowPart) -> Tensor:
    """The positions of ``part``, of rows [B, T, …]."""
    return torch.cat([rows[:, start:end] for start, end in part.spans(rows.shape[1])], dim=1)


@dataclass(frozen=True)
class Batch:
    """One rank's part of an optimizer step."""

    microbatches: list[Microbatch]
    hash: int
    """This rank's part of the global batch's hash, as a signed 64-bit number."""
    padding: int = 0
    """Positions that are padding."""
    corpus_rows: tuple[int, ...] = ()
    """Rows from each corpus."""
    problems: tuple[Problem, ...] = ()
    """Documents that could not be read on the way."""


@dataclass(frozen=True)
class Part:
    """Some rows of one step, and the state after it."""

    rows: Rows
    corpora: NDArray[np.int64]
    """Which corpus each row is from."""
    state: State
    problems: tuple[Problem, ...] = ()


class StepSource(Protocol):
    """The rows of every step of a run."""

    def share(self, rank: int, ranks: int, workers: int) -> list[NDArray[np.int64]]:
        """The places in the global batch that each worker of a rank fills: consecutive ones, in order. There may
        be fewer shares than workers."""
        ...

    def steps(self, state: State, places: NDArray[np.int64]) -> Iterator[Part]:
        """These places' rows of one step after another, from ``state`` on ({}: from the beginning)."""
        ...

    def check(self, state: State) -> None:
        """Raise ValueError if there is no such state."""
        ...


_Row = Annotated[int, Field(ge=0, lt=2**62)]


class _PreparedState(Content):
    rows: list[_Row]
    """Taken of each corpus."""


class _StreamState(Content):
    rows: list[_Row]
    """Taken of each corpus."""
    places: list[Annotated[list[_Row], Field(min_length=4, max_length=4)]]
    """In each corpus: epoch, file, document, and what is used of that."""


class PreparedSteps:
    """Steps from prepared corpora: any row can be read at any time."""

    def __init__(
        self, sources: Sequence[RowSource], names: Sequence[str], weights: list[float], *, global_batch: int, seed: int
    ) -> None:
        self.sources, self.weights, self.global_batch, self.seed = list(sources), weights, global_batch, seed
        self.keys = [f"{seed}/{name}" if name else f"{seed}" for name in names]

    def share(self, rank: int, ranks: int, workers: int) -> list[NDArray[np.int64]]:
        mine = np.array_split(np.arange(self.global_batch), ranks)[rank]
        return [part for part in np.array_split(mine, workers) if len(part)]

    def check(self, state: State) -> None:
        if state and len(typed(_PreparedState, state).rows) != len(self.sources):
            raise ValueError(f"it has another number of corpora than {len(self.sources)}")

    def steps(self, state: State, places: NDArray[np.int64]) -> Iterator[Part]:
        taken = np.array(state.get("rows", [0] * len(self.sources)))  # rows of each corpus so far
        while True:
            chosen = choose(taken.sum() + np.arange(self.global_batch), self.weights, str(self.seed))
            numbers = np.empty_like(chosen)
            for corpus in range(len(self.sources)):
                theirs = chosen == corpus
                numbers[theirs] = taken[corpus] + np.arange(theirs.sum())
                taken[corpus] += theirs.sum()
            parts, order = [], []
            for corpus in np.unique(chosen[places]):
                theirs = np.flatnonzero(chosen[places] == corpus)
                source = self.sources[corpus]
                rows = row_order(numbers[places[theirs]], num_rows=source.num_rows, key=self.keys[corpus])
                parts.append(source.rows(rows))
                order.append(theirs)
            back = np.argsort(np.concatenate(order))
            yield Part(Rows.join(parts).take(back), chosen[places], {"rows": taken.tolist()})


class StreamedSteps:
    """Steps from streams, each of which fills a fixed part of every batch."""

    def __init__(
        self,
        corpora: list[StreamedCorpus],
        weights: list[float],
        *,
        global_batch: int,
        num_streams: int,
        packing: str,
        seq_len: int,
        seed: int,
    ) -> None:
        self.corpora, self.weights = corpora, weights
        self.num_streams, self.rows_each = num_streams, global_batch // num_streams
        self.options: dict[str, Any] = {"packing": packing, "seq_len": seq_len, "seed": seed}

    def share(self, rank: int, ranks: int, workers: int) -> list[NDArray[np.int64]]:
        mine = np.split(np.arange(self.num_streams), ranks)[rank]
        each = np.arange(self.rows_each)
        shares = [part for part in np.array_split(mine, workers) if len(part)]
        return [(streams[:, None] * self.rows_each + each).ravel() for streams in shares]

    def check(self, state: State) -> None:
        for number, stream in state.items():
            found = typed(_StreamState, stream)
            if not (number.isdecimal() and int(number) < self.num_streams):
                raise ValueError(f"there is no stream {number[:20]}")
            if not len(found.rows) == len(found.places) == len(self.corpora):
                raise ValueError(f"it has another number of corpora than {len(self.corpora)}")
            for (_, place, _, _), corpus in zip(found.places, self.corpora, strict=True):
                if place > len(corpus.files):
                    raise ValueError(f"stream {number} is at file {place}, and there are {len(corpus.files)}")

    def steps(self, state: State, places: NDArray[np.int64]) -> Iterator[Part]:
        tokenizer = Tokenizer(Path(self.corpora[0].recipe.tokenizer))  # one for all streams
        streams = [
            Stream(
                number,
                self.corpora,
                self.weights,
                state.get(str(number)),
                num_streams=self.num_streams,
                tokenizer=tokenizer,
                **self.options,
            )
            for number in np.unique(places // self.rows_each).tolist()
        ]
        while True:
            rows, corpora = zip(*(stream.row() for stream in streams for _ in range(self.rows_each)), strict=True)
            yield Part(
                Rows.join(list(rows)),
                np.array(corpora),
                {str(stream.number): stream.state for stream in streams},
                tuple(problem for stream in streams for problem in stream.take_problems()),
            )


class Loader:
    """Deals out a rank's part of one step after another.

    workers: processes that read ahead; 0: none. document_mask: whether the model is told of documents.
    """

    def __init__(
        self,
        source: StepSource,
        plan: BatchPlan,
        *,
        dp_rank: int,
        dp: int,
        num_corpora: int,
        workers: int,
        document_mask: bool,
        device: torch.device,
        part: RowPart = WHOLE,
    ) -> None:
        self.part = part
        self.plan, self.device, self.num_corpora, self.document_mask = plan, device, num_corpora, document_mask
        self.source, self.workers = source, workers
        self.shares = source.share(dp_rank, dp, max(workers, 1))
        self._parts: Iterator[Part | UserError | RunError] | None = None
        self._start: State = {}
        self._reached: State = {}

    def start(self, state: State) -> None:
        """Begin at ``state``, as ``gather_state`` gave it; {}: at the beginning. Raises UserError if there is no such
        state."""
        try:
            self.source.check(state)
        except ValueError as error:
            raise UserError(f"the checkpoint's position in the data cannot be used: {error}") from None
        self._start, self._reached = state, {}
        steps = _Steps(self.source, state, self.shares)
        if not self.workers:
            self._parts = iter(steps)
            return
        from torchdata.stateful_dataloader import StatefulDataLoader

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # a call of torchdata's own
            self._parts = iter(
                StatefulDataLoader(
                    steps,
                    batch_size=None,
                    num_workers=len(self.shares),
                    collate_fn=_as_it_is,
                    multiprocessing_context=_workers_context(),
                    worker_init_fn=_start_worker,
                    generator=torch.Generator(),  # leave torch's own alone: dropout draws from it
                    # Its state is never used: it counts for one number of workers, and ours, beside each part, for any.
                    snapshot_every_n_steps=2**62,
                )
            )

    def next(self) -> Batch:
        """This rank's part of the next step."""
        assert self._parts is not None, "started"
        parts = []
        for _ in self.shares:  # one of each worker, in turn
            try:
                part = next(self._parts)
            except RuntimeError as error:
                part = RunError(f"a data worker has died: {str(error).partition(chr(10))[0]}")
            if isinstance(part, UserError | RunError):
                raise part
            parts.append(part)
            self._reached |= part.state
        rows = Rows.join([part.rows for part in parts])
        corpora = np.bincount(np.concatenate([part.corpora for part in parts]), minlength=self.num_corpora)
        signed = (batch_hash(rows, np.concatenate(self.shares)) + 2**63) % 2**64 - 2**63
        size = self.plan.local_batch_size
        return Batch(
            [
                microbatch(
                    rows.take(np.arange(at, at + size)),
                    self.device,
                    document_mask=self.document_mask,
                    part=self.part,
                )
                for at in range(0, len(rows.inputs), size)
            ],
            signed,
            rows.padding,
            tuple(corpora.tolist()),
            tuple(problem for part in parts for problem in part.problems),
        )

    def gather_state(self, group: dist.ProcessGroup) -> State:
        """The run's state after the last step: what all ranks of the data-parallel ``group`` have, put together."""
        states: list[State] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(states, self._reached, group=group)
        return {key: value for state in (self._start, *states) for key, value in state.items()}

    def close(self) -> None:
        """End the workers."""
        self._parts = None


class _Steps(IterableDataset):  # type: ignore[type-arg]
    """What a worker runs. An error is handed over like a part: torch would bury its message in a traceback."""

    def __init__(self, source: StepSource, state: State, shares: list[NDArray[np.int64]]) -> None:
        self.source, self.state, self.shares = source, state, shares

    def __iter__(self) -> Iterator[Part | UserError | RunError]:
        worker = get_worker_info()
        places = self.shares[worker.id if worker else 0]
        try:
            yield from self.source.steps(self.state, places)
        except (UserError, RunError) as error:
            yield error


def _workers_context() -> Any:
    """Workers are forked from a process without threads that has imported this module: a fork of the rank itself
    would take over locks that its threads hold, and a process of its own takes seconds to import torch."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _as_it_is(part: Any) -> Any:
    return part


def _start_worker(_number: int) -> None:
    """The rank decides when its workers end: a signal to all must not take them away before its last save."""
    begin()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def validation_batches(
    rows: Rows,
    plan: BatchPlan,
    *,
    dp: int,
    dp_rank: int,
    document_mask: bool,
    device: torch.device,
    part: RowPart = WHOLE,
) -> list[Microbatch]:
    """A rank's share of the held-out ``rows``, the same at every validation.

    Where the rows do not fill the last batch, its labels are -100, so that every rank runs as often as the
    others and no row counts twice.
    """
    count, size = len(rows.inputs), plan.local_batch_size
    batches = []
    for start in range(0, count, size * dp):
        wanted = np.arange(start + dp_rank * size, start + (dp_rank + 1) * size)
        batch = microbatch(rows.take(np.minimum(wanted, count - 1)), device, document_mask=document_mask, part=part)
        batch.labels[torch.from_numpy(wanted >= count)] = -100
        batches.append(batch)
    return batches


def microbatch(rows: Rows, device: torch.device, *, document_mask: bool, part: RowPart = WHOLE) -> Microbatch:
    """``rows``, or a part of each, on the device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    arrays = (rows.inputs, rows.labels, *((rows.documents, rows.positions) if document_mask else ()))
    whole = Microbatch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
    return Microbatch(*(None if tensor is None else move(tensor) for tensor in whole.of_part(part)))  # type: ignore[arg-type]
