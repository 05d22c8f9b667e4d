# shellcheck shell=bash disable=SC2154
# The queued resource of tpu_pod.sh, which sources this: requested, set up, had again after a
# preemption.

queued() {
    run gcloud compute tpus queued-resources "$@" --zone="$zone" --project="$project"
}

create() {
    local nodes=(--node-id="$name")
    ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$name")
    ! $spot || nodes+=(--spot)
    queued create "$name" "${nodes[@]}" --accelerator-type="$type" --runtime-version="$runtime"
}

# The checkout, with what is changed in its files, on every worker.
install() {
    local archive commit
    archive=$(git rev-parse --git-dir)/minigpt4-jax.tgz
    commit=$($dry_run || git stash create) || return
    run git archive --output="$archive" "${commit:-HEAD}" &&
        queued scp "$archive" "$name:minigpt4-jax.tgz" "${everywhere[@]}" &&
        on all "mkdir -p minigpt4-jax && tar xzf minigpt4-jax.tgz -C minigpt4-jax" &&
        on all "$there install $(printf %q "$setup")"
}

# back [true]: waits until the TPU is there and set up; gets one that was preempted anew, and
# with true one that never was. False when it is not as it was.
back() {
    local new=${1:-false} said tries=0
    ! $dry_run || { create && idle && install; return 1; }
    while true; do
        said=$(queued describe "$name" --format='value(state.state)' 2>&1) || true
        case $said in # gcloud may add a notice
            *NOT_FOUND*)
                $new || fail "$name is gone: somebody has deleted it"
                create || fail "the TPU could not be requested"
                ;;
            *ERROR*) echo "$said" >&2 ;;
            *ACTIVE*)
                $new || return 0
                ! { idle && install; } || return 1
                ((++tries < 3)) || fail "no setup; did you ssh-add ~/.ssh/google_compute_engine?"
                ;;
            *SUSPENDED*) queued delete "$name" --force --quiet && new=true ;;
            *FAILED*) fail "the request has failed: queued-resources describe $name says why" ;;
        esac
        sleep "$RETRY_SECONDS"
    done
}
