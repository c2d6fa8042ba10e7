#!/usr/bin/env bash
# Lint, types and tests, in the environment that run_train.sh makes. Arguments go to pytest: -m nightly runs the tests
# that are left out otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$(./run_train.sh --setup-only dev)"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# Two workers: the files that start several ranks have a CPU each. conftest.py puts the files that take longest first.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
