# Sourced by the scripts that run tests: a virtual environment in $VENV, made with $PYTHON when it is missing.
# With COVERAGE=1 the tests also write what they execute into .coverage.* (see tools/coverage.sh).
source tools/help.sh
PYTHON=${PYTHON:-python3}
# Tests start Python a thousand times: modules are compiled once, as they are where a package is installed.
unset PYTHONDONTWRITEBYTECODE

make_environment() {
    [[ -x $VENV/bin/python ]] || "$PYTHON" -m venv "$VENV"
    if [[ -n ${COVERAGE:-} ]]; then
        pip 'coverage>=7.10'
        export COVERAGE_FILE=$PWD/.coverage
    fi
}

pip() { "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet "$@"; }

# torch, transformers and peft, and the project on numpy 2, without MindSpore.
make_transformers() {
    make_environment
    echo "Installing torch, transformers, peft and the project into $VENV"
    pip 'torch==2.13.0' 'transformers>=5' peft 'numpy>=2' safetensors \
        click filelock ml_dtypes protobuf psutil pyyaml rich xxhash 'hypothesis>=6.90' 'pytest>=8' 'pytest-timeout>=2.3'
    # The default install keeps numpy below 2, for MindSpore; our own code must run on both.
    pip --no-deps --editable .
}

# MindFormers of a version, with a MindSpore that it runs on. 1.7.0 brings MindSpore 2.7.2; newer versions are installed
# on MindSpore 2.10 without their dependencies, whose places tools/stand_ins.py takes.
make_mindformers() {
    make_environment
    echo "Installing MindFormers $1, the project and pytest into $VENV"
    if [[ $1 == 1.7.0 ]]; then
        # The bounds of datasets, opencv and pandas follow from those of MindFormers; pip would find them by downloading.
        pip --editable . "mindformers==$1" 'datasets<4.1' 'opencv-python-headless<4.12' 'pandas<3' \
            'hypothesis>=6.90' 'pytest>=8' 'pytest-timeout>=2.3'
    else
        pip --editable . 'mindspore==2.10.*' requests 'hypothesis>=6.90' 'pytest>=8' 'pytest-timeout>=2.3'
        pip --no-deps "mindformers==$1"
        local packages
        packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        printf '%s\nimport stand_ins\n' "$PWD/tools" > "$packages/stand_ins.pth"
    fi
}

run_pytest() {
    if [[ -n ${COVERAGE:-} ]]; then
        "$VENV/bin/python" -m coverage run --parallel-mode -m pytest "$@"
    else
        "$VENV/bin/python" -m pytest "$@"
    fi
}

# Run pytest with every version of MindFormers in VERSIONS, in environments named after the first argument; the last one
# stays in VENV.
test_with_mindformers() {
    local base=$1 version
    shift
    for version in ${VERSIONS:-1.7.0 1.9.0 2.1.0}; do
        VENV=$base
        [[ $version == 1.7.0 ]] || VENV=$base-$version
        make_mindformers "$version"
        run_pytest "$@"
    done
}
