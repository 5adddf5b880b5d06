#!/usr/bin/env bash
# Measure which lines and branches of the package the tests execute, in all their environments, and hold the floor.
#   bash tools/coverage.sh
# Processes that tests start are counted. The floor is `fail_under` in pyproject.toml.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
take_no_arguments "$@"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -f .coverage .coverage.*
export COVERAGE=1
failed=0
for script in test test_transformers test_mindformers; do
    bash "tools/$script.sh" || failed=1 # what was executed counts all the same
done
.venv-test/bin/python -m coverage combine --quiet
.venv-test/bin/python -m coverage report
((! failed))
