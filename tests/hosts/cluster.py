"""Several hosts on this machine: network, process, name and mount namespaces, joined by a bridge.

Each host has its own address, name and processes; the file system is shared, as by NFS. Needs root and ``unshare``,
``nsenter`` and ``ip``; ``why_no_hosts`` says whether they work here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ENVIRONMENT

_NAMESPACES = ("unshare", "-n", "-u", "-m", "-p", "--fork", "--mount-proc", "sh", "-c")


@functools.cache
def why_no_hosts() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    link, mount = "ip link add t0 type bridge && ip link add t1 type veth peer name t2", "mount --bind /etc /etc"
    try:
        done = subprocess.run([*_NAMESPACES, f"{link} && {mount}"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


SERVER = "10.77.0.100"
"""This machine, as the hosts see it, where they mount its folder."""


class Host:
    """A machine of the cluster, as ``h0`` at 10.77.0.1."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number = cluster, number
        self.name, self.address = f"h{number}", f"10.77.0.{number + 1}"
        self.boot()

    def boot(self) -> None:
        """Start it, or start it again after ``kill``."""
        self.started: list[subprocess.Popen[str]] = []
        folder = self.cluster.folder
        binds = f"mount --bind {folder}/hosts /etc/hosts; mount --bind /dev/null /etc/resolv.conf"
        # The holder is the first process of the host: when it is killed, the kernel kills all others.
        self._holder = _holder([*_NAMESPACES, f"hostname {self.name}; {binds}; echo up; exec sleep 100000"])
        self.pid = _child(self._holder)
        port, switch = f"p{self.number}", self.cluster.switch
        _run(*switch, "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        _run(*switch, "ip", "link", "set", port, "master", "br0", "up")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "link", "set", "lo", "up")
        if self.cluster.nfs:
            self.run("mount", "-t", "nfs", "-o", self.cluster.nfs, f"{SERVER}:{folder}", str(folder))

    def run(self, *command: str) -> None:
        """Run a command on this host and wait for its end."""
        _run("nsenter", "-t", str(self.pid), "-n", "-u", "-m", *command)

    def start(self, *arguments: str | Path, log: str, **environment: str) -> subprocess.Popen[str]:
        """Run Python with ``arguments`` on this host, in the cluster's folder; its output goes to the file ``log``."""
        folder = self.cluster.folder
        enter = ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "-p", f"--wdns={folder}"]
        with open(folder / log, "a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*enter, sys.executable, *map(str, arguments)],
                stdout=output, stderr=subprocess.STDOUT, text=True,
                env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "eth0"} | environment,
            )  # fmt: skip
        self.started.append(process)
        return process

    def stop(self, process: subprocess.Popen[str]) -> None:
        """Send SIGTERM to what ``start`` has started: ``process`` is only the command that entered the host."""
        with contextlib.suppress(IndexError, FileNotFoundError, ProcessLookupError):  # it has just ended
            os.kill(_child(process), signal.SIGTERM)

    def stop_all(self, seconds: float) -> None:
        """Tell all that was started here to stop, and wait until it has ended."""
        for process in self.started:
            if process.poll() is None:
                self.stop(process)
        for process in self.started:
            process.wait(seconds)

    def kill(self) -> None:
        """As when the power goes: its processes end, and their connections are not closed."""
        self.cut()
        self._end()
        _run(*self.cluster.switch, "ip", "link", "del", f"p{self.number}")

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        for process in (self._holder, *self.started):
            process.wait(60)

    def cut(self) -> None:
        """Pull the network cable."""
        _run(*self.cluster.switch, "ip", "link", "set", f"p{self.number}", "down")

    def reconnect(self) -> None:
        """Put the network cable back."""
        _run(*self.cluster.switch, "ip", "link", "set", f"p{self.number}", "up")

    def lose_packets(self, share: float) -> None:
        """Drop that share of all packets that reach this host."""
        self.run(
            "iptables", "-A", "INPUT", "-m", "statistic", "--mode", "random", "--probability", f"{share}", "-j", "DROP"
        )

    def slow_down(self, rate: str) -> None:
        """Send no faster than ``rate``, as "2mbit"."""
        self.run(
            "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"
        )

    def fill_disk(self, folder: Path) -> None:
        """Have nothing more fit into ``folder``, as this host sees it."""
        folder.mkdir()
        self.run("mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder))
        self.run("sh", "-c", f"yes > {folder}/rest 2> /dev/null || true")


class Cluster:
    """``count`` hosts and the switch between them.

    nfs: options with which each of them mounts ``folder`` from this machine, which has to export it; "": they share
    its file system.
    """

    def __init__(self, folder: Path, count: int, *, nfs: str = "") -> None:
        self.folder, self.nfs = folder, nfs
        names = "".join(f"10.77.0.{number + 1} h{number}\n" for number in range(count))
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + names, encoding="utf-8")
        bridge = "ip link add br0 type bridge && ip link set br0 up"
        self._switch = _holder(["unshare", "-n", "sh", "-c", f"{bridge} && echo up && exec sleep 100000"])
        self.switch = ["nsenter", "-t", str(self._switch.pid), "-n"]
        if nfs:
            _run(*self.switch, "ip", "link", "add", "server", "type", "veth", "peer", "name", "nfs", "netns", "1")
            _run(*self.switch, "ip", "link", "set", "server", "master", "br0", "up")
            _run("ip", "addr", "add", f"{SERVER}/24", "dev", "nfs")
            _run("ip", "link", "set", "nfs", "up")
        self.hosts = [Host(self, number) for number in range(count)]

    def close(self) -> None:
        for host in self.hosts:
            host._end()
        if self.nfs:
            _run("ip", "link", "del", "nfs")
        self._switch.kill()
        self._switch.wait(60)


@contextlib.contextmanager
def cluster_of(count: int, folder: Path, *, nfs: str = "") -> Iterator[Cluster]:
    """A cluster of ``count`` hosts whose processes start in ``folder``. nfs: see ``Cluster``."""
    cluster = Cluster(folder, count, nfs=nfs)
    try:
        yield cluster
    finally:
        cluster.close()


def _holder(command: list[str]) -> subprocess.Popen[str]:
    """Start ``command`` and wait until it has printed "up"."""
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "up\n"
    return holder


def _child(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()[0])


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
