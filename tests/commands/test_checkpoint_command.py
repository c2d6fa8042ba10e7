"""``checkpoint list|verify|show``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.commands.checkpoint import main

ABOUT = {
    "mesh": {"dp_replicate": 1, "dp_shard": 2, "tp": 4},
    "torch": "2.99",
    "tokenizer": "feed",
    "data": ["f00d"],
    "time": 1.7e9,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 5 and 10, the first of them the best."""
    folder = CheckpointFolder(tmp_path / "checkpoint")
    for step in (5, 10):
        temporary = folder.begin(step)
        (temporary / "__0_0.distcp").write_bytes(bytes(2000))
        (temporary / "config.toml").write_text("[optimizer]\nlr = 0.25\nbeta1 = 0.9\n[model]\nhidden_size = 256\n")
        folder.commit(step, {}, about=ABOUT | {"figures": {"loss": 1.25 * step, "val_loss": None}})
    folder.set_best(5)
    return tmp_path


def call(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def damage(run: Path, *, size: bool) -> None:
    (run / "checkpoint/step-10/__0_0.distcp").write_bytes(b"x" * (1999 if size else 2000))


def test_list(run: Path, capsys) -> None:
    assert call("list", run) == 0
    head, newest, oldest = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "size", "layout", "loss", "val.", "loss", "saved", "files"]
    for part in ("10 ", " kB", "dp 2 × tp 4", "12.5000", "2023-11-1", "whole"):
        assert part in newest, part
    assert oldest.split()[0] == "5"
    assert oldest.split()[-1] == "best"
    damage(run, size=False)
    assert call("list", run) == 0
    assert "__0_0.distcp has changed since it was written" in capsys.readouterr().out
    assert call("list", run, "--quick") == 0
    assert "sizes are right" in capsys.readouterr().out


@pytest.mark.parametrize("where", [".", "checkpoint", "checkpoint/step-10"])
def test_verify(run: Path, capsys, where: str) -> None:
    assert call("verify", run / where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run / 'checkpoint/step-10'}: whole"
    assert len(lines) == (1 if where.endswith("10") else 2)
    damage(run, size=False)
    assert call("verify", run / where, "--quick") == 0
    capsys.readouterr()
    assert call("verify", run / where) == 1
    assert "step-10: __0_0.distcp has changed" in capsys.readouterr().out
    damage(run, size=True)
    assert call("verify", run / where, "--quick") == 1
    assert "step-10: __0_0.distcp has 1999 bytes instead of 2000" in capsys.readouterr().out


def test_json(run: Path, capsys) -> None:
    for action in ("list", "verify", "show"):
        assert call(action, run, "--json") == 0
        first, *rest = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(rest) == (0 if action == "show" else 1)
        assert first["step"] == 10
        assert (first["problem"], first["best"]) == (None, False)
        assert first["path"] == str(run / "checkpoint/step-10")
        assert first | ABOUT == first
        assert set(first["files"]) == {"__0_0.distcp", "config.toml", "train_state.json"}
        assert first["bytes"] == sum(entry["size"] for entry in first["files"].values())
        if rest:
            assert rest[0]["best"] is True
    damage(run, size=True)
    assert call("verify", run, "--json") == 1
    assert "1999 bytes" in json.loads(capsys.readouterr().out.splitlines()[0])["problem"]


def test_show(run: Path, capsys) -> None:
    assert call("show", run / "checkpoint/step-5") == 0
    output = capsys.readouterr().out
    for part in ("step            5", "dp 2 × tp 4", "best so far     yes", "2.99", "feed", "f00d", "__0_0.distcp",
                 "  optimizer.lr = 0.25\n", "files           whole", "loss            6.2500\n"):  # fmt: skip
        assert part in output, part
    # Those at their defaults are left out, and a flavor's own dimensions.
    assert "beta1" not in output
    assert "hidden_size" not in output
    assert "validation loss" not in output


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"files": [1]}', b"\xff"])
def test_a_manifest_that_cannot_be_read(run: Path, capsys, content: bytes) -> None:
    (run / "checkpoint/step-10/manifest.json").write_bytes(content)
    assert call("verify", run) == 1
    assert "step-10: manifest.json" in capsys.readouterr().out
    for action in ("list", "show"):
        for more in ((), ("--json",)):
            assert call(action, run / "checkpoint/step-10", *more) == 0, (action, more)
            assert "manifest.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{run}/nowhere"], "there is no such folder"),
        (["list", "{run}/empty"], "has no checkpoints"),
        (["list"], "DIR"),
        (["sing", "{run}"], "invalid choice"),
        (["list", "{run}", "--jason"], "did you mean --json?"),
    ],
)
def test_mistakes(run: Path, capsys, arguments: list[str], message: str) -> None:
    (run / "empty").mkdir()
    assert call(*(argument.replace("{run}", str(run)) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [{"mesh": {"a": 1}}, {"figures": [1]}, {"figures": {"loss": "x"}}, {"time": "x"}, {"data": 5}, {"files": {"a": 1}}],
    ids=str,
)
def test_a_manifest_that_says_odd_things_hides_nothing(run: Path, wrong: dict, capsys) -> None:
    path = run / "checkpoint/step-10/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    assert call("list", run) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert call("show", run / "checkpoint/step-10") == 0
    assert "checkpoint" in capsys.readouterr().out
