#!/usr/bin/env bash
# Sets itself up, then trains.
#
#   ./run_train.sh                                      train_configs/qwen3.toml, minutes on two CPU cores
#   ./run_train.sh --config FILE --section.key VALUE    another configuration, and overrides
#   NPROC=4 ./run_train.sh                              four processes (default: one per GPU, else one)
#   ./run_train.sh --help [SECTION]                     what can be set
#   ./run_train.sh --setup-only [EXTRA]                 only set up (EXTRA: dev, wandb); prints the Python to use
#
# Uses the active Python environment if everything is installed there; otherwise makes .venv beside
# this file, once, with uv if there is one and pip if not. RUN_TRAIN_VENV=FOLDER uses that environment in any case.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${RUN_TRAIN_VENV:-$root/.venv}"
constraints="${RUN_TRAIN_CONSTRAINTS:-$root/constraints.txt}"

extra=""
if [[ "${1:-}" == "--setup-only" ]]; then
    extra="${2:-}"
fi

# Whether the Python in $1 has this package and all it requires (with the extra $2).
has_everything() {
    "$1" - "$root" "$2" >/dev/null 2>&1 <<'PYTHON'
import importlib.metadata, importlib.util, os, re, sys
root, extra = sys.argv[1:]
sys.path = [p for p in sys.path if p]  # not the current folder: the package must be installed
spec = importlib.util.find_spec("torchtitan_style")
if os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))) != os.path.realpath(root):
    raise SystemExit(1)
for line in importlib.metadata.requires("torchtitan-style"):
    requirement, _, marker = line.partition(";")
    if "extra" in marker and (not extra or f"'{extra}'" not in marker.replace('"', "'")):
        continue
    if "python_version" in marker and sys.version_info >= (3, 11):
        continue
    importlib.metadata.version(re.match(r"[\w.-]+", requirement)[0])
PYTHON
}

set_up() {
    local spec="$root${extra:+[$extra]}"
    echo "setting up $venv (once; a few minutes)" >&2
    if command -v uv >/dev/null; then
        # uv does not read pip's settings; wheels that pip was told of are offered to it too.
        export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
        [[ -x "$venv/bin/python" ]] || uv venv --python "$system_python" "$venv" >&2
        uv pip install --python "$venv/bin/python" --constraint "$constraints" --editable "$spec" >&2
    else
        [[ -x "$venv/bin/python" ]] || "$system_python" -m venv "$venv" >&2
        "$venv/bin/python" -m pip install --constraint "$constraints" --editable "$spec" >&2
    fi
    echo "$wanted" | tee "$stamp" >"$venv/installed" # with an extra, what goes without is there too
}

system_python="$(command -v python3 || command -v python || true)"
if [[ -z "$system_python" ]] || ! "$system_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: Python 3.10 or newer is needed, and python3 is ${system_python:-not on the path}" >&2
    exit 2
fi
if [[ -z "${RUN_TRAIN_VENV:-}" ]] && has_everything "$system_python" "$extra"; then
    python="$system_python"
else
    python="$venv/bin/python"
    stamp="$venv/installed${extra:+-$extra}"
    wanted="$(cat "$root/pyproject.toml" "$constraints" | cksum)"
    if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
        set_up
    fi
fi

if [[ "${1:-}" == "--setup-only" ]]; then
    echo "$python"
    exit 0
fi
exec "$python" -m torchtitan_style.launch "$@"
