"""One rank of a job, as a program: prepares, gets its strategy file, loads, and tells what it holds.

    python rank.py '{"config": {...}, "live": "pp4", "fault": "clear"}'

The strategy file is one that MindSpore recorded when it compiled on Ascend: it is put where MindSpore would
write it. MindSpore itself is not imported; its parameters are stood in for by digests of their bytes, so
that many ranks can run at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from faults import arm

from mindformers_ckpt.errors import CheckpointError, StrategySaved
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.ms import live, weights
from mindformers_ckpt.ms.hook import CheckpointHook
from mindformers_ckpt.strategy.files import rank_file_name

STRATEGIES = Path(__file__).parents[1] / "data" / "strategies"


def digests(tensors: Iterator[Any], parameters: object) -> dict[str, str]:
    return {spec.name: hashlib.blake2b(content.tobytes(), digest_size=8).hexdigest() for spec, content in tensors}


def check_fit(parameters: object, loaded: object, advice: str, lacking: Sequence[str] = ()) -> None:
    weights.raise_unfit((), (), lacking, advice)


def count_requests(folder: str) -> dict[str, int]:
    """Count what this process asks a file system from now on, of what is below a folder."""
    counts = {"open": 0, "listing": 0, "stat": 0}

    def count(kind: str, path: object) -> None:
        if isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)).startswith(folder):
            counts[kind] += 1

    kinds = {"open": "open", "os.listdir": "listing", "os.scandir": "listing"}
    sys.addaudithook(lambda event, arguments: count(kinds[event], arguments[0]) if event in kinds else None)
    for name in ("stat", "lstat"):  # of which no event tells
        setattr(os, name, counted(getattr(os, name), lambda path: count("stat", path)))
    return counts


def counted(ask: Callable[..., Any], count: Callable[[object], None]) -> Callable[..., Any]:
    def look(path: Any, *arguments: Any, **options: Any) -> Any:
        count(path)
        return ask(path, *arguments, **options)

    return look


class Names(dict[str, None]):
    """Stands in for the parameters of a network, which has none of MindSpore's."""

    memory: ClassVar[Mapping[str, Any]] = {}


def take_part(job: dict[str, Any]) -> int:
    """Be a rank of a job; the exit code."""
    counts = count_requests(job["counted"]) if job.get("counted") else None
    stand_in = types.ModuleType("mindspore")
    stand_in.set_auto_parallel_context = lambda **keys: None  # type: ignore[attr-defined]
    stand_in.get_auto_parallel_context = lambda key: None  # type: ignore[attr-defined]
    sys.modules["mindspore"] = stand_in
    config = Config.from_mapping(job["config"])
    weights.tensors_of = digests  # type: ignore[assignment]
    names = job.get("names", ())
    if isinstance(names, dict):
        names = names[os.environ["MS_NODE_ID"]]
    weights.Parameters = lambda cells: Names.fromkeys(names)  # type: ignore[assignment, misc, return-value]
    weights.own_memory = lambda parameters, specs: {}
    weights.own_shapes = lambda parameters: dict.fromkeys(names, ())
    weights.are_cut = weights.shares_stages = lambda parameters: False
    weights.shape_faults = lambda found, own: []
    weights.check_fit = check_fit
    weights.check_loaded = lambda parameters, loaded: None
    weights.load_into = lambda parameters, loaded: dict(loaded)
    live.compiled_layouts = lambda cells, shapes: {}
    if job.get("fault"):
        arm(job["fault"], config)
    hook = CheckpointHook(config)
    try:
        hook.prepare()
        if job.get("live"):
            folder = STRATEGIES / job["live"]
            name = rank_file_name(hook.cluster.rank)
            recorded = folder / name if (folder / name).exists() else next(folder.glob("ckpt_strategy_rank_*"))
            # Written aside: a mount may still take the name for the file that it was seconds ago, and is gone.
            # Where another rank has failed meanwhile the folder is gone, too: `load` says so.
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(recorded, hook.strategy_dir / f".{name}")
                os.replace(hook.strategy_dir / f".{name}", hook.strategy_dir / name)
        if job.get("pause"):
            print("prepared", flush=True)
            sys.stdin.readline()
        loaded = hook.load(None)
    except CheckpointError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
        return 1
    except StrategySaved:
        return 0  # what the trainer makes of it
    print(json.dumps({"loaded": loaded, "requests": counts}), flush=True)
    return 0


def main() -> int:
    return take_part(json.loads(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
