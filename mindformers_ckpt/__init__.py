"""Re-slices MindSpore checkpoints between parallel strategies, at the speed of a copy.

In a training job: `CheckpointHook` (yaml keys `load_checkpoint`, `auto_trans_ckpt`, …).
Offline: the command `mindformers-ckpt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindformers_ckpt import _moved

if TYPE_CHECKING:
    from mindformers_ckpt.geometry.layout import Layout
    from mindformers_ckpt.ms.hook import CheckpointHook, load_checkpoint

__version__ = "0.1.0"
__all__ = ["CheckpointHook", "Layout", "__version__", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use: the command line must start without them."""
    if name in ("CheckpointHook", "load_checkpoint"):
        from mindformers_ckpt.ms import hook

        return getattr(hook, name)
    if name == "Layout":
        from mindformers_ckpt.geometry.layout import Layout

        return Layout
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_moved.install()
