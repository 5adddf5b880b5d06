#!/usr/bin/env bash
# Install what the tests need into a virtual environment and run them all: lint, types, tests; then the core on the
# other versions of Python, with the lowest versions of what we need (tools/test_versions.sh).
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
run_pytest -m "not slow"
# SKIP_VERSIONS=1: where they have a run of their own. Coverage is counted where the frameworks are.
[[ -n ${SKIP_VERSIONS:-}${COVERAGE:-} ]] || bash tools/test_versions.sh
