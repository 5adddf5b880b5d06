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
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mindformers_ckpt.disk.files import like_it, replace_file
from mindformers_ckpt.errors import StrategyError, raise_problems, system_errors
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.objects.path import as_path, names_of
from mindformers_ckpt.strategy.iterations import chosen_iteration, is_save_path
from mindformers_ckpt.strategy.metadata import LARGEST, METADATA_FILE, Metadata, is_metadata, parse_metadata
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.strategy.parse import MERGED_MARK, SINGLE_MARK, StageFile, parse, read_data
from mindformers_ckpt.strategy.schema import strategy_map_class
from mindformers_ckpt.text_files import parse_json

MERGED_FILE = "merged_ckpt_strategy.ckpt"
_RANK_FILE = re.compile(r"rank_([0-9]+)\.(ckpt|json)$")


def rank_file_name(rank: int, suffix: str = "ckpt") -> str:
    """Name of a rank's strategy file, as MindFormers jobs write it."""
    return f"ckpt_strategy_rank_{rank}.{suffix}"


def read_strategy(path: str | os.PathLike[str]) -> Strategy:
    """Read the strategy of a job: one file (no pipeline), a merged file, or the folder of all ranks' files.

    A metadata.json of checkpoint 2.0, its folder and the save path of such folders are one, too. Raises StrategyError
    when the file cannot be read, stages are missing, files of one stage differ, files of different runs are mixed, or
    a parameter is split manually (unevenly).
    """
    path = as_path(path)
    if path.is_dir():
        metadata = _metadata_in(path)
        return _read_folder(path) if metadata is None else read_metadata(metadata).strategy()
    data = read_data(path)
    if is_metadata(data):
        return parse_metadata(path, data).strategy()
    content = parse(path, data)
    if not content.merged:
        _check_alone(path, data, content)
    return _joined(content.stages, str(path))


def read_metadata(path: Path) -> Metadata:
    """Read a metadata.json of checkpoint 2.0. Raises StrategyError."""
    return parse_metadata(path, read_data(path, LARGEST))


def _metadata_in(folder: Path) -> Path | None:
    """The metadata.json of an iteration's folder, or of the save path that holds it; None where there is none."""
    names = _names(folder, folders=True)
    if is_save_path(names):
        folder, _ = chosen_iteration(folder, names, None, StrategyError)
    elif METADATA_FILE not in names:
        return None
    return folder / METADATA_FILE


def read_rank_file(path: str | os.PathLike[str]) -> dict[str, Layout]:
    """The layouts in the file of one rank, which are those of its pipeline stage. Raises StrategyError."""
    path = as_path(path)
    content = _rank_file(path, read_data(path))
    if content.merged:
        raise StrategyError(f"{path} is a merged strategy; the file of one rank was expected")
    (layouts,) = content.stages.values()
    return dict(layouts)


@lru_cache(maxsize=1)
def _rank_file(path: Path, data: bytes) -> StageFile:
    """What a file says. The last one is kept: the main rank of a job reads its own alone, then with all the others."""
    return parse(path, data)


def is_strategy_folder(path: Path) -> bool:
    """Whether a folder holds strategy files by their names."""
    return path.is_dir() and (bool(_rank_files(path)) or (path / MERGED_FILE).is_file())


def write_strategy(layouts: Mapping[str, Layout], path: str | os.PathLike[str], stage: int = 0) -> None:
    """Write the strategy file of one rank (all ranks of the stage write the same), replacing it atomically.

    The flavour follows the suffix; MindSpore's own tools read the result. JSON cannot hold a dimension that
    is cut along several axes without the shape of the tensor, so such layouts are refused there.
    """
    path = as_path(path)
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
    if not folder.is_dir():
        what, like = ("is a file", "") if folder.exists() else ("is not there", like_it(folder))
        raise StrategyError(f"{folder} {what}; give the folder with the strategy files of all ranks.{like}".rstrip("."))
    files = _rank_files(folder)
    strategy = _read_folder(folder, use_merged=False)
    by_stage: dict[int, bytes] = {}
    for rank, file in sorted(files.items()):
        by_stage.setdefault(strategy.stage_of(rank), read_data(file))
    suffix = next(iter(files.values())).suffix
    _replace_file(target, _merged_json(by_stage) if suffix == ".json" else _merged_message(by_stage), tidy=True)
    return strategy


