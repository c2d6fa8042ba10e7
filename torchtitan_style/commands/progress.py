"""Progress bars that count bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from torchtitan_style.data.prepare.tokenize import lines_of_progress


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of bytes done. Shows nothing where there is no terminal."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:  # some versions of rich print an empty line there, even if disabled
        yield lambda count: None
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def tokenizing_bar(*, stderr: bool = False) -> Iterator[tuple[Callable[[int, int, int], None], Callable[[str], None]]]:
    """Yields a function to call with bytes read, bytes in all and tokens made, and one that prints a line above
    the bar. Without a terminal there is a line of progress every ten seconds. stderr: all of it goes there."""
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[speed]}"))
    console = Console(highlight=False, soft_wrap=True, stderr=stderr)

    def say(line: str) -> None:
        console.print(line, markup=False)

    if not console.is_terminal:
        yield lines_of_progress(say), say
        return
    begin = time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None, speed="")

        def progress(done: int, total: int, tokens: int) -> None:
            speed = f"{tokens / max(time.monotonic() - begin, 1e-9):,.0f} tokens/s"
            bar.update(task, completed=done, total=total, speed=speed)

        yield progress, say
