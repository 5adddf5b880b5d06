# Sourced by the scripts that run tests: a virtual environment in $VENV, made with $PYTHON when it is missing.
# With COVERAGE=1 the tests also write what they execute into .coverage.* (see tools/coverage.sh).
source tools/help.sh
PYTHON=${PYTHON:-python3}

make_environment() {
    [[ -x $VENV/bin/python ]] || "$PYTHON" -m venv "$VENV"
    if [[ -n ${COVERAGE:-} ]]; then
        pip 'coverage>=7.10'
        export COVERAGE_FILE=$PWD/.coverage
    fi
}

pip() { "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet "$@"; }

run_pytest() {
    if [[ -n ${COVERAGE:-} ]]; then
        "$VENV/bin/python" -m coverage run --parallel-mode -m pytest "$@"
    else
        "$VENV/bin/python" -m pytest "$@"
    fi
}
