"""Run a MindFormers script with our engine under its `TransformCkpt`.

    python -m mindformers_ckpt.run run_mindformer.py --config finetune.yaml --auto_trans_ckpt True

The command of the documentation; what it does is in `integrations/launch.py`.
"""

import sys

from mindformers_ckpt.integrations.launch import main

if __name__ == "__main__":
    sys.exit(main())
