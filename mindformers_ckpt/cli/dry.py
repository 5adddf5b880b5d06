"""What `--dry-run` says: what a plan would read and write, and whether its place is free."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mindformers_ckpt.cli.notices import amount, say, say_json, warn
from mindformers_ckpt.disk.files import existing
from mindformers_ckpt.formats import TensorSpec, layout_file
from mindformers_ckpt.objects.path import ObjectPath
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish.manifest import is_result
from mindformers_ckpt.words import counted


def say_plan(plan: Plan, destination: Path, as_json: bool) -> None:
    """Print what a run of a plan would do."""
    needed, free = file_bytes(plan), free_bytes(destination)
    problems = refusals(destination, needed)
    if as_json:
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
        return
    warn(plan.warnings)
    tensors = counted(len(plan.transfers), "tensor")
    say(f"would read {amount(plan.bytes_read)} of {tensors} in {counted(len(plan.sources), 'file')}")
    room = "" if free is None else f"; {amount(free)} are free"
    say(f"would write {counted(len(plan.targets), 'file')}, {amount(needed)}, to {destination}{room}")
    for problem in problems:
        say(f"would be refused: {problem}")


def file_bytes(plan: Plan) -> int:
    """The size of all target files, heads included."""
    sizes: dict[tuple[str, tuple[TensorSpec, ...]], int] = {}
    total = 0
    for target in plan.targets:
        key = (target.format, target.tensors)
        if key not in sizes:
            sizes[key] = layout_file(target.format, target.tensors).size
        total += sizes[key]
    return total


def free_bytes(destination: Path) -> int | None:
    """Free bytes of the disk where the destination would be; None in an object storage."""
    if isinstance(destination, ObjectPath):
        return None
    return shutil.disk_usage(existing(destination)).free


def refusals(destination: Path, needed: int, *, adds_ranks: bool = False) -> list[str]:
    """Why a run without further options would not begin, as far as the destination and the disk tell."""
    found = []
    if destination.is_dir() and any(destination.iterdir()) and not adds_ranks:
        way = "--overwrite replaces it" if is_result(destination) else "--overwrite-anything replaces it"
        found.append(f"{destination} is not empty; choose another folder, or {way}")
    elif destination.is_file():
        found.append(f"{destination} is there; choose another name, or --overwrite-anything replaces it")
    free = free_bytes(destination)
    if free is not None and needed > free:
        found.append(f"the disk has {amount(free)} free, {amount(needed)} are needed")
    return found
