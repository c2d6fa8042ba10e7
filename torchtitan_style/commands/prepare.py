"""``prepare``: tokenize the corpus of a configuration once, for all runs that use it; show rows of it.

python -m torchtitan_style prepare --config train_configs/qwen3.toml --show 2
"""

from __future__ import annotations

import contextlib
import os
import time
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.launch.configure import load_config
from torchtitan_style.launch.preflight import check_writable
from torchtitan_style.launch.run_lock import check_free, run_lock
from torchtitan_style.train.stopping import interruptible

from .cli import Arguments
from .progress import tokenizing_bar

if TYPE_CHECKING:
    from torchtitan_style.config import Config
    from torchtitan_style.data.prepare.prepared import Prepared
    from torchtitan_style.data.prepare.store import CorpusStore

USAGE = """\
usage: python -m torchtitan_style prepare [--config FILE] [--processes N] [--show N [--json]] [--section.key VALUE ...]

Tokenizes the corpus into memory-mapped shards, in the dump folder or in data.prepared_folder, where runs of
the same configuration find them. If it is interrupted, the same command resumes.

  --config FILE         the configuration, a file or the name of one in train_configs/, as qwen3_8b; qwen3 if left out
  --processes N         processes that tokenize; one per CPU if left out
  --show N              then print the first N rows as the model sees them, what is trained on in colour or underlined;
                        of a streamed corpus too
  --json                with --show: an object a row, with its ids, labels and documents
  --section.key VALUE   override a key of it, as in --data.prepared_folder corpora/fineweb
  --help data           what a corpus can be
"""


def main(arguments: list[str]) -> None:
    """Run the command."""
    with reported_errors(), interruptible():
        parser = Arguments(USAGE)
        parser.add_argument("--config", default=os.path.relpath(DEFAULT_CONFIG))
        parser.add_argument("--processes", type=int)
        parser.add_argument("--show", type=int)
        parser.add_argument("--json", action="store_true")
        options, overrides = parser.parse_known(arguments)
        for name in ("processes", "show"):
            if (number := getattr(options, name)) is not None and number < 1:
                raise UserError(f"--{name}: must be at least 1, not {number}")
        if options.json and not options.show:
            raise UserError("--json: is the form of --show N, which is missing")
        # Whatever the number of ranks: the corpus is the same.
        config = load_config(options.config, overrides, world_size=None)
        if config.data.streaming and not options.show:
            raise UserError("data.streaming: a streamed corpus is not prepared; with --data.streaming false it is")

        from torchtitan_style.data.prepare.store import CorpusStore
        from torchtitan_style.data.prepare.validation_sets import prepare_sets

        begin = time.monotonic()
        folder = Path(config.job.dump_folder)
        check_writable(folder)
        check_free(folder)
        store = CorpusStore.of(config, for_run=False)
        # A folder for several runs has a lock of its own, at which others wait.
        lock = contextlib.nullcontext() if config.data.prepared_folder else run_lock(folder)
        with lock, tokenizing_bar(stderr=options.json) as (progress, say):
            prepared = store.get(say=say, progress=progress, processes=options.processes)
            if not config.data.prepared_folder and not config.data.streaming:  # else the run does, in its dump folder
                prepare_sets(config, prepared.tokenizer, say=say)
            if not options.show:
                tokens = prepared.tokens("train") + prepared.tokens("validation")
                print(f"{prepared.folder} has {tokens:,} tokens, ready after {time.monotonic() - begin:,.1f} s")
        if options.show:
            _show(config, store, prepared, options.show, json=options.json)


def _show(config: Config, store: CorpusStore, prepared: Prepared, count: int, *, json: bool) -> None:
    """Print the first rows of training."""
    from torchtitan_style.data.prepare.show import as_json, as_text, first_rows
    from torchtitan_style.data.tokenizer.tokenizer import Tokenizer

    from .show_rows import print_rows

    rows = first_rows(config, store, prepared, count)
    if json:
        for row in as_json(rows):
            print(dumps(row))
    else:
        print_rows(as_text(rows, Tokenizer(prepared.tokenizer)))
