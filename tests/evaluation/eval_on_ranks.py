"""One rank of ``eval``: eval_on_ranks.py OUTPUT ARGUMENT ...; the main rank's output goes to OUTPUT."""

from __future__ import annotations

import contextlib
import sys

from torchtitan_style.__main__ import main

if __name__ == "__main__":
    with open(sys.argv[1], "a", encoding="utf-8") as output, contextlib.redirect_stdout(output):
        main(sys.argv[2:])
