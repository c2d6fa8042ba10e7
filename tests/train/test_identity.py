"""What a resume may change, and how it says what it may not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.common.errors import UserError
from torchtitan_style.config import Config
from torchtitan_style.launch.launcher import main
from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.models.section import schema_of
from torchtitan_style.train.identity import changed_settings, check_before_start, check_same_run, identity
from torchtitan_style.train.state import SkippedSteps, TrainState

HERE = Path("run/checkpoint/step-5")


def config(**checkpoint: Any) -> Config:
    return schema_of(QWEN3).model_validate({"model": {"flavor": "debug"}, "checkpoint": checkpoint})


def saved(**changes: Any) -> dict[str, dict[str, Any]]:
    found = copy.deepcopy(identity(config(), dp=1))
    found["data"] |= {"tokenizer": "a", "content": ["b"]}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        found[section][name] = value
    return found


def test_the_same_run_may_go_on() -> None:
    assert check_same_run(saved(), saved(), config(), HERE) == []
    two = identity(config(), dp=2)
    assert {key: value for key, value in two.items() if key != "data"} == {
        key: value for key, value in saved().items() if key != "data"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__seed": 7}, "training.seed was 7, is 0; restore the setting, or start"),
        ({"model__hidden_size": 32, "training__seq_len": 9},
         "model.hidden_size was 32, is 64; training.seq_len was 9, is 512; restore the setting, or start"),
        ({"optimizer__name": "muon"}, "was muon, is adamw; restore the setting, allow it with "
         "--checkpoint.switch_optimizer"),
        ({"data__tokenizer": "z"},
         "data.tokenizer was z, is a; restore the setting, continue at the same position in the new data with "
         "--checkpoint.allow_changed_data, or start"),
        ({"data__packing": "best_fit"}, "data.packing was best_fit, is concat; restore the setting, or start"),
        ({"data__tokenizer": "z", "optimizer__name": "muon"}, "is a; restore the setting, or start"),
    ],
)  # fmt: skip
def test_another_run_is_refused_with_all_that_differs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_same_run(saved(**changes), saved(), config(), HERE)
    assert str(caught.value).startswith(f"{HERE} belongs to a different run: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith("start a new run with another --job.dump_folder")


def test_normuon_has_more_state_than_muon() -> None:
    def optimizer(**muon: float) -> dict[str, Any]:
        settings = {"model": {"flavor": "debug"}, "optimizer": {"name": "muon", "muon": muon}}
        return identity(schema_of(QWEN3).model_validate(settings), dp=1)

    assert check_same_run(optimizer(normuon_beta2=0.9), optimizer(normuon_beta2=0.95), config(), HERE) == []
    with pytest.raises(UserError, match=r"optimizer.name was muon, is muon with normuon_beta2; restore the setting, "):
        check_same_run(optimizer(), optimizer(normuon_beta2=0.95), config(), HERE)


def test_what_is_allowed_is_said() -> None:
    settings = config(switch_optimizer=True, allow_changed_data=True)
    before = saved(optimizer__name="muon", data__content=["z"])
    assert check_same_run(before, saved(), settings, HERE) == [
        "the optimizer was muon; adamw starts afresh",
        "content of the data changed; continuing at the same position in the new data",
    ]
    with pytest.raises(UserError, match=r"different run: training.seed was 7, is 0; restore the setting, or start"):
        check_same_run(saved(training__seed=7, optimizer__name="muon"), saved(), settings, HERE)


def test_what_an_older_version_did_not_save_differs() -> None:
    before = saved()
    del before["data"]["weights"]
    with pytest.raises(UserError, match=r"data.weights was None, is "):
        check_same_run(before, saved(), config(), HERE)
    assert check_same_run(saved() | {"more": {"x": 1}}, saved(), config(), HERE) == []


def test_older_states_have_defaults_for_what_came_later() -> None:
    assert TrainState.from_json({"step": 3, "rows_seen": 12, "best_val_loss": None, "data": {"rows": [12]}}) == (
        TrainState(step=3, rows_seen=12, data={"rows": [12]})
    )
    state = TrainState.from_json({"step": 3, "skipped": {"total": 2, "in_a_row": 1}})
    assert state.skipped == SkippedSteps(2, 1)


def test_before_the_start_the_newest_that_can_be_read_counts(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoint")
    for step, seed in ((1, 0), (2, 7), (3, 0)):
        folder.begin(step)
        folder.commit(step, {"identity": saved(training__seed=seed)})

    def check(load_step: int) -> None:
        settings = {"model": {"flavor": "debug"}, "checkpoint": {"load_step": load_step}}
        check_before_start(schema_of(QWEN3).model_validate(settings | {"job": {"dump_folder": str(tmp_path)}}), dp=1)

    check(-1)
    check(1)
    check(0)
    with pytest.raises(UserError, match=r"training.seed was 7, is 0"):
        check(2)
    for damaged in (b"", b"[]", b"\xff", b'{"identity": 3}'):
        (folder.path(3) / "train_state.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"step-2 belongs to a different run"):
            check(-1)


def test_settings_that_changed_are_listed(tmp_path: Path) -> None:
    import dataclasses

    from torchtitan_style.config import to_toml
    from torchtitan_style.models.registry import model_config

    before = schema_of(QWEN3).model_validate({"model": {"flavor": "debug"}, "optimizer": {"lr": 0.001}})
    (tmp_path / "config.toml").write_text(to_toml(before, dimensions=dataclasses.asdict(model_config(before.model))))
    assert changed_settings(tmp_path, before) == []
    now = schema_of(QWEN3).model_validate({"model": {"flavor": "debug", "dropout": 0.1}, "optimizer": {"lr": 0.0005}})
    assert changed_settings(tmp_path, now) == ["model.dropout 0.0 → 0.1", "optimizer.lr 0.001 → 0.0005"]
    (tmp_path / "config.toml").write_text("no TOML [")
    assert changed_settings(tmp_path, before) == []


@pytest.mark.parametrize("text", ["--max-restarts=many", "--max-restarts=-1", "--max-restarts=", "--max-restarts=1.5"])
def test_a_wrong_number_of_restarts_is_refused(capsys, monkeypatch, text: str) -> None:
    monkeypatch.delenv("MAX_RESTARTS", raising=False)
    monkeypatch.setattr("torchtitan_style.commands.train.main", pytest.fail)
    for arguments in ([text], text.split("=")):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert "error: --max-restarts: must be a whole number, 0 or more, not " in capsys.readouterr().err


def test_a_wrong_number_of_restarts_in_the_environment_is_refused(capsys, monkeypatch) -> None:
    monkeypatch.setattr("torchtitan_style.commands.train.main", pytest.fail)
    monkeypatch.setenv("MAX_RESTARTS", "often")
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert 'error: MAX_RESTARTS: must be a whole number, 0 or more, not "often"' in capsys.readouterr().err
