"""The further held-out sets of a run, [[validation.sets]]: each prepared in ``<dump folder>/validation_sets/NAME``.

    prepared = SetStore(config, "code", tokenizer=prepared.tokenizer).get(say=print)

They are tokenized with the run's tokenizer, which must be there. Needs no torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.config import Config
from torchtitan_style.config.schema import Data
from torchtitan_style.models.registry import model_config

from ..rows import RowSource
from ..sources.corpus import source_files
from ..sources.problems import counted
from .build import Say
from .prepared import Prepared
from .store import CorpusStore
from .tokenize import Progress

FOLDER = "validation_sets"


class SetStore(CorpusStore):
    """Gives the prepared folder of one held-out set. tokenizer: folder of the run's."""

    least = 2

    def __init__(self, config: Config, name: str, *, tokenizer: Path) -> None:
        [entry] = [each for each in config.validation.sets if each.name == name]
        data = config.data
        shared = ("packing", "document_mask", "max_bad_documents", "allow_lost_files", "max_document_bytes")
        super().__init__(
            Data(
                **entry.model_dump(exclude={"name"}),
                **{key: getattr(data, key) for key in shared},
                tokenizer=str(tokenizer.resolve()),
                validation_fraction=0,
            ),
            Path(config.job.dump_folder),
            vocab_size=model_config(config.model).vocab_size,
            seq_len=config.training.seq_len,
            validates=False,
            allow_changed_data=config.checkpoint.allow_changed_data,
        )
        self.name, self.folder = name, self.dump_folder / FOLDER / name
        self.hands_out = False  # the tokenizer in the dump folder is that of the corpus

    @property
    def is_running(self) -> bool:
        return any(self.dump_folder.glob("checkpoint/step-*"))

    def get(self, *, say: Say, progress: Progress | None = None, processes: int | None = None) -> Prepared:
        """As ``CorpusStore.get``."""
        is_new = []

        def tell(line: str) -> None:
            if line.startswith("tokenized "):  # tells tokens to train on from tokens held out
                is_new.append(True)
            elif not line.startswith("best_fit: "):
                say(f"validation set {self.name}: {line}")

        try:
            prepared = super().get(say=tell, progress=progress, processes=processes)
        except UserError as error:
            raise _about(self.name, error) from None
        if is_new and not prepared.is_chat(""):  # of conversations there is a line already
            documents = sum(prepared.manifest["corpora"][""]["documents"].values())
            what = f"{counted(documents, 'document')}, {counted(prepared.tokens('train'), 'token')}"
            say(f"validation set {self.name}: {what}")
        return prepared

    def rows(self, prepared: Prepared) -> RowSource:
        """All documents of the set."""
        return prepared.rows("", "train", seq_len=self.seq_len, packing=self.data.packing, least=self.least)

    def _settings(self, present: Prepared | None) -> dict[str, Any]:
        # The tokenizer is compared by content: its folder may have moved with the run.
        return super()._settings(present) | {"tokenizer": ""}

    def _check_may_change(self, change: str) -> None:
        if self.is_running and not self.allow_changed_data:
            raise UserError(
                f"{change} since this run began, and its figures could not be compared with the earlier ones; restore "
                "it, give the changed set another name, or prepare it again with --checkpoint.allow_changed_data"
            )


def check_sets(config: Config) -> None:
    """Raise UserError if the files of a set that is not prepared yet are missing: before the corpus is prepared, which
    may take hours."""
    for each in config.validation.sets if config.validation.enable else []:
        if not (Path(config.job.dump_folder) / FOLDER / each.name / "manifest.json").exists():
            try:
                source_files(each)
            except UserError as error:
                raise _about(each.name, error) from None


def _about(name: str, error: UserError) -> UserError:
    """``error`` with the key of a set in the place of that of a corpus."""
    return UserError(f"validation.sets: {name}: {re.sub(r'^data[.](?=[a-z_]+:)', '', str(error))}")


def prepare_sets(config: Config, tokenizer: Path, *, say: Say) -> dict[str, Prepared]:
    """Find or prepare every held-out set, by name; none if nothing is validated. Raises UserError as
    ``CorpusStore.get``."""
    sets = config.validation.sets if config.validation.enable else []
    return {each.name: SetStore(config, each.name, tokenizer=tokenizer).get(say=say) for each in sets}
