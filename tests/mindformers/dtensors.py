"""Tensors like those of PyNative networks: hyper-parallel, whose DTensor they are, has no package to install.

Written after its published source (hyper_parallel/platform/mindspore/dtensor.py, core/dtensor/dtensor.py and
core/distributed_checkpoint/layout.py): a Tensor on this rank's part, whose `shape` is that of the whole, and what
`get_current_layout` tells MindFormers of a network of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore
import numpy as np

from mindformers_ckpt.geometry.layout import Layout


class Placed(dict):  # type: ignore[type-arg]
    """The layout of a DTensor, as its `to_dict` gives it."""

    @classmethod
    def of(cls, layout: Layout, ranks: Sequence[int]) -> Placed:
        names = [f"axis_{number}" for number in range(len(layout.device_matrix))]
        tensor_map = [list(axes) if len(axes) > 1 else axes[0] if axes else -1 for axes in layout.tensor_map]
        matrix = list(layout.device_matrix)
        return cls(mesh_shape=matrix, alias_name=names, rank_list=list(ranks), tensor_map=tensor_map)

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


class DTensor(mindspore.Tensor):  # type: ignore[misc]
    """A tensor of several ranks, on this rank."""

    _local: Any
    _placed: Placed | None
    _whole: tuple[int, ...]

    def __new__(cls, local: Any, layout: Placed | None = None, shape: tuple[int, ...] = ()) -> Any:
        if isinstance(local, DTensor):
            local, layout, shape = local._local, local.layout, local.shape
        made = mindspore.Tensor._make_subclass(cls, local)
        made._local, made._placed, made._whole = local, layout, shape
        return made

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    @property
    def layout(self) -> Placed | None:
        return self._placed

    @property
    def shape(self) -> tuple[int, ...]:
        return self._whole

    @property
    def has_init(self) -> bool:
        return False

    def to_local(self) -> Any:
        return self._local

    def asnumpy(self) -> Any:
        return self._local.asnumpy()

    def set_data(self, data: Any, slice_shape: bool = False) -> None:
        self._local._update_data(data)
        self._update_data(data)


def dtensor(name: str, local: np.ndarray[Any, Any], layout: Placed, shape: tuple[int, ...]) -> Any:
    return mindspore.Parameter(DTensor(mindspore.Tensor(local), layout, shape), name=name)


def get_current_layout(rank: int, cell: Any) -> dict[str, dict[str, Any]]:
    """What hyper-parallel's function of this name tells of the parameters of a cell."""
    told: dict[str, Any] = {}
    for parameter in cell.get_parameters():
        about = dict(getattr(parameter, "layout", None) or {})
        if about:
            about["device_matrix"] = about.pop("mesh_shape")
        told[parameter.name] = {**about, "type": str(parameter.dtype), "full_shape": tuple(parameter.shape)}
    return {str(rank): told}
