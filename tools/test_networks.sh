#!/usr/bin/env bash
# Compare what `convert` writes with MindFormers' own networks, built with tiny sizes: names and shapes of all parameters,
# and logits with those that transformers computes. Prints the table of docs/conversion.md.
#   bash tools/test_networks.sh [pytest arguments]
# VERSIONS names those of MindFormers ("1.7.0 1.9.0 2.1.0"), VENV their environments as for tools/test_mindformers.sh,
# TRANSFORMERS that with transformers (.venv-transformers).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
BASE=${VENV:-.venv-mindformers}
NETWORKS=$(mktemp -d)
export NETWORKS
trap 'rm -rf "$NETWORKS"' EXIT

VENV=${TRANSFORMERS:-.venv-transformers}
make_transformers
"$VENV/bin/python" tests/networks/tiny_models.py "$NETWORKS"
test_with_mindformers "$BASE" tests/networks "$@"
"$VENV/bin/python" tools/network_table.py "$NETWORKS"
