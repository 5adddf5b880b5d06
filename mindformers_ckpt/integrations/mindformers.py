"""Our engine under MindFormers' own `TransformCkpt`: an existing job gains by one line.

    from mindformers_ckpt.mindformers import install

    install()                       # before the Trainer runs
    ...
    uninstall()                     # MindFormers' own code again

`TransformCkpt` keeps its name, its signatures and what it leaves on disk; wherever MindFormers or a script
has imported it, the next call is ours. Which of its habits are kept and which are mended is a table in
docs/mindformers.md. In ModelArts, where nodes exchange files through object storage, MindFormers' own code
goes on doing the work.

Checkpoints 2.0 have an entry point of their own, which is replaced by the same call: `integrations/checkpoint2.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.integrations import checkpoint2
from mindformers_ckpt.integrations.checkpoint2 import CHECKPOINT2
from mindformers_ckpt.integrations.joining import LOADING, join_before_compiling, joined, put_back
from mindformers_ckpt.integrations.replacing import parameters_of
from mindformers_ckpt.integrations.settings import settings
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.log import log
from mindformers_ckpt.words import shortened

__all__ = ["MODULE", "install", "installed", "uninstall"]

MODULE = "mindformers.tools.ckpt_transform.transform_checkpoint"
# Digests of the files that define TransformCkpt and were looked at, and the versions they are of.
_KNOWN = {
    "9c552bb04631f60e": "1.3.2",
    "eb75c0152dc9aaa6": "1.6.0",
    "b20bbd3190e3f8a3": "1.7.0",
    "dc07d358aa9c0447": "1.8.0, 1.9.0, 2.0.0 and 2.1.0",
}
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
    allow_missing: tuple[str, ...]


_installed: _Installed | None = None


def installed() -> bool:
    """Whether `TransformCkpt` is ours at the moment."""
    return _installed is not None


def install(timeout: float | None = None, allow_missing: Sequence[str] | None = None) -> None:
    """Put our engine under MindFormers' `TransformCkpt`, and under its loading of checkpoint 2.0.

    `timeout`: seconds that ranks wait for each other at a step; by default MINDFORMERS_CKPT_TIMEOUT in the
    environment, or 7200. `allow_missing`: names or patterns of parameters that a checkpoint 2.0 may lack; by default
    those in MINDFORMERS_CKPT_ALLOW_MISSING, separated by commas. Where ours is there already, what is given here
    counts from now on, and nothing else changes.

    The code that is there decides, whatever its version: raises ConfigError, and changes nothing, when MindFormers is
    missing, or its `TransformCkpt` has other methods than the one that can be replaced. Where its `load_checkpoint`
    of checkpoint 2.0 is another, that one stays, with a warning.
    """
    check_installed()
    module = importlib.import_module(MODULE)
    with suppress(ImportError):  # before 1.7 there is none
        importlib.import_module(CHECKPOINT2)
    install_in(module, timeout, allow_missing)


def install_in(module: ModuleType, timeout: float | None = None, allow_missing: Sequence[str] | None = None) -> None:
    """`install` into MindFormers' module that defines `TransformCkpt`, and those that stand beside it."""
    global _installed
    if _installed is not None:
        _change(timeout, allow_missing)
        return
    seconds, allowed = settings(timeout, allow_missing)
    _check_alike(module)
    _report_unknown(module)
    theirs = module.TransformCkpt
    init, call = theirs.__init__, theirs.__call__
    handler = _LogHandler(module)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    _installed = _Installed(module, init, call, seconds, handler, allowed)
    theirs.__init__, theirs.__call__ = _in_place_of(init, _initialise), _in_place_of(call, _transform)
    log.info("TransformCkpt of MindFormers re-slices with the engine of mindformers_ckpt")
    for name, install_beside in ((LOADING, join_early_in), (CHECKPOINT2, load_in)):
        beside = sys.modules.get(name)
        if beside is not None and not _is_half_imported(beside):
            install_beside(beside)


