# shellcheck shell=bash disable=SC2154
# The JobSet of gke.sh, which sources this: asked for, followed, filled in.

# Its name and how it has ended, if it has; nothing where there is none.
state() {
    kubectl get jobset "$name" --ignore-not-found \
        --output='jsonpath={.metadata.name} {.status.terminalState}'
}

# Shows the first host's log until the JobSet has ended; whether it has completed.
follow() {
    local is first=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0
    first+=,batch.kubernetes.io/job-completion-index=0
    while true; do
        run kubectl logs --follow --tail=20 --container=train --selector="$first" || true
        ! $dry_run || return 0
        is=$(state)
        [[ $is == "$name " ]] || break
        sleep "$RETRY_SECONDS" # the cluster begins it again
    done
    echo "${is:-there is no JobSet $name}" >&2
    [[ $is == *Completed ]]
}

# filled COMMAND...: jobset.yaml with the command and the values of the flags.
filled() {
    local yaml word field command=""
    yaml=$(< launch/jobset.yaml)
    for field in name image bucket topology type account slices hosts chips; do
        fill "$field" "$(escaped "${!field}")"
    done
    fill spot "$(! $spot || echo 'cloud.google.com/gke-spot: "true"')"
    for word; do # of $(NAME) Kubernetes would make what $NAME holds
        command+=${command:+, }\"$(escaped "${word//\$/\$\$}")\"
    done
    fill command "[$command]" # last: its words may look like a field
    printf '%s\n' "$yaml"
}

fill() { yaml=${yaml//"@$1@"/"$2"}; }

# Inside a string of YAML.
escaped() {
    local s=${1//\\/\\\\}
    s=${s//\"/\\\"}
    printf %s "${s//$'\n'/\\n}"
}
