"""The content of one strategy file, in the protobuf (.ckpt) or the JSON flavour, checked.

A file comes from outside: the numbers in it are bounded before anything is made from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.disk.files import like_it
from mindformers_ckpt.errors import StrategyError, raise_problems
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.schema import LayoutItems, read_layouts, unread_map_class
from mindformers_ckpt.text_files import parse_json, read_regular

SINGLE_MARK, MERGED_MARK = 2, 1  # `current_stage`, which is not the stage: single files 2, merged files 1
MOST_STAGES = 1 << 16
# Far above the strategies of the largest jobs, far below a checkpoint that is given in place of one.
_LARGEST_FILE = 256 << 20
_STAGE_PREFIX = re.compile(r"([0-9]+)-(.*)", re.DOTALL)


class StageFile(NamedTuple):
    """The content of one strategy file: layouts by stage (one stage unless the file is merged)."""

    stages: dict[int, dict[str, Layout]]
    merged: bool


def read_data(path: Path, limit: int = _LARGEST_FILE) -> bytes:
    """The bytes of a strategy file. Raises StrategyError when they cannot be read, or it cannot be one."""
    try:
        data = read_regular(path, limit)
    except FileNotFoundError:
        raise StrategyError(
            f"no strategy file or folder at {path}; a job saves it in the folder `strategy` of its output."
            f"{like_it(path)}"
        ) from None
    except OSError as error:
        raise StrategyError(f"the strategy file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StrategyError(f"the strategy file {path} cannot be read: {error}") from None
    if not data:
        raise StrategyError(f"{path} is empty; a strategy file was expected")
    return data


def parse(path: Path, data: bytes) -> StageFile:
    """The content of a strategy file, of either flavour. Raises StrategyError with all that is wrong in it."""
    rows = _json_rows(path, data) if data.lstrip()[:1] == b"{" else _message_rows(path, data)
    if not rows.layouts:
        raise StrategyError(f"{path}: no parameter has a layout; is this a strategy file?")
    layouts: dict[str, Layout] = {}
    problems = []
    known: dict[int, Layout] = {}  # parameters that are cut alike have one row
    for name, row in rows.layouts:
        try:
            layout = known.get(id(row)) or known.setdefault(id(row), _layout(row))
            if layouts.setdefault(name, layout) != layout:
                raise StrategyError("it stands twice in the file, with different layouts")
        except StrategyError as error:
            problems.append(f"{name}: {error}")
    raise_problems(StrategyError, f"{path}: layouts that cannot be used", problems)
    return _by_stage(path, rows, layouts)


def _by_stage(path: Path, rows: _Rows, layouts: Mapping[str, Layout]) -> StageFile:
    prefixed = {name: _STAGE_PREFIX.fullmatch(name) for name in layouts}
    if rows.mark != MERGED_MARK or not all(prefixed.values()):
        return StageFile({_stage(path, rows.stage): dict(layouts)}, merged=False)
    stages: dict[int, dict[str, Layout]] = {}
    for name, match in prefixed.items():
        assert match is not None
        # Python converts no number of thousands of digits.
        number = _stage(path, int(match[1]) if len(match[1]) < 20 else MOST_STAGES)
        stages.setdefault(number, {})[match[2]] = layouts[name]
    return StageFile(stages, merged=True)


def _stage(path: Path, number: int) -> int:
    if not 0 <= number < MOST_STAGES:
        raise StrategyError(f"{path} names a pipeline stage above {MOST_STAGES - 1}, which no job has; it is damaged")
    return number


class _Row(NamedTuple):
    """A layout as a file writes it."""

    device_matrix: Sequence[int]
    tensor_map: Sequence[Sequence[int]]  # one list for the whole tensor, or one list a dimension
    optimizer_step: int
    optimizer_shards: int
    flat_shape: Sequence[int]
    split_shape: Sequence[int]
    offsets: Sequence[int]


class _Rows(NamedTuple):
    mark: int
    stage: int
    layouts: list[tuple[str, _Row]]


def _layout(row: _Row) -> Layout:
    per_dimension = row.tensor_map
    if len(per_dimension) == 1:
        per_dimension = [[value] for value in per_dimension[0]]
    _refuse_manual_split(row, len(per_dimension))
    tensor_map = tuple(tuple(value for value in values if value != -1) for values in per_dimension)
    return Layout(tuple(row.device_matrix), tensor_map, row.optimizer_shards, row.optimizer_step, tuple(row.flat_shape))


def _refuse_manual_split(row: _Row, dimensions: int) -> None:
    """Refuse the sizes and offsets of uneven pieces.

    MindFormers and MindSpore's tutorials write the shape of the (even) slice where MindSpore writes the sizes of
    uneven pieces: one number a dimension, and no offsets.
    """
    if row.offsets or (row.split_shape and len(row.split_shape) != dimensions):
        sizes, offsets = list(row.split_shape[:20]), list(row.offsets[:20])
        raise StrategyError(
            f"split manually into uneven pieces (sizes {sizes}, offsets {offsets}), which is not supported; "
            "save the checkpoint from a job that cuts it evenly"
        )


def _message_rows(path: Path, data: bytes) -> _Rows:
    from google.protobuf.message import DecodeError, EncodeError

    if data[:1] == b"\n" or path.suffix == ".safetensors":
        raise StrategyError(f"{path} is not a strategy file: it looks like a checkpoint; give the strategy instead")
    message = unread_map_class()()
    rows: dict[tuple[bytes, ...], _Row] = {}  # many parameters are cut alike
    try:
        message.ParseFromString(data)
        items = message.parallel_strategy_item
        layouts, reader = [], LayoutItems()
        for item in message.parallel_layout_item:
            name, fields = reader.read(item)
            if fields not in rows:
                rows[fields] = _message_row(read_layouts(fields))
            layouts.append((_name(name), rows[fields]))
        return _Rows(message.current_stage, items[0].parallel_strategys.stage if items else 0, layouts)
    # In protobuf's pure Python, damaged bytes end in errors of other kinds now and then.
    except (DecodeError, EncodeError, ValueError, RecursionError) as error:
        raise StrategyError(
            f"{path} is not a strategy file (protobuf: {error}); give ckpt_strategy_rank_<n>.ckpt, or its folder"
        ) from None


def _message_row(fields: Any) -> _Row:
    return _Row(
        _joined(fields.dev_matrix),
        [list(part.dim) for part in fields.tensor_map] or [[]],
        fields.opt_weight_shard_step,
        fields.opt_weight_shard_size,
        (),
        _joined(fields.param_split_shape),
        _joined(fields.indices_offset),
    )


def _joined(parts: Any) -> list[int]:
    return [value for part in parts for value in part.dim]


def _name(name: object) -> str:
    """The name of a parameter; protobuf gives bytes when it is not UTF-8."""
    if not isinstance(name, str):
        raise ValueError(f"the name of a parameter is not UTF-8: {name!r:.80}")  # noqa: TRY004 - the file's fault
    return name


def _json_rows(path: Path, data: bytes) -> _Rows:
    try:
        content = parse_json(data)
        layouts = [(name, _json_row(item)) for name, item in content["parallel_layout_item"].items()]
        strategies = list(content.get("parallel_strategy_item", {}).values())
        stage = _number(strategies[0]["stage"]) if strategies else 0
        return _Rows(_number(content.get("current_stage", SINGLE_MARK)), stage, layouts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StrategyError(
            f"{path} is not a strategy file (JSON: {error!r:.200}); give ckpt_strategy_rank_<n>.json, or its folder"
        ) from None


def _json_row(item: Any) -> _Row:
    return _Row(
        _numbers(item["dev_matrix"]),
        [_numbers(part if isinstance(part, list) else [part]) for part in item["tensor_map"]],
        _number(item.get("opt_weight_shard_step", 0)),
        _number(item.get("opt_weight_shard_size", 0)),
        _numbers(item.get("tensor_shape", [])),
        _numbers(item.get("param_split_shape", [])),
        _numbers(item.get("indices_offset", [])),
    )


def _numbers(values: Any) -> list[int]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r:.80} where a list of numbers must stand")
    return [_number(value) for value in values]


def _number(value: Any) -> int:
    if type(value) is not int:  # True is not a number here
        raise TypeError(f"{value!r:.80} where a number must stand")
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError("a number of over 64 bits")
    return value
