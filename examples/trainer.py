"""A trainer whose jobs go on from each other's checkpoints under any number of ranks. docs/trainer.md explains it.

msrun --worker_num=4 --local_worker_num=4 --join=True examples/trainer.py --output_dir=output/first
"""

import os

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.communication import get_group_size, get_rank, init

from mindformers_ckpt import CheckpointHook, Layout


class Mlp(nn.Cell):
    """The loss of two matrices: `up` is cut by rows, `down` by columns, each over all ranks."""

    def __init__(self, rank, ranks):
        super().__init__()
        up, down = np.random.default_rng(0).normal(0, 0.1, (2, 64, 32)).astype(np.float32)
        self.up = ms.Parameter(np.split(up, ranks)[rank], name="up")
        self.down = ms.Parameter(np.split(down.T, ranks, axis=1)[rank], name="down")
        self.all_reduce = ops.AllReduce() if ranks > 1 else ops.Identity()

    def construct(self, x, y):
        part = ops.matmul(ops.relu(ops.matmul(x, self.up.T)), self.down.T)
        # The sum over the ranks; its gradient goes to the part of each rank as it is.
        found = part + ops.stop_gradient(self.all_reduce(part) - part)
        return ops.square(found - y).mean()


ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
hook = CheckpointHook.from_args(yaml=os.path.join(os.path.dirname(__file__), "trainer.yaml"))
if hook.config.use_parallel:
    init()
rank, ranks = (get_rank(), get_group_size()) if hook.config.use_parallel else (0, 1)
network = Mlp(rank, ranks)
optimizer = nn.Adam(network.trainable_params(), learning_rate=0.01)

hook.prepare()
mesh = {"mp": ranks}
hook.declare({"up": Layout.on(mesh, "mp", None), "down": Layout.on(mesh, None, "mp")})
hook.load(network, optimizer)

train_step = nn.TrainOneStepCell(network, optimizer)
first = int(optimizer.global_step.asnumpy()[0])
last = first + int(os.environ.get("STEPS", "10"))
for step in range(first + 1, last + 1):
    x = np.random.default_rng(step).standard_normal((16, 32)).astype(np.float32)
    loss = train_step(ms.Tensor(x), ms.Tensor(x[:, ::-1].copy()))
    print(f"step {step}: loss {float(loss.asnumpy()):.6f}", flush=True)
folder = os.path.join(hook.config.output_dir, "checkpoint", f"rank_{rank}")
os.makedirs(folder, exist_ok=True)
ms.save_checkpoint(train_step, os.path.join(folder, f"trainer_rank_{rank}-1_{last}.ckpt"))
