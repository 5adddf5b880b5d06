"""Where a rank stands in the device mesh, and the collectives that tensor and data parallelism need.

Ranks count row-major over (dp, mp): rank = dp_index * mp + mp_index, as in MindSpore's strategies.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import create_group, get_group_size, get_rank, init
from mindspore.device_context.cpu.op_tuning import threads_num
from numpy.typing import NDArray

from .settings import ParallelSettings, SettingsError

Axes = tuple[str | None, ...]
"""How a parameter is cut: the mesh axis ("dp", "mp") of each dimension, None where it is not cut."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """The devices of a job and this rank's place among them."""

    dp: int
    mp: int
    rank: int

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size, outermost first."""
        return {"dp": self.dp, "mp": self.mp}

    @property
    def dp_index(self) -> int:
        """Coordinate of this rank on the data-parallel axis."""
        return self.rank // self.mp

    @property
    def mp_index(self) -> int:
        """Coordinate of this rank on the model-parallel axis."""
        return self.rank % self.mp

    @property
    def mp_group(self) -> str:
        """Name of the communication group of the ranks that share a copy of the model."""
        return f"mp_of_dp_{self.dp_index}"

    @property
    def dp_group(self) -> str:
        """Name of the communication group of the ranks that hold the same slices."""
        return f"dp_of_mp_{self.mp_index}"

    def part(self, full: NDArray[np.float32], axes: Axes) -> NDArray[np.float32]:
        """Return this rank's slice of a complete tensor."""
        index = {"dp": self.dp_index, "mp": self.mp_index}
        for dimension, axis in enumerate(axes):
            if axis is not None:
                full = np.split(full, self.sizes[axis], axis=dimension)[index[axis]]
        return np.ascontiguousarray(full)


def start_mesh(parallel: ParallelSettings, use_parallel: bool) -> Mesh:
    """Join the cluster that msrun started (with `use_parallel`) and create the groups of this rank.

    The scheduler process of msrun runs the same script; it stays in `init` until the job is over.
    """
    if not use_parallel:
        return Mesh(1, 1, 0)
    init()
    mesh = Mesh(parallel.data_parallel, parallel.model_parallel, get_rank())
    if get_group_size() != mesh.dp * mesh.mp:
        raise SettingsError(
            f"data_parallel {mesh.dp} x model_parallel {mesh.mp} needs {mesh.dp * mesh.mp} workers, "
            f"msrun started {get_group_size()}"
        )
    if mesh.mp > 1:
        create_group(mesh.mp_group, [mesh.dp_index * mesh.mp + index for index in range(mesh.mp)])
    if mesh.dp > 1:
        create_group(mesh.dp_group, [index * mesh.mp + mesh.mp_index for index in range(mesh.dp)])
    return mesh


class CopyToRanks(nn.Cell):  # type: ignore[misc]
    """Forward: nothing. Backward: sum over the mp group. Stands before a layer cut in its outputs."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.all_reduce = ops.AllReduce(group=mesh.mp_group) if mesh.mp > 1 else ops.Identity()

    def construct(self, x: Tensor) -> Tensor:
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.all_reduce(dout),)


class SumOfRanks(nn.Cell):  # type: ignore[misc]
    """Forward: sum over the mp group. Backward: nothing. Stands after a layer cut in its inputs."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.all_reduce = ops.AllReduce(group=mesh.mp_group) if mesh.mp > 1 else ops.Identity()

    def construct(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (dout,)


class GatherColumns(nn.Cell):  # type: ignore[misc]
    """Forward: [rows, columns / mp] of every rank become [rows, columns]. Backward: this rank's columns.

    MindSpore's AllGather on CPU knows no groups, so each rank adds its columns to zeros.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.index = mesh.mp_index
        self.place = Tensor(np.eye(mesh.mp, dtype=np.float32)[mesh.mp_index].reshape(1, mesh.mp, 1))
        self.all_reduce = ops.AllReduce(group=mesh.mp_group) if mesh.mp > 1 else ops.Identity()

    def construct(self, x: Tensor) -> Tensor:
        return self.all_reduce(x.expand_dims(1) * self.place).reshape(x.shape[0], -1)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        columns = x.shape[1]
        return (dout[:, self.index * columns : (self.index + 1) * columns],)


class MeanOfReplicas(nn.Cell):  # type: ignore[misc]
    """Mean over the dp group of the loss and of each gradient.

    One collective for all of them would be faster to run, but takes far longer to compile.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.dp = mesh.dp
        self.all_reduce = ops.AllReduce(group=mesh.dp_group) if mesh.dp > 1 else ops.Identity()

    def construct(self, loss: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.dp == 1:
            return loss, gradients
        means = [self.all_reduce(gradient) / self.dp for gradient in gradients]
        return self.all_reduce(loss) / self.dp, tuple(means)


def use_cpu() -> None:
    """Compile for CPU, with one thread: the ranks of a job share the cores of one machine."""
    ms.set_device("CPU")
    # Uncompiled, a collective of 4 workers on 2 cores takes ten times as long.
    ms.set_context(mode=ms.GRAPH_MODE)
    threads_num(1)
