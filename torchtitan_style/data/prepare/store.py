"""The corpora of a run: found where they were prepared, or prepared now.

    prepared = CorpusStore.of(config, dp=dp).get(say=print)

The launcher, the ``prepare`` command and the run itself all ask in this way; what is there already is only checked.
Needs no torch: the launcher asks before it starts the ranks, so that a mistake in the corpus is found at once.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import copy_folder
from torchtitan_style.common.locks import locked
from torchtitan_style.common.reading import read_json_object
from torchtitan_style.config import Config
from torchtitan_style.config.layout import plan_batch
from torchtitan_style.config.schema import Corpus, Data
from torchtitan_style.models.registry import model_config

from ..sources.corpus import source_files
from ..sources.problems import FILE_NAME
from ..streams import StreamedCorpus
from ..tokenizer.tokenizer import Tokenizer
from .build import Build, Say, recipe_of
from .changes import change_of
from .prepared import Prepared, read_prepared, template_hash
from .tokenize import Progress, lines_of_progress


class CorpusStore:
    """Gives the tokenizer and the prepared corpora that a configuration asks for.

    vocab_size: of the model. seq_len: tokens of a row; rows are packed ahead for it. validates: whether documents are
    held out of training. held_out_rows: rows wanted of what is held out of streams. for_run: whether the dump folder
    gets its own copy of the tokenizer. allow_changed_data: accept a corpus that has changed after the first checkpoint.
    """

    least = 0
    """Tokens that a corpus must have; 0: a row."""

    def __init__(
        self,
        data: Data,
        dump_folder: Path,
        *,
        vocab_size: int,
        seq_len: int,
        validates: bool = True,
        held_out_rows: int = 0,
        allow_changed_data: bool = False,
        for_run: bool = True,
    ) -> None:
        self.data, self.dump_folder, self.vocab_size, self.seq_len = data, dump_folder, vocab_size, seq_len
        self.validates, self.allow_changed_data = validates, allow_changed_data
        folder = Path(os.path.expanduser(data.prepared_folder)) if data.prepared_folder else dump_folder / "data"
        self.folder = folder.resolve() if folder.is_symlink() else folder  # its target is replaced, not the link
        self.hands_out = for_run or not data.prepared_folder
        # Each corpus of a mixture needs its share, and at least a row.
        shares = [max(math.ceil(held_out_rows * weight), 1) if held_out_rows else 0 for weight in data.weights()]
        self.held_out = [rows * seq_len for rows in shares]
        """Tokens to hold out of each streamed corpus."""

    @classmethod
    def of(cls, config: Config, *, dp: int = 1, for_run: bool = True) -> CorpusStore:
        """The store of a run. dp: data-parallel ranks, which decide how much is held out of streams."""
        data, validation = config.data, config.validation
        needs_held_out = data.streaming and config.holds_out
        return cls(
            data,
            Path(config.job.dump_folder),
            vocab_size=model_config(config.model).vocab_size,
            seq_len=config.training.seq_len,
            validates=config.holds_out,
            held_out_rows=validation.steps * plan_batch(config.training, dp).global_batch_size if needs_held_out else 0,
            allow_changed_data=config.checkpoint.allow_changed_data,
            for_run=for_run,
        )

    @property
    def is_running(self) -> bool:
        """Whether the run has checkpoints. A folder prepared for other runs is not tied to the dump folder's."""
        return self.hands_out and any(self.dump_folder.glob("checkpoint/step-*"))

    def get(self, *, say: Say, progress: Progress | None = None, processes: int | None = None) -> Prepared:
        """Find the prepared folder, or prepare it. Continues what an earlier call left unfinished.

        say: called with a line of progress. progress: called regularly while tokenizing; default: a line every ten
        seconds. processes: default: one per CPU. Raises UserError if the corpus cannot be used; then nothing is left
        behind but the list of bad documents.
        """
        self._check_replaceable()
        with locked(self.folder, say) if self.data.prepared_folder else contextlib.nullcontext():
            present = read_prepared(self.folder, say)
            settings = self._settings(present)
            change = change_of(present, self.data, settings) if present else None
            if change:
                self._check_may_change(change)
            if present is None or change or self._lacks_held_out(present):
                present = self._prepare(settings, say, progress or lines_of_progress(say), processes or _cpus())
            else:
                # Shares were reported when it was prepared.
                self._pack_rows(present, say=lambda line: say(line) if "again" in line else None)
            if self.hands_out:
                self._hand_out(present)
            return present

    def streamed(self, prepared: Prepared) -> list[StreamedCorpus]:
        """What the streams of data.streaming read."""
        return [
            StreamedCorpus(
                name=name,
                files=tuple(source_files(corpus)),
                recipe=recipe_of(self.data, corpus, prepared.manifest["settings"], prepared.tokenizer),
                max_bad_documents=self.data.max_bad_documents,
            )
            for name, corpus in self.data.corpora().items()
        ]

    def _prepare(self, settings: dict[str, Any], say: Say, progress: Progress, processes: int) -> Prepared:
        """Tokenize, pack rows, publish."""
        dump_folder = self.dump_folder if self.hands_out else None
        build = Build(self.data, self.folder, dump_folder, settings=settings, say=say)
        with build.staged():
            # A model is tied to its tokens: changed data is read with the same tokenizer.
            trained = self.dump_folder / "tokenizer" if self.is_running else None
            made = build.make(trained=trained, held_out=self.held_out, progress=progress, processes=processes)
            self._pack_rows(made, say=say)
            prepared = build.publish(made)
        if dump_folder and not self.data.streaming:
            (dump_folder / FILE_NAME).unlink(missing_ok=True)  # of an earlier attempt
        return prepared

    def _settings(self, present: Prepared | None) -> dict[str, Any]:
        """What decides the content of the prepared folder, besides the corpus's files.

        With validation off nothing is held out, except in a run that has begun: it keeps the data that it has.
        """
        fraction = self.data.validation_fraction if self.validates else 0.0
        if not self.validates and present and self.is_running:
            fraction = present.manifest["settings"].get("validation_fraction", fraction)
        return {
            "tokenizer": self.data.tokenizer,
            "vocab_size": self.vocab_size,
            "validation_fraction": fraction,
            "max_document_bytes": self.data.max_document_bytes,
            "streaming": self.data.streaming,
            "corpora": {name: self._corpus_settings(corpus) for name, corpus in self.data.corpora().items()},
        } | ({"longest": self.longest} if self.data.has_chat else {})

    @property
    def longest(self) -> int:
        """Tokens that a sample of a conversation has at most: a row's inputs and its last label; 0: any number."""
        return self.seq_len + 1 if self.data.packing == "best_fit" else 0

    @staticmethod
    def _corpus_settings(corpus: Corpus) -> dict[str, Any]:
        keys = {"dataset", "subset", "split", "text_key", "paths"}
        return corpus.model_dump(
            include=keys | ({"format", "messages_key", "train_on"} if corpus.format == "chat" else set())
        )

    def _lacks_held_out(self, present: Prepared) -> bool:
        """Whether more is wanted for validation than was held out of a streamed corpus that has more."""
        return self.data.streaming and any(
            corpus["tokens"]["validation"] < wanted and not corpus["exhausted"]
            for corpus, wanted in zip(present.manifest["corpora"].values(), self.held_out, strict=True)
        )

    def _pack_rows(self, prepared: Prepared, *, say: Say) -> None:
        """Pack the rows of every part that is used. Raises UserError if a corpus has too few tokens."""
        train = () if self.data.streaming else ("train",)
        for part in (*train, *(("validation",) if self.validates else ())):
            for name in prepared.names:
                prepared.rows(name, part, seq_len=self.seq_len, packing=self.data.packing, least=self.least, say=say)

    def _check_may_change(self, change: str) -> None:
        """Raise UserError if this run, or others, rely on the folder as it was."""
        if self.is_running and not self.allow_changed_data:
            mend = f"delete {self.folder} to prepare it again" if str(self.folder) in change else "restore it"
            raise UserError(
                f"{self.dump_folder}: {change} since this run began, so the next batch would differ; {mend}, "
                "start a new run with another --job.dump_folder, or continue at the same position of the new data with "
                "--checkpoint.allow_changed_data"
            )
        if self.data.prepared_folder:
            raise UserError(
                f"data.prepared_folder: {self.folder}: {change} since it was prepared; name another folder, or delete "
                "this one"
            )

    def _check_replaceable(self) -> None:
        """Raise UserError if something that this program did not write would be replaced."""
        try:
            manifest = read_json_object(self.folder / "manifest.json", most=2**28)
            is_prepared = isinstance(manifest.get("format"), int) and "corpora" in manifest
        except (OSError, ValueError):
            is_prepared = (self.folder / "manifest.json").exists() and (self.folder / "tokenizer").is_dir()
        staging = self.folder.with_name(f"{self.folder.name}.tmp")
        is_staging = any((staging / name).exists() for name in ("plan.json", "plan.json.tmp", "manifest.json"))
        places = [(self.folder, is_prepared), (staging, is_staging)]
        if self.hands_out:
            tokenizer = self.dump_folder / "tokenizer"
            places.append((tokenizer, (tokenizer / "tokenizer.json").exists()))
        key = "data.prepared_folder" if self.data.prepared_folder else "job.dump_folder"
        for place, ours in places:
            if not ours and place.exists() and (not place.is_dir() or any(place.iterdir())):
                raise UserError(
                    f"{place} is not a prepared corpus, and would be overwritten by one; name another folder with {key}"
                )

    def _hand_out(self, prepared: Prepared) -> None:
        """Copy the tokenizer and the list of bad documents into the dump folder."""
        own = self.dump_folder / "tokenizer"
        try:
            same = Tokenizer(own).fingerprint == prepared.manifest["tokenizer_sha256"]
            same = same and template_hash(own) == template_hash(prepared.tokenizer)
        except UserError:
            same = False
        if not same:
            if self.is_running and not self.allow_changed_data and (own / "tokenizer.json").exists():
                raise UserError(
                    f"{own}: the tokenizer has changed since this run began; restore it, or use that of the prepared "
                    "data with --checkpoint.allow_changed_data"
                )
            self.dump_folder.mkdir(parents=True, exist_ok=True)
            copy_folder(prepared.tokenizer, own)
        listed = prepared.folder / FILE_NAME
        if listed.exists() and not (self.dump_folder / FILE_NAME).exists():
            shutil.copyfile(listed, self.dump_folder / FILE_NAME)


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
