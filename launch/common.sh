# shellcheck shell=bash
# What the launchers share; sourced, not run. The comment at a launcher's top is its --help.
set -euo pipefail

typed=$PWD # where the command was typed
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
config="" workdir="" dry_run=false extra=()
: "${RETRY_SECONDS:=30}" # between two looks at machines, and before a run begins again

fail() {
    printf '%s: %s (--help lists the flags)\n' "${0##*/}" "$1" >&2
    exit 2
}

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "launch/${0##*/}"
    exit
}

# choose "VERB..." ARG...: the first argument, one of these, in $verb.
choose() {
    verb=${2:-}
    case $verb in
        -h | --help) usage ;;
        "" | *[!a-z]*) fail "want ${1// /, } first" ;;
        *) [[ " $1 " == *" $verb "* ]] || fail "want ${1// /, } first, got $verb" ;;
    esac
}

# take "NAME..." "SWITCH..." ARG...: the value of --some-name goes into $some_name, a
# switch becomes true, and what follows -- goes into $extra.
take() {
    local _names=" $1 " _switches=" $2 " _name _value
    shift 2
    while (($#)); do
        _name=${1%%=*} _value=true
        _name=${_name#--}
        case $1 in
            --) shift; extra=("$@"); return ;;
            -h | --help) usage ;;
        esac
        if [[ $1 == --* && $_names == *" $_name "* ]]; then
            if [[ $1 == *=* ]]; then
                _value=${1#*=}
            else
                [[ $# -gt 1 && $2 != --* ]] || fail "$1 wants a value"
                _value=$2
                shift
            fi
        elif [[ $1 != --* || $1 == *=* || $_switches != *" $_name "* ]]; then
            fail "unknown argument $1"
        fi
        printf -v "${_name//-/_}" %s "$_value"
        shift
    done
}

# need NAME HINT: refuses to go on without --NAME.
need() {
    local variable=${1//-/_}
    [[ -n ${!variable} ]] || fail "--$1 is missing: $2"
}

# The training command without its interpreter, in $train.
training() {
    need config "a file of this checkout, as configs/stage1.py"
    need workdir "a folder for checkpoints and logs, which every process reaches"
    [[ -f ${config%%:*} ]] || fail "--config: no such file in $PWD: $config"
    [[ $workdir != *://* ]] ||
        fail "--workdir: training writes files; mount the bucket and name the mount"
    [[ $workdir == /* ]] || workdir=$typed/$workdir
    train=(-m minigpt4_jax.train --config "$config" --workdir "$workdir")
    train+=(${extra[@]+"${extra[@]}"}) # a Mac's bash takes an empty list for an unset one
}

# The same for machines elsewhere, which have this checkout but not the rest of this disk.
training_elsewhere() {
    [[ -z $workdir || $workdir == /* || $workdir == *://* ]] ||
        fail "--workdir: want its full path on the machines, got $workdir"
    [[ $config != /* ]] || fail "--config: want a file of this checkout, got $config"
    training
}

reached="" stuck=0
# again "CODE..." STEP: whether a run that ended with these codes is to begin again. One that
# hung (75) or was told to end (143) is, three times at most without a newer checkpoint.
again() {
    case " $1 " in *" 75 "* | *" 143 "*) ;; *) return 1 ;; esac
    [[ $2 == "$reached" ]] || stuck=0
    reached=$2
    if ((++stuck > 3)); then
        echo "${0##*/}: given up: three runs without a checkpoint after ${2:-the start}" >&2
        return 1
    fi
    echo "${0##*/}: ended with code $1, last checkpoint ${2:-none}; it begins again" >&2
}

# The shell command that prints the newest checkpoint of the work directory.
newest() {
    printf 'find %q/checkpoints -maxdepth 1 -name "[0-9]*" 2> /dev/null | ' "$workdir"
    printf 'sort -V | tail -n 1'
}

# Show a command, and run it unless --dry-run.
run() {
    printf '%q ' "$@" >&2
    printf '\n' >&2
    $dry_run || "$@"
}
