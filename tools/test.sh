#!/usr/bin/env bash
# Install what the tests need into a virtual environment and run them all: lint, types, tests.
# tools/test_versions.sh tests the core on other versions of Python, with the lowest versions of what we need.
#   bash tools/test.sh [pytest arguments]
# With arguments, only pytest runs. VENV names the environment (.venv-test; made when it is missing), PYTHON the
# interpreter to make it with (python3).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv-test}
source tools/environment.sh
make_environment
echo "Installing the project, MindSpore and the test tools into $VENV"
pip --editable '.[mindspore,test]'

PATH=$PWD/$VENV/bin:$PATH
ruff check .
ruff format --check --quiet .
mypy
# Warnings are errors (pyproject.toml). The default suite leaves out what is marked slow.
if (($#)); then
    run_pytest "$@"
    exit
fi
# Three processes side by side, for two cores: jobs of several ranks, and commands, wait a lot. The groups, of which the
# last is what remains, take about the same time.
GROUPS_BESIDE=(
    "tests/auto tests/convert"
    "tests/cli tests/docs tests/jobs"
)
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
started=() ignored=()
for group in "${GROUPS_BESIDE[@]}"; do
    read -ra folders <<<"$group"
    run_pytest -m "not slow" -p no:cacheprovider "${folders[@]}" >"$logs/${#started[@]}" 2>&1 &
    started+=("$!") ignored+=("${folders[@]/#/--ignore=}")
done
failed=0
run_pytest -m "not slow" "${ignored[@]}" || failed=1
for number in "${!started[@]}"; do
    wait "${started[number]}" || failed=1
    echo "--- ${GROUPS_BESIDE[number]}"
    cat "$logs/$number"
done
((! failed))
