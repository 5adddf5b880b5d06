#!/usr/bin/env bash
# Build the documentation site into site/, strictly: a warning is an error. English at the root, Chinese in site/zh.
#   bash tools/site.sh
# VENV names the environment (.venv-site; made when it is missing), PYTHON the interpreter to make it with. Pages ask
# nothing of other servers, and open without one: site/index.html.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv-site}
source tools/environment.sh
take_no_arguments "$@"
make_environment
# The reason for these, and for their bounds, is in CONTRIBUTING.md.
pip 'mkdocs-material>=9.7,<10' 'mkdocs>=1.6,<2' 'jieba>=0.42,<0.43' 'websocket-client>=1.6'
rm -rf site
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for configuration in mkdocs.yml mkdocs.zh.yml; do
    # Not --quiet: what is not said does not count as a warning. The theme speaks of its successor at every start.
    NO_MKDOCS_2_WARNING=1 "$VENV/bin/python" -W ignore::SyntaxWarning -m mkdocs build --strict -f "$configuration" \
        >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
done
echo "site/index.html and site/zh/index.html are built"
