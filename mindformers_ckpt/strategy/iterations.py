"""The save path of checkpoint 2.0 (MindFormers' own format): one folder an iteration, and a file that names the last.

    <save_path>/latest_checkpointed_iteration.txt    "7"
    <save_path>/iteration_00000007/                  the checkpoint

The tracker file is written when all ranks have saved: a later folder without it may be half of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.text_files import read_regular

TRACKER_FILE = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iteration_(\d{8,})")
_MEGATRON = re.compile(r"iter_\d{7}|release")  # has a tracker of the same name
_TRACKER_BYTES = 1 << 10


def folder_name(iteration: int) -> str:
    """The name of an iteration's folder."""
    return f"iteration_{iteration:08d}"


def iteration_of(name: str) -> int | None:
    """The iteration whose folder this is by its name, None when it is none."""
    match = _FOLDER.fullmatch(name)
    return None if match is None else int(match[1])


def is_save_path(names: Collection[str]) -> bool:
    """Whether a folder with these entries is a save path."""
    if any(iteration_of(name) is not None for name in names):
        return True
    return TRACKER_FILE in names and not any(_MEGATRON.fullmatch(name) for name in names)


def chosen_iteration(
    folder: Path, names: Collection[str], wanted: str | None, error: type[CheckpointError]
) -> tuple[Path, list[str]]:
    """The folder of the iteration that is meant: the one `wanted` names, or else the tracker file; and remarks.

    Raises `error` when there is none of that number, or nothing says which.
    """
    there = sorted(number for name in names if (number := iteration_of(name)) is not None)
    listed = ", ".join(map(str, there[-20:])) or "none"
    if wanted is not None:
        number = iteration_of(wanted)
        number = int(wanted) if number is None and re.fullmatch(r"\d{1,12}", wanted) else number
        if number not in there:
            raise error(f"{folder} has no iteration {wanted!r} (iterations there: {listed})")
        return folder / folder_name(number), []
    if TRACKER_FILE not in names:
        raise error(
            f"{folder} has no {TRACKER_FILE}, which is written when a checkpoint is whole (iterations there: "
            f"{listed}); give the folder of an iteration, if you know that it is"
        )
    number = _tracked(folder / TRACKER_FILE, error)
    if number not in there:
        raise error(
            f"{folder / TRACKER_FILE} names iteration {number}, but there is no folder {folder_name(number)} "
            f"(iterations there: {listed}); give the folder of an iteration"
        )
    later = [folder_name(other) for other in there if other > number]
    remark = f"{folder}: iteration {number} is read, which the tracker file names; left aside: {', '.join(later[:20])}"
    return folder / folder_name(number), [remark] if later else []


def _tracked(file: Path, error: type[CheckpointError]) -> int:
    try:
        text = read_regular(file, _TRACKER_BYTES).decode().strip()
    except (OSError, ValueError) as cause:
        raise error(f"{file} cannot be read: {cause}") from None
    if not re.fullmatch(r"\d{1,12}", text):
        raise error(f"{file} holds {text[:40]!r} where the number of an iteration must stand")
    return int(text)
