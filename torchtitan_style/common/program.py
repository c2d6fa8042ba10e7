"""The first thing that each program of this package does: make standard streams safe, and handle signals.

It imports little, so that it runs within milliseconds of the interpreter's start. Child processes inherit standard
streams that are open.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from .errors import UserError, shown

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what torchrun, Kubernetes and SLURM send; what SLURM can be told to send ahead of the time limit."""

received: list[tuple[int, float]] = []
"""Signals to stop that this process has received, and when (``time.monotonic``)."""


# Streams


class _Output(io.FileIO):
    """Standard output or error. Drops what cannot be written."""

    matters = False
    """Whether this output is the program's result: then the program ends if it cannot be written."""
    _lost = False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self._lost:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            if not self.matters:
                return len(data)
            self._lost = True
            if error.errno == errno.EPIPE:  # the reader is gone, as in `... | head`
                raise SystemExit(128 + signal.SIGPIPE) from None
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
            raise SystemExit(1) from None


def begin(*, output_matters: bool = False) -> None:
    """Make the standard streams safe to use. Call it again to change ``output_matters``.

    Those that are closed become /dev/null: otherwise the next file or socket would get their number, and what is
    printed. Characters that the encoding lacks are replaced. Output that cannot be written is dropped, or, with
    ``output_matters``, raises SystemExit: with status 141 if the reader is gone, else with 1 after a message.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            if (null := os.open(os.devnull, os.O_RDWR)) != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for name, number, matters in (("stdout", 1, output_matters), ("stderr", 2, False)):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue  # a test's or a notebook's
        raw = getattr(stream, "torchtitan_style_raw", None)
        if raw is None:
            raw = _Output(number, "w", closefd=False)
            stream = _text(raw, stream)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        raw.matters = matters


class _Text(io.TextIOWrapper):
    torchtitan_style_raw: _Output


def _text(raw: _Output, before: io.TextIOWrapper | None) -> _Text:
    """``raw`` with the encoding of the stream ``before`` it. Lines are written as they are printed, to a pipe or a file
    too: a program that waits has said what for."""
    encoding, unbuffered = "utf-8", False
    if before is not None:
        with contextlib.suppress(OSError):
            before.flush()
        encoding, unbuffered = before.encoding, before.write_through
    buffer = raw if unbuffered else io.BufferedWriter(raw)  # type: ignore[type-var]
    text = _Text(buffer, encoding, "replace", line_buffering=True, write_through=unbuffered)  # type: ignore[arg-type]
    text.torchtitan_style_raw = raw
    return text


@contextlib.contextmanager
def delivering_output() -> Iterator[None]:
    """For a program's ``main``: at the end what it has printed is written, or the exit status says it was not."""
    try:
        yield
    except SystemExit as error:
        if error.code in (0, None):
            sys.stdout.flush()
        raise
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    sys.stdout.flush()


# What the program is started with


def environment_number(name: str, default: int) -> int:
    """A whole number from 0 on in an environment variable. Exits with a message if it is something else."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        print(f"error: {name}: must be a whole number, not {text[:80]!r}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    return int(text)


def check_start(arguments: Sequence[str]) -> None:
    """Raise UserError if there is no working folder any more, or an argument is not text."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working folder has been deleted; change into one that exists") from None
    from .reading import check_text  # which imports more

    for before, argument in zip(["", *arguments], arguments, strict=False):
        try:
            check_text(argument)
        except ValueError as error:
            where = before if before.startswith("--") else argument.partition("=")[0]
            raise UserError(f"{shown(where)[1:-1]}: {error}") from None


# Signals


def begin_command() -> None:
    """Begin a program whose result is its output. Ctrl-C never ends it with a traceback."""
    begin(output_matters=True)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):  # an exception would end torch's import in an abort
        os._exit(128 + number)
    raise KeyboardInterrupt


def start_over_with(variable: str, value: str) -> None:
    """Begin this program again with an environment variable that counts from a process's start only, unless it is set.

    For the first line of a program. The process stays the same. Nothing happens unless the interpreter was started for
    this package: a debugger, or a notebook, would begin again instead.
    """
    if variable in os.environ or sys.platform != "linux":
        return
    given = sys.orig_argv[1:]
    named = given[given.index("-m") + 1] if "-m" in given[:-1] else os.path.basename(given[0] if given else "")
    if named.partition(".")[0] in ("torchtitan_style", "torchtitan-style"):
        os.environ[variable] = value
        os.execv(sys.executable, [sys.executable, *given])


def begin_run(arguments: list[str]) -> None:
    """Begin a program that trains. Signals to stop are recorded until ``train/stopping.py`` can act on them.

    Ctrl-C ends the process at once, as there is nothing to save yet, unless it is one of several ranks: these agree
    on when to stop, and a rank that ended by itself would look like a failure.
    """
    begin(output_matters=bool({"--help", "-h", "--dry-run"} & set(arguments)))
    noting = environment_number("WORLD_SIZE", 1) > 1 and "RANK" in os.environ
    for number in STOP_SIGNALS:
        signal.signal(number, _note if noting else _note_or_end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the launcher up to here


def _note(number: int, _frame: FrameType | None) -> None:
    received.append((number, time.monotonic()))


def _note_or_end(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        os._exit(128 + number)
    _note(number, frame)
