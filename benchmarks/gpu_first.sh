#!/usr/bin/env bash
# What is true of this code on one GPU of the H100 or H200 class, in two calls of some six minutes:
#
#   benchmarks/gpu_first.sh outputs/gpu checks
#   benchmarks/gpu_first.sh outputs/gpu speed
#
# On a machine without network: packages that are missing there can lie in WHEELS (a folder of wheels), and a newer
# NCCL, which lets two ranks share a GPU, as NCCL (libnccl.so.2, or that compressed by xz). More: gpu_first.py.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
if [[ -n "${WHEELS:-}" ]]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/gpu_first "$WHEELS"/*.whl
    export PYTHONPATH="/tmp/gpu_first:$PYTHONPATH"
fi
if [[ -n "${NCCL:-}" ]]; then
    library="$NCCL"
    if [[ "$NCCL" == *.xz ]]; then
        library=/tmp/libnccl.so.2
        [[ -f "$library" ]] || "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$NCCL" "$library"
    fi
    export LD_PRELOAD="$library"
fi
exec "$python" benchmarks/gpu_first.py "$@"
