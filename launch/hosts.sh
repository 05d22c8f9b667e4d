#!/usr/bin/env bash
# Train on hosts that ssh reaches, one process each; begin again when the run hung.
#
# usage: launch/hosts.sh train|follow|stop --hosts LIST [--dir DIR] [--port PORT]
#            [--env NAME=VALUE] --config FILE --workdir DIR [--dry-run] [-- FLAG...]
#
# train    begins on all hosts; then as follow
# follow   shows the first host's log, and begins again when the run hung or was told to
#          end. Ctrl-C leaves the run alone. Wants what train was given
# stop     saves and ends the run
#
#   --hosts LIST      a,b,c or me@a,me@b; the others must reach the first at --port (8476)
#   --dir DIR         this checkout on each of them, with its .venv (default: the path here)
#   --env NAME=VALUE  for the run, as JAX_PLATFORMS=cuda,cpu (the default)
#   --workdir DIR     on a disk that they share

# shellcheck source=launch/remote.sh
. "$(dirname "${BASH_SOURCE[0]}")/remote.sh"

hosts="" dir=$PWD port=8476 env=JAX_PLATFORMS=cuda,cpu
choose "train follow stop" "$@"
shift
take "hosts dir port env config workdir" "dry-run" "$@"
need hosts "as --hosts a,b,c; ssh must reach each without a password"
IFS=, read -ra host <<< "$hosts"
there=$(printf %q "$dir")/$there

on() {
    local i status=0 pids=() here
    if [[ $1 == first ]]; then
        run ssh -n -o BatchMode=yes "${host[0]}" "$2"
        return
    fi
    for i in "${!host[@]}"; do
        here="MINIGPT4_JAX_COORDINATOR=${host[0]#*@}:$port"
        here+=" MINIGPT4_JAX_PROCESSES=${#host[@]} MINIGPT4_JAX_PROCESS=$i"
        run ssh -n -o BatchMode=yes "${host[i]}" "$here $2" &
        pids+=($!)
    done
    for i in "${pids[@]}"; do
        wait "$i" || status=$?
    done
    return "$status"
}

back() { :; } # a host that was away comes back as it was

if [[ $verb == stop ]]; then
    on all "$there stop"
    exit
fi
training_elsewhere
command=(env "$env" .venv/bin/python "${train[@]}")
if [[ $verb == train ]]; then
    idle || fail "ssh ${host[0]} does not answer"
    begin "${command[@]}"
fi
watch "${command[@]}"
