"""What `--dry-run` says: what a plan would read and write, and whether the run would begin."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from mindformers_ckpt.cli.making import How
from mindformers_ckpt.cli.notices import amount, say, say_json, warn
from mindformers_ckpt.disk.files import existing
from mindformers_ckpt.execution.checks import is_checkpoint
from mindformers_ckpt.formats import file_size
from mindformers_ckpt.objects.path import ObjectPath
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish.manifest import is_result
from mindformers_ckpt.words import counted


def say_plan(plan: Plan, destination: Path, how: How, *, adds_ranks: bool = False) -> None:
    """Print what a run of a plan would do. Ends with exit code 1 where it would be refused."""
    needed, free = file_bytes(plan), free_bytes(destination)
    problems = refusals(destination, needed, how, adds_ranks=adds_ranks)
    if how.as_json:
        values: dict[str, Any] = {
            "destination": str(destination),
            "files": [target.path for target in plan.targets],
            "tensors": len(plan.transfers),
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
            "disk_needed": needed,
            "disk_free": free,
            "refusals": problems,
            "warnings": list(plan.warnings),
        }
        say_json(values)
    else:
        _say(plan, destination, needed, free, problems)
    if problems:
        raise click.exceptions.Exit(1)


def _say(plan: Plan, destination: Path, needed: int, free: int | None, problems: list[str]) -> None:
    warn(plan.warnings)
    tensors = counted(len(plan.transfers), "tensor")
    say(f"would read {amount(plan.bytes_read)} of {tensors} in {counted(len(plan.files_read), 'file')}")
    room = "" if free is None else f"; {amount(free)} are free"
    say(f"would write {counted(len(plan.targets), 'file')}, {amount(needed)}, to {destination}{room}")
    for problem in problems:
        say(f"would be refused: {problem}")


def file_bytes(plan: Plan) -> int:
    """The size of all target files, heads included."""
    sizes: dict[tuple[str, int], int] = {}  # by the list itself: the ranks of a stage share theirs
    total = 0
    for target in plan.targets:
        key = target.format, id(target.tensors)
        if key not in sizes:
            sizes[key] = file_size(target.format, target.tensors)
        total += sizes[key]
    return total


def free_bytes(destination: Path) -> int | None:
    """Free bytes of the disk where the destination would be; None in an object storage."""
    if isinstance(destination, ObjectPath):
        return None
    return shutil.disk_usage(existing(destination)).free


def refusals(destination: Path, needed: int, how: How | None = None, *, adds_ranks: bool = False) -> list[str]:
    """Why a run would not begin, as far as the destination and the disk show; without `how`, one without options."""
    found = []
    fault = "" if adds_ranks else _taken(destination, how)
    if fault:
        found.append(f"{destination} {fault}")
    free = free_bytes(destination)
    if free is not None and needed > free:
        found.append(f"the disk has {amount(free)} free, {amount(needed)} are needed")
    return found


def _taken(destination: Path, how: How | None) -> str:
    """What is at the destination and would not be replaced, and the option that replaces it; "" for nothing."""
    if destination.is_file():
        is_ours, state, other = is_checkpoint(destination), "is there", "name"
    elif destination.is_dir() and any(destination.iterdir()):
        is_ours, state, other = is_result(destination), "is not empty", "folder"
    else:
        return ""
    if how is not None and (how.overwrite_anything or (is_ours and (how.overwrite or how.resume))):
        return ""
    option = "--overwrite" if is_ours else "--overwrite-anything"
    return f"{state}; choose another {other}, or {option} replaces it"
