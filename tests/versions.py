"""Tries versions other than those of constraints.txt: an environment for each combination, and part of the tests in it.

    python tests/versions.py                           every combination whose Python is on the path
    python tests/versions.py python3.12 oldest         some of them
    python tests/versions.py --environment FOLDER      an environment that exists; nothing is installed

Prints for each what the table in docs/installing.md is made of. Environments are made in .venv-versions/ and removed
after the tests, as one with CUDA has 5 GB; --keep leaves them. Runs with Python 3.10 and no packages.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]

# Python, torch (None: that of constraints.txt), whether all other packages are the oldest that pyproject.toml admits.
COMBINATIONS = {
    "python3.10": ("python3.10", None, False),
    "python3.11": ("python3.11", None, False),
    "python3.12": ("python3.12", None, False),
    "python3.13": ("python3.13", None, False),
    "torch2.11": ("python3.11", "2.11.0", False),
    "torch2.14": ("python3.11", "2.14.1", False),
    "oldest": ("python3.10", "2.11.0", True),
    "oldest-torch2.13": ("python3.11", None, True),
}

# What depends most on other packages: TOML, tokenizers, parquet and datasets, Transformers' models and formats, DCP.
TESTS = [
    "tests/config",
    "tests/data/test_tokenizer.py",
    "tests/data/test_documents.py",
    "tests/data/test_chat_masks.py",
    "tests/data/test_prepare.py",
    "tests/models/test_hf_folder.py",
    "tests/models/test_qwen3_hf.py",
    "tests/models/test_qwen3_against_hf.py",
    "tests/models/test_qwen3_moe_against_hf.py",
    "tests/optim",
    "tests/metrics",
    "tests/checkpoint",
    "tests/inference/test_generate.py",
    "tests/launch",
    "tests/test_installed.py",
]
# torch.compile, torchrun, FSDP2 and DTensor: every gradient of two tensor-parallel ranks against one process.
RUNS = {
    "train": ["--training.steps", "10", "--compile.enable", "true"],
    "verify": ["--model.flavor", "debug", "--world-size", "2", "--parallelism.tensor_parallel_degree", "2"],
}
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "pydantic", "numpy", "pyarrow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("combinations", nargs="*", metavar="COMBINATION", help=", ".join(COMBINATIONS))
    parser.add_argument("--environment", type=Path, metavar="FOLDER")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.combinations) - set(COMBINATIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(COMBINATIONS)}")
    if options.environment:
        raise SystemExit(0 if try_out(options.environment.resolve()) else 1)

    failed = []
    for name in options.combinations or COMBINATIONS:
        python, torch, oldest = COMBINATIONS[name]
        if not shutil.which(python):
            print(f"{name}: no {python} on the path", flush=True)
            failed += [name] if options.combinations else []
            continue
        environment = ROOT / ".venv-versions" / name
        make(environment, python, torch, oldest)
        if not try_out(environment):
            failed.append(name)
        if not options.keep:
            shutil.rmtree(environment)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def make(environment: Path, python: str, torch: str | None, oldest: bool) -> None:
    """The package and its tests' needs, in an environment of its own."""
    lines = oldest_packages() if oldest else (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if oldest and torch is None:
        torch = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)[1]
    if torch:
        lines = [f"torch=={torch}" if re.match(r"torch[>=]=", line) else line for line in lines]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(lines))
        constraints.flush()
        subprocess.run([python, "-m", "venv", "--clear", environment], check=True)
        install = [
            environment / "bin/python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            "-c",
            constraints.name,
        ]
        subprocess.run([*install, "--editable", f"{ROOT}[dev]"], check=True)


def oldest_packages() -> list[str]:
    """The lower bounds of pyproject.toml as constraints."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.search(r"^dependencies = \[$(.*?)^\]$", text, flags=re.M | re.S)[1]
    return [bound.replace(">=", "==") for bound in re.findall(r'^    "([\w.-]+>=[\d.]+)', dependencies, flags=re.M)]


def try_out(environment: Path) -> bool:
    """Whether the tests and the default run work with the packages of ``environment``. Prints a row of the table."""
    python = environment / "bin/python"
    variables = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        tests = [python, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={results}", *TESTS]
        subprocess.run(tests, cwd=ROOT, env=variables, check=False)
        suite = ElementTree.parse(results).getroot()[0].attrib if results.exists() else {}
        status = {
            name: subprocess.run(
                [python, "-m", "torchtitan_style", name, *arguments, "--job.dump_folder", folder],
                cwd=folder,
                env=variables,
                check=False,
            ).returncode
            for name, arguments in RUNS.items()
        }
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    show = "import importlib.metadata as m, platform; print(platform.python_version(), *map(m.version, {}))"
    versions = subprocess.check_output([python, "-c", show.format(PACKAGES)], text=True).split()
    cells = [
        *versions,
        f"{passed} passed, {count['skipped']} skipped, {failed} failed",
        *("ok" if returned == 0 else f"status {returned}" for returned in status.values()),
        f"{datetime.date.today()}",
    ]
    print("|", " | ".join(cells), "|", flush=True)
    return passed > 0 and failed == 0 and not any(status.values())


if __name__ == "__main__":
    main()
