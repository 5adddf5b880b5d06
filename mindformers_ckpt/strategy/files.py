"""Strategy files: reading, writing and merging, in the protobuf (.ckpt) and the JSON flavour.

What the fields mean is in `layout`. A file tells nothing about the rank that wrote it, and all ranks of a
pipeline stage write identical files: one file a stage is enough. Merged files hold all stages; their
parameter names carry the prefix "<stage>-".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.disk.files import replace_file
from mindformers_ckpt.errors import StrategyError, describe_problems
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.strategy.schema import strategy_map_class
from mindformers_ckpt.text_files import parse_json

MERGED_FILE = "merged_ckpt_strategy.ckpt"
_RANK_FILE = re.compile(r"rank_(\d+)\.(ckpt|json)$")
_STAGE_PREFIX = re.compile(r"(\d+)-(.*)", re.DOTALL)
_SINGLE_MARK, _MERGED_MARK = 2, 1  # `current_stage`, which is not the stage: single files 2, merged files 1


class _StageFile(NamedTuple):
    """The content of one strategy file: layouts by stage (one stage unless the file is merged)."""

    stages: dict[int, dict[str, Layout]]
    merged: bool


def rank_file_name(rank: int, suffix: str = "ckpt") -> str:
    """Name of a rank's strategy file, as MindFormers jobs write it."""
    return f"ckpt_strategy_rank_{rank}.{suffix}"


def read_strategy(path: str | os.PathLike[str]) -> Strategy:
    """Read the strategy of a job: one file (no pipeline), a merged file, or the folder of all ranks' files.

    Raises StrategyError when the file cannot be read, stages are missing, files of one stage differ, files
    of different runs are mixed, or a parameter is split manually (unevenly).
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise StrategyError(f"no strategy file or folder at {path}")
    data = path.read_bytes()
    content = _parse(path, data)
    if not content.merged:
        _check_alone(path, data, content)
    return _joined(content.stages, str(path))


def is_strategy_folder(path: Path) -> bool:
    """Whether a folder holds strategy files by their names."""
    return path.is_dir() and (bool(_rank_files(path)) or (path / MERGED_FILE).is_file())


def write_strategy(layouts: Mapping[str, Layout], path: str | os.PathLike[str], stage: int = 0) -> None:
    """Write the strategy file of one rank (all ranks of the stage write the same), replacing it atomically.

    The flavour follows the suffix; MindSpore's own tools read the result. JSON cannot hold a dimension that
    is cut along several axes without the shape of the tensor, so such layouts are refused there.
    """
    path = Path(path)
    if path.suffix == ".json":
        data = json.dumps(_to_json(layouts, stage), indent=1).encode()
    else:
        data = _to_message(layouts, stage).SerializeToString()
    _replace_file(path, data)


def merge_strategies(
    folder: str | os.PathLike[str], target: str | os.PathLike[str], *, anything: bool = False
) -> Strategy:
    """Merge the files of all ranks in a folder into one file, and return the strategy.

    The same content as `mindspore.parallel.merge_pipeline_strategys` writes, with the stages in order.
    `target` is replaced only when the new content is complete, and when it is a strategy file or empty, unless
    `anything` may be replaced; it may be in the folder itself.
    """
    folder, target = Path(folder), Path(target)
    if not anything:
        _check_replaceable(target)
    files = _rank_files(folder)
    strategy = _read_folder(folder, use_merged=False)
    by_stage: dict[int, bytes] = {}
    for rank, file in sorted(files.items()):
        by_stage.setdefault(strategy.stage_of(rank), file.read_bytes())
    suffix = next(iter(files.values())).suffix
    _replace_file(target, _merged_json(by_stage) if suffix == ".json" else _merged_message(by_stage), tidy=True)
    return strategy


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what is not a strategy file. Raises StrategyError."""
    if not target.exists() or (target.is_file() and not target.stat().st_size):
        return
    try:
        _parse(target, target.read_bytes())
    except (OSError, StrategyError):
        raise StrategyError(
            f"{target} is not a strategy file and is not replaced; choose another name, or allow whatever is there to "
            "be replaced (--overwrite-anything)"
        ) from None


def _rank_files(folder: Path) -> dict[int, Path]:
    """The strategy files of single ranks in a folder, by rank."""
    found: dict[int, Path] = {}
    suffixes = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _RANK_FILE.search(entry.name)
            if match is None or not entry.is_file():
                continue
            rank = int(match[1])
            suffixes.add(match[2])
            if rank in found and len(suffixes) == 1:
                raise StrategyError(
                    f"{folder}: {found[rank].name} and {entry.name} are both strategy files of rank {rank}; "
                    "keep those of one run only"
                )
            found[rank] = Path(entry.path)
    if len(suffixes) > 1:
        raise StrategyError(f"{folder}: .ckpt and .json strategy files are mixed; keep one flavour only")
    return found


