"""Hosts that share their folder by NFS, with a real server and clients: those of a user-mode Linux, whose hosts are
namespaces of that kernel. Needs root and Debian's user-mode-linux, nfs-kernel-server and e2fsprogs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hosts.cluster import why_no_hosts

_MISSING = [name for name in ("linux.uml", "rpc.nfsd", "rpcbind", "mkfs.ext4") if not shutil.which(name)]
_WHY_NOT = f"not installed: {', '.join(_MISSING)}" if _MISSING else why_no_hosts()
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(bool(_WHY_NOT), reason=f"no NFS here: {_WHY_NOT}")]


def in_guest(folder: Path, command: str, *, seconds: float) -> tuple[int, str]:
    """Run a shell command in guest.sh. Returns its status and the guest's output."""
    disk, status, start = folder / "disk", folder / "status", folder / "start"
    with disk.open("wb") as file:
        file.truncate(2**30)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    variables = {"COMMAND": command, "STATUS": str(status), "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    exports = "".join(f"export {name}={value!r}\n" for name, value in variables.items())
    start.write_text(f"#!/bin/bash\n{exports}. {ROOT}/tests/hosts/guest.sh\n", encoding="utf-8")
    start.chmod(0o755)
    kernel = ["linux.uml", "mem=4G", f"ubd0={disk}", f"uml_dir={folder}/uml", "quiet"]
    root = ["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw", f"init={start}", "con=null", "con0=null,fd:1"]
    done = subprocess.run(
        [*kernel, *root], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", timeout=seconds,
    )  # fmt: skip
    return int(status.read_text()) if status.exists() else -1, done.stdout


@pytest.mark.timeout(3000)
def test_locks_and_a_run_on_nfs(tmp_path: Path) -> None:
    options = f"-n0 --timeout 0 -p no:cacheprovider -c {ROOT}/pyproject.toml --noconftest --basetemp /mnt/tests"
    command = f"{sys.executable} -m pytest {options} {ROOT}/tests/hosts/on_nfs.py"
    status, output = in_guest(tmp_path, command, seconds=2900)
    assert status == 0, output
