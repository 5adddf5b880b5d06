#!/usr/bin/env bash
# Install what the tests need into a virtual environment and run them all: lint, types, tests.
#   bash tools/test.sh [pytest arguments]
# VENV names the environment (.venv-test; made when it is missing), PYTHON the interpreter to make it with (python3).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv-test}
PYTHON=${PYTHON:-python3}
export PYTHONDONTWRITEBYTECODE=1

[[ -x $VENV/bin/python ]] || "$PYTHON" -m venv "$VENV"
echo "Installing the project, MindSpore and the test tools into $VENV"
"$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --editable '.[mindspore,test]'

PATH=$PWD/$VENV/bin:$PATH
ruff check .
ruff format --check --quiet .
mypy
# Warnings are errors (pyproject.toml). The default suite leaves out what is marked slow.
if (($#)); then
    exec python -m pytest "$@"
fi
exec python -m pytest -m "not slow"
