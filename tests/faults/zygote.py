"""Starts runs without the seconds that importing torch takes: each is forked from this process.

What is forked is a process like any other: it has its own pid, session, signals and files, and can be killed. Only
the start of the interpreter is left out, of the launcher and, under it, of the ranks. With the environment variable
FAULTS, a list of them in JSON, a rank is given the faults of ``faulty.py``.

A line of JSON on stdin is a request: {"start": …}, answered with a pid, or {"poll": pid}, with its status or null.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any, NoReturn

from tests.forked import prepare_to_fork


def main() -> None:
    prepare_to_fork("tests.faults.faulty")
    assert threading.active_count() == 1
    answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        answer(start(**request["start"]) if "start" in request else poll(request["poll"]))


def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


def poll(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def start(command: list[str], env: dict[str, str], cwd: str, log: str) -> int:
    if pid := os.fork():
        return pid
    os.setsid()
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if "RUN_PIPE" in env:  # so that a limit for files is none for the output
        pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output).stdin
        assert pipe
        output = pipe.fileno()
    os.dup2(output, 1)
    os.dup2(1, 2)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = Forked
    return become(command, env)


class Forked(subprocess.Popen):
    """A process that torchrun starts."""

    def __init__(self, args: Any, env: dict[str, str], **_: Any) -> None:
        self.args, self.returncode, self.stdin, self.stdout, self.stderr = args, None, None, None, None
        self._child_created, self._waitpid_lock = True, threading.Lock()
        sys.stdout.flush()
        leads, led = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.closerange(3, 1024)
            become(list(args[1:]), env)
        os.close(led)
        os.read(leads, 1)  # until it has a session of its own, as with Popen
        os.close(leads)


def become(command: list[str], env: dict[str, str]) -> NoReturn:
    """Be ``python command``."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    status: Any = 1
    try:
        if "RANK" in env:
            with open(f"{env['RUN_LOG']}.rank-{env['RANK']}", "w", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {started(os.getpid())}")
        dash_m, module, *arguments = [argument for argument in command if argument != "-u"]
        assert dash_m == "-m"
        sys.argv = [module, *arguments]
        if module in ("torchtitan_style.launch.launcher", "torchtitan_style.launch.rank"):
            importlib.import_module("torchtitan_style.common.program").begin_run(arguments)  # as `python -m` does first
        if "FAULTS" in env and ("RANK" in env or env.get("NPROC") == "1"):
            importlib.import_module("tests.faults.faulty").inject(json.loads(env["FAULTS"]))
        importlib.import_module(module).main(arguments)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def started(pid: int) -> str:
    """When, in ticks since the machine was, or "" if there is none. With it a pid is that of one process for good."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


if __name__ == "__main__":
    main()
