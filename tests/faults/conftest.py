"""What the tests of faults share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Command, Runs, Zygote, write_corpus


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def command(zygote: Zygote, tmp_path: Path) -> Command:
    return Command(zygote, tmp_path)


@pytest.fixture(scope="session")
def corpus(zygote: Zygote, tmp_path_factory) -> Path:
    """A made-up corpus, a configuration for it, and its tokens in ``prepared``."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    Runs(zygote, folder, folder)("prepared", "--training.steps", 1, "--checkpoint.enable", "false")
    return folder


@pytest.fixture(scope="session")
def shared(zygote: Zygote, corpus: Path, tmp_path_factory) -> Iterator[Runs]:
    """Runs that several tests look at."""
    runs = Runs(zygote, corpus, tmp_path_factory.mktemp("shared"))
    yield runs
    runs.end()


@pytest.fixture
def runs(zygote: Zygote, corpus: Path, tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(zygote, corpus, tmp_path)
    yield runs
    runs.end()


@pytest.fixture(scope="session")
def whole(shared: Runs) -> Path:
    """The uninterrupted run of one process."""
    return shared("whole").folder


@pytest.fixture(scope="session")
def whole_of_two(shared: Runs) -> Path:
    """The uninterrupted run of two processes."""
    return shared("whole-of-two", nproc=2).folder
