"""What else is in the folder of a path that leads nowhere: a name may be misspelt."""

from __future__ import annotations

import os
from pathlib import Path

from mindformers_ckpt.errors import did_you_mean


def like_it(path: Path) -> str:
    """ " Did you mean 'x'?" where the folder of a path holds a name that is like its own, else nothing."""
    try:
        return did_you_mean(path.name, os.listdir(str(path.parent)))
    except OSError:  # no folder on a disk, or none that can be read
        return ""
