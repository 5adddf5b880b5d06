"""Our engine under MindFormers' own `TransformCkpt`: an existing job gains by one line.

    from mindformers_ckpt.mindformers import install

    install()                       # before the Trainer runs
    ...
    uninstall()                     # MindFormers' own code again

`TransformCkpt` keeps its name, its signatures and what it leaves on disk; wherever MindFormers or a script
has imported it, the next call is ours. Which of its habits are kept and which are mended is a table in
docs/mindformers.md. In ModelArts, where nodes exchange files through object storage, MindFormers' own code
goes on doing the work.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.integrations.joining import LOADING, join_before_compiling, joined, put_back
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import parse_bool
from mindformers_ckpt.log import log

__all__ = ["MODULE", "VERSIONS", "install", "installed", "uninstall"]

MODULE = "mindformers.tools.ckpt_transform.transform_checkpoint"
VERSIONS = ("1.6.", "1.7.")  # TransformCkpt is the same code in both; the tests run 1.7.0
DEFAULT_TIMEOUT = 7200.0  # seconds; MindFormers waits so long for strategy files, and without end elsewhere
_NEEDED = (
    *("check_in_modelarts", "get_device_num_per_node", "get_output_root_path", "get_real_group_size"),
    *("get_real_rank", "is_main_rank", "logger", "ms"),
)


class _Installed(NamedTuple):
    """What was there before, to be put back."""

    module: ModuleType
    init: Callable[..., None]
    call: Callable[..., str]
    timeout: float
    handler: logging.Handler


_installed: _Installed | None = None


def installed() -> bool:
    """Whether `TransformCkpt` is ours at the moment."""
    return _installed is not None


def install(timeout: float | None = None) -> None:
    """Put our engine under MindFormers' `TransformCkpt`. Does nothing when it is there already.

    `timeout`: seconds that ranks wait for each other at a step; by default MINDFORMERS_CKPT_TIMEOUT in the
    environment, or 7200. Raises ConfigError, and changes nothing, when MindFormers is missing, of a version
    that we do not know, or has another `TransformCkpt` than the one that we know.
    """
    check_version()
    install_in(importlib.import_module(MODULE), timeout)


def install_in(module: ModuleType, timeout: float | None = None) -> None:
    """`install` into MindFormers' module that defines `TransformCkpt`."""
    global _installed
    if _installed is not None:
        return
    seconds = _seconds(os.environ.get("MINDFORMERS_CKPT_TIMEOUT") if timeout is None else timeout)
    _check_alike(module)
    theirs = module.TransformCkpt
    init, call = theirs.__init__, theirs.__call__
    handler = _LogHandler(module)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    _installed = _Installed(module, init, call, seconds, handler)
    theirs.__init__, theirs.__call__ = _in_place_of(init, _initialise), _in_place_of(call, _transform)
    loading = sys.modules.get(LOADING)
    if loading is not None:
        join_early_in(loading)
    log.info("TransformCkpt of MindFormers re-slices with the engine of mindformers_ckpt")


def join_early_in(loading: ModuleType) -> None:
    """Let the ranks meet before the network is compiled by MindFormers' module that loads, where it can be replaced."""
    join_before_compiling(loading, _join)


def _join() -> Cluster | None:
    """The ranks of this job by MindSpore's count, met in MindFormers' output dir."""
    # MindSpore 2.7 cannot be imported after protobuf, which this imports: not at the head of this file.
    from mindformers_ckpt.job.transform_ckpt import join

    before = _current()
    module = before.module
    size = module.get_real_group_size()
    if size == 1 or module.check_in_modelarts():
        return None
    return join(module.get_real_rank(), size, before.timeout, Path(module.get_output_root_path()))


def uninstall() -> None:
    """Put MindFormers' own code back. Does nothing when it is there."""
    global _installed
    if _installed is None:
        return
    put_back()
    theirs = _installed.module.TransformCkpt
    theirs.__init__, theirs.__call__ = _installed.init, _installed.call
    log.removeHandler(_installed.handler)
    log.setLevel(logging.NOTSET)
    _installed = None


def check_version() -> None:
    """Raise ConfigError unless a MindFormers is installed whose `TransformCkpt` we know."""
    try:
        found = version("mindformers")
    except PackageNotFoundError:
        raise ConfigError("MindFormers is not installed in this environment: pip install mindformers") from None
    if not found.startswith(VERSIONS):
        known = " and ".join(f"{prefix}x" for prefix in VERSIONS)
        raise ConfigError(
            f"MindFormers {found} is installed, but TransformCkpt can be replaced in versions {known} only. Nothing "
            "was changed. Leave install() out to go on "
            "with MindFormers' own code, or use CheckpointHook or `mindformers-ckpt transform`"
        )


def _check_alike(module: ModuleType) -> None:
    theirs = getattr(module, "TransformCkpt", None)
    lacking = [name for name in _NEEDED if not hasattr(module, name)]
    if theirs is None or lacking:
        raise ConfigError(f"{module.__name__} has no {'TransformCkpt' if theirs is None else ', '.join(lacking)}")
    for own, other in ((_initialise, theirs.__init__), (_transform, theirs.__call__)):
        expected, found = _parameters(own), _parameters(other)
        if expected != found:
            raise ConfigError(
                f"TransformCkpt.{other.__name__} has other parameters than the one that can be replaced "
                f"(found {found}, expected {expected}). Nothing was changed; was it patched by something else?"
            )


