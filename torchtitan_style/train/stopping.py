"""What happens on SIGTERM, SIGUSR1 and Ctrl-C, and how a rank ends.

A launcher passes the signal on to all ranks, and ends with status 0 if they saved (launch/torchrun.py). In each rank:

1. A signal is noted in a list and does not interrupt the step under way (``stop_gracefully``, ``told_to_stop``).
2. Between two steps the ranks exchange what they were told (``agreement.py``), so that all stop after the same step.
3. The trainer saves a checkpoint, writes ``preempted.json`` (``preempted.py``) and returns (``Trainer._stop_early``);
   the rank ends with status 0 (``report_stopped``). The same command resumes the run.

Before training there is nothing to save: a signal ends a single process at once, as does a second Ctrl-C; prepared data
is kept. Several ranks note it, and agree as in training. ``begin_run`` (common/program.py) notes what arrives before
the configuration is read, and ``stops_end_at_once`` acts on it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.common.program import STOP_SIGNALS
from torchtitan_style.common.program import received as _received

from .preempted import leave_preempted

_farewell: list[Callable[[], None]] = []
_graceful = False


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process when this context ends, with or without an error, skipping Python's orderly shutdown.

    A gloo thread may still be releasing the tensors of the last collective, and needs the interpreter for it. If the
    interpreter is shutting down, that thread aborts the process (torch 2.13, in one of five runs of two ranks). All
    files are closed by now.
    """
    status: object = 0
    try:
        yield
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    status = status if isinstance(status, int) else 0 if status is None else 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as error:  # output that matters is lost
        status = status or error.code
    except OSError:  # a full disk, or a reader that is gone
        pass
    os._exit(status if isinstance(status, int) else 1)


def on_interrupt(farewell: Callable[[], None]) -> None:
    """Call ``farewell`` if a Ctrl-C ends the program at once. It must not communicate with other ranks."""
    _farewell[:] = [farewell]


def interrupted(step: int, folder: CheckpointFolder) -> str:
    """What to tell a person who has interrupted the run at ``step``."""
    steps = folder.steps()
    if not steps:
        return f"interrupted at step {step}. There is no checkpoint yet."
    return (
        f"interrupted at step {step}. The last checkpoint is {folder.path(steps[0])}. Run the same command to resume."
    )


def stopped(step: int, signal: str, checkpoint: str | None) -> str:
    """What to tell the person whose run has stopped. checkpoint: of that step, if there is one."""
    where = f"; the checkpoint is {checkpoint}" if checkpoint else ""
    return f"stopped at step {step} by {signal}{where}. Run the same command to resume."


def trained_already(step: int, dump_folder: Path) -> str:
    """What to tell a person who has started a run that is at its end."""
    return (
        f"{dump_folder} is trained to step {step} already; raise training.steps to continue, or start a new run with "
        "another --job.dump_folder"
    )


def stop_gracefully() -> None:
    """From now on signals to stop are noted and do not end the process."""
    global _graceful
    _graceful = True


def told_to_stop() -> int:
    """The first signal to stop that this process received, or 0."""
    return _received[0][0] if _received else 0


def stops_end_at_once(dump_folder: Path | None = None) -> None:
    """From now on a signal to stop ends the process with ``end_at_once``; one that was noted before does so now.

    For while there is nothing to clean up. torch may be imported meanwhile, which an exception would abort.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        end_at_once(number, dump_folder)

    for number in STOP_SIGNALS:
        signal.signal(number, end)
    if _received:
        end_at_once(_received[0][0], dump_folder)


def end_at_once(number: int, dump_folder: Path | None = None) -> NoReturn:
    """End the process for signal ``number``, with 128 + number as its status.

    dump_folder: a scheduler that ends the run by SIGTERM or SIGUSR1 before there is anything to save finds
    preempted.json there all the same, and status 0.
    """
    ignore_stops()
    with contextlib.suppress(Exception, SystemExit):  # the signal may have come in the middle of a write
        sys.stdout.flush()
        sys.stderr.flush()
    status = 128 + number
    if dump_folder and number != signal.SIGINT:
        with contextlib.suppress(OSError):
            leave_preempted(dump_folder, signal=signal.Signals(number).name)
            status = 0
    # Not sys.exit: leaving the process group in order would wait for ranks that are gone.
    os._exit(status)


def ignore_stops() -> None:
    """From now on ignore signals to stop: the process is ending and has nothing left to save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def interruptible(dump_folder: Path | None = None, *, gracefully: bool = False) -> Iterator[None]:
    """Exit without a traceback at a signal to stop: status 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1.

    dump_folder: see ``end_at_once``. gracefully: only note signals from the beginning, see ``stop_gracefully``.

    A signal reaches all ranks, but a rank may first notice the broken connections of those that have ended. So any
    error after a signal counts as its consequence. Without a signal, a lost connection is reported in one line that
    says that another rank failed.
    """
    global _graceful
    _graceful = gracefully
    before = {number: signal.signal(number, _note) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
        for number, handler in before.items():
            signal.signal(number, handler)
    except BaseException as error:
        if not _received and _lost_connection(error):
            time.sleep(1)  # the launcher's signal may be on its way: then nothing needs to be said
            if not _received:
                reason = str(error).strip().splitlines()[0]
                print(f"rank {os.environ.get('RANK', 0)} has lost the connection to another rank, which failed or was "
                      f"killed: {reason}", file=sys.stderr, flush=True)  # fmt: skip
                os._exit(1)
        if not _received:
            raise
        if isinstance(error, KeyboardInterrupt):  # and no consequence of another rank's end
            for farewell in _farewell:
                with contextlib.suppress(Exception):
                    farewell()
        end_at_once(_received[0][0], None if _graceful else dump_folder)


def _note(number: int, _frame: FrameType | None) -> None:
    now = time.monotonic()
    # The terminal's signal and the launcher's may both arrive; a person takes longer to repeat it.
    again = bool(_received) and now - _received[0][1] > 1
    _received.append((number, now))
    if not _graceful or (again and number == signal.SIGINT):
        ignore_stops()
        raise KeyboardInterrupt


def _lost_connection(error: BaseException) -> bool:
    """Whether ``error`` is what a collective raises when another rank is gone."""
    from torch.distributed import DistError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DistError) or (isinstance(seen, RuntimeError) and "gloo" in str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
