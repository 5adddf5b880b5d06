"""Checkpoints 2.0 as MindFormers saves them, written plainly: one tensor after the other, by the boxes of a strategy.

tests/data/checkpoint2 has some that MindFormers itself wrote, which this writer is compared with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recorded import Tensor, write_tensors

from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.model import Strategy

SAMPLES = Path(__file__).parent / "data" / "checkpoint2"
COMMON = {"epoch_num": 1, "step_num": 7, "global_step": 7, "loss_scale": 1.0, "global_batch_size": 4}


def write_checkpoint2(
    save_path: Path,
    tensors: Mapping[str, Tensor],
    strategy: Strategy,
    *,
    iteration: int = 7,
    prefix: str = "l-",
    counters: Mapping[str, Tensor] = {},
    common: Mapping[str, Any] = COMMON,
    writes: Callable[[str, int], bool] = lambda name, rank: True,
    described: bool = True,
) -> Path:
    """Write whole tensors cut for a strategy; those of "adam_…" into the files of the optimizer, with the counters.

    `writes` says whether a rank saves what it holds of a tensor (redundancy removed: one rank of a slice does).
    Returns the folder of the iteration.
    """
    folder = save_path / f"iteration_{iteration:08d}"
    world = strategy.rank_count
    storage: dict[str, list[dict[str, Any]]] = {}
    for rank in range(world):
        sides: dict[str, dict[str, Tensor]] = {"model": {}, "opt": dict(counters)}
        for name, tensor in tensors.items():
            layout = strategy.stages[strategy.stage_of(rank)].get(name)
            if layout is None and (name in strategy.names() or not writes(name, rank)):
                continue
            side = "opt" if name.startswith("adam_") else "model"
            if layout is not None and writes(name, rank):
                box = layout.box(tensor.bits.shape, rank % strategy.stage_size)
                sides[side][name] = tensor.part(box)
                place = {"file_name": _name(prefix, side, rank, world), "storage_rank": rank, "rank_group": [rank]}
                key = str((name, (number_of(layout, rank % strategy.stage_size),)))
                storage.setdefault(key, []).append(place)
            elif layout is None:
                sides[side][name] = tensor
        for side, held in sides.items():
            if held:
                write_tensors(folder / _name(prefix, side, rank, world), held)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "common.json").write_text(json.dumps(common))
    if described:
        content = {"state_dict_metadata": _described(tensors, strategy), "storage_data": storage}
        (folder / "metadata.json").write_text(json.dumps(content))
    (save_path / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def number_of(layout: Layout, rank: int) -> int:
    """The number of the slice that a rank holds, as MindFormers counts: mixed radix over the flattened tensor map."""
    matrix = layout.device_matrix
    number = 0
    for axes in layout.tensor_map:
        for axis in axes:
            position = len(matrix) - 1 - axis
            index = rank // math.prod(matrix[position + 1 :]) % matrix[position]
            number = number * matrix[position] + index
    return number


def _name(prefix: str, side: str, rank: int, world: int) -> str:
    return f"{prefix}{side}-{rank:07d}-{world:07d}.safetensors"


def _described(tensors: Mapping[str, Tensor], strategy: Strategy) -> dict[str, Any]:
    size = strategy.stage_size
    found = {}
    for stage, layouts in enumerate(strategy.stages):
        for name, layout in layouts.items():
            if name in found or name not in tensors:
                continue
            shape, ranks = tensors[name].bits.shape, range(stage * size, (stage + 1) * size)
            numbers = dict.fromkeys(number_of(layout, rank) for rank in range(size))
            local = [extent // cut for extent, cut in zip(shape, layout.cuts)]
            found[name] = {
                "properties": {"dtype": tensors[name].dtype.ckpt, "replica_id": [], "allow_to_save": True},
                "global_shape": list(shape),
                "axis_fragmentations": list(layout.cuts),
                "layout": {
                    "device_matrix": list(layout.device_matrix),
                    "tensor_map": [-1 if not a else a[0] if len(a) == 1 else list(a) for a in layout.tensor_map],
                    "interleaved_parallel": False,
                    "alias_name": [f"axis_{number}" for number in range(len(layout.device_matrix))],
                    "rank_list": list(ranks),
                },
                "chunk": [{"global_offset": [number], "local_shape": local} for number in numbers],
            }
    return found
