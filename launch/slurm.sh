#!/usr/bin/env bash
# Train on the GPU nodes of a SLURM cluster; the job queues itself again as often as it takes.
#
# usage: launch/slurm.sh --config FILE --workdir DIR [--nodes N] [--gpus N] [--cpus N]
#            [--dry-run] [-- FLAG...]
#
#   --workdir DIR   on a disk that all nodes share; the job's log goes there too
#   --nodes N       nodes, one process on each (default: 1)
#   --gpus N        GPUs of a node (8), and --cpus N its cores (8 for each GPU)
#   --dry-run       print the command, submit nothing
#   -- FLAG...      more flags for the run, as --config.mesh.fsdp=8
#
# Partition, account and time limit are sbatch's own variables: SBATCH_PARTITION,
# SBATCH_ACCOUNT, SBATCH_TIMELIMIT. The run saves five minutes before the limit; then, after
# a preemption and when it hung, the job is requeued. scancel saves and ends it.

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=1 gpus=8 cpus=""
take "config workdir nodes gpus cpus" "dry-run" "$@"
training
[[ $nodes,$gpus,$cpus =~ ^[1-9][0-9]*,[1-9][0-9]*,[0-9]*$ ]] ||
    fail "--nodes, --gpus, --cpus: want numbers"
: "${cpus:=$((8 * gpus))}"
title="minigpt4 $workdir"

if ! $dry_run; then
    queue=$(squeue --me --noheader --format='%i %j') ||
        fail "squeue does not answer: is this a login node?"
    while read -r id job; do
        [[ $job != "$title" ]] || fail "job $id trains there already: wait for it, or scancel $id"
    done <<< "$queue"
    mkdir -p "$workdir"
fi
run sbatch --job-name="$title" --chdir="$PWD" --output="${workdir//%/%%}/slurm-%j.log" \
    --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus" --cpus-per-task="$cpus" \
    --requeue --open-mode=append --signal=TERM@300 \
    launch/slurm_job.sh "$workdir" "${PYTHON:-.venv/bin/python}" "${train[@]}"
printf 'follow it with: tail -F %q/slurm-*.log\n' "$workdir" >&2
