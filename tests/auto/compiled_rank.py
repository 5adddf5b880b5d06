"""One rank of a job whose network MindSpore compiles itself: CONFIG CASE RESULT. Writes RESULT/<rank>.json.

Two ranks, model parallel 2: `w` is cut by columns, `b` by elements. CASE is what happens beside. "layers" is another
network, of two layers with their matrices cut by columns, and "pipeline" the same with a stage of two ranks for each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from frontend import compile_network
from mindspore import nn, ops

from mindformers_ckpt import CheckpointHook
from mindformers_ckpt.errors import CheckpointError, StrategySaved
from mindformers_ckpt.job.config import Config


class Net(nn.Cell):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.w = ms.Parameter(ms.Tensor(np.full((8, 8), -1, np.float32)), name="w")
        self.b = ms.Parameter(ms.Tensor(np.full((8,), -1, np.float32)), name="b")
        self.multiply = ops.MatMul().shard(((1, 1), (1, 2)))
        self.add = ops.Add().shard(((1, 2), (2,)))
        self.mean = ops.ReduceMean().shard(((1, 2),))

    def construct(self, x: Any) -> Any:
        return self.mean(self.add(self.multiply(x, self.w), self.b))


class Layer(nn.Cell):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        super().__init__(auto_prefix=False)
        self.w = ms.Parameter(ms.Tensor(np.full((8, 8), -1, np.float32)), name=name)
        self.multiply = ops.MatMul().shard(((1, 1), (1, 2)))

    def construct(self, x: Any) -> Any:
        return self.multiply(x, self.w)


class Layers(nn.Cell):  # type: ignore[misc]
    @ms.lazy_inline  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.first, self.last = Layer("first.w"), Layer("last.w")
        self.first.pipeline_stage, self.last.pipeline_stage = 0, 1
        self.mean = ops.ReduceMean().shard(((1, 1),))

    def construct(self, x: Any) -> Any:
        return self.mean(self.last(self.first(x)))


def set_context(rank: int, ranks: int = 2, **more: Any) -> None:
    about = {"device_num": ranks, "global_rank": rank, "dataset_strategy": "full_batch"}
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", **about, **more)


def run(hook: CheckpointHook, case: str, result: Path) -> dict[str, Any]:
    rank = int(os.environ.get("MS_NODE_ID") or os.environ["RANK_ID"])
    if case == "pipeline":
        set_context(rank, 4, pipeline_stages=2)
    else:
        set_context(rank)
    network = Layers() if case in ("layers", "pipeline") else Net()
    optimizer = nn.Adam(network.trainable_params())
    forward = nn.PipelineCell(network, 2) if case == "pipeline" else network
    train = nn.TrainOneStepCell(forward, optimizer).set_train()
    hook.prepare()
    x = ms.Tensor(np.ones((16, 8), np.float32))
    if case == "set after prepare":
        set_context(rank, strategy_ckpt_config={"save_file": str(result / "another.ckpt")})
    elif case == "reset after prepare":
        ms.reset_auto_parallel_context()
        set_context(rank)
    compile_network(train, x)
    if case == "evaluation between":
        compile_network(Net().set_train(False), x)
    # Not the cell that was compiled: its layouts are not to be had.
    hook.load(network if case.startswith("reset") else train)
    parameters = {parameter.name: parameter for parameter in train.get_parameters()}
    return {
        "held": {name: value.asnumpy().tolist() for name, value in parameters.items()},
        "sliced": {name: bool(value.sliced) for name, value in parameters.items()},
        "strategy": sorted(path.name for path in hook.strategy_dir.glob("*")),
    }


def main() -> int:
    config, case, result = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    ms.set_context(mode=ms.GRAPH_MODE)
    hook = CheckpointHook(Config.from_mapping(json.loads(config)))
    try:
        said = run(hook, case, result)
    except StrategySaved:
        return 0
    except CheckpointError as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    name = os.environ.get("MS_NODE_ID") or os.environ["RANK_ID"]
    (result / f"{name}.json").write_text(json.dumps(said))
    return 1 if "error" in said else 0


if __name__ == "__main__":
    sys.exit(main())
