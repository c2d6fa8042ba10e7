"""The data of a run, as its configuration asks for it. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from torchtitan_style.config import Config
from torchtitan_style.config.layout import plan_batch
from torchtitan_style.config.schema import Data
from torchtitan_style.models.registry import model_config

from .prepare import prepare
from .prepared import Prepared
from .tokenize import Progress

__all__ = ["data_of_run", "prepare_data"]


def data_of_run(config: Config) -> Data:
    """The data section as it applies: with validation off, nothing is held out from training."""
    if config.validation.enable:
        return config.data
    return config.data.model_copy(update={"validation_fraction": 0.0})


def prepare_data(
    config: Config,
    *,
    dp: int = 1,
    say: Callable[[str], None],
    progress: Progress | None = None,
    processes: int | None = None,
    for_run: bool = True,
) -> Prepared:
    """Tokenizer, prepared corpora and tables of rows of ``config``; what is there already is only checked.

    dp: data-parallel ranks; only matters to what is streamed. The others as in ``data.prepare.prepare``.
    Raises UserError if the corpus cannot be used.
    """
    training, validation = config.training, config.validation
    needs_held_out = config.data.streaming and validation.enable
    rows = validation.steps * plan_batch(training, dp).global_batch_size if needs_held_out else 0
    # Each corpus of a mixture has to have its share, and a row at least.
    of_corpora = [max(math.ceil(rows * weight), 1) if rows else 0 for weight in config.data.weights()]

    def lay_out_rows(prepared: Prepared, say: Callable[[str], None]) -> None:
        """See that there are rows, and have them packed."""
        for part in (*(() if config.data.streaming else ("train",)), *(("validation",) if validation.enable else ())):
            for name in prepared.names:
                prepared.rows(name, part, seq_len=training.seq_len, packing=config.data.packing, say=say)

    return prepare(
        data_of_run(config),
        Path(config.job.dump_folder),
        vocab_size=model_config(config.model).vocab_size,
        held_out=[count * training.seq_len for count in of_corpora],
        say=say,
        complete=lay_out_rows,
        progress=progress,
        processes=processes,
        allow_changed_data=config.checkpoint.allow_changed_data,
        for_run=for_run,
    )
