# shellcheck shell=bash
# A run on machines that are reached from here; sourced. The launcher says
#   on WHO COMMAND   runs a shell's COMMAND on the first machine or on all of them
#   back             waits for machines that failed; false when they are new ones
#   there            the path of worker.sh on them
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
there=launch/worker.sh

# Refuses a run over another one; false when the machines do not answer.
idle() {
    local said
    said=$(on first "if [ -e $there ]; then $there idle || echo busy; fi") || return
    [[ $said != *busy* ]] || fail "a run is under way there: \`follow\` shows it, \`stop\` ends it"
}

# begin COMMAND...: on all machines, unless it has begun there.
begin() {
    local dir
    dir=$(printf %q "$workdir")
    on first "$there mark $dir" && on all "$there seen $dir" &&
        on all "$there begin $(printf '%q ' "$@")"
}

# watch COMMAND...: shows the first machine's log to the end, and begins as often as it takes.
watch() {
    local codes worst
    while true; do
        if on first "$there follow" && codes=$(on all "$there code") &&
            [[ $dry_run == true || $codes == *code=* ]]; then
            codes=$(sed -n 's/^code=//p' <<< "$codes" | sort -nu | tr '\n' ' ')
            codes=${codes% }
            worst=${codes##* }
            ((worst)) || return 0
            again "$codes" "$(on first "$(newest)")" || exit "$worst"
            sleep "$RETRY_SECONDS"
        else
            sleep "$RETRY_SECONDS"
            ! back || continue
        fi
        begin "$@" || true # where the machines are gone again, the log is not to be had
    done
}
