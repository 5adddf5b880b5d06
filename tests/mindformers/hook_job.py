"""One rank of a job that loads with `CheckpointHook`: CONFIG FOLDER. Writes FOLDER/<rank>.npz, the bytes it holds."""

import json
import sys
from pathlib import Path

import mindspore as ms  # before protobuf
import numpy as np
from mindspore import nn

from mindformers_ckpt import CheckpointHook, Layout
from mindformers_ckpt.job.config import Config


class Network(nn.Cell):  # type: ignore[misc]
    """The parts of one of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = ms.Parameter(ms.Tensor(np.zeros((4, 6), np.float32), ms.bfloat16), name="emb")
        self.wq = ms.Parameter(ms.Tensor(np.zeros((8, 3), np.float32)), name="wq")
        self.norm = ms.Parameter(ms.Tensor(np.zeros(6, np.float32)), name="norm")


def main() -> None:
    config, folder = sys.argv[1:]
    ms.set_device("CPU")
    hook = CheckpointHook(Config.from_mapping(json.loads(config)))
    network = Network()
    hook.prepare()
    mesh = {"mp": 2}
    hook.declare({"emb": Layout.on(mesh, "mp", None), "wq": Layout.on(mesh, None, "mp"), "norm": Layout.on(mesh, None)})
    loaded = hook.load(network)
    assert all(loaded[parameter.name] is parameter for parameter in network.get_parameters())
    held = {parameter.name: np.frombuffer(parameter.get_bytes(), np.uint8) for parameter in loaded.values()}
    np.savez(Path(folder) / f"{hook.cluster.rank}.npz", **held)


main()
