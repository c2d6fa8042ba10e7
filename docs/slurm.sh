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
# Ten minutes before the end: time for a step and a checkpoint. To the job steps, so that every launcher gets it.
#SBATCH --signal=USR1@600
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
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec ./run_train.sh "$@"' run "$@"
status=$?

# The run leaves this when it was told to stop and has saved. With another status it may be one of an earlier job.
if [[ "$status" == 0 && -e "$folder/preempted.json" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
