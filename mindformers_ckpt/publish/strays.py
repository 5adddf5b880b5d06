"""What runs have left beside their results, or hold there at this moment: named, not touched.

The next run for the same destination clears it, or goes on with it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.disk.locks import Owner
from mindformers_ckpt.publish.manifest import is_result

_HEX = "[0-9a-f]"
# The first that fits a name says what it is.
_NAMES = [
    (re.compile(rf"\..+\.staging-removed-{_HEX}+"), "a result that was replaced"),
    (re.compile(rf"\..+\.staging-.*{_HEX}+\.journal"), "the journal of a result"),
    (re.compile(rf"\..+\.staging-.*{_HEX}+-joined"), "ranks that were being put together"),
    (re.compile(rf"\..+\.staging-.*{_HEX}+"), "the work of a run; the same command with --resume goes on with it"),
    (re.compile(rf"\..+\.new-.*{_HEX}+"), "a new result that is complete"),
    (re.compile(rf"\..+\.part-{_HEX}{{8}}(\.lock)?"), "a file that was being written"),
    (re.compile(r"\.removed-.+"), "what a job has removed"),
    (re.compile(rf"\.shared-disk-{_HEX}+-\d+"), "what a job found out with whether its nodes share the disk"),
    (re.compile(r"\.strategy\.previous"), "the strategy of the job before"),
    (re.compile(rf"\.meeting-{_HEX}+"), "the secret of a job whose ranks are meeting"),
]
_OLD, _LOCK = re.compile(r"\..+\.old"), re.compile(r"\..+\.(lock|owner)")


class Stray(NamedTuple):
    """A file or folder of a run. `holder`: the process that has it, as far as is known; "" where that has ended."""

    path: Path
    what: str
    holder: str


def find_strays(folder: Path) -> list[Stray]:
    """What runs have in a folder beside results. Raises OSError when it cannot be listed."""
    found = []
    for path in sorted(folder.iterdir()):
        what = next((what for pattern, what in _NAMES if pattern.fullmatch(path.name)), None)
        if what is None and _OLD.fullmatch(path.name) and is_result(path):
            what = "an old result that was being replaced"
        if what is None and _LOCK.fullmatch(path.name) and Owner.of_file(path) is not None:
            what = "a lock"
        if what is not None:
            found.append(Stray(path, what, _holder(path)))
    return found


def _holder(path: Path) -> str:
    places = (path / "lock", path, path.with_name(f"{path.name}.lock"))
    for owner in map(Owner.of_file, places):
        if owner is not None:
            return "" if owner.is_dead() else owner.described
    return ""
