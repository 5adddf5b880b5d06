"""The guide's weight conversion tool: `mindformers-ckpt convert` under its familiar name.

python tools/convert_weight.py --model llama --input_path /home/user/torch_weights --output_path llama.ckpt
"""

import sys

import checkout  # noqa: F401 - finds the package of this checkout

from mindformers_ckpt.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
