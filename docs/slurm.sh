#!/usr/bin/env bash
# Train on several nodes, and go on in a new job when the time is up:
#
#   sbatch --nodes 4 docs/slurm.sh --config train_configs/qwen3_8b.toml --job.dump_folder /shared/outputs/8b
#
# The dump folder must be on a file system that all nodes share.
#SBATCH --job-name=torchtitan_style
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Ten minutes before the end: time for a step and a checkpoint. To this script, which hands it on to every launcher.
#SBATCH --signal=B:USR1@600
set -uo pipefail

folder=""
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case "${arguments[i]}" in
        --job.dump_folder) folder="${arguments[i + 1]:-}" ;;
        --job.dump_folder=*) folder="${arguments[i]#*=}" ;;
    esac
done
if [[ -z "$folder" ]]; then
    echo "error: name the run's folder on the shared file system with --job.dump_folder" >&2
    exit 2
fi

export NNODES="$SLURM_JOB_NUM_NODES"
export RDZV_ENDPOINT="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500"
told=0
trap 'told=$((told + 1)); scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # to the job steps
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec ./run_train.sh "$@"' run "$@" &
while true; do
    before=$told
    wait $!
    status=$?
    [[ "$told" == "$before" ]] && break # else it was the signal that ended the wait
done

# The run leaves preempted.json when it was told to stop and has saved. With another status it may be one of an earlier
# job. A signal in the first instants of a start ends it with 138 or 143 instead: USR1, or the launcher's TERM. Without
# a signal from the scheduler these are failures, as when one node kills the others.
if [[ "$status" == 0 && -e "$folder/preempted.json" ]] || [[ "$told" != 0 && "$status" =~ ^(138|143)$ ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
