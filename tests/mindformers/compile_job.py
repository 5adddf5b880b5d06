"""One rank of a job whose rank 1 dies while it compiles: SOURCE FOLDER. Writes FOLDER/told_<rank>.txt.

MindSpore compiles for no device that this machine has, so a model stands in that takes a moment, or dies.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers.tools.register import MindFormerConfig

from mindformers_ckpt.mindformers import install


class Model:
    """Takes the place of mindspore.Model."""

    def build(self, **_options: Any) -> None:
        """Die on rank 1; take a moment on the others."""
        Path(sys.argv[2], f"compiling_{os.environ['RANK_ID']}").touch()
        if os.environ["RANK_ID"] == "1":
            while not Path(sys.argv[2], "compiling_0").exists():
                time.sleep(0.05)
            os._exit(9)
        time.sleep(1)


def main() -> None:
    source, folder = sys.argv[1:]
    rank = int(os.environ["RANK_ID"])
    ms.set_device("CPU")
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=2, global_rank=rank)
    install()
    from mindformers.trainer.utils import transform_and_load_checkpoint

    config = MindFormerConfig(
        load_checkpoint=source,
        checkpoint={"load_path": source},
        src_strategy_path_or_dir="",
        auto_trans_ckpt=True,
        load_ckpt_format="ckpt",
        use_parallel=True,
        output_dir=os.environ["LOCAL_DEFAULT_PATH"],
        model={"model_config": {"type": "LlamaConfig"}},
        context={"mode": ms.GRAPH_MODE},
        runner_config={"step_scale": None, "sink_mode": True, "epochs": 1, "sink_size": 1},
    )
    try:
        transform_and_load_checkpoint(config, Model(), ms.nn.Cell(), [0])
    except (RuntimeError, ValueError) as error:
        Path(folder, f"told_{rank}.txt").write_text(f"{type(error).__name__}: {error}")


main()
