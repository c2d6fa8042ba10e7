"""Runs the Python snippets of Markdown pages: those of a page in order, in one namespace.

    python tests/docs/snippets.py docs/learn/rope.md docs/learn/fsdp.md

Prints what they print. With --json FILE, what went wrong on each page ("" if nothing did) is left there instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^```python\n(.*?)^```$", flags=re.S | re.M)


def snippets(page: Path) -> list[tuple[int, str]]:
    """Each with the line of the page that it begins in, from 1."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in FENCE.finditer(text)]


def run_page(page: Path) -> None:
    """Raises what a snippet raises. Tracebacks show the lines of the page."""
    import torch
    import torch.distributed as dist

    namespace: dict[str, Any] = {"__name__": page.stem}
    folder, environment = os.getcwd(), dict(os.environ)
    generator = torch.random.get_rng_state()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        try:
            for line, code in snippets(page):
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
            if dist.is_initialized():
                raise AssertionError(f"{page.name} leaves a process group behind")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            torch.random.set_rng_state(generator)


def main(arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    into = None
    if arguments[0] == "--json":
        into, arguments = Path(arguments[1]), arguments[2:]
    problems = {}
    for name in arguments:
        output = io.StringIO() if into else sys.stdout
        try:
            with contextlib.redirect_stdout(output):
                run_page(Path(name).resolve())
            problems[name] = ""
        except Exception:
            if into is None:
                raise
            problems[name] = output.getvalue() + traceback.format_exc()
    if into:
        into.write_text(json.dumps(problems), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
