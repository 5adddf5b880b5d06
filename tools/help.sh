# Sourced by the scripts beside it: with --help the comment at their head is all that they print.
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    script=$0
    [[ -f $script ]] || script=tools/${0##*/} # where the script has gone to the root of the repository
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
    exit 0
fi

# Of scripts that take no arguments: a misspelt --help starts nothing.
take_no_arguments() {
    (($#)) || return 0
    echo "error: ${0##*/} takes no arguments, not $*; see --help" >&2
    exit 2
}
