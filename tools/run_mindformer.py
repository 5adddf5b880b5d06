r"""Train the tiny Llama as a MindFormers-like yaml says.

    bash tools/msrun_launcher.sh \
        "tools/run_mindformer.py --config configs/tiny_llama/pretrain_dp2mp2.yaml --run_mode train" 4
    python tools/run_mindformer.py --config configs/tiny_llama/pretrain_dp2mp2.yaml --run_mode train \
        --use_parallel False

Any key of the yaml can be set in the command line, also in a section:
`--use_parallel False --runner_config.steps 20`.

MindSpore on CPU cannot compile semi_auto_parallel, so the model is parallel by hand and declares the
layouts of its parameters to the checkpoint hook, which writes the strategy files. On Ascend MindSpore
writes them while it compiles.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import checkout

from mindformers_ckpt.errors import CheckpointError

# Several ranks share the cores of one machine; MindSpore reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    """Parse the command line and run the job.

    Returns 1 when the checkpoint hook refuses or fails, 2 for a wrong yaml or option.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="training yaml")
    arguments, rest = parser.parse_known_args()
    checkout.need("mindspore", extra="mindspore")

    from tiny_llama.settings import SettingsError, parse_overrides, read_yaml
    from tiny_llama.trainer import run

    try:
        run(arguments.config, parse_overrides(rest, read_yaml(arguments.config)))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
