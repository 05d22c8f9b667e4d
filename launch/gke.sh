#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster, as a JobSet: the cluster begins it again as needed.
#
# usage: launch/gke.sh train|follow|delete --name NAME
#            --image IMAGE --bucket BUCKET --topology 4x4 [--type LABEL] [--chips N]
#            [--slices N] [--spot] [--account NAME] --config FILE --workdir /bucket/DIR
#            [--dry-run] [-- FLAG...]
#
# train    applies the JobSet NAME (launch/jobset.yaml) in kubectl's context and namespace
# follow   shows the first host's log until the JobSet has ended
# delete   ends it, saved, and removes the JobSet
#
#   --image IMAGE     this checkout, as launch/Dockerfile makes it
#   --bucket BUCKET   mounted as /bucket on every host, with the rights of --account (default)
#   --type LABEL      gke-tpu-accelerator of the node pool (tpu-v5-lite-podslice)
#   --chips N         of a host (4); --slices N of --topology each, joined by the network
#   --dry-run         print the JobSet, do nothing

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/jobset.sh
. launch/jobset.sh

# shellcheck disable=SC2034 # some are read by their names
name="" image="" bucket="" topology="" type=tpu-v5-lite-podslice chips=4 slices=1 \
    account=default spot=false
choose "train follow delete" "$@"
shift
take "name image bucket topology type chips slices account config workdir" "spot dry-run" "$@"
need name "of the JobSet, as --name stage1"
case $verb in
    delete) run kubectl delete jobset "$name"; exit ;;
    follow) follow; exit ;;
esac

training_elsewhere
need image "see launch/Dockerfile"
need bucket "for --workdir, which all hosts reach"
need topology "of a slice, as 4x4"
[[ $workdir == /bucket/* ]] ||
    fail "--workdir: want a folder of the bucket, as /bucket/stage1, got $workdir"
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] ||
    fail "--topology: want it as 4x4 or 4x4x4, got $topology"
[[ $chips,$slices =~ ^[1-9][0-9]*,[1-9][0-9]*$ ]] || fail "--chips, --slices: want numbers"
hosts=$((${topology//x/*} / chips))
((hosts > 0)) || fail "--topology: $topology has fewer chips than a host, $chips"
yaml=$(filled python "${train[@]}")
$dry_run && { printf '%s\n' "$yaml"; exit; }

case $(state) in
    "") ;;
    "$name ") fail "the JobSet $name is running: \`follow\` shows it, \`delete\` ends it" ;;
    *) run kubectl delete jobset "$name" ;; # of a run that has ended
esac
run kubectl apply --filename=- <<< "$yaml"
