"""A run on three hosts that has faults for hours: power, network, processes, checkpoints.

python -m tests.hosts.soak --minutes 60 --seed 1

Every few seconds something happens to a host of a run with NNODES=1:3. At the end the run is stopped, and losses and
batch hashes of all its steps are compared with those of a run on one host that nothing happened to. Prints each fault;
ends with status 1 if a step differs, or the run gets no further within ten minutes. Needs root (see cluster.py).
"""

from __future__ import annotations

import argparse
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

_STUCK = 600.0
"""Seconds without a step after which the run counts as stuck."""
OPTIONS = (
    "--training.seq_len", "64", "--checkpoint.interval", "50", "--checkpoint.async_mode", "async",
    "--max-restarts", "1000000", "--comm.train_timeout_seconds", "30",
)  # fmt: skip


class Soak:
    """What happens, and to whom."""

    def __init__(self, run: Run, random: Random) -> None:
        self.run, self.random = run, random
        self.launchers: dict[Host, subprocess.Popen[str] | None] = {}
        self.counts: Counter[str] = Counter()
        for host in run.cluster.hosts:
            self.launchers[host] = run.start(host)

    def fault(self) -> str:
        """Do something to a host. Returns what."""
        host = self.random.choice(self.run.cluster.hosts)
        name, happen = self.random.choice(list(FAULTS.items()))
        self.counts[name] += 1
        happen(self, host)
        return f"{host.name}: {name}"

    def restart(self) -> None:
        """Start the launchers that have ended."""
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
            launcher.wait(120)

    def network(self, host: Host, *, seconds: float) -> None:
        host.cut()
        time.sleep(seconds)
        host.reconnect()

    def kill_rank(self, host: Host) -> None:
        self._signal(host, "launch.rank", signal.SIGKILL)

    def kill_launcher(self, host: Host) -> None:
        self._signal(host, "launch --config", signal.SIGKILL)

    def stop_rank(self, host: Host) -> None:
        self._signal(host, "launch.rank", signal.SIGSTOP)
        time.sleep(3)
        self._signal(host, "launch.rank", signal.SIGCONT)

    def damage_checkpoint(self, host: Host) -> None:
        """Flip a bit in a file of the newest checkpoint, and have the run resume."""
        found = sorted(self.run.folder.glob("checkpoint/step-*/*.distcp"), key=lambda path: path.stat().st_mtime)
        if len(found) > 2:
            with found[-1].open("r+b") as file:
                file.seek(-100, os.SEEK_END)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
            self.kill_rank(host)

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
    "network gone until it is missed": partial(Soak.network, seconds=20),
    "rank killed": Soak.kill_rank,
    "rank stopped for 3 s": Soak.stop_rank,
    "launcher killed": Soak.kill_launcher,
    "checkpoint damaged": Soak.damage_checkpoint,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if why := why_no_hosts():
        print(f"no namespaces here: {why}")
        return 2
    with tempfile.TemporaryDirectory() as folder, cluster_of(3, Path(folder)) as cluster:
        run = Run(cluster, nnodes="1:3", options=OPTIONS)
        soak = Soak(run, Random(options.seed))
        end = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end:
            soak.restart()
            try:
                run.wait_for_steps(soak.random.choice([1, 30, 100]), seconds=_STUCK)
            except AssertionError as error:
                print(f"stuck: {error}")
                return 1
            print(f"step {run.step()}: {soak.fault()}", flush=True)
        return _compare(run, soak)


def _compare(run: Run, soak: Soak) -> int:
    """End the run, take as many steps on one host, and compare."""
    found, expected = end(run, seconds=86400)
    missing = set(range(1, max(found) + 1)) - found.keys()
    hashes = [step for step in found if found[step][0] != expected[step][0]]
    furthest = max(abs(found[step][1] - expected[step][1]) / expected[step][1] for step in found)
    print(f"{sum(soak.counts.values())} faults: {dict(soak.counts)}")
    print(f"{len(found)} steps, {len(missing)} missing, {len(hashes)} with other rows; losses differ by {furthest:.1e}")
    return 1 if missing or hashes or furthest > 1e-4 else 0


if __name__ == "__main__":
    raise SystemExit(main())
