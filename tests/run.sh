#!/usr/bin/env bash
# Lint, types and tests, in the environment that run_train.sh makes. Arguments go to pytest.
#
#   tests/run.sh -m nightly       the tests that are left out otherwise
#   TORCH=2.14.1 tests/run.sh     the tests with another torch, in an environment of its own: .venv-torch-2.14.1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n "${TORCH:-}" ]]; then
    export RUN_TRAIN_VENV="$PWD/.venv-torch-$TORCH" RUN_TRAIN_CONSTRAINTS="$PWD/.venv-torch-$TORCH.txt"
    sed "s/^torch==.*/torch==$TORCH/" constraints.txt >"$RUN_TRAIN_CONSTRAINTS"
fi
python="$(./run_train.sh --setup-only dev)"
unset RUN_TRAIN_VENV RUN_TRAIN_CONSTRAINTS # for the runs that tests start

if [[ -z "${TORCH:-}" ]]; then # lint and types do not depend on it
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
fi
# Two workers: the files that start several ranks have a CPU each. conftest.py puts the files that take longest first.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
