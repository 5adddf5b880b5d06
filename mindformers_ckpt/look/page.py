"""A whole plan as one page for a browser: it needs no server and fetches nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindformers_ckpt.disk.files import replace_file
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.look.picture import rank_of_file, traffic
from mindformers_ckpt.planning.file import Job
from mindformers_ckpt.planning.model import Numbers, Place
from mindformers_ckpt.printable import ascii_json

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(job: Job, path: Path, stage_sizes: tuple[int, int] | None = None) -> None:
    """Write the page of a plan. `stage_sizes` are the ranks of a pipeline stage of source and target.

    An earlier page is replaced, and nothing else. Raises PlanError when it cannot be written.
    """
    head = "<!doctype html>"
    if path.is_dir():
        raise PlanError(f"{path} is a folder; give the name of a file in it, like {path / 'plan.html'}")
    if path.exists():
        with path.open("rb") as stream:
            if stream.read(len(head)) not in (head.encode(), b""):
                raise PlanError(f"{path} is not a page and is not replaced; choose another name")
    # "<" is written as an escape: a name cannot end the element that holds it.
    data = ascii_json(page_data(job, stage_sizes)).replace("<", "\\u003c")
    before, _, after = _TEMPLATE.read_text(encoding="utf-8").partition("@DATA@")
    try:
        replace_file(path, (before + data + after).encode(), tidy=True)
    except OSError as error:
        advice = "; make its folder first" if isinstance(error, FileNotFoundError) else ""
        raise PlanError(f"{path} cannot be written: {error.strerror}{advice}") from error


def page_data(job: Job, stage_sizes: tuple[int, int] | None = None) -> dict[str, Any]:
    """What the page shows. Boxes, and lists of places, are in tables of their own and are referred to by number."""
    plan = job.plan
    boxes: Numbers[Box] = Numbers()
    places: Numbers[tuple[Place, ...]] = Numbers()
    tensors = [
        [
            transfer.name,
            transfer.dtype.name,
            transfer.dtype.itemsize,
            transfer.shape,
            places[transfer.sources],
            places[transfer.targets],
        ]
        for transfer in plan.transfers
    ]
    return {
        "about": {
            "source": f"{job.about.get('source', '')} {job.about.get('source_path', '')}",
            "target": job.about.get("target", ""),
            "files": f"{len(plan.files_read)} to read, {len(plan.targets)} to write",
            "tensors": f"{len(plan.transfers)}",
            "warnings": f"{len(plan.warnings)}" if plan.warnings else "none",
        },
        "stages": stage_sizes,
        "sources": [[str(file.path), rank_of_file(file)] for file in plan.sources],
        "targets": [[file.path, file.rank] for file in plan.targets],
        "tensors": tensors,
        "places": [[[place.file, boxes[place.box]] for place in entry] for entry in places],
        "boxes": list(boxes),
        "traffic": [[source, target, size] for (source, target), size in sorted(traffic(plan).items())],
    }
