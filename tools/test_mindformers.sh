#!/usr/bin/env bash
# Test the replacement of TransformCkpt with the real MindFormers, which brings a MindSpore of its own (2.7.2).
#   bash tools/test_mindformers.sh [pytest arguments]
# VENV names the environment (.venv-mindformers; made when it is missing), PYTHON the interpreter to make it with.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv-mindformers}
source tools/environment.sh
make_environment
echo "Installing MindFormers, the project and pytest into $VENV"
# The bounds of datasets, opencv and pandas follow from those of MindFormers; pip would find them by downloading.
pip --editable . mindformers==1.7.0 'datasets<4.1' 'opencv-python-headless<4.12' 'pandas<3' \
    'hypothesis>=6.90' 'pytest>=8' 'pytest-timeout>=2.3'

run_pytest tests/mindformers "$@"
