"""``train --dry-run``: the report, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchtitan_style.launch import launcher


@pytest.mark.parametrize(("processes", "mesh"), [("1", "dp 1 × tp 1, 1 rank"), ("2", "dp 2 × tp 1, 2 ranks")])
def test_a_dry_run_reports_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processes: str, mesh: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPROC", processes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        launcher.main(["--dry-run", "--model.flavor", "debug", "--job.dump_folder", str(tmp_path / "run")])
    output = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"{mesh} on 1 host" in output
    assert f"on {processes} × cpu" in output
    assert list(tmp_path.iterdir()) == []
