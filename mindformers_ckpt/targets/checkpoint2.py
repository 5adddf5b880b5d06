"""A result as checkpoint 2.0, MindFormers' own format: what its 2.x releases resume from.

    <destination>/latest_checkpointed_iteration.txt
    <destination>/iteration_<n>/common.json, metadata.json, {prefix-}model-…, {prefix-}opt-….safetensors

A plan for rank files is one for this form, too, when each file is two: the weights, and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.engine.whole_files import read_file
from mindformers_ckpt.errors import PlanError, StrategyError, describe_problems
from mindformers_ckpt.formats import DType, TensorSpec
from mindformers_ckpt.geometry.layout import Layout, without_optimizer_shards
from mindformers_ckpt.planning.computations import Constant
from mindformers_ckpt.planning.missing import weight_names
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Place, Plan, TargetFile, Transfer
from mindformers_ckpt.sources.checkpoint2 import COMMON_FILE, COMMON_NAMES, file_name
from mindformers_ckpt.state_names import COUNTERS
from mindformers_ckpt.strategy.iterations import TRACKER_FILE, folder_name
from mindformers_ckpt.strategy.metadata import MARK, METADATA_FILE, number_of
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.strategy.states import with_states
from mindformers_ckpt.text_files import write_json, write_text

_USUAL_PREFIX = "CKP"  # what MindFormers itself writes in graph mode
_KEPT = "global_step"  # a counter that is a parameter of the optimizer, and in common.json
_SIDES = ("model", "opt")


class Made(NamedTuple):
    """A plan for a checkpoint 2.0, and what puts its texts into the folder of the result."""

    plan: Plan
    companions: Callable[[Path], None]


def as_checkpoint2(
    plan: Plan, target: Strategy, prefix: str = DEFAULT_PREFIX, metadata: tuple[tuple[str, str], ...] = ()
) -> Made:
    """The plan that makes a checkpoint 2.0 of what a plan makes for all ranks of a strategy, one file a rank.

    `prefix` is that of rank files; where it was not chosen, files are called as MindFormers calls them.
    `metadata` goes into the headers of the files. Counters go into common.json, and the values of them are read here.
    Raises PlanError for layouts that the format cannot say, TransferError for a source that cannot be read.
    """
    counters = _counters(plan)
    step = int(counters.get(_KEPT) or counters.get("step_num") or 0)
    if step < 0:
        raise PlanError(
            f"the source's {_KEPT} or step_num is {step}, and a checkpoint 2.0 is named after it; is it damaged?"
        )
    folder = folder_name(step)
    own_prefix = _USUAL_PREFIX if prefix == DEFAULT_PREFIX else prefix.rstrip("-_")
    split = _split(plan, folder, own_prefix, target.rank_count)
    split = replace(split, targets=tuple(file._replace(metadata=metadata) for file in split.targets))
    completed = with_states(target, {transfer.name: transfer.shape for transfer in plan.transfers})
    described = None if target.is_complete else _metadata(split, completed)
    warnings = list(plan.warnings)
    if counters and counters.get("global_batch_size") is None:
        warnings.append(
            f"the source tells no global_batch_size, without which MindFormers does not resume: write it into {folder}/"
            f"{COMMON_FILE}"
        )

    def companions(root: Path) -> None:
        write_text(root / TRACKER_FILE, str(step))
        if counters:
            write_json(root / folder / COMMON_FILE, counters, indent=4)
        if described is not None:
            write_json(root / folder / METADATA_FILE, described, indent=None)

    return Made(replace(split, warnings=tuple(warnings)), companions)


def _split(plan: Plan, folder: str, prefix: str, world: int) -> Plan:
    """The plan with two files for each: the weights of a model, and what an optimizer and a training keep."""
    weights = weight_names({transfer.name for transfer in plan.transfers})
    places: dict[tuple[int, str], int] = {}
    targets: list[TargetFile] = []
    for number, file in enumerate(plan.targets):
        for side in _SIDES:
            held = tuple(spec for spec in file.tensors if _side(spec.name, weights) == side)
            if held:
                places[number, side] = len(targets)
                path = f"{folder}/{file_name(prefix, side, file.rank, world)}"
                targets.append(file._replace(path=path, format="safetensors", tensors=held))
    transfers = []
    for transfer in plan.transfers:
        side = _side(transfer.name, weights)
        if side:
            moved = tuple(place._replace(file=places[place.file, side]) for place in transfer.targets)
            transfers.append(transfer._replace(targets=moved))
    return replace(plan, targets=tuple(targets), transfers=tuple(transfers))


def _side(name: str, weights: set[str]) -> str:
    """The kind of file that holds a tensor, "" for what is in common.json alone."""
    if name in weights:
        return "model"
    return "" if name in COMMON_NAMES and name != _KEPT else "opt"


def _counters(plan: Plan) -> dict[str, Any]:
    """The counters that a training resumes from, {} where the plan has none: it makes weights alone."""
    found = {
        transfer.name: _value(plan, transfer, transfer.sources[0])
        for transfer in plan.transfers
        if transfer.name in COMMON_NAMES and transfer.sources
    }
    if not found:
        return {}
    needed = dict.fromkeys(("epoch_num", "step_num", "global_step", "loss_scale", "global_batch_size"))
    return {**needed, **found}


def _value(plan: Plan, transfer: Transfer, place: Place) -> int | float:
    """The number that a tensor of one element is."""
    if isinstance(place.compute, Constant):
        return _number(transfer.dtype, place.compute.content)
    ((_, content),) = read_file(plan.sources[place.file].path, {place.tensor or transfer.name})
    return _number(transfer.dtype, content.tobytes())


def _number(dtype: DType, content: bytes) -> int | float:
    import ml_dtypes  # noqa: F401 - gives numpy the names of bfloat16 and its kin
    import numpy as np

    (value,) = np.frombuffer(content, dtype.name)[:1].tolist()
    return float(value) if "float" in dtype.name else int(value)


# ------------------------------------------------------------------------------------------- metadata.json


def _metadata(plan: Plan, target: Strategy) -> dict[str, Any]:
    """The content of metadata.json. Raises PlanError that lists all tensors whose layout it cannot say."""
    described: dict[str, Any] = {}
    storage: dict[str, list[dict[str, Any]]] = {}
    problems: dict[str, str] = {}
    for file in plan.targets:
        stage, rank = divmod(file.rank, target.stage_size)
        for spec in file.tensors:
            if spec.name in COUNTERS:
                continue
            try:
                layout = _plain_layout(target, spec, stage)
            except StrategyError as error:
                problems[spec.name] = str(error)
                continue
            if spec.name not in described:
                described[spec.name] = _description(spec, layout, stage)
            number = number_of(layout, rank)
            # Every rank has its own file, so that a slice need not be looked for among those of others.
            place = {"file_name": Path(file.path).name, "storage_rank": file.rank, "rank_group": [file.rank]}
            storage.setdefault(str((spec.name, (number,))), []).append(place)
    if problems:
        listed = [f"{name}: {fault}" for name, fault in problems.items()]
        raise PlanError(describe_problems(f"{METADATA_FILE} cannot say the layouts of {target.describe()}", listed))
    return {MARK: described, "storage_data": storage}


def _plain_layout(target: Strategy, shard: TensorSpec, stage: int) -> Layout:
    """The layout of a tensor on a stage; one that no strategy names is whole on every rank."""
    layout = target.layout(shard.name, stage)
    if layout is None:
        return Layout((target.stage_size,), ((),) * len(shard.shape))
    return without_optimizer_shards(layout.for_shard(shard.shape))


def _description(shard: TensorSpec, layout: Layout, stage: int) -> dict[str, Any]:
    """What metadata.json says of a tensor. MindFormers unpacks the values of `layout` in this order."""
    first = stage * layout.rank_count
    numbers = [number_of(layout, rank) for rank in range(layout.rank_count)]
    return {
        "properties": {
            "dtype": shard.dtype.ckpt,
            "replica_id": list(_replicas(numbers)),
            "allow_shape_mismatch": False,
            "allow_to_save": True,
        },
        "global_shape": list(layout.full_shape(shard.shape)),
        "axis_fragmentations": list(layout.cuts),
        "layout": {
            "device_matrix": list(layout.device_matrix),
            "tensor_map": [-1 if not axes else axes[0] if len(axes) == 1 else list(axes) for axes in layout.tensor_map],
            "interleaved_parallel": False,
            "alias_name": [f"axis_{number}" for number in range(len(layout.device_matrix))],
            "rank_list": list(range(first, first + layout.rank_count)),
        },
        "chunk": [{"global_offset": [number], "local_shape": list(shard.shape)} for number in dict.fromkeys(numbers)],
    }


def _replicas(numbers: list[int]) -> Iterator[int]:
    """For every rank, how many ranks before it hold the same slice."""
    seen: dict[int, int] = {}
    for number in numbers:
        yield seen.get(number, 0)
        seen[number] = seen.get(number, 0) + 1
