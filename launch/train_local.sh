#!/usr/bin/env bash
# Train the demo's connector on this machine: warm start, stage 1 and stage 2, each from
# the result of the one before.
set -euo pipefail

usage() {
    cat <<EOF
usage: launch/train_local.sh --data DIR --workdir DIR [--dry-run] [-- FLAG...]

  --data DIR      captioned photos as tar shards: DIR/train, DIR/val
  --workdir DIR   DIR/warmup, DIR/stage1, DIR/stage2: checkpoints and logs;
                  DIR/features: what the frozen ViT makes of the photos. Outside the
                  checkout. Run the same command again to go on where it stopped.
  --dry-run       print the commands, run nothing
  -- FLAG...      more flags for every stage, as --config.batch_size=8

PYTHON names the interpreter (default: .venv/bin/python of this clone, see make demo).
EOF
}

fail() {
    printf 'train_local.sh: %s\n' "$1" >&2
    usage >&2
    exit 2
}

# The path without links and dots of a folder that may not be there yet.
real() {
    local path="" rest=$1/ part
    while [[ -n $rest ]]; do
        part=${rest%%/*} rest=${rest#*/}
        case $part in
            "" | .) ;;
            ..) path=${path%/*} ;;
            *) path+=/$part ;;
        esac
        [[ ! -L $path ]] || path=$(cd -P "$path" && pwd) || return
        path=${path%/}
    done
    printf '%s\n' "${path:-/}"
}

data="" workdir="" dry_run=false
while (($#)); do
    case $1 in
        --data | --workdir)
            (($# > 1)) || fail "$1 wants a folder"
            if [[ $1 == --data ]]; then data=$2; else workdir=$2; fi
            shift 2
            ;;
        --data=*) data=${1#*=}; shift ;;
        --workdir=*) workdir=${1#*=}; shift ;;
        --dry-run) dry_run=true; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        *) fail "unknown argument $1" ;;
    esac
done
[[ -n $data ]] || fail "--data is missing"
[[ -n $workdir ]] || fail "--workdir is missing"
$dry_run || [[ -d $data ]] || fail "--data: no such folder: $data"

# Relative folders are meant from where the command was typed.
[[ $data == /* ]] || data=$PWD/$data
[[ $workdir == /* ]] || workdir=$PWD/$workdir
workdir=$(real "$workdir") || fail "--workdir leads nowhere: $workdir"
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $workdir/ != "$PWD"/* ]] || fail "--workdir lies inside the checkout: $workdir"

python=${PYTHON:-.venv/bin/python}

$dry_run || "$python" -c 'import grain, tensorboardX' 2> /dev/null ||
    fail "training needs more packages: $python -m pip install -e '.[train]'"

run() {
    printf '%q ' "$@" >&2
    printf '\n' >&2
    $dry_run || "$@"
}

train() {
    local stage=$1
    shift
    run "$python" -m minigpt4_jax.train --config "configs/demo_$stage.py" \
        --workdir "$workdir/$stage" --config.data.photos.path="$data/train" \
        --config.val="$data/val" --config.cache.folder="$workdir/features" "$@"
}

run "$python" -m convert demo --no-connector
train warmup "$@"
train stage1 --config.init="$workdir/warmup" "$@"
train stage2 --config.init="$workdir/stage1" "$@"