def _change(timeout: float | None, allow_missing: Sequence[str] | None) -> None:
    """Take over what a later call names: `run` has installed before the script calls `install` itself."""
    global _installed
    seconds, allowed = settings(timeout, allow_missing)
    if timeout is not None:
        _installed = _current()._replace(timeout=seconds)
    if allow_missing is not None:
        _installed = _current()._replace(allow_missing=allowed)
        checkpoint2.allow(allowed)


def _is_half_imported(module: ModuleType) -> bool:
    """Whether a module is being imported at the moment; what imports it installs when it has all."""
    return bool(getattr(module.__spec__, "_initializing", False))


def load_in(module: ModuleType) -> None:
    """Let our engine load checkpoints 2.0 in MindFormers' module that does, once `TransformCkpt` is ours."""
    if _installed is not None:
        checkpoint2.replace_in(module, _installed.allow_missing)


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
    checkpoint2.put_back()
    theirs = _installed.module.TransformCkpt
    theirs.__init__, theirs.__call__ = _installed.init, _installed.call
    log.removeHandler(_installed.handler)
    log.setLevel(logging.NOTSET)
    _installed = None


def check_installed() -> None:
    """Raise ConfigError unless a MindFormers is installed."""
    try:
        version("mindformers")
    except PackageNotFoundError:
        raise ConfigError("MindFormers is not installed in this environment: pip install mindformers") from None


def _report_unknown(module: ModuleType) -> None:
    """Warn of code that nobody has compared with ours, although what can be told of it is the same."""
    file = getattr(module, "__file__", None)
    digest = hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest() if file else "none"
    if digest not in _KNOWN:
        log.warning(
            "TransformCkpt in %s (digest %s) is not the code of a release that was looked at (%s). Its methods are the "
            "same, and it is replaced; uninstall() goes back",
            file or module.__name__,
            digest,
            ", ".join(_KNOWN.values()),
        )


def _check_alike(module: ModuleType) -> None:
    theirs = getattr(module, "TransformCkpt", None)
    lacking = [name for name in _NEEDED if not hasattr(module, name)]
    if theirs is None or lacking:
        raise ConfigError(
            f"{module.__name__} has no {'TransformCkpt' if theirs is None else ', '.join(lacking)}: this MindFormers "
            "cannot be changed. Nothing was; leave install() out to go on with MindFormers' own code, or use "
            "CheckpointHook or `mindformers-ckpt transform`"
        )
    for own, other in ((_initialise, theirs.__init__), (_transform, theirs.__call__)):
        expected, found = parameters_of(own), parameters_of(other)
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
    given = Config.from_mapping(
        {
            "auto_trans_ckpt": auto_trans_ckpt,
            "transform_by_rank": transform_by_rank,
            "transform_process_num": transform_process_num,
        }
    )
    self.auto_trans_ckpt, self.transform_by_rank = given.auto_trans_ckpt, given.transform_by_rank
    self.world_size = world_size or module.get_real_group_size()
    self.rank_id = module.get_real_rank() if rank_id is None else rank_id
    self.is_main_rank = module.is_main_rank()
    self.npu_num_per_node = npu_num_per_node or module.get_device_num_per_node()
    self.node_num = self.world_size // self.npu_num_per_node
    self.transform_process_num = min(given.transform_process_num, self.world_size)
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
    names = transform_checkpoint(request, rank, size, before.timeout, joined())
    if self.auto_trans_ckpt and rank == MAIN_RANK:
        _warn_of_others(request.destination, names)
    return str(request.destination)


def _warn_of_others(folder: Path, names: Sequence[str]) -> None:
    """Tell of results that MindFormers' loader reads with these: its Trainer clears the folder beforehand."""
    found = {path.parent.name for path in folder.glob("*/rank_*")}.difference(names)
    others = sorted(name for name in found if not name.startswith("."))
    if others:
        log.warning(
            "%s also holds %s, of other runs, which MindFormers loads as well: remove what is not of this checkpoint",
            *(folder, shortened(others)),
        )


def _optional_path(path: str | None) -> Path | None:
    return None if not path or path == "None" else Path(os.path.realpath(path))
