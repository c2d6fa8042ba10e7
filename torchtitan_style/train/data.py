"""The data of one run: what is prepared, its loader, its validation batches, and what a resume must find unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from torchtitan_style.common.files import refresh_names
from torchtitan_style.config import Config
from torchtitan_style.config.layout import plan_batch, plan_streams
from torchtitan_style.data.loader import Batch, Loader, Microbatch, PreparedSteps, StreamedSteps, validation_batches
from torchtitan_style.data.mixture import choose
from torchtitan_style.data.prepare.prepared import describe_chat
from torchtitan_style.data.prepare.store import CorpusStore
from torchtitan_style.data.prepare.validation_sets import SetStore, prepare_sets
from torchtitan_style.data.rows import NO_LABEL, Rows, RowSource
from torchtitan_style.data.sources.problems import FILE_NAME, BadDocuments, Problem, describe_left_out
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer, token_bytes
from torchtitan_style.distributed.world import World, on_main
from torchtitan_style.metrics.display import Display
from torchtitan_style.metrics.validation import HeldOutSet


class RunData:
    """Every rank has one. Methods are called by all ranks."""

    def __init__(self, config: Config, world: World, display: Display) -> None:
        self.config, self.world, self.display = config, world, display
        self.batch_plan = plan_batch(config.training, world.layout.dp)
        self.store = CorpusStore.of(config, dp=world.layout.dp)
        self.prepared = on_main(lambda: self.store.get(say=display.say))
        refresh_names(self.prepared.folder)
        self.mixture = self.prepared.names if config.data.dataset == "mixture" else []
        """Names of the corpora of a mixture."""
        self.bad_documents = BadDocuments(
            Path(config.job.dump_folder) / FILE_NAME,
            limit=config.data.max_bad_documents,
            allow_lost=config.data.allow_lost_files,
        )
        self.source = self._streams() if config.data.streaming else self._prepared_rows()
        self.loader = Loader(
            self.source,
            self.batch_plan,
            dp_rank=world.dp_rank,
            dp=world.layout.dp,
            num_corpora=len(self.prepared.names),
            workers=config.data.num_workers,
            document_mask=config.data.document_mask,
            device=world.device,
            part=world.part,
        )
        if (busy := len(self.loader.shares)) < config.data.num_workers:
            what = "streams" if config.data.streaming else "rows"
            display.warn(f"data.num_workers: a rank has {what} for {busy} workers only, not {config.data.num_workers}")
        self.validation_batches = self._held_out() if config.holds_out else []
        self.best_metric = config.checkpoint.best_metric
        """Changes whenever the documents do that the best checkpoint is chosen by, if they are a set."""
        self.validation_sets = self._validation_sets()
        self._problems: list[Problem] = []
        """Documents that this rank could not read, since they were last reported."""

    def next_batch(self) -> Batch:
        """This rank's part of the next step."""
        batch = self.loader.next()
        self._problems += batch.problems
        return batch

    def identity(self) -> dict[str, Any]:
        """Beside the settings, what must not change for the data to continue with the very next row."""
        return {
            "tokenizer": self.prepared.manifest["tokenizer_sha256"][:16],
            "content": [self.prepared.fingerprint(name) for name in self.prepared.names],
        }

    def describe(self) -> str:
        """How much data there is, in words."""
        if isinstance(self.source, StreamedSteps):
            return f"from {self.source.num_streams} streams"
        rows = self.config.training.steps * self.batch_plan.global_batch_size
        epochs = [
            f"{rows * weight / source.num_rows:.2f} epochs{f' of {name}' if name else ''}"
            for name, weight, source in zip(
                self.prepared.names, self.config.data.weights(), self.source.sources, strict=True
            )
        ]
        return f"{', '.join(epochs)} of {self.prepared.tokens('train'):,} tokens"

    def describe_chat(self) -> Iterator[str]:
        """A line about each corpus of conversations: of a streamed one, about what is held out of it."""
        for name, entry in self.prepared.manifest["corpora"].items():
            if line := describe_chat(name, entry):
                held_out = "held out of the stream: " if self.config.data.streaming else ""
                yield held_out + line

    def resuming(self, state: dict[str, Any]) -> str:
        """What it costs to find the position in the data again, in words; "" if nothing."""
        if not isinstance(self.source, StreamedSteps):
            return ""
        records = sum(place[2] for stream in state.values() for place in stream["places"])
        return f"; the streams read past up to {records:,} documents to find their places"

    def report_problems(self) -> None:
        """List documents that this and other ranks could not read. Raises UserError if there are too many."""
        mine, self._problems = self._problems, []
        of_ranks: list[list[Problem]] = [[]] * self.world.layout.world_size
        dist.all_gather_object(of_ranks, mine)
        before = self.bad_documents.count, len(self.bad_documents.lost)
        on_main(lambda: self.bad_documents.add(problem for problems in of_ranks for problem in problems))
        if (self.bad_documents.count, len(self.bad_documents.lost)) > before:
            self.display.warn(
                f"so far, {describe_left_out(self.bad_documents.count, self.bad_documents.lost)}; "
                f"{self.bad_documents.path} lists them"
            )

    def _rows(self, part: str) -> list[RowSource]:
        """Rows of each corpus, "train" or "validation"."""
        seq_len, packing = self.config.training.seq_len, self.config.data.packing
        return [self.prepared.rows(name, part, seq_len=seq_len, packing=packing) for name in self.prepared.names]

    def _prepared_rows(self) -> PreparedSteps:
        return PreparedSteps(
            self._rows("train"),
            self.prepared.names,
            self.config.data.weights(),
            global_batch=self.batch_plan.global_batch_size,
            seed=self.config.training.seed,
        )

    def _streams(self) -> StreamedSteps:
        config, global_batch = self.config, self.batch_plan.global_batch_size
        return StreamedSteps(
            on_main(lambda: self.store.streamed(self.prepared)),
            config.data.weights(),
            global_batch=global_batch,
            num_streams=plan_streams(config.data, global_batch, self.world.layout.dp),
            packing=config.data.packing,
            seq_len=config.training.seq_len,
            seed=config.training.seed,
        )

    def _validation_sets(self) -> list[HeldOutSet]:
        """This rank's batches of the further held-out sets, all of their rows."""
        config, tokenizer = self.config, self.prepared.tokenizer
        if config.validation.sets and not config.validation.enable:
            self.display.warn("validation.enable = false: validation.sets are not validated either")
        prepared = on_main(lambda: prepare_sets(config, tokenizer, say=self.display.say))
        sizes = token_bytes(Tokenizer(tokenizer)) if prepared else np.empty(0, np.int64)
        found = []
        for name, each in prepared.items():
            refresh_names(each.folder)
            if config.checkpoint.best_metric == f"val_loss/{name}":
                self.best_metric += f" {each.fingerprint('')}"
            source = SetStore(config, name, tokenizer=tokenizer).rows(each)
            rows = source.rows(np.arange(source.num_rows))
            labels = rows.labels[rows.labels != NO_LABEL]
            found.append(HeldOutSet(name, self._batches(rows), tokens=labels.size, bytes=int(sizes[labels].sum())))
        return found

    def _held_out(self) -> list[Microbatch]:
        """This rank's validation batches: all held-out rows, or as many as asked for, from each corpus its share."""
        config, sources = self.config, self._rows("validation")
        counts = [source.num_rows for source in sources]
        if config.validation.steps != -1:
            # No more than have each corpus give all that it has: of the rest there is none.
            weights = config.data.weights()
            enough = max(int(count / weight) + 1 for count, weight in zip(counts, weights, strict=True)) + 100
            wanted = np.arange(min(config.validation.steps * self.batch_plan.global_batch_size, enough))
            shares = np.bincount(choose(wanted, config.data.weights(), ""), minlength=len(sources))
            counts = np.minimum(counts, shares).tolist()
        parts = [source.rows(np.arange(count)) for source, count in zip(sources, counts, strict=True) if count]
        return self._batches(Rows.join(parts))

    def _batches(self, rows: Rows) -> list[Microbatch]:
        return validation_batches(
            rows,
            self.batch_plan,
            dp=self.world.layout.dp,
            dp_rank=self.world.dp_rank,
            document_mask=self.config.data.document_mask,
            device=self.world.device,
            part=self.world.part,
        )
