"""Finds the rank that all others wait for.

A thread of every rank tells the others, once a second, how many seconds its main thread has made no progress, and which
collective it entered last. When no rank has made progress for ``limit`` seconds, the ranks that still can write their
stacks to a file, name the one that is behind or does not answer, and exit; the launcher ends or restarts the rest.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TICK = 1.0
"""Seconds between signs of life."""


class Watchdog:
    """Made by all ranks together. folder: for the stacks. limit: seconds without progress before the run is ended.
    stages: of the pipeline; each has as many ranks as the others, and the first ranks are the first stage's.

    A run of one process is never ended, as nobody waits for it; its stacks are written all the same.
    """

    def __init__(self, folder: Path, *, limit: float, warn: Callable[[str], None], stages: int = 1) -> None:
        self.folder, self.limit, self.warn, self.stages = folder, limit, warn, stages
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._step, self._since, self._parent = 0, time.monotonic(), os.getppid()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        self._signs: dict[int, dict[str, Any]] = {}
        """The last sign of life of each rank."""
        self._heard = time.monotonic()
        """When they were last asked for with success."""
        if self.world_size > 1:
            talk = partial(self._talk, _shared_store())
            self._threads.append(threading.Thread(target=talk, name="watchdog's talk", daemon=True))
        for thread in self._threads:
            thread.start()

    def record_progress(self, step: int | None = None) -> None:
        """Restart the count of seconds without progress. From any thread."""
        self._since = time.monotonic()
        if step is not None:
            self._step = step

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2 * _TICK)  # a store that does not answer is not waited for

    # In threads

    def _talk(self, store: dist.TCPStore) -> None:
        """Publish this rank's sign of life; read the others' at first, and when progress stalls. Blocks if rank 0,
        which has the store, does not answer."""
        keys = [str(rank) for rank in range(self.world_size)]
        with contextlib.suppress(RuntimeError):  # rank 0 is gone, which its peers notice by themselves
            for tick in itertools.count():
                sign = self._sign_of_life()
                store.set(str(self.rank), json.dumps(sign | {"tick": tick}))
                if (not self._signs or sign["stalled"] > self.limit / 2) and store.check(keys):
                    self._signs = {rank: json.loads(sign) for rank, sign in enumerate(store.multi_get(keys))}
                self._heard = time.monotonic()
                if self._closed.wait(_TICK):
                    store.set(str(self.rank), json.dumps(sign | {"tick": tick, "closed": True}))
                    return

    def _watch(self) -> None:
        reported = False
        while not self._closed.wait(_TICK):
            if os.getppid() != self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
                # The launcher was killed. Nobody would end this rank any more, so it is told to save and stop.
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)
            stalled = time.monotonic() - self._since
            if stalled <= self.limit:
                reported = False
            elif self.world_size > 1:
                self._judge()
            elif not reported:
                self.warn(f"no progress for {stalled:.0f} s at step {self._step}; {self._dump_stacks()}")
                reported = True

    def _sign_of_life(self) -> dict[str, Any]:
        stalled = time.monotonic() - self._since
        # Nobody asks for it before, and it takes a while where the user has torch remember many.
        number, name = _last_collective() if stalled > self.limit / 2 else (0, "")
        return {
            "stalled": stalled,
            "step": self._step,
            "collective": number,
            "name": name,
            "waits": stalled > 2 * _TICK and _waits_for_ranks(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _judge(self) -> None:
        """End the process, if no other rank has made progress lately either."""
        before, patience = self._signs, 3 * _TICK
        if self._closed.wait(patience):
            return
        # Ranks that are done neither answer nor make progress.
        now = {rank: sign for rank, sign in self._signs.items() if not sign.get("closed")}
        now[self.rank] = self._sign_of_life()
        if time.monotonic() - self._heard > patience:
            silent = [0] if 0 in now else []
        else:
            silent = [rank for rank in now if rank != self.rank and now[rank]["tick"] == before[rank]["tick"]]
        answering = {rank: sign for rank, sign in now.items() if rank not in silent}
        if any(sign["stalled"] < self.limit for sign in answering.values()) and silent != [0]:
            return
        if self.rank != min(answering):
            time.sleep(_TICK)  # the launcher ends all when the first one ends
        where = self._dump_stacks()
        if self.rank == min(answering):
            verdict = _verdict(silent, answering, self._stages_of_ranks())
            print(f"error: {verdict}; {where}", file=sys.stderr, flush=True)
            for rank in silent:
                # Stopped, it would outlive the launcher's SIGTERM. One on another host is left to the launcher there.
                if now[rank]["host"] == socket.gethostname():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(now[rank]["pid"], signal.SIGKILL)
        os._exit(1)

    def _stages_of_ranks(self) -> list[int]:
        """The pipeline stage of each rank; none if there is no pipeline."""
        each = self.world_size // self.stages
        return [rank // each for rank in range(self.world_size)] if self.stages > 1 else []

    def _dump_stacks(self) -> str:
        """Write the stacks of all threads to a file. Returns a phrase that says where."""
        file = self.folder / f"step-{self._step}-rank-{self.rank}.txt"
        try:
            self.folder.mkdir(exist_ok=True)
            with file.open("w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream)
        except OSError as error:
            return f"stacks cannot be written: {error}"
        return f"stacks are in {self.folder}"


def _verdict(silent: list[int], answering: dict[int, Any], stages: list[int]) -> str:
    """A sentence that says which rank holds up the others. stages: the pipeline stage of each rank, or none."""
    waiting = max(answering.values(), key=lambda sign: sign["collective"])
    stalled, others = f"{waiting['stalled']:.0f} s", f"the others wait in {waiting['name']}"
    if stages:
        others = "the others wait for it"

    def named(rank: int) -> str:
        return f"{rank} (pipeline stage {stages[rank]})" if stages else str(rank)

    if silent:
        who = ", ".join(map(named, silent))
        return (
            f"rank {who} does not answer (stopped, or its host is gone); {others} after step {waiting['step']}, "
            f"for {stalled}"
        )
    behind = _behind(answering, stages)
    if behind is not None:
        sign = answering[behind]
        return f"rank {named(behind)} hangs after step {sign['step']} and {sign['name']}, for {stalled}; {others}"
    return f"all ranks hang after step {waiting['step']} in {waiting['name']}, for {stalled}"


def _behind(signs: dict[int, Any], stages: list[int]) -> int | None:
    """The rank that has entered fewer collectives than others; None if all have entered as many.

    Stages of a pipeline have other numbers of them, and what passes between stages is not counted. So with a pipeline
    it is the rank that waits for no other one, and ranks are compared within their stage only if all wait.
    """
    if not stages:
        behind = min(signs, key=lambda rank: signs[rank]["collective"])
        most = max(sign["collective"] for sign in signs.values())
        return behind if signs[behind]["collective"] < most else None
    busy = [rank for rank, sign in signs.items() if not sign["waits"]]
    if busy:
        return busy[0] if len(busy) < len(signs) else None
    of_stages = [{rank: signs[rank] for rank in signs if stages[rank] == stage} for stage in sorted(set(stages))]
    return next((rank for each in of_stages if each and (rank := _behind(each, [])) is not None), None)


def _waits_for_ranks() -> bool:
    """Whether the main thread is in a function of torch's that communicates."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and "/torch/distributed/" in frame.f_code.co_filename.replace(os.sep, "/")


def _shared_store() -> dist.TCPStore:
    """A store for all ranks, kept by rank 0: the launcher's own one is not there under every launcher."""
    address = os.environ["MASTER_ADDR"]
    wait = timedelta(seconds=10)
    port: list[Any] = [None]
    if dist.get_rank() == 0:
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=wait)
        port = [store.port]
    dist.broadcast_object_list(port, src=0)
    if dist.get_rank() != 0:
        store = dist.TCPStore(address, port[0], is_master=False, wait_for_workers=False, timeout=wait)
    return store


def _last_collective() -> tuple[int, str]:
    """Number and description of the last collective that this process entered."""
    c10d: Any = torch._C._distributed_c10d
    try:  # torch's flight recorders; NCCL has one of its own
        dump = c10d._dump_nccl_trace_json if "nccl" in dist.get_backend() else c10d._dump_fr_trace_json
        entries = json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", [])
        entry = max(entries, key=lambda entry: entry["record_id"])
    except (AttributeError, ValueError, TypeError, KeyError, RuntimeError):  # not in this version of torch
        return 0, "a collective"
    number = entry["record_id"] + 1
    return number, f"collective {number}, {entry['profiling_name']} of {entry['input_sizes']}"
