#!/usr/bin/env bash
# Build the source distribution and the wheel, and test the core, without MindSpore, as a user gets it: on each Python
# from 3.9 to 3.13 that is here, the wheel in a clean environment and the tests of the source distribution, on one core.
# The oldest Python has the lowest version of everything we need (tools/lowest.txt).
#   bash tools/test_versions.sh [pytest arguments]
# Pythons are python3.X in PATH, and those of pyenv. LOWEST_MINDSPORE=1 tests with the lowest MindSpore, too, on the
# oldest Python (3 GB). Several versions run side by side, one a core.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
take_no_arguments "$@"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
VERSIONS=(3.9 3.10 3.11 3.12 3.13)
CORE=(tests/test_box.py tests/test_layout.py tests/test_plan.py tests/test_execute.py tests/test_checkpoint.py
    tests/test_strategy_files.py tests/formats tests/convert/test_round_trips.py tests/lora/test_merge_lora.py
    tests/cli/test_cli_transform.py tests/auto/test_cluster.py)
WITH_MINDSPORE=(tests/test_transform_oracle.py tests/test_strategy_files.py tests/formats tests/lora/test_lora_oracle.py
    tests/auto/test_weights.py tests/auto/test_hook.py)
export PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH

# Print the interpreter of a version, or nothing. A shim of pyenv may be in PATH and not run.
find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

build() {
    "$1" -m venv "$WORK/build"
    "$WORK/build/bin/python" -m pip install --disable-pip-version-check --quiet build twine
    "$WORK/build/bin/python" -m build --outdir "$WORK/dist" . >"$WORK/build.log" 2>&1 ||
        { cat "$WORK/build.log"; exit 1; }
    "$WORK/build/bin/python" -m twine check --strict "$WORK"/dist/*
    "$WORK/build/bin/python" tools/check_distributions.py "$WORK/dist"
    mkdir "$WORK/source"
    tar -xf "$WORK"/dist/*.tar.gz -C "$WORK/source" --strip-components 1
    rm -r "$WORK/source/mindformers_ckpt" # the tests are to find the wheel, in subprocesses too
}

# test_on CORE_NUMBER PYTHON NAME CONSTRAINTS [pytest arguments]: install and test in a clean environment.
test_on() {
    local core=$1 python=$2 name=$3 constraints=$4 venv=$WORK/venv-$3
    shift 4
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -c "$constraints" \
        "$(echo "$WORK"/dist/*.whl)${EXTRA:-}" hypothesis pytest pytest-timeout
    cd "$WORK/source"
    "$venv/bin/mindformers-ckpt" --version
    taskset -c "$core" "$venv/bin/python" -m pytest -p no:cacheprovider "$@"
}

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
: >"$WORK/none.txt"
mapfile -t CORES < <(python3 -c 'import os; print(*sorted(os.sched_getaffinity(0)), sep="\n")')

names=() pythons=() missing=()
for version in "${VERSIONS[@]}"; do
    python=$(find_python "$version")
    if [[ -n $python ]]; then
        names+=("$version") pythons+=("$python")
    else
        missing+=("$version")
    fi
done
((${#names[@]})) || { echo "error: no Python ${VERSIONS[*]} in PATH or pyenv" >&2; exit 1; }
echo "Testing the wheel on Python ${names[*]}${missing:+; not here: ${missing[*]}}"
build "${pythons[-1]}"

# start NUMBER NAME PYTHON CONSTRAINTS [pytest arguments]: test in the background, with a log of its own.
jobs_of=() failed=()
start() {
    local core=${CORES[$(($1 % ${#CORES[@]}))]} name=$2 python=$3 constraints=$4
    shift 4
    (test_on "$core" "$python" "$name" "$constraints" "$@") >"$WORK/$name.log" 2>&1 &
    jobs_of+=("$name=$!")
}
finish() {
    local job name
    for job in "${jobs_of[@]}"; do
        name=${job%=*}
        wait "${job#*=}" || failed+=("$name")
        echo "--- Python $name"
        cat "$WORK/$name.log"
        rm -rf "$WORK/venv-$name"
    done
    jobs_of=()
}

for index in "${!names[@]}"; do
    constraints=$WORK/none.txt label=${names[index]}
    ((index)) || constraints=$ROOT/tools/lowest.txt label=$label-lowest
    start "$index" "$label" "${pythons[index]}" "$constraints" "${@:-${CORE[@]}}"
    (((index + 1) % ${#CORES[@]})) || finish
done
finish
if [[ -n ${LOWEST_MINDSPORE:-} ]]; then
    EXTRA='[mindspore]' start 0 "${names[0]}-mindspore" "${pythons[0]}" "$ROOT/tools/lowest.txt" "${WITH_MINDSPORE[@]}"
    finish
fi
((! ${#failed[@]})) || { echo "error: failed on ${failed[*]}" >&2; exit 1; }
echo "Passed on Python ${names[*]}"
