"""What is suggested for a name that there is not."""

from __future__ import annotations

import pytest

from torchtitan_style.config import names
from torchtitan_style.config.schema import sections_of
from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.models.section import schema_of

SECTIONS = sections_of(schema_of(QWEN3))


def test_tables_point_at_keys_that_there_are() -> None:
    keys = set(names.all_keys(SECTIONS))
    assert set(names._FOREIGN) <= keys
    assert set(names._MOVED.values()) <= keys
    own = {key.rpartition(".")[2] for key in keys}
    assert not own & set(names._BY_FOREIGN_NAME)  # else it is never looked up
    assert not keys & {*names._MOVED, *names._NO_COUNTERPART}
    several = [name for listed in names._FOREIGN.values() for name in listed.split()]
    assert len(several) == len(set(several))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("training.learning_rate", "optimizer.lr"),
        ("learning_rate", "optimizer.lr"),
        ("learning-rate", "optimizer.lr"),
        ("validation.interval", "validation.freq"),
        ("model.dim", "model.hidden_size"),
        ("training.per_device_train_batch_size", "training.local_batch_size"),
        ("training.max_seq_lenght", "training.seq_len"),  # a misspelled foreign name
        ("evaluation.eval_interval", "validation.freq"),
        ("trainer.save_steps", "checkpoint.interval"),
        ("training.stepz", "training.steps"),
        ("training.lora_r", "lora.rank"),
        ("lora.lora_alpha", "lora.alpha"),
    ],
)
def test_the_right_name_is_found_in_any_section(wrong: str, right: str) -> None:
    assert names.did_you_mean(wrong, SECTIONS).rstrip("?").split()[-1] == right


@pytest.mark.parametrize(
    "wrong", ["optimizer.fused", "checkpoint.folder", "checkpoint.export_dtype", "training.epochs"]
)
def test_what_has_no_counterpart_says_why(wrong: str) -> None:
    assert "mean" not in names.did_you_mean(wrong, SECTIONS)
    assert ": " not in names.did_you_mean(wrong, SECTIONS).partition("; ")[0]
    assert len(names.did_you_mean(wrong, SECTIONS)) > 20


@pytest.mark.parametrize("wrong", ["training.foo", "optimizer.rho", "checkpoint.zzz"])
def test_nothing_is_suggested_where_nothing_is_near(wrong: str) -> None:
    section = wrong.partition(".")[0]
    assert names.did_you_mean(wrong, SECTIONS) == f"; --help {section} lists the keys"
