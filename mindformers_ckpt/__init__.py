"""Re-slices MindSpore checkpoints between parallel strategies, at the speed of a copy.

In a training job: `CheckpointHook` (yaml keys `load_checkpoint`, `auto_trans_ckpt`, …).
Offline: the command `mindformers-ckpt`, and `fingerprint`, `verify` and `diff` (docs/trust.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mindformers_ckpt import _moved

if TYPE_CHECKING:
    from mindformers_ckpt.geometry.layout import Layout
    from mindformers_ckpt.look.diff import Diff, TensorDiff, diff
    from mindformers_ckpt.look.fingerprint import Fingerprint, fingerprint
    from mindformers_ckpt.look.verify import verify
    from mindformers_ckpt.look.verify_model import Difference, Verification
    from mindformers_ckpt.ms.hook import CheckpointHook, load_checkpoint

__version__ = "0.1.0"
__all__ = [
    "CheckpointHook",
    "Diff",
    "Difference",
    "Fingerprint",
    "Layout",
    "TensorDiff",
    "Verification",
    "__version__",
    "diff",
    "fingerprint",
    "load_checkpoint",
    "verify",
]
_LOOK = {
    "diff": ("Diff", "TensorDiff", "diff"),
    "fingerprint": ("Fingerprint", "fingerprint"),
    "verify": ("verify",),
    "verify_model": ("Difference", "Verification"),
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: the command line must start without them."""
    if name in ("CheckpointHook", "load_checkpoint"):
        from mindformers_ckpt.ms import hook

        return getattr(hook, name)
    if name == "Layout":
        from mindformers_ckpt.geometry.layout import Layout

        return Layout
    home = next((home for home, names in _LOOK.items() if name in names), None)
    if home is not None:
        return getattr(importlib.import_module(f"{__name__}.look.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_moved.install()
