#!/usr/bin/env bash
# Train on a Cloud TPU: request it, set it up, run, begin again after a preemption.
#
# usage: launch/tpu_pod.sh train|follow|stop|delete --name NAME --zone ZONE --project ID
#            --type TYPE [--slices N] [--runtime VERSION] [--spot] [--setup COMMAND]
#            --config FILE --workdir DIR [--dry-run] [-- FLAG...]
#
# train    requests the queued resource NAME unless it is there, installs this checkout on
#          all workers and begins; then as follow
# follow   shows worker 0's log; gets the TPU back after a preemption, and begins again then
#          or when the run hung. Ctrl-C leaves the run alone. Wants what train was given
# stop     saves and ends the run; the TPU stays, and costs
# delete   gives the TPU back
#
#   --type TYPE       v5litepod-16, v6e-64, ...; --slices N of them, joined by the network
#   --setup COMMAND   on every worker before the run, as the mount of a disk; may run twice
#   --workdir DIR     on a disk or bucket that COMMAND mounts on every worker

# shellcheck source=launch/remote.sh
. "$(dirname "${BASH_SOURCE[0]}")/remote.sh"
# shellcheck source=launch/queued.sh
. launch/queued.sh

name="" zone=${CLOUDSDK_COMPUTE_ZONE:-} project=${CLOUDSDK_CORE_PROJECT:-} type="" slices=1
runtime="" setup="" spot=false
choose "train follow stop delete" "$@"
shift
take "name zone project type slices runtime setup config workdir" "spot dry-run" "$@"
need name "of the queued resource, as --name stage1"
need zone "where the TPU is; gcloud compute tpus locations list"
need project "its id; gcloud projects list"

there=minigpt4-jax/$there everywhere=(--node=all --worker=all)
on() {
    if [[ $1 == all ]]; then
        queued ssh "$name" "${everywhere[@]}" --command="$2"
    else
        queued ssh "$name" --command="$2"
    fi
}
case $verb in
    stop) on all "$there stop"; exit ;;
    delete) queued delete "$name" --force --quiet; exit ;;
esac

training_elsewhere
need type "as v5litepod-16; gcloud compute tpus accelerator-types list --zone=$zone"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices: want a number, got $slices"
case $type in
    v5litepod-*) : "${runtime:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${runtime:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${runtime:=v2-alpha-tpuv6e}" ;;
    v[234]-*) : "${runtime:=tpu-ubuntu2204-base}" ;;
    *) need runtime "none is known for $type" ;;
esac
command=(env "JAX_PLATFORMS=tpu,cpu" .venv/bin/python "${train[@]}") # never on the CPU instead

[[ $verb == follow ]] || back true || begin "${command[@]}"
watch "${command[@]}"
