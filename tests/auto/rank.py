"""One rank of a job, as a program: prepares, gets its strategy file, loads, and tells what it holds.

    python rank.py '{"config": {...}, "live": "pp4", "fault": "clear"}'

The strategy file is one that MindSpore recorded when it compiled on Ascend: it is put where MindSpore would
write it. MindSpore itself is not imported; its parameters are stood in for by digests of their bytes, so
that many ranks can run at once. A fault kills this rank, or breaks something, at a certain point.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

STAND_IN = types.ModuleType("mindspore")
STAND_IN.set_auto_parallel_context = lambda **keys: None  # type: ignore[attr-defined]
sys.modules["mindspore"] = STAND_IN

from mindformers_ckpt.auto import hook as hook_module  # noqa: E402
from mindformers_ckpt.auto import reslice, weights  # noqa: E402
from mindformers_ckpt.auto.cluster import Cluster  # noqa: E402
from mindformers_ckpt.auto.config import Config  # noqa: E402
from mindformers_ckpt.auto.hook import CheckpointHook  # noqa: E402
from mindformers_ckpt.auto.output_dir import OutputDir  # noqa: E402
from mindformers_ckpt.errors import CheckpointError  # noqa: E402
from mindformers_ckpt.publish import Staging  # noqa: E402
from mindformers_ckpt.strategy.files import rank_file_name  # noqa: E402

STRATEGIES = Path(__file__).parents[1] / "data" / "strategies"


def kill(*arguments: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, action: Callable[..., object]) -> None:
    """Have something happen before a function is called."""
    function = getattr(owner, name)

    def run(*arguments: Any, **options: Any) -> Any:
        action(*arguments, **options)
        return function(*arguments, **options)

    setattr(owner, name, run)


def after(owner: Any, name: str, action: Callable[[], object]) -> None:
    """Have something happen after a function was called."""
    function = getattr(owner, name)

    def run(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        action()
        return result

    setattr(owner, name, run)


def kill_a_worker() -> None:
    """Kill a process of this rank's pool, as the kernel does when memory is short."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended already
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()


def fill_the_disk(folder: Path) -> None:
    with contextlib.suppress(OSError), open(folder / "filler", "wb") as stream:
        while True:
            stream.write(bytes(1 << 16))
            stream.flush()


def at_step(name: str, action: Callable[[], object]) -> Callable[..., None]:
    def run(self: Cluster, step: str, *rest: Any) -> None:
        if step == name:
            action()

    return run


def arm(fault: str, config: Config) -> None:
    """Prepare what is to go wrong on this rank."""
    output = Path(config.output_dir)
    if fault == "clear":
        after(OutputDir, "clear", kill)
    elif fault == "compile":
        before(CheckpointHook, "load", kill)
    elif fault == "merge":
        before(hook_module, "merge_strategies", kill)
    elif fault == "transform":
        before(reslice, "copy_tasks", lambda *arguments, **options: options["check"]() or kill())
    elif fault in ("wait", "hang"):
        action = kill if fault == "wait" else lambda: time.sleep(120)
        before(Cluster, "barrier", at_step("transformed", action))
    elif fault == "load":
        before(weights, "load_into", kill)
    elif fault == "publish":
        before(Staging, "publish", kill)
    elif fault == "keep":
        before(OutputDir, "keep", kill)
    elif fault == "worker":
        before(Cluster, "check", lambda self: kill_a_worker())
    elif fault == "source vanishes":
        gone = Path(config.load_checkpoint) / "rank_5"
        before(reslice, "copy_tasks", lambda *arguments, **options: gone.rename(gone.with_name("gone")))
    elif fault == "disk fills":
        before(reslice, "copy_tasks", lambda *arguments, **options: fill_the_disk(output))
    elif fault == "raise":
        before(CheckpointHook, "load", lambda *arguments: sys.exit("an error of the training script"))
    else:
        raise ValueError(fault)


def digests(tensors: Iterator[Any]) -> dict[str, str]:
    return {spec.name: hashlib.blake2b(content.tobytes(), digest_size=8).hexdigest() for spec, content in tensors}


def main(job: dict[str, Any]) -> int:
    config = Config.from_mapping(job["config"])
    weights.parameters_of = digests
    weights.wanted_names = lambda cells: set(job.get("names", ()))
    weights.check_fit = weights.load_into = lambda *arguments: None
    if job.get("fault"):
        arm(job["fault"], config)
    hook = CheckpointHook(config)
    try:
        hook.prepare()
        if job.get("live"):
            folder = STRATEGIES / job["live"]
            name = rank_file_name(hook.cluster.rank)
            recorded = folder / name if (folder / name).exists() else next(folder.glob("ckpt_strategy_rank_*"))
            shutil.copy(recorded, hook.strategy_dir / name)
        if job.get("pause"):
            print("prepared", flush=True)
            sys.stdin.readline()
        loaded = hook.load(None)
    except CheckpointError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
        return 1
    print(json.dumps({"loaded": loaded}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
