#!/usr/bin/env bash
# Install the project into a virtual environment and run tools/quickstart.py there.
#   bash tools/quickstart.sh
# VENV names the environment (.venv; made when it is missing), PYTHON the interpreter to make it with (python3).
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash tools/quickstart.sh

Installs the project and MindSpore (CPU; 3 GB on disk) into the virtual environment .venv and runs tools/quickstart.py
there: real msrun jobs on this machine, each of which goes on from the checkpoint of the one before. It takes a few
minutes, and leaves checkpoints, strategies and logs in output/quickstart.

  VENV    the environment; made when it is missing   (.venv)
  PYTHON  the interpreter to make it with: 3.10, 3.11 or 3.12   (python3)
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
if (($#)); then
    usage >&2
    exit 2
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

# Is $1 a Python that MindSpore has wheels for?
check_python() {
    "$1" - <<'TEXT' || exit 1
import platform
import sys

system, machine = platform.system(), platform.machine()
problems = []
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    problems.append("MindSpore 2.10 has no wheel for Python %d.%d, only for 3.10, 3.11 and 3.12: "
                    "call PYTHON=python3.11 VENV=.venv311 bash tools/quickstart.sh" % sys.version_info[:2])
if (system, machine) not in {("Linux", "x86_64"), ("Linux", "aarch64")}:
    problems.append("this quickstart runs MindSpore on Linux (x86_64, aarch64), not on %s %s" % (system, machine))
for problem in problems:
    print("error: " + problem, file=sys.stderr)
sys.exit(bool(problems))
TEXT
}

if [[ -x $VENV/bin/python ]]; then
    check_python "$VENV/bin/python"
else
    command -v "$PYTHON" >/dev/null || fail "$PYTHON was not found; set PYTHON to a Python 3.10, 3.11 or 3.12"
    check_python "$PYTHON"
    echo "Making the virtual environment $VENV"
    if "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
        "$PYTHON" -m venv "$VENV"
    else
        # Debian keeps ensurepip in python3-venv; the pip of the interpreter can install into any environment.
        "$PYTHON" -m venv --without-pip "$VENV"
    fi
fi

if "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
    PIP=("$VENV/bin/python" -m pip)
else
    PIP=("$PYTHON" -m pip --python "$VENV/bin/python")
    "$PYTHON" -c 'import pip' 2>/dev/null || fail "$PYTHON has no pip; on Debian: apt-get install python3-pip"
fi
echo "Installing the project and its dependencies (MindSpore is large: 3 GB on disk)"
"${PIP[@]}" install --disable-pip-version-check --quiet '.[mindspore]' || fail "pip could not install the project; see above"

exec "$VENV/bin/python" tools/quickstart.py
