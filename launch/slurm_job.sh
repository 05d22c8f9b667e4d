#!/usr/bin/env bash
# The job that slurm.sh submits: WORKDIR COMMAND...

# shellcheck source=launch/common.sh
. launch/common.sh
workdir=$1
trap : TERM # else this shell would end before training has saved

# One process drives all GPUs of its node; JAX would give it the first alone.
JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # never on the CPU instead
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

before=$(eval "$(newest)") || true
code=0
# srun returns the highest code: a process that JAX aborts (134) because another one ended
# must not outrank that one.
# shellcheck disable=SC2016
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 bash -c \
    'trap : TERM; "$@"; code=$?; exit $((code == 134 ? 74 : code))' task "${@:2}" || code=$?

case $code in
    143) ;;
    75) # hung; three times in a row without a new checkpoint is a fault
        after=$(eval "$(newest)") || true
        [[ $after != "$before" || ${SLURM_RESTART_COUNT:-0} -lt 3 ]] || exit "$code"
        ;;
    *) exit "$code" ;;
esac
# A cancelled job runs no more; one that was preempted is requeued by SLURM.
if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
