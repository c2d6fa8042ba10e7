"""Some changed inputs for each way into the program, the same each time. ``python -m tests.fuzz`` tries millions."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.entries import ENTRIES
from tests.fuzz.trial import Trial, fast_entries

CASES = 12


@pytest.fixture(scope="module", params=fast_entries())
def trial(request: pytest.FixtureRequest) -> Iterator[Trial]:
    found = Trial(ENTRIES[request.param])
    yield found
    found.close()


@settings(
    max_examples=CASES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(random=st.randoms(use_true_random=False))
def test_anything_ends_normally_or_with_one_message(trial: Trial, random: Random) -> None:
    name, content = trial.case(random)
    fault = trial.call(name, content)
    assert fault is None, f"{name} = {content[:1000]!r}"
