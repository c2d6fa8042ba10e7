"""Python processes that need not import torch: each is a fork of one that has.

Importing what training needs takes a core three seconds, a tiny run half of one. Imports compute nothing, so a fork
differs from ``python -m`` in two things only: the seed of ``hash`` is that of its siblings, and so is the peak of the
CPU that MFU is relative to, which takes longer to measure than a tiny model takes to train. Run as a script with the
path of a socket, this is the process that is forked; with more arguments, it asks that process for a fork and ends as
the fork does, which is what torchrun starts as a rank.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

_IMPORTED = [
    "torchtitan_style.data.prepare.store",
    "torchtitan_style.launch.launcher",
    "torchtitan_style.launch.rank",
    "torchtitan_style.launch.run",
    "torchtitan_style.launch.torchrun",
    "torchtitan_style.models.qwen3.parallelize",
    "torchtitan_style.planner.this_machine",
    "torchtitan_style.train.trainer",
    "torch._dynamo",  # which the first optimizer imports
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.elastic.rendezvous.registry",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining.schedules",
    "torch.distributed.run",
    "torch.distributed.tensor.parallel",
    "torch.utils.serialization",
    "numpy.ma",
    "tiktoken",
]
_FOR_COMMANDS = [
    *(
        f"torchtitan_style.commands.{name}"
        for name in ("chat", "export_hf", "generate", "import_hf", "prepare", "train", "verify")
    ),
    "torchtitan_style.checkpoint.hf_export",
    "torchtitan_style.checkpoint.hf_import",
    "torchtitan_style.inference.generate",
    "torchtitan_style.inference.load",
    "pyarrow.compute",
    "pyarrow.parquet",
    "transformers.utils.chat_template_utils",
]
_LARGEST_REQUEST = 2**17


class Fork:
    """A fork that was asked for; it is killed when this is closed.

    arguments: ``-m module …`` or ``script …``. fds: its standard input, output and error.
    """

    def __init__(self, path: str, arguments: list[str], environment: Mapping[str, str], cwd: str, fds: list[int]):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)
        socket.send_fds(self._socket, [json.dumps([arguments, dict(environment), cwd]).encode()], fds)
        self.pid = int(self._socket.recv(99))

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; negative for a signal."""
        self._socket.settimeout(timeout)
        return int(self._socket.recv(99))

    def kill(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        with contextlib.suppress(BrokenPipeError):
            self._socket.send(str(number).encode())

    def close(self) -> None:
        self._socket.close()


def prepare_to_fork(*modules: str) -> None:
    """Do once what each fork would do, of what does not depend on what it is asked for; import ``modules``, too."""
    import importlib

    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # Arrow's, which may hold a lock as it is forked

    import torch

    from torchtitan_style.common import device

    device.peak_flops = functools.cache(device.peak_flops)
    for dtype in (torch.float32, torch.bfloat16):
        device.peak_flops(torch.device("cpu"), dtype)
    for name in (*_IMPORTED, *modules):
        importlib.import_module(name)
    with contextlib.suppress(ModuleNotFoundError):  # torch 2.13 has it, 2.11 and 2.14 have not
        importlib.import_module("torch.profiler._cupti_monitor")
    from torchtitan_style.models.registry import model_names, spec_of
    from torchtitan_style.models.section import schema_of

    for name in model_names():
        schema_of(spec_of(name))  # which is kept
    assert os.listdir("/proc/self/task") == [str(os.getpid())]  # no other thread
    faulthandler.enable()  # a fork that crashes says where
    gc.collect()
    gc.freeze()  # a fork's collections leave alone what they would have to copy


def _fork_on_request(path: str) -> None:
    """Serve until standard input ends, and run in each fork what was asked for."""
    prepare_to_fork(*_FOR_COMMANDS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path + ".new")
        listener.listen()
        os.rename(path + ".new", path)  # there only once it listens
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the forks
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, fds, _, _ = socket.recv_fds(connection, _LARGEST_REQUEST, 3)
    pid = os.fork()
    if pid:
        _wait_and_tell(pid, connection)
    connection.close()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    status = _run(*json.loads(request))
    # To take apart all that was imported takes seconds.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait_and_tell(pid: int, connection: socket.socket) -> None:
    connection.send(str(pid).encode())
    process = os.pidfd_open(pid)
    while process not in select.select([process, connection], [], [])[0]:
        number = connection.recv(99)  # nothing: the one who asked is gone
        os.kill(pid, int(number or signal.SIGKILL))
        if not number:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(str(status).encode())
    os._exit(0)


def _run(arguments: list[str], environment: dict[str, str], cwd: str) -> int:
    """Run what was asked for, and return the exit status."""
    import runpy
    import traceback

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path[0] = cwd
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = os.path.dirname(arguments[0])
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _be_a_fork(path: str, arguments: list[str]) -> None:
    fork = Fork(path, arguments, os.environ, os.getcwd(), [0, 1, 2])

    def forward(number: int, _frame: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(fork.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # as a rank does once it has handlers
    status = fork.wait()
    if status < 0:
        if -status != signal.SIGKILL:  # which has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _fork_on_request(sys.argv[1])
    else:
        _be_a_fork(sys.argv[1], sys.argv[2:])
