"""The package as pip installs it: from a wheel, without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = {path.name for path in (ROOT / "train_configs").glob("*.toml")}

BUILD = """
from setuptools import build_meta
build_meta.build_sdist("dist")
build_meta.build_wheel("dist")
build_meta.build_editable("editable")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a wheel and an sdist, built from a copy of what they are made of."""
    source = tmp_path_factory.mktemp("source")
    for name in ("torchtitan_style", "train_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return source / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as in site-packages."""
    [wheel] = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    elsewhere = installed.with_name("elsewhere")
    elsewhere.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "torchtitan_style", *map(str, arguments)],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_wheel_and_sdist_hold_the_configurations(built: Path, installed: Path) -> None:
    assert {path.name for path in (installed / "torchtitan_style/train_configs").iterdir()} == CONFIGS
    own = {path.relative_to(ROOT) for path in (ROOT / "torchtitan_style").rglob("*.py")}
    assert all((installed / path).is_file() for path in own)
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {f"train_configs/{name}" for name in CONFIGS} | {"setup.py"}


def test_an_editable_install_is_found_beside_a_folder_of_its_name(built: Path, tmp_path: Path) -> None:
    [wheel] = built.with_name("editable").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site-packages")
    (tmp_path / "torchtitan_style").mkdir()  # as in the folder in which somebody cloned the repository
    find = "import site, importlib.util; site.addsitedir('site-packages'); "
    find += "print(importlib.util.find_spec('torchtitan_style').origin)"
    command = [sys.executable, "-S", "-c", find]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == built.parent / "torchtitan_style/__init__.py"


# A misspelled key is what the configuration is refused for once it was found and read; nothing is trained.
@pytest.mark.parametrize("config", [[], ["--config", "qwen3_8b"], ["--config", "qwen3_8b.toml"]], ids=str)
def test_configurations_are_found_from_another_folder(installed: Path, config: list[str]) -> None:
    done = run(installed, "train", *config, "--training.stepz", "3")
    assert (done.returncode, done.stderr) == (2, "error: --training.stepz: unknown key; did you mean training.steps?\n")


def test_the_installed_command_starts_as_many_processes_as_it_is_told(installed: Path) -> None:
    options = ["--parallelism.tensor_parallel_degree", "2"]
    done = run(installed, "train", *options, NPROC="3")
    assert done.returncode == 2
    assert "does not divide the 3 processes" in done.stderr
    done = run(installed, "train", *options, NPROC="2", NNODES="2", NODE_RANK="2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: NODE_RANK: ")
    assert "--max-restarts" in run(installed, "train", "--help").stdout
