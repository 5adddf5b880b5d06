#!/usr/bin/env bash
# Test with the real MindFormers: the replacement of TransformCkpt, and its own loader of checkpoint 2.0.
#   bash tools/test_mindformers.sh [pytest arguments]
# VERSIONS names those of MindFormers ("1.7.0 1.9.0 2.1.0"), VENV the environments (.venv-mindformers for 1.7.0, which
# brings a MindSpore of its own, 2.7.2; .venv-mindformers-<version> for others), PYTHON the interpreter to make them with.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
test_with_mindformers "${VENV:-.venv-mindformers}" tests/mindformers "$@"
