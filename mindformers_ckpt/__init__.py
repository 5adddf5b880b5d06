"""Re-slices MindSpore checkpoints between parallel strategies, at the speed of a copy.

    import mindformers_ckpt as mc

In a training job: `mc.CheckpointHook` (yaml keys `load_checkpoint`, `auto_trans_ckpt`, …).
Offline: `mc.open_checkpoint`, `mc.plan`, `mc.transform`, …, and the command `mindformers-ckpt`.
What is in `__all__` is public; docs/api.md describes it, and says how it changes.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mindformers_ckpt import _moved

if TYPE_CHECKING:
    from mindformers_ckpt.api.convert import convert
    from mindformers_ckpt.api.merge_lora import merge_lora
    from mindformers_ckpt.api.transform import plan, transform
    from mindformers_ckpt.convert.run import ConversionReport
    from mindformers_ckpt.errors import (
        CheckpointError,
        ClusterError,
        ConfigError,
        FormatError,
        PlanError,
        PublishError,
        StrategyError,
        StrategySaved,
        TransferError,
    )
    from mindformers_ckpt.execution.options import Report
    from mindformers_ckpt.geometry.layout import Layout
    from mindformers_ckpt.look.checkpoint import Checkpoint, Shard, Tensor, open_checkpoint
    from mindformers_ckpt.look.diff import Diff, TensorDiff, diff
    from mindformers_ckpt.look.fingerprint import Fingerprint, fingerprint
    from mindformers_ckpt.look.inspect import Inspection, inspect
    from mindformers_ckpt.look.verify import verify
    from mindformers_ckpt.look.verify_model import Difference, Verification
    from mindformers_ckpt.ms.hook import CheckpointHook, load_checkpoint
    from mindformers_ckpt.planning.file import Job
    from mindformers_ckpt.strategy.files import read_strategy, write_strategy
    from mindformers_ckpt.strategy.model import Strategy

__version__ = "0.2.0"
__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointHook",
    "ClusterError",
    "ConfigError",
    "ConversionReport",
    "Diff",
    "Difference",
    "Fingerprint",
    "FormatError",
    "Inspection",
    "Job",
    "Layout",
    "PlanError",
    "PublishError",
    "Report",
    "Shard",
    "Strategy",
    "StrategyError",
    "StrategySaved",
    "Tensor",
    "TensorDiff",
    "TransferError",
    "Verification",
    "__version__",
    "convert",
    "diff",
    "fingerprint",
    "inspect",
    "load_checkpoint",
    "merge_lora",
    "open_checkpoint",
    "plan",
    "read_strategy",
    "transform",
    "verify",
    "write_strategy",
]

# Module -> public names in it. They are imported on first use: the command line must start without them.
_HOMES = {
    "api.convert": ("convert",),
    "api.merge_lora": ("merge_lora",),
    "api.transform": ("plan", "transform"),
    "convert.run": ("ConversionReport",),
    "errors": (
        *("CheckpointError", "ClusterError", "ConfigError", "FormatError", "PlanError", "PublishError"),
        *("StrategyError", "StrategySaved", "TransferError"),
    ),
    "execution.options": ("Report",),
    "geometry.layout": ("Layout",),
    "look.checkpoint": ("Checkpoint", "Shard", "Tensor", "open_checkpoint"),
    "look.diff": ("Diff", "TensorDiff", "diff"),
    "look.fingerprint": ("Fingerprint", "fingerprint"),
    "look.inspect": ("Inspection", "inspect"),
    "look.verify": ("verify",),
    "look.verify_model": ("Difference", "Verification"),
    "ms.hook": ("CheckpointHook", "load_checkpoint"),
    "planning.file": ("Job",),
    "strategy.files": ("read_strategy", "write_strategy"),
    "strategy.model": ("Strategy",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """This package. Python would replace the functions `convert` and `transform` by the rooms of those names, as soon
    as one is imported; here a public name is what it says, and `from mindformers_ckpt.convert import …` the room."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
_moved.install()
