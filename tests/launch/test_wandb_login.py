"""Weights & Biases: what would keep it from starting is found before anything is prepared."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from torchtitan_style.common.errors import UserError
from torchtitan_style.launch import rank
from torchtitan_style.launch.wandb_login import check_wandb

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a login, in a working folder of their own, with a module of wandb's name. Returns that folder."""
    for name in ("MODE", "API_KEY", "BASE_URL", "CONFIG_DIR", "DIR", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text("def init(**_):\n    raise RuntimeError('no server\\nmore')\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_login_is_refused() -> None:
    with pytest.raises(UserError, match=r"^metrics\.enable_wandb: there is no login .* `wandb login`, .*WANDB_MODE"):
        check_wandb()


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_the_environment_may_have_the_login(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, KEY)
    check_wandb()


def test_a_key_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="WANDB_API_KEY has 5 characters"):
        check_wandb()


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun"])
def test_without_a_server_no_login_is_needed(nobody: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    check_wandb()
    monkeypatch.delenv("WANDB_MODE")
    (nobody / "wandb").mkdir()
    (nobody / "wandb/settings").write_text(f"[default]\nmode = {mode}\n")  # as `wandb offline` does
    check_wandb()
    monkeypatch.setenv("WANDB_MODE", "online")  # the environment wins
    with pytest.raises(UserError, match="no login"):
        check_wandb()


def test_a_netrc_file_may_have_the_login_of_the_right_host(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = nobody / "home/.netrc"
    file.write_text("machine example.com login me password secret\n")
    with pytest.raises(UserError, match="no login"):
        check_wandb()
    file.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    check_wandb()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.mine.org:8080")
    with pytest.raises(UserError, match="no login"):
        check_wandb()
    file.rename(nobody / "elsewhere")
    monkeypatch.setenv("NETRC", str(nobody / "elsewhere"))
    (nobody / "elsewhere").write_text(f"machine wandb.mine.org:8080 login user password {KEY}\n")
    check_wandb()


def test_a_missing_package_is_found_though_a_folder_has_its_name(nobody: Path) -> None:
    (nobody / "packages/wandb.py").unlink()
    (nobody / "packages/wandb").mkdir()
    with pytest.raises(UserError, match="the wandb package is not installed"):
        check_wandb()


def test_a_run_is_refused_before_its_data_is_prepared(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torchtitan_style.launch.rank.ending_at_once", contextlib.nullcontext)
    with pytest.raises(SystemExit, match="2"):
        rank.main(["--metrics.enable_wandb", "true", "--job.dump_folder", "run"])
    assert capsys.readouterr().err.startswith("error: metrics.enable_wandb: there is no login")
    assert not (nobody / "run").exists()


def test_a_server_that_cannot_be_reached_is_one_message(nobody: Path) -> None:
    from torchtitan_style.config.schema import Metrics
    from torchtitan_style.metrics.recorder import Recorder

    config = Metrics(enable_wandb=True, enable_tensorboard=False)
    with pytest.raises(UserError, match=r"Weights & Biases cannot start: no server; .*WANDB_MODE=offline"):
        Recorder(config, nobody, resumed_step=0, settings={}, warn=print)


def test_a_failure_during_the_run_does_not_end_it(nobody: Path) -> None:
    from torchtitan_style.config.schema import Metrics
    from torchtitan_style.metrics.recorder import Recorder

    (nobody / "packages/wandb.py").write_text(
        "class Run:\n    def log(self, *_, **__):\n        raise ConnectionError('gone')\n\n"
        "def init(**_):\n    return Run()\n"
    )
    warnings: list[str] = []
    config = Metrics(enable_wandb=True, enable_tensorboard=False)
    recorder = Recorder(config, nobody, resumed_step=0, settings={}, warn=warnings.append)
    recorder.write([{"step": 1, "loss": 2.0}])
    recorder.write([{"step": 2, "loss": 1.0}])
    recorder.close()
    assert warnings == ["Weights & Biases receives no more records; metrics.jsonl has all of them: gone"]
    assert len((nobody / "metrics.jsonl").read_text().splitlines()) == 2
