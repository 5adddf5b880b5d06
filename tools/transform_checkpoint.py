"""Re-slice a checkpoint offline, with the options of MindFormers' script of the same name.

    python tools/transform_checkpoint.py --src_checkpoint FILE_OR_FOLDER [--src_strategy FILE_OR_FOLDER] \\
        --dst_checkpoint_dir FOLDER [--dst_strategy FILE_OR_FOLDER] [--prefix checkpoint_]

The same as `mindformers-ckpt transform`, which documents all options with --help.
"""

from __future__ import annotations

import sys

import checkout  # noqa: F401 - finds the package of this checkout

from mindformers_ckpt.cli.main import main

if __name__ == "__main__":
    main(["transform", *sys.argv[1:]])
