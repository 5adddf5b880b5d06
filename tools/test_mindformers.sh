#!/usr/bin/env bash
# Test with the real MindFormers: the replacement of TransformCkpt, and its own loader of checkpoint 2.0.
#   bash tools/test_mindformers.sh [pytest arguments]
# VERSIONS names those of MindFormers ("1.7.0 1.9.0 2.1.0"), VENV the environments (.venv-mindformers for 1.7.0, which
# brings a MindSpore of its own, 2.7.2; .venv-mindformers-<version> for others), PYTHON the interpreter to make them with.
# Newer versions are installed on MindSpore 2.10 without their dependencies, whose places tools/stand_ins.py takes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
BASE=${VENV:-.venv-mindformers}
for version in ${VERSIONS:-1.7.0 1.9.0 2.1.0}; do
    VENV=$BASE
    [[ $version == 1.7.0 ]] || VENV=$BASE-$version
    make_environment
    echo "Installing MindFormers $version, the project and pytest into $VENV"
    if [[ $version == 1.7.0 ]]; then
        # The bounds of datasets, opencv and pandas follow from those of MindFormers; pip would find them by downloading.
        pip --editable . "mindformers==$version" 'datasets<4.1' 'opencv-python-headless<4.12' 'pandas<3' \
            'hypothesis>=6.90' 'pytest>=8' 'pytest-timeout>=2.3'
    else
        pip --editable . 'mindspore==2.10.*' requests 'hypothesis>=6.90' 'pytest>=8' 'pytest-timeout>=2.3'
        pip --no-deps "mindformers==$version"
        packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        printf '%s\nimport stand_ins\n' "$PWD/tools" > "$packages/stand_ins.pth"
    fi
    run_pytest tests/mindformers "$@"
done
