"""A run on three hosts that has faults for hours: power, network, processes, checkpoints.

python -m tests.hosts.soak --minutes 60 --seed 1

As soon as a run with NNODES=1:3 has taken some steps, something happens to one of its hosts: all kinds of faults in
turn, in random order. At the end the run is stopped, and losses and batch hashes of all its steps are compared with
those of a run on one host that nothing happened to. Prints each fault; ends with status 1 if a step differs, or the
run gets no further within 15 minutes. It waits for events, so it may share the machine. Needs root (see cluster.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does

from tests.hosts.cluster import Host, cluster_of, why_no_hosts
from tests.hosts.test_hosts import Run, end

_STUCK = 900.0
"""Seconds without a step after which the run counts as stuck."""
OPTIONS = (
    "--training.steps", "10000000", "--training.seq_len", "64",
    "--optimizer.lr", "0.00001",  # differences of rounding stay small for as many steps as an hour has
    "--checkpoint.interval", "50", "--checkpoint.async_mode", "async", "--max-restarts", "1000000",
    "--comm.host_timeout_seconds", "15", "--comm.rejoin_timeout_seconds", "5", "--comm.train_timeout_seconds", "60",
)  # fmt: skip


class Soak:
    """What happens, and to whom."""

    def __init__(self, run: Run, random: Random) -> None:
        self.run, self.random, self.start = run, random, time.monotonic()
        self.launchers: dict[Host, subprocess.Popen[str] | None] = {}
        self.counts: Counter[str] = Counter()
        self.coming: list[str] = []
        self.damaged: set[int] = set()
        for host in run.cluster.hosts:
            self.launchers[host] = run.start(host)

    def fault(self) -> str:
        """Do something to a host. Returns what."""
        host = self.random.choice(self.run.cluster.hosts)
        if not self.coming:
            self.coming = self.random.sample(list(FAULTS), len(FAULTS))
        name = self.coming.pop()
        self.counts[name] += 1
        FAULTS[name](self, host)
        return f"{host.name}: {name}"

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def wait_for_steps(self, more: int) -> None:
        """Until the run has taken ``more`` steps; launchers that have ended meanwhile are started again."""
        goal = self.run.step() + more

        def reached() -> bool:
            self.restart()
            return self.run.step() >= goal

        self.run.wait(reached, f"step {goal}", _STUCK)

    def restart(self) -> None:
        for host, launcher in self.launchers.items():
            if launcher is None or launcher.poll() is not None:
                self.launchers[host] = self.run.start(host)

    def power(self, host: Host) -> None:
        host.kill()
        time.sleep(self.random.choice([0, 20]))
        host.boot()
        self.launchers[host] = None

    def tell_to_stop(self, host: Host) -> None:
        if (launcher := self.launchers[host]) and launcher.poll() is None:
            host.stop(launcher)
            launcher.wait(_STUCK)

    def network(self, host: Host, *, seconds: float) -> None:
        host.cut()
        time.sleep(seconds)
        host.reconnect()

    def missed(self, host: Host) -> None:
        """Cut the network until a launcher says so, if it ever does: the host may be the only one."""
        before = self.said("no heartbeat for", "is lost")
        host.cut()
        with contextlib.suppress(AssertionError):
            self.run.wait(lambda: self.said("no heartbeat for", "is lost") > before, "a lost host", 60)
        host.reconnect()

    def said(self, *texts: str) -> int:
        """How often the launchers and ranks have printed one of ``texts``."""
        return sum(self.run.output(host).count(text) for host in self.run.cluster.hosts for text in texts)

    def kill_rank(self, host: Host) -> None:
        self._signal(host, "launch.rank", signal.SIGKILL)

    def kill_launcher(self, host: Host) -> None:
        self._signal(host, "launch --config", signal.SIGKILL)

    def stop_rank(self, host: Host) -> None:
        self._signal(host, "launch.rank", signal.SIGSTOP)
        time.sleep(3)
        self._signal(host, "launch.rank", signal.SIGCONT)

    def damage_checkpoint(self, host: Host) -> None:
        """Flip a bit in the newest checkpoint, once it and the one before are whole, and have the run resume."""
        self.run.wait(lambda: self.restart() or self._damage(), "two whole checkpoints", _STUCK)
        self.kill_rank(host)

    def _damage(self) -> bool:
        """Whether there were two of them."""
        checkpoints = sorted(self.run.folder.glob("checkpoint/step-*"), key=lambda path: int(path.name[5:]))
        try:
            inodes = [path.stat().st_ino for path in checkpoints[-2:]]
            if len(inodes) < 2 or not self.damaged.isdisjoint(inodes):
                return False
            with min(checkpoints[-1].glob("*.distcp")).open("r+b") as file:
                file.seek(-100, os.SEEK_END)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
        except (FileNotFoundError, ValueError):  # a newer one has just replaced it
            return False
        self.damaged.add(inodes[-1])
        return True

    def _signal(self, host: Host, command: str, number: int) -> None:
        space = f"/proc/{host.pid}/ns/pid"
        for process in Path("/proc").glob("[0-9]*"):
            try:
                same = os.readlink(process / "ns/pid") == os.readlink(space)
                text = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if same and f"-m torchtitan_style.{command}" in text:
                    os.kill(int(process.name), number)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue


FAULTS: dict[str, Callable[[Soak, Host], None]] = {
    "power": Soak.power,
    "told to stop": Soak.tell_to_stop,
    "network gone for 3 s": partial(Soak.network, seconds=3),
    "network gone until it is missed": Soak.missed,
    "rank killed": Soak.kill_rank,
    "rank stopped for 3 s": Soak.stop_rank,
    "launcher killed": Soak.kill_launcher,
    "checkpoint damaged": Soak.damage_checkpoint,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a folder to keep; a run in it is continued")
    options = parser.parse_args()
    if why := why_no_hosts():
        print(f"no namespaces here: {why}")
        return 2
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        cluster = stack.enter_context(cluster_of(3, folder))
        run = Run(cluster, nnodes="1:3", options=OPTIONS)
        soak = Soak(run, Random(options.seed))
        while soak.seconds() < 60 * options.minutes:
            try:
                soak.wait_for_steps(soak.random.choice([1, 30, 100]))
            except AssertionError as error:
                print(f"stuck: {error}")
                return 1
            print(f"{soak.seconds():6.0f} s, step {run.step()}: {soak.fault()}", flush=True)
        return _compare(run, soak)


def _compare(run: Run, soak: Soak) -> int:
    """End the run, take as many steps on one host, and compare."""
    found, expected = end(run, seconds=86400)
    missing = set(range(1, max(found) + 1)) - found.keys()
    hashes = [step for step in found if found[step][0] != expected[step][0]]
    furthest = max(abs(found[step][1] - expected[step][1]) / expected[step][1] for step in found)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(soak.counts.items()))
    print(f"{sum(soak.counts.values())} faults ({counts}); the run resumed {soak.said('resuming after step')} times")
    print(f"{len(found)} steps, {len(missing)} missing, {len(hashes)} with other rows; losses differ by {furthest:.1e}")
    return 1 if missing or hashes or furthest > 1e-5 else 0


if __name__ == "__main__":
    raise SystemExit(main())
