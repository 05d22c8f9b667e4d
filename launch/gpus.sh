#!/usr/bin/env bash
# Train on the GPUs of this host; begin again when the run hung or was told to end.
#
# usage: launch/gpus.sh --config FILE --workdir DIR [--gpus LIST] [--dry-run] [-- FLAG...]
#
#   --config FILE   of this checkout, as configs/stage1.py or configs/stage1.py:13b
#   --workdir DIR   checkpoints and logs; the same command goes on from there
#   --gpus LIST     as nvidia-smi counts them: 0,1 (default: all)
#   --dry-run       print the command, run nothing
#   -- FLAG...      more flags for the run, as --config.mesh.fsdp=4
#
# One process drives all GPUs. Exit codes 75 and 143 begin again, three times at most
# without a new checkpoint; Ctrl-C and SIGTERM save, and end it. PYTHON names the
# interpreter (default: .venv/bin/python), RETRY_SECONDS the pause (default: 30).

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

gpus=""
take "config workdir gpus" "dry-run" "$@"
training
[[ -z $gpus ]] || export CUDA_VISIBLE_DEVICES=$gpus CUDA_DEVICE_ORDER=PCI_BUS_ID
# Without this a JAX that finds no GPU trains on the CPU.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
# JAX takes three quarters of a GPU by itself; nothing else is to run here.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
command=("${PYTHON:-.venv/bin/python}" "${train[@]}")
$dry_run && { run "${command[@]}"; exit; }

command -v nvidia-smi > /dev/null || fail "no nvidia-smi here: is the driver installed?"
mkdir -p "$workdir"
exec 8> "$workdir/.launched"
flock -n 8 || fail "a run is under way in $workdir: wait for its end, or end it with kill"
busy=$(nvidia-smi ${gpus:+-i "$gpus"} --query-compute-apps=pid,name --format=csv,noheader) ||
    fail "nvidia-smi finds no GPU ${gpus:-at all}: $busy"
[[ -z $busy ]] || fail "in use by $busy: wait for its end, or name other GPUs with --gpus"

ending=false pid=""
trap 'ending=true; [[ -z $pid ]] || kill "$pid"' TERM INT
while ! $ending; do
    setsid "${command[@]}" 8>&- &
    pid=$! code=0
    ! $ending || kill "$pid" # the signal came before its number was known
    wait "$pid" || code=$?
    while kill -0 "$pid" 2> /dev/null; do # a signal has cut the wait short
        code=0
        wait "$pid" || code=$?
    done
    kill -KILL -- "-$pid" 2> /dev/null || true # what a run that hung has left
    pid=""
    if $ending || ! again "$code" "$(eval "$(newest)")"; then
        exit "$code"
    fi
    sleep "$RETRY_SECONDS" & wait $! # which a signal cuts short
done
exit 143
