"""Lets the ranks of a job meet before MindFormers compiles the network, not after it.

`TransformCkpt` is called after the network is compiled, which may take hours. Nobody would miss a rank that dies
meanwhile: the others would wait for it in `TransformCkpt` until their time is over. So the function around both,
`transform_and_load_checkpoint`, is replaced by one that joins the ranks first; from then on the death of a rank is
announced to all of them. Where that function is missing or is not called, the ranks join in `TransformCkpt`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.integrations.replacing import replace_everywhere
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import parse_bool

LOADING = "mindformers.trainer.utils"
_FUNCTION = "transform_and_load_checkpoint"
_STEP = "load checkpoint"

_theirs: Callable[..., Any] | None = None
_joined: Cluster | None = None


def joined() -> Cluster | None:
    """The ranks that have met before the network was compiled; None where they have not."""
    return _joined


def join_before_compiling(module: ModuleType, join: Callable[[], Cluster | None]) -> None:
    """Replace the function that compiles and loads, in `module` and wherever it has been imported.

    `join` joins the ranks; it returns None for a job of one rank. Does nothing when the function is replaced already,
    or is not there.
    """
    global _theirs
    theirs = vars(module).get(_FUNCTION)
    if _theirs is not None or not callable(theirs):
        return
    _theirs = theirs
    replace_everywhere(_FUNCTION, theirs, _loading(theirs, join))


def put_back() -> None:
    """Put MindFormers' own function back. Does nothing when it is there."""
    global _theirs
    theirs, _theirs = _theirs, None
    if theirs is not None:
        replace_everywhere(_FUNCTION, getattr(sys.modules[LOADING], _FUNCTION), theirs)


def _loading(theirs: Callable[..., Any], join: Callable[[], Cluster | None]) -> Callable[..., Any]:
    @wraps(theirs)
    def load(config: Any, *args: Any, **options: Any) -> Any:
        global _joined
        cluster = join() if _transforms(config) and _joined is None else None
        if cluster is None:
            return theirs(config, *args, **options)
        _joined = cluster
        try:
            with cluster, cluster.step(_STEP):
                return theirs(config, *args, **options)
        finally:
            _joined = None

    return load


def _transforms(config: Any) -> bool:
    """Whether loading by this configuration ends in `TransformCkpt`."""
    try:
        format = str(getattr(config, "load_ckpt_format", None) or "ckpt")
        return parse_bool(config.auto_trans_ckpt) and not config.only_save_strategy and format == "ckpt"
    except (AttributeError, CheckpointError, ValueError):
        return False  # MindFormers says what is wrong with it
