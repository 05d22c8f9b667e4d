#!/usr/bin/env bash
# One machine's part of a run. tpu_pod.sh and hosts.sh call it there, over connections that
# may break; the run does not depend on them.
#
# usage: launch/worker.sh install SETUP | idle | mark DIR | seen DIR | begin COMMAND... |
#            follow | code | stop
#
# ~/.minigpt4-jax/HOST holds `lock`, taken as long as the run lasts, `log`, `pid`, and `code`,
# what the run ended with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

at=~/.minigpt4-jax/$(hostname) # a home may be shared by all machines
mkdir -p "$at"
touch "$at/log"
verb=${1:-}
shift || true

case $verb in
    install) # what tpu_pod.sh has copied here
        eval "$1"
        [[ -x .venv/bin/python ]] || {
            python3 -m pip install --quiet --user uv # the system's Python is too old
            ~/.local/bin/uv venv --quiet --python 3.11 .venv
        }
        ~/.local/bin/uv pip install --quiet -c constraints.txt -e '.[tpu,train]'
        ;;
    idle) # fails while a run is under way
        flock -n "$at/lock" true
        ;;
    mark) # on the first machine: what `seen` looks for on all of them
        mkdir -p "$1"
        touch "$1/.reached"
        ;;
    seen)
        [[ -e $1/.reached ]] || {
            echo "$1 is not the same folder on every machine: mount a shared disk or bucket" >&2
            exit 4
        }
        ;;
    begin) # once: a launcher tries again what a broken connection cut off
        exec 9> "$at/lock"
        flock -w "${LOCK_SECONDS:-5}" 9 || exit 0 # `follow` may take it for a second
        rm -f "$at/code"
        touch "$at/pid"
        {
            trap '' HUP
            setsid "$@" 9>&- &
            pid=$! code=0
            echo "$pid" > "$at/pid"
            wait "$pid" || code=$?
            kill -KILL -- "-$pid" 2> /dev/null || true # what a run that hung has left
            [[ -e $at/pid ]] || code=0 # stopped on purpose
            rm -f "$at/pid"
            echo "$code" > "$at/code"
        } >> "$at/log" 2>&1 < /dev/null &
        ;;
    follow) # the log, until the run ends
        tail -n 20 -F "$at/log" 2> /dev/null &
        flock "$at/lock" sleep 1 # in which the last lines come
        kill $! || true
        ;;
    code) # of the run when it has ended; one that left none went with its machine
        echo "code=$(flock "$at/lock" cat "$at/code" 2> /dev/null || echo 143)"
        ;;
    stop) # saved, and not begun again
        ! flock -n "$at/lock" true || { echo "no run is under way" >&2; exit; }
        pid=$(cat "$at/pid")
        rm "$at/pid"
        kill "$pid"
        ;;
    *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
