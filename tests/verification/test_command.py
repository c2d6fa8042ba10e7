"""``python -m torchtitan_style verify``, as a person runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_hf import hf_model

from tests.conftest import ENVIRONMENT, ROOT, Python

TINY = ["--model.flavor", "debug", "--training.seq_len", "32"]


@pytest.fixture(scope="module")
def verify(python: Python) -> Python:
    return lambda *arguments: python("-m", "torchtitan_style", "verify", *arguments, cwd=ROOT)


def interpreter(*arguments: object, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """As a user would start it, with the package in a folder."""
    command = [sys.executable, "-m", "torchtitan_style", "verify", *map(str, arguments)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(package)}
    return subprocess.run(
        command, env=environment, cwd=package, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    hf_model().save_pretrained(folder)
    return folder


def test_a_layout_that_is_right(verify: Python, tmp_path: Path) -> None:
    config = ["--config", "train_configs/qwen3.toml", "--parallelism.tensor_parallel_degree", "2"]
    done = verify(*config, *TINY, "--training.local_batch_size", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    # -1 counts as 2; both precisions; every parameter of two layers
    assert "4 processes (dp 2 × tp 2)" in done.stdout
    assert "4 rows of 32 tokens" not in done.stdout
    assert "8 rows of 32 tokens in 2 microbatches" in done.stdout
    assert done.stdout.count("computing in") == 2
    assert done.stdout.count("every gradient of step 1") == 2
    assert "everything agrees" in done.stdout
    assert done.stderr == ""


def test_a_compiled_model_that_is_right(verify: Python) -> None:
    options = ["--training.mixed_precision_param", "float32", "--compile.enable", "true"]
    options += ["--model.attention_bias"]  # so that graphs are those of distributed/test_gradients.py
    done = verify(*TINY, "--world-size", "1", "--training.local_batch_size", "2", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every gradient of step 1") == 1
    assert "everything agrees" in done.stdout


def test_a_layout_that_is_wrong(tmp_path: Path) -> None:
    """The package with one line left out: a norm that sees a part of the positions, its gradient not summed."""
    for name in ("torchtitan_style", "train_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    file = tmp_path / "torchtitan_style" / "models" / "qwen3" / "parallelize.py"
    line = '        "post_attention_layernorm": NormOfShard(),\n'
    source = file.read_text()
    assert source.count(line) == 1
    file.write_text(source.replace(line, ""))
    done = interpreter("--parallelism.tensor_parallel_degree", "2", "--world-size", "2", *TINY, package=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG" in done.stdout
    assert "model.layers.1.post_attention_layernorm.weight: off by" in done.stdout
    assert "NOT everything agrees" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_model_that_is_right(verify: Python, model: Path) -> None:
    done = verify("--hf", model)
    assert done.returncode == 0, done.stdout + done.stderr
    for check in ("names of parameters", "bit for bit", "logits", "greedy text", "loss", "every gradient"):
        assert check in done.stdout
    assert done.stderr == ""


def test_a_tolerance_of_the_users(verify: Python, model: Path) -> None:
    done = verify("--hf", model, "--tolerance", "1e-12")
    assert done.returncode == 1
    assert "1e-12" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hf", "/nowhere/model"], "there is no folder /nowhere/model"),
        (["--hf", "train_configs"], "train_configs holds neither checkpoints nor a model"),
        (["--config", "nowhere.toml"], "there is no such config file"),
        (["--world-size", "3", "--parallelism.tensor_parallel_degree", "2"], "does not divide the 3 processes"),
        (["--world-size", "0"], "--world-size: must be at least 1"),
        (["--world-size", "two"], "invalid int value: 'two'"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--training.sequence_length", "3"], "unknown key"),
        (["stray"], "argument stray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message(verify: Python, arguments: list[str], message: str) -> None:
    done = verify(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help(verify: Python) -> None:
    assert "--world-size N" in verify("--help").stdout
    assert "tensor_parallel_degree" in verify("--help", "parallelism").stdout