def _in_place_of(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def method(*args: Any, **options: Any) -> Any:
        return ours(*args, **options)

    return method


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(parameter.name, parameter.default) for parameter in inspect.signature(function).parameters.values()]


def _seconds(value: float | str | None) -> float:
    try:
        seconds = float(value or DEFAULT_TIMEOUT)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"timeout (MINDFORMERS_CKPT_TIMEOUT): a positive number of seconds was expected: {value!r}")
    return seconds


class _LogHandler(logging.Handler):
    """Sends our lines to MindFormers' log, where the job's other lines are."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self._theirs = module.logger

    def emit(self, record: logging.LogRecord) -> None:
        write = self._theirs.warning if record.levelno >= logging.WARNING else self._theirs.info
        write("%s", record.getMessage())


def _current() -> _Installed:
    assert _installed is not None
    return _installed


# The two methods that replace theirs. They set and read the attributes that MindFormers' own code has.


def _initialise(
    self: Any,
    auto_trans_ckpt: bool = False,
    rank_id: int | None = None,
    world_size: int | None = None,
    transform_process_num: int = 1,
    transform_by_rank: bool = False,
    npu_num_per_node: int | None = None,
) -> None:
    before = _current()
    module = before.module
    if module.check_in_modelarts():
        before.init(
            self, auto_trans_ckpt, rank_id, world_size, transform_process_num, transform_by_rank, npu_num_per_node
        )
        return
    try:
        self.auto_trans_ckpt = parse_bool(auto_trans_ckpt)
        self.transform_by_rank = parse_bool(transform_by_rank)
        processes = int(transform_process_num)
    except ValueError as error:
        raise ConfigError(f"auto_trans_ckpt, transform_by_rank or transform_process_num is wrong: {error}") from None
    if processes < 1:
        raise ConfigError(f"transform_process_num: at least 1 process was expected, not {processes}")
    self.world_size = world_size or module.get_real_group_size()
    self.rank_id = module.get_real_rank() if rank_id is None else rank_id
    self.is_main_rank = module.is_main_rank()
    self.npu_num_per_node = npu_num_per_node or module.get_device_num_per_node()
    self.node_num = self.world_size // self.npu_num_per_node
    self.transform_process_num = min(processes, self.world_size)
    share = self.world_size // self.transform_process_num
    self.transform_rank_id_list = [number * share for number in range(self.transform_process_num)]
    if self.auto_trans_ckpt:
        output = module.get_output_root_path()
        self.use_pipeline = module.ms.get_auto_parallel_context("pipeline_stages") > 1
        self.transformed_checkpoint_dir = os.path.join(output, "transformed_checkpoint")
        if self.world_size > 1:
            self.dst_strategy_dir = os.path.join(output, "strategy")
    self.cache_list = []


def _transform(
    self: Any,
    src_checkpoint: str,
    dst_checkpoint_dir: str | None = None,
    src_strategy: str | None = None,
    dst_strategy: str | None = None,
    prefix: str = "checkpoint_",
) -> str:
    # MindSpore 2.7 cannot be imported after protobuf, which this imports: not at the head of this file.
    from mindformers_ckpt.job.transform_ckpt import Request, transform_checkpoint

    before = _current()
    module = before.module
    if module.check_in_modelarts():
        return before.call(self, src_checkpoint, dst_checkpoint_dir, src_strategy, dst_strategy, prefix)
    if self.auto_trans_ckpt:
        for name, value in (("dst_checkpoint_dir", dst_checkpoint_dir), ("dst_strategy", dst_strategy)):
            if value:
                log.warning("%s=%s is not used with auto_trans_ckpt=True", name, value)
        dst_checkpoint_dir, dst_strategy = self.transformed_checkpoint_dir, None
    elif not dst_checkpoint_dir:
        dst_checkpoint_dir = os.path.join(os.getcwd(), "transformed_checkpoint")
        log.warning("dst_checkpoint_dir is not set: the result goes to %s", dst_checkpoint_dir)
    request = Request(
        source=Path(os.path.realpath(src_checkpoint)),
        source_strategy=_optional_path(src_strategy),
        target_strategy=_optional_path(dst_strategy),
        live_strategies=Path(self.dst_strategy_dir) if self.auto_trans_ckpt and self.world_size > 1 else None,
        parallel_mode=str(module.ms.get_auto_parallel_context("parallel_mode")),
        destination=Path(os.path.realpath(dst_checkpoint_dir)),
        prefix=prefix,
        rank=self.rank_id,
        world_size=self.world_size,
        first_ranks=tuple(self.transform_rank_id_list),
        by_rank=self.transform_by_rank,
    )
    rank, size = module.get_real_rank(), module.get_real_group_size()
    transform_checkpoint(request, rank, size, before.timeout, joined())
    return str(request.destination)


def _optional_path(path: str | None) -> Path | None:
    return None if not path or path == "None" else Path(os.path.realpath(path))
