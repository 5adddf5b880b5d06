"""Fold LoRA branches into the weights, with the options of MindFormers' script of the same name.

    python tools/transform_ckpt_lora.py [--src_ckpt_strategy FILE_OR_FOLDER] --src_ckpt_path_or_dir FILE_OR_FOLDER \\
        --dst_ckpt_dir FOLDER [--prefix checkpoint_] --lora_scaling lora_alpha/lora_rank

The same as `mindformers-ckpt merge-lora`, which documents all options with --help.
"""

from __future__ import annotations

import sys

import checkout  # noqa: F401 - finds the package of this checkout

from mindformers_ckpt.cli.main import main

if __name__ == "__main__":
    main(["merge-lora", *sys.argv[1:]])