def strategy_of_job(folder: Path, ranks: int, *, merges: bool = True) -> Strategy:
    """What the ranks of a job have left in a folder; of a pipeline the merged file is written there, too.

    Raises StrategyError when it is that of another number of ranks.
    """
    strategy = read_strategy(folder)
    if strategy.rank_count != ranks:
        raise StrategyError(
            f"the strategy in {folder} is for {strategy.rank_count} ranks, but this job has {ranks}; remove the files "
            "of other runs"
        )
    if merges and len(strategy.stages) > 1:
        merge_strategies(folder, folder / MERGED_FILE)
    return strategy


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what is not a strategy file. Raises StrategyError."""
    if not target.exists() or (target.is_file() and not target.stat().st_size):
        return
    try:
        parse(target, read_data(target))
    except (OSError, StrategyError):
        raise StrategyError(
            f"{target} is not a strategy file and is not replaced; choose another name, or allow whatever is there to "
            "be replaced (--overwrite-anything)"
        ) from None


def _rank_files(folder: Path) -> dict[int, Path]:
    """The strategy files of single ranks in a folder, by rank."""
    found: dict[int, Path] = {}
    suffixes = set()
    for name in _names(folder):
        match = _RANK_FILE.search(name)
        if match is None:
            continue
        rank = int(match[1])
        suffixes.add(match[2])
        if rank in found and len(suffixes) == 1:
            raise StrategyError(
                f"{folder}: {found[rank].name} and {name} are both strategy files of rank {rank}; "
                "keep those of one run only"
            )
        found[rank] = folder / name
    if len(suffixes) > 1:
        raise StrategyError(f"{folder}: .ckpt and .json strategy files are mixed; keep one flavour only")
    return found


def _names(folder: Path, *, folders: bool = False) -> list[str]:
    """The names in a folder, without those of folders in it unless they are asked for."""
    with system_errors(StrategyError, f"the strategy folder {folder} cannot be read"):
        return [name for name, is_folder in names_of(folder).items() if folders or not is_folder]


def _read_folder(folder: Path, use_merged: bool = True) -> Strategy:
    files = _rank_files(folder)
    if not files:
        if use_merged and (folder / MERGED_FILE).is_file():
            return read_strategy(folder / MERGED_FILE)
        raise StrategyError(
            f"{folder}: no strategy file (ckpt_strategy_rank_<n>.ckpt) in this folder; give "
            "the folder `strategy` of the job's output, or one of its files"
        )
    contents: dict[bytes, tuple[Path, StageFile]] = {}
    stages: dict[int, tuple[bytes, Path]] = {}
    stage_of_rank: dict[int, int] = {}
    problems = []
    for rank, file in sorted(files.items()):
        data = read_data(file)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in contents:
            contents[digest] = (file, _rank_file(file, data))
        content = contents[digest][1]
        if content.merged:
            raise StrategyError(f"{file} is a merged strategy under the name of a rank's file")
        (stage,) = content.stages
        stage_of_rank[rank] = stage
        first_digest, first_file = stages.setdefault(stage, (digest, file))
        if first_digest != digest:
            problems.append(f"{first_file.name} and {file.name} are both of stage {stage} but differ")
    headline = f"{folder}: files of different runs are mixed; keep those of one run only"
    raise_problems(StrategyError, headline, problems)
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
    headline = f"{folder}: the files do not belong to one run of {strategy.rank_count} ranks; remove stale ones"
    raise_problems(StrategyError, headline, misplaced)


def _check_alone(path: Path, data: bytes, content: StageFile) -> None:
    """Refuse one rank's file of a pipeline: it tells of its own stage only."""
    (stage,) = content.stages
    neighbours = {} if _RANK_FILE.search(path.name) is None else _rank_files(path.parent)
    other = stage
    if neighbours:
        last = neighbours[max(neighbours)]
        others = read_data(last)
        (other,) = content.stages if others == data else parse(last, others).stages
    if stage != 0 or other != stage:
        raise StrategyError(
            f"{path} is the strategy of pipeline stage {stage} alone; give the merged file or the folder "
            f"with the files of all ranks instead: {path.parent}"
        )


def _joined(stages: Mapping[int, dict[str, Layout]], origin: str) -> Strategy:
    missing = sorted(set(range(max(stages) + 1)) - set(stages))
    if missing:
        raise StrategyError(
            f"{origin}: pipeline stages {_listed(missing)} are missing (stages {_listed(sorted(stages))} are there); "
            "collect the files of all ranks"
        )
    return Strategy.of_stages(tuple(stages[number] for number in range(len(stages))), origin)


def _listed(numbers: Sequence[int], limit: int = 20) -> str:
    return str(list(numbers)) if len(numbers) <= limit else f"{str(list(numbers[:limit]))[:-1]}, …] ({len(numbers)})"


def _to_message(layouts: Mapping[str, Layout], stage: int) -> Any:
    message = strategy_map_class()(current_stage=SINGLE_MARK)
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
    return {"current_stage": SINGLE_MARK, "parallel_layout_item": items, "parallel_strategy_item": operators}


def _merged_message(by_stage: Mapping[int, bytes]) -> bytes:
    merged = strategy_map_class()(current_stage=MERGED_MARK)
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
        "current_stage": MERGED_MARK,
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