def _read_folder(folder: Path, use_merged: bool = True) -> Strategy:
    files = _rank_files(folder)
    if not files:
        if use_merged and (folder / MERGED_FILE).is_file():
            return read_strategy(folder / MERGED_FILE)
        raise StrategyError(f"{folder}: no strategy file (ckpt_strategy_rank_<n>.ckpt) in this folder")
    contents: dict[bytes, tuple[Path, _StageFile]] = {}
    stages: dict[int, tuple[bytes, Path]] = {}
    stage_of_rank: dict[int, int] = {}
    problems = []
    for rank, file in sorted(files.items()):
        data = file.read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in contents:
            contents[digest] = (file, _parse(file, data))
        content = contents[digest][1]
        if content.merged:
            raise StrategyError(f"{file} is a merged strategy under the name of a rank's file")
        (stage,) = content.stages
        stage_of_rank[rank] = stage
        first_digest, first_file = stages.setdefault(stage, (digest, file))
        if first_digest != digest:
            problems.append(f"{first_file.name} and {file.name} are both of stage {stage} but differ")
    if problems:
        headline = f"{folder}: files of different runs are mixed; keep those of one run only"
        raise StrategyError(describe_problems(headline, problems))
    strategy = _joined({stage: contents[digest][1].stages[stage] for stage, (digest, _) in stages.items()}, str(folder))
    _check_ranks(folder, strategy, stage_of_rank)
    return strategy


def _check_ranks(folder: Path, strategy: Strategy, stage_of_rank: Mapping[int, int]) -> None:
    misplaced = [
        f"{rank_file_name(rank)} says stage {stage}, but rank {rank} of {strategy.rank_count} "
        + (
            f"belongs to stage {strategy.stage_of(rank)}"
            if rank < strategy.rank_count
            else "does not exist in this strategy"
        )
        for rank, stage in stage_of_rank.items()
        if strategy.stage_of(rank) != stage
    ]
    if misplaced:
        headline = f"{folder}: the files do not belong to one run of {strategy.rank_count} ranks; remove stale ones"
        raise StrategyError(describe_problems(headline, misplaced))


def _check_alone(path: Path, data: bytes, content: _StageFile) -> None:
    """Refuse one rank's file of a pipeline: it tells of its own stage only."""
    (stage,) = content.stages
    neighbours = {} if _RANK_FILE.search(path.name) is None else _rank_files(path.parent)
    other = stage
    if neighbours:
        last = neighbours[max(neighbours)]
        others = last.read_bytes()
        (other,) = content.stages if others == data else _parse(last, others).stages
    if stage != 0 or other != stage:
        raise StrategyError(
            f"{path} is the strategy of pipeline stage {stage} alone; give the merged file or the folder "
            f"with the files of all ranks instead: {path.parent}"
        )


def _joined(stages: Mapping[int, dict[str, Layout]], origin: str) -> Strategy:
    missing = sorted(set(range(max(stages) + 1)) - set(stages))
    if missing:
        raise StrategyError(
            f"{origin}: pipeline stages {missing} are missing (stages {sorted(stages)} are there); "
            "collect the files of all ranks"
        )
    return Strategy.of_stages(tuple(stages[number] for number in range(len(stages))), origin)


def _parse(path: Path, data: bytes) -> _StageFile:
    """The content of a strategy file, of either flavour."""
    if not data:
        raise StrategyError(f"{path} is empty; a strategy file was expected")
    rows = _json_rows(path, data) if data.lstrip()[:1] == b"{" else _message_rows(path, data)
    if not rows.layouts:
        raise StrategyError(f"{path}: no parameter has a layout; is this a strategy file?")
    layouts: dict[str, Layout] = {}
    problems = []
    for name, row in rows.layouts:
        try:
            layouts[name] = _layout(row)
        except StrategyError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise StrategyError(describe_problems(f"{path}: layouts that cannot be used", problems))
    prefixed = {name: _STAGE_PREFIX.fullmatch(name) for name in layouts}
    if rows.mark != _MERGED_MARK or not all(prefixed.values()):
        return _StageFile({rows.stage: layouts}, merged=False)
    stages: dict[int, dict[str, Layout]] = {}
    for name, match in prefixed.items():
        assert match is not None
        stages.setdefault(int(match[1]), {})[match[2]] = layouts[name]
    return _StageFile(stages, merged=True)


class _Row(NamedTuple):
    """A layout as a file writes it."""

    device_matrix: Sequence[int]
    tensor_map: Sequence[Sequence[int]]  # one list for the whole tensor, or one list a dimension
    optimizer_step: int
    optimizer_shards: int
    flat_shape: Sequence[int]
    manual_split: bool


class _Rows(NamedTuple):
    mark: int
    stage: int
    layouts: list[tuple[str, _Row]]


def _layout(row: _Row) -> Layout:
    if row.manual_split:
        raise StrategyError("split manually into uneven pieces, which is not supported")
    per_dimension = row.tensor_map
    if len(per_dimension) == 1:
        per_dimension = [[value] for value in per_dimension[0]]
    tensor_map = tuple(tuple(value for value in values if value != -1) for values in per_dimension)
    return Layout(tuple(row.device_matrix), tensor_map, row.optimizer_shards, row.optimizer_step, tuple(row.flat_shape))


