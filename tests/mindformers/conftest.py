"""MindSpore 2.7 cannot be imported after protobuf, which reading strategies needs: it comes first."""

from __future__ import annotations

import contextlib
from importlib.metadata import PackageNotFoundError, version

with contextlib.suppress(PackageNotFoundError):
    version("mindformers")
    import mindspore  # noqa: F401
