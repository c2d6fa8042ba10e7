"""``prepare``: tokenize the corpus of a configuration once, for all runs that use it.

python -m torchtitan_style prepare --config train_configs/qwen3.toml
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.launch.configure import load_config
from torchtitan_style.launch.preflight import check_writable
from torchtitan_style.launch.run_lock import check_free, run_lock
from torchtitan_style.train.stopping import interruptible

from .cli import Arguments
from .progress import tokenizing_bar

USAGE = """\
usage: python -m torchtitan_style prepare [--config FILE] [--processes N] [--section.key VALUE ...]

Tokenizes the corpus into memory-mapped shards, in the dump folder or in data.prepared_folder, where runs of
the same configuration find them. If it is interrupted, the same command resumes.

  --config FILE         the configuration, a file or the name of one in train_configs/, as qwen3_8b; qwen3 if left out
  --processes N         processes that tokenize; one per CPU if left out
  --section.key VALUE   override a key of it, as in --data.prepared_folder corpora/fineweb
  --help data           what a corpus can be
"""


def main(arguments: list[str]) -> None:
    """Run the command."""
    with reported_errors(), interruptible():
        parser = Arguments(USAGE)
        parser.add_argument("--config", default=os.path.relpath(DEFAULT_CONFIG))
        parser.add_argument("--processes", type=int)
        options, overrides = parser.parse_known(arguments)
        if options.processes is not None and options.processes < 1:
            raise UserError(f"--processes: must be at least 1, not {options.processes}")
        # Whatever the number of ranks: the corpus is the same.
        config = load_config(options.config, overrides, world_size=None)
        if config.data.streaming:
            raise UserError("data.streaming: a streamed corpus is not prepared; with --data.streaming false it is")

        from torchtitan_style.data.store import CorpusStore

        begin = time.monotonic()
        folder = Path(config.job.dump_folder)
        check_writable(folder)
        check_free(folder)
        # A folder for several runs has a lock of its own, at which others wait.
        lock = contextlib.nullcontext() if config.data.prepared_folder else run_lock(folder)
        with lock, tokenizing_bar() as (progress, say):
            store = CorpusStore.of(config, for_run=False)
            prepared = store.get(say=say, progress=progress, processes=options.processes)
        tokens = prepared.tokens("train") + prepared.tokens("validation")
        print(f"{prepared.folder} has {tokens:,} tokens, ready after {time.monotonic() - begin:,.1f} s")
