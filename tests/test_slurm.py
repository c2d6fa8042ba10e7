"""docs/slurm.sh: when it has its job queued again. SLURM's programs are stand-ins."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

# The job step: it notes the scheduler's signal, goes on until told to end, and ends with the status that is wanted.
SRUN = """#!/bin/bash
trap 'touch "$BIN/told"' USR1
echo $$ >"$BIN/step"
until [[ -e "$BIN/end" ]]; do sleep 0.02; done
exit "$STATUS"
"""
PROGRAMS = {
    "srun": SRUN,
    "scancel": '#!/bin/bash\n[[ "$1" == --signal=USR1 && "$2" == 7 ]] && kill -USR1 "$(cat "$BIN/step")"\n',
    "scontrol": '#!/bin/bash\nif [[ "$1" == requeue ]]; then echo "$2" >"$BIN/requeued"; else echo node0; fi\n',
}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() or (path.name == "step" and not path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("status", "told", "word", "requeued"),
    [
        (0, True, True, True),  # stopped as told, and saved
        (0, False, True, True),  # told by somebody else, as Kubernetes or a person
        (0, True, False, False),  # it was done
        (138, True, False, True),  # told before the launcher could leave word of it
        (143, True, True, True),
        (138, False, True, False),
        (143, False, False, False),  # one node failed, and srun ended the others
        (1, True, True, False),
        (2, True, False, False),
    ],
)
def test_a_job_is_queued_again_if_and_only_if_it_was_told_to_stop(
    tmp_path: Path, status: int, told: bool, word: bool, requeued: bool
) -> None:
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    if word:
        (tmp_path / "preempted.json").touch()
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "BIN": str(tmp_path),
        "STATUS": str(status),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node0",
    }
    job = subprocess.Popen(["bash", ROOT / "docs/slurm.sh", "--job.dump_folder", tmp_path], env=environment)
    wait_for(tmp_path / "step")
    if told:
        job.send_signal(10)
        wait_for(tmp_path / "told")
    (tmp_path / "end").touch()
    assert job.wait(20) == status
    assert (tmp_path / "requeued").exists() == requeued