def _message_rows(path: Path, data: bytes) -> _Rows:
    from google.protobuf.message import DecodeError, EncodeError

    message = strategy_map_class()()
    try:
        message.ParseFromString(data)
    except (DecodeError, EncodeError) as error:
        raise StrategyError(f"{path} is not a strategy file (protobuf: {error})") from None
    layouts = []
    for item in message.parallel_layout_item:
        fields = item.parallel_layouts
        row = _Row(
            [extent for part in fields.dev_matrix for extent in part.dim],
            [list(part.dim) for part in fields.tensor_map] or [[]],
            fields.opt_weight_shard_step,
            fields.opt_weight_shard_size,
            (),
            any(part.dim for part in (*fields.param_split_shape, *fields.indices_offset)),
        )
        layouts.append((item.param_name, row))
    items = message.parallel_strategy_item
    return _Rows(message.current_stage, items[0].parallel_strategys.stage if items else 0, layouts)


def _json_rows(path: Path, data: bytes) -> _Rows:
    try:
        content = parse_json(data)
        layouts = []
        for name, item in content["parallel_layout_item"].items():
            row = _Row(
                _numbers(item["dev_matrix"]),
                [_numbers(part if isinstance(part, list) else [part]) for part in item["tensor_map"]],
                int(item.get("opt_weight_shard_step", 0)),
                int(item.get("opt_weight_shard_size", 0)),
                _numbers(item.get("tensor_shape", ())),
                bool(item.get("param_split_shape") or item.get("indices_offset")),
            )
            layouts.append((name, row))
        strategies = list(content.get("parallel_strategy_item", {}).values())
        stage = int(strategies[0]["stage"]) if strategies else 0
        return _Rows(int(content.get("current_stage", _SINGLE_MARK)), stage, layouts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StrategyError(f"{path} is not a strategy file (JSON: {error!r})") from None


def _numbers(values: Iterable[Any]) -> list[int]:
    return [int(value) for value in values]


def _to_message(layouts: Mapping[str, Layout], stage: int) -> Any:
    message = strategy_map_class()(current_stage=_SINGLE_MARK)
    # MindSpore finds the stage in the first operator, and refuses a file that has none.
    message.parallel_strategy_item.add(node_name="Declared").parallel_strategys.stage = stage
    for name, layout in layouts.items():
        fields = message.parallel_layout_item.add(param_name=name).parallel_layouts
        fields.dev_matrix.add(dim=layout.device_matrix)
        rows = [list(axes) or [-1] for axes in layout.tensor_map]
        if all(len(row) == 1 for row in rows):
            rows = [[value for row in rows for value in row]]
        for row in rows:
            fields.tensor_map.add(dim=row)
        fields.param_split_shape.add()
        fields.indices_offset.add()
        fields.field = 0
        fields.opt_weight_shard_step = layout.optimizer_step
        fields.opt_weight_shard_size = layout.optimizer_shards
    return message


def _to_json(layouts: Mapping[str, Layout], stage: int) -> dict[str, Any]:
    items = {}
    for name, layout in layouts.items():
        if any(len(axes) > 1 for axes in layout.tensor_map):
            raise StrategyError(
                f"{name}: a dimension cut along several axes cannot be written as JSON; use the .ckpt flavour"
            )
        items[name] = {
            "dev_matrix": list(layout.device_matrix),
            "field": 0,
            "opt_weight_shard_size": layout.optimizer_shards,
            "opt_weight_shard_step": layout.optimizer_step,
            "tensor_map": [axes[0] if axes else -1 for axes in layout.tensor_map],
        }
    operators = {"Declared": {"parallel_strategy": [], "stage": stage}}
    return {"current_stage": _SINGLE_MARK, "parallel_layout_item": items, "parallel_strategy_item": operators}


def _merged_message(by_stage: Mapping[int, bytes]) -> bytes:
    merged = strategy_map_class()(current_stage=_MERGED_MARK)
    for stage in sorted(by_stage):
        message = strategy_map_class()()
        message.ParseFromString(by_stage[stage])
        for item in message.parallel_layout_item:
            item.param_name = f"{stage}-{item.param_name}"
        merged.parallel_strategy_item.extend(message.parallel_strategy_item)
        merged.parallel_layout_item.extend(message.parallel_layout_item)
    data: bytes = merged.SerializeToString()
    return data


def _merged_json(by_stage: Mapping[int, bytes]) -> bytes:
    merged: dict[str, Any] = {
        "current_stage": _MERGED_MARK,
        "parallel_strategy_item": {},
        "parallel_layout_item": {},
    }
    for stage in sorted(by_stage):
        content = parse_json(by_stage[stage])
        merged["parallel_strategy_item"].update(content["parallel_strategy_item"])
        for name, item in content["parallel_layout_item"].items():
            merged["parallel_layout_item"][f"{stage}-{name}"] = item
    return json.dumps(merged).encode()


def _replace_file(path: Path, data: bytes, *, tidy: bool = False) -> None:
    """Put a complete file in place of the old one, or leave the old one untouched."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data, tidy=tidy)
    except OSError as error:
        raise StrategyError(f"cannot write the strategy file {path}: {error}") from error
