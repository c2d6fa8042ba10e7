#!/usr/bin/env bash
# All that is measured on one GPU of the H100 or H200 class, in one go (made to take some 20 minutes):
#
#   benchmarks/gpu.sh outputs/gpu
#   PYTHON=.venv/bin/python MODELS="0.6B 8B/8" PARTS="train" benchmarks/gpu.sh outputs/gpu
#
# Every part writes into the folder, NAME.txt and mostly NAME.json; one that fails or takes too long is said so, and
# the others go on. summary.txt has the status and the seconds of each.
#
# MODELS: flavors to train, at rows of SEQ_LEN tokens, against Transformers; 8B/8 is the 8B with 8 of its 36 layers.
# Two contenders are on the GPU at once, with fp32 weights, gradients and AdamW's moments of 16 bytes a parameter
# each: the whole 4B has 64 GB of it, so that it runs against large matmuls only (ALONE), and the whole 8B 131 GB,
# which does not fit with its activations at all.
# PARTS: which parts, of peak, train, generate, checkpoint, data, trace.
set -uo pipefail

out="${1:?the folder for results is missing, as in benchmarks/gpu.sh outputs/gpu}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$out"
out="$(cd "$out" && pwd)"
python="${PYTHON:-python}"
models="${MODELS-0.6B 1.7B 4B/18 8B/8}"
alone="${ALONE-4B}"
seq_len="${SEQ_LEN:-4096}"
repeats="${REPEATS:-3}"
steps="${STEPS:-3}"
contenders="${CONTENDERS:-ours, a graph per block;HF loop, compiled;large matmuls}"
flavor="${GENERATE_FLAVOR:-0.6B}"
parts=" ${PARTS:-peak train generate checkpoint data trace} "
: >"$out/summary.txt"

# part NAME SECONDS COMMAND...: run COMMAND, for so many seconds at most.
part() {
    local name="$1" limit="$2" begin=$SECONDS status=0
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
    tail -n 15 "$out/$name.txt"
    echo "$name: status $status, $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
}

wanted() { [[ "$parts" == *" $1 "* ]]; }

# Rows at once, and whether blocks are recomputed, so that both sides should fit into 141 GB.
rows_of() { case "$1" in 0.6B) echo 4 ;; 1.7B | */*) echo 2 ;; *) echo 1 ;; esac; }
recompute_of() { case "$1" in 4B | 8B*) echo full ;; *) echo none ;; esac; }

if wanted peak; then
    part peak 120 "$python" benchmarks/device_peak.py --json "$out/peak.json"
fi

# train MODEL CONTENDERS
train() {
    local name="train-${1/\//-layers-}" flavored=(--model "${1%%/*}") only=() names
    if [[ "$1" == */* ]]; then
        flavored+=(--model.num_hidden_layers "${1##*/}" --model.max_window_layers "${1##*/}")
    fi
    IFS=";" read -ra names <<<"$2"
    for contender in "${names[@]}"; do only+=(--only "$contender"); done
    part "$name" 270 "$python" benchmarks/train_step.py "${flavored[@]}" --rows "${ROWS:-$(rows_of "$1")}" \
        --seq-len "$seq_len" --recompute "$(recompute_of "$1")" --repeats "$repeats" --steps "$steps" \
        "${only[@]}" --json "$out/$name.json"
}

if wanted train; then
    for model in $models; do train "$model" "$contenders"; done
    for model in $alone; do train "$model" "large matmuls"; done
fi

if wanted generate; then
    part generate 150 "$python" benchmarks/generate.py --flavor "$flavor" --repeats "$repeats" --new "${NEW:-128}"
fi

if wanted checkpoint; then
    part checkpoint 150 "$python" benchmarks/checkpoint.py --repeats "$repeats" --folder "$out" \
        --layers "${LAYERS:-12}" --output "$out/checkpoint.json"
fi

if wanted data; then
    part data 200 "$python" benchmarks/data.py --repeats 1 --megabytes "${MEGABYTES:-24}" --output "$out/data.json"
fi

if wanted trace; then # of single steps, for Perfetto: trace/profile_traces/step-*/rank-0.json
    rm -rf "$out/trace"
    part trace 150 "$python" -m torchtitan_style train --job.dump_folder "$out/trace" --model.flavor "${TRACE_FLAVOR:-0.6B}" \
        --training.seq_len "$seq_len" --training.global_batch_size "${ROWS:-2}" --training.steps 12 \
        --lr_scheduler.warmup_steps 2 --compile.enable true --profiling.enable_profiling true \
        --profiling.profile_freq 5 --validation.enable false --generation.enable false --checkpoint.enable false
fi

echo "everything is in $out:"
cat "$out/summary.txt"
