"""What can go wrong on a rank: arm() has it happen at a certain point of the hook's work."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from mindformers_ckpt.execution import copying
from mindformers_ckpt.formats import Header
from mindformers_ckpt.job import looking
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.output_dir import OutputDir
from mindformers_ckpt.job.sharing.board import Board
from mindformers_ckpt.ms import weights
from mindformers_ckpt.ms.hook import CheckpointHook
from mindformers_ckpt.publish.staging import Staging
from mindformers_ckpt.strategy import files as strategy_files


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


def amid_headers(action: Callable[[], object]) -> None:
    """Have something happen when this rank has looked at ten files of its share of the source."""
    look = looking._crc_if_like
    looked: list[Path] = []

    def look_at(path: Path, model: Header) -> int | None:
        looked.append(path)
        if len(looked) == 10:
            action()
        return look(path, model)

    looking._crc_if_like = look_at


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
        before(strategy_files, "merge_strategies", kill)
    elif fault in ("looking", "hangs looking"):
        amid_headers(kill if fault == "looking" else lambda: time.sleep(120))
    elif fault == "transform":
        copy = copying.copy_tasks  # type: ignore[attr-defined]  # between two blocks, with the workers of the pool at work
        copying.copy_tasks = lambda *a, **k: copy(*a, **{**k, "check": kill})  # type: ignore[attr-defined]
    elif fault in ("wait", "hang"):
        action = kill if fault == "wait" else lambda: time.sleep(120)
        before(Cluster, "barrier", at_step("transformed", action))
    elif fault == "read":
        before(Board, "done", kill)  # of what ranks read once between them
    elif fault == "load":
        before(weights, "load_into", kill)
    elif fault == "publish":
        before(Staging, "publish", kill)
    elif fault == "keep":
        before(OutputDir, "keep", kill)
    elif fault == "worker":
        copy = copying.copy_tasks  # type: ignore[attr-defined]
        copying.copy_tasks = lambda *a, **k: copy(*a, **{**k, "check": kill_a_worker})  # type: ignore[attr-defined]
    elif fault == "source vanishes":
        gone = Path(config.load_checkpoint) / "rank_5"
        before(copying, "copy_tasks", lambda *arguments, **options: gone.rename(gone.with_name("gone")))
    elif fault == "disk fills":
        before(copying, "copy_tasks", lambda *arguments, **options: fill_the_disk(output))
    elif fault == "raise":
        before(CheckpointHook, "load", lambda *arguments: sys.exit("an error of the training script"))
    else:
        raise ValueError(fault)
