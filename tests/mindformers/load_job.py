"""One rank of a job that loads weights the way MindFormers does: SOURCE DAMAGED FOLDER.

It loads as one node, and again as two nodes, and writes FOLDER/loaded_<rank>_<nodes>.npz. Then it loads a
damaged source, and then the strategy of rank 1 is lost; FOLDER/damaged_<rank>.txt and FOLDER/lost_<rank>.txt
tell what the rank was told.
"""

import os
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer.utils import transform_and_load_checkpoint
from mindspore.communication import get_rank, init


class Network(ms.nn.Cell):  # type: ignore[misc]
    """The parts of one of two ranks."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], types: dict[str, Any]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, ms.Parameter(ms.ops.zeros(shape, types[name]), name=name))


def main() -> None:
    source, damaged, folder = sys.argv[1:]
    ms.set_device("CPU")
    init()
    rank = get_rank()
    held = ms.load_checkpoint(source)
    types = {name: parameter.dtype for name, parameter in held.items()}
    config: dict[str, Any] = {
        "load_checkpoint": source,
        "checkpoint": {"load_path": source},
        "src_strategy_path_or_dir": "",
        "auto_trans_ckpt": True,
        "load_ckpt_format": "ckpt",
        "use_parallel": True,
        "output_dir": os.environ["LOCAL_DEFAULT_PATH"],
        "transform_process_num": 2,
        "model": {"model_config": {"type": "LlamaConfig"}},
        "runner_config": {"step_scale": None},
    }
    for nodes in (1, 2):
        if nodes == 2:
            os.environ["MINDFORMERS_CKPT_NODE"] = f"node_{rank}"
        network = Network({"emb": (4, 6), "wq": (6, 4), "norm": (6,)}, types)
        transform_and_load_checkpoint(MindFormerConfig(**config), None, network, None)
        content = {
            parameter.name: np.frombuffer(parameter.get_bytes(), np.uint8) for parameter in network.get_parameters()
        }
        np.savez(Path(folder) / f"loaded_{rank}_{nodes}.npz", **content)
    paths = {"load_checkpoint": damaged, "checkpoint": {"load_path": damaged}}
    fails({**config, **paths}, network, Path(folder, f"damaged_{rank}.txt"))
    if rank == 1:
        Path(config["output_dir"], "strategy", "ckpt_strategy_rank_1.ckpt").unlink()
    fails(config, network, Path(folder, f"lost_{rank}.txt"))


def fails(config: dict[str, Any], network: Network, note: Path) -> None:
    """Load, and note the error that comes."""
    try:
        transform_and_load_checkpoint(MindFormerConfig(**config), None, network, None)
    except (ValueError, RuntimeError) as error:
        note.write_text(f"{type(error).__name__}: {error}")


main()
