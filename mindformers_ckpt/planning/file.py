"""Plan files: a plan as JSON, to look at, to keep, and to run later.

What repeats is written once: boxes, and lists of places, are in tables of their own and are referred to by
number. One line a table entry, so that a plan can be read, searched and compared with text tools.

    {"mindformers_ckpt_plan": 1, "digest": "…",
     "plan": {"about": {…}, "partial": false, "destination": "/…/result", "warnings": [],
              "sources":   [["/…/rank_0/a.ckpt", bytes, modified (ns)], …],
              "targets":   [["rank_0/checkpoint_0.ckpt", rank, "ckpt", tensor list], …],
              "tensors":   [[name, element type, [shape]], …],
              "lists":     [[tensor, …], …],
              "boxes":     [[[start, …], [stop, …]], …],
              "places":    [[[file, box], …], …],     and the name in a source file that calls a box otherwise
              "transfers": [[name, element type, [shape], source places, target places], …]}}

Plans of `transform` only: what conversion adds (views, computed elements) has no place here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindformers_ckpt.disk.files import replace_file
from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.objects.path import as_path
from mindformers_ckpt.planning.checked import DecodeError
from mindformers_ckpt.planning.decode import decode_plan
from mindformers_ckpt.planning.model import Numbers, Place, Plan, SourceFile
from mindformers_ckpt.text_files import MAX_OWN_BYTES, parse_json, read_regular, readable_json

VERSION = 1
_MARK = "mindformers_ckpt_plan"
# A plan of 16,384 ranks for 8,192 takes some 10 million; boxes that are made for it take the square of their number.
_MOST_COMPARISONS = 200_000_000


def _no_companions(folder: Path) -> None:
    """What most results have beside their files."""


@dataclass(frozen=True)
class Job:
    """A plan and what it takes to run it later.

    Attributes:
        plan: what to read and to write.
        about: source and target in words, for the manifest of the result.
        partial: whether the plan makes some of the target's ranks only.
        destination: folder for the result, absolute; None when it is not known yet.
        companions: puts the texts that belong to the result into its folder; a plan file has none.
    """

    plan: Plan
    about: dict[str, Any]
    partial: bool
    destination: Path | None
    companions: Callable[[Path], None] = field(default=_no_companions, compare=False, repr=False)


def write_plan(job: Job, path: Path, *, anything: bool = False) -> None:
    """Write a plan file, replacing an old one when it is complete.

    Raises PlanError when it cannot be written, when a source file is gone, or when what is there is no plan file
    and not empty, unless `anything` may be replaced.
    """
    if not anything:
        _check_replaceable(path)
    try:
        body = _to_json(job)
        text = _render({_MARK: VERSION, "digest": _digest(body), "plan": body})
        replace_file(path, text.encode(errors="surrogateescape"), tidy=True)
    except OSError as error:
        advice = "; make its folder first" if isinstance(error, FileNotFoundError) else ""
        raise PlanError(f"cannot write the plan file {path}: {error.strerror}{advice}") from error


def _check_replaceable(path: Path) -> None:
    head = b""
    if path.is_file():
        with open(path, "rb") as stream:
            head = stream.read(len(_MARK) + 3)
    elif not path.exists():
        return
    if (head and head != f'{{"{_MARK}"'.encode()) or path.is_dir():
        raise PlanError(
            f"{path} is not a plan file and is not replaced; choose another name, or allow whatever is there to be "
            "replaced (--overwrite-anything)"
        )


def read_plan(path: Path) -> Job:
    """Read a plan file, and check that its sources are what they were when the plan was made.

    Raises PlanError when the file is damaged, of another version or no plan, or a source was changed.
    """
    try:
        content = parse_json(read_regular(path, MAX_OWN_BYTES), most_parts=None)
    except OSError as error:
        raise PlanError(f"cannot read the plan file {path}: {error.strerror}; plan --out FILE makes one") from error
    except ValueError as error:
        raise PlanError(
            f"{path} is not a plan file, or damaged ({str(error).partition(';')[0]}); `mindformers-ckpt plan --out` "
            "makes one"
        ) from None
    if not isinstance(content, dict) or _MARK not in content:
        raise PlanError(f"{path} is not a plan file; `mindformers-ckpt plan --out` makes one")
    if content[_MARK] != VERSION:
        raise PlanError(
            f"{path} is a plan file of version {content[_MARK]!r:.40}, this program reads version {VERSION}; "
            "make it again"
        )
    body: Any = content.get("plan")
    if content.get("digest") != _digest(body):
        raise PlanError(f"{path} is damaged: its content does not go with its digest; make it again")
    try:
        job = _from_json(body)
    except DecodeError as error:
        raise PlanError(f"{path} holds no plan that can be run ({error}); make it again") from None
    _check_sources(path, job.plan.sources, [entry[2] for entry in body["sources"]])
    job.plan.check(_MOST_COMPARISONS)
    return job


def _to_json(job: Job) -> dict[str, Any]:
    plan = job.plan
    boxes: Numbers[Box] = Numbers()
    places: Numbers[tuple[Place, ...]] = Numbers()
    specs: Numbers[TensorSpec] = Numbers()
    lists: Numbers[tuple[TensorSpec, ...]] = Numbers()
    targets = [[target.path, target.rank, target.format, lists[target.tensors]] for target in plan.targets]
    tensor_lists = [[specs[spec] for spec in entry] for entry in lists]
    transfers = [
        [
            transfer.name,
            transfer.dtype.name,
            transfer.shape,
            places[transfer.sources],
            places[transfer.targets],
        ]
        for transfer in plan.transfers
    ]
    place_lists = [[_place_to_json(place, boxes) for place in entry] for entry in places]
    return {
        "about": job.about,
        "partial": job.partial,
        "destination": None if job.destination is None else str(job.destination),
        "warnings": plan.warnings,
        "sources": [
            [str(file.path), file.size, status.st_mtime_ns]
            for file, status in zip(plan.sources, each(lambda file: file.path.stat(), plan.sources))
        ],
        "targets": targets,
        "tensors": [[spec.name, spec.dtype.name, spec.shape] for spec in specs],
        "lists": tensor_lists,
        "boxes": list(boxes),
        "places": place_lists,
        "transfers": transfers,
    }


def _place_to_json(place: Place, boxes: Numbers[Box]) -> list[Any]:
    if not place.is_plain:
        raise PlanError("a plan that rearranges or computes cannot be written to a file")
    return [place.file, boxes[place.box], *([place.tensor] if place.tensor else [])]


def _from_json(body: Any) -> Job:
    if not isinstance(body, dict):
        raise DecodeError("it is not a JSON object")
    plan = decode_plan(body)
    about, partial, destination = body.get("about"), body.get("partial"), body.get("destination")
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise DecodeError("what it says about source and target is not text")
    if not isinstance(partial, bool):
        raise DecodeError("it does not say whether it is a part")
    if destination is None:
        return Job(plan, about, partial, None)
    if not isinstance(destination, str) or "\0" in destination or not as_path(destination).is_absolute():
        raise DecodeError("its destination is not an absolute path")
    return Job(plan, about, partial, as_path(destination))


def _check_sources(path: Path, sources: Sequence[SourceFile], times: Sequence[int]) -> None:
    def look(file: SourceFile) -> os.stat_result | OSError:
        try:
            return file.path.stat()
        except OSError as error:
            return error

    problems = []
    for file, modified, status in zip(sources, times, each(look, sources)):
        if isinstance(status, OSError):
            problems.append(f"{file.path}: {status.strerror}")
        elif status.st_size != file.size:
            problems.append(f"{file.path} has {status.st_size} bytes, {file.size} when the plan was made")
        elif status.st_mtime_ns != modified:
            problems.append(f"{file.path} was written again after the plan was made")
    raise_problems(PlanError, f"the sources of the plan {path} were changed; make it again", problems)


def _digest(body: Any) -> str:
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _render(content: dict[str, Any]) -> str:
    """JSON with a line for every entry of a table."""
    parts = []
    for key, value in content["plan"].items():
        text = _dump(value)
        if isinstance(value, (list, tuple)) and value:
            text = "[\n  " + ",\n  ".join(map(_dump, value)) + "\n ]"
        parts.append(f" {_dump(key)}: {text}")
    head = ", ".join(f"{_dump(key)}: {_dump(content[key])}" for key in (_MARK, "digest"))
    return "{" + head + ', "plan": {\n' + ",\n".join(parts) + "\n}}\n"


def _dump(value: Any) -> str:
    return readable_json(value, separators=(",", ":"))
