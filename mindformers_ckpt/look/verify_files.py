"""Do checkpoint files hold what was recorded of them: the CRC-32 in a .ckpt file, hashes in a manifest beside it?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from mindformers_ckpt.errors import FormatError, PlanError, describe_problems
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.look.verify_manifest import Entry, Manifest, check_hashes, check_trailers, read_result, sampler
from mindformers_ckpt.look.verify_model import Difference, Verification


def verify_files(paths: Iterable[Path], check: Callable[[], None] = lambda: None) -> list[Path]:
    """Read files and compare them with what is recorded of them; those of which nothing is.

    `check` is called between files and may raise. Raises FormatError that lists everything that differs.
    """
    found, unrecorded = Verification(), []
    known = lru_cache(maxsize=64)(_entries)
    for path in paths:
        check()
        try:
            header = read_header(path)
        except FormatError as error:
            found.differences.append(Difference(str(error)))
            continue
        entry = known(path.parent.parent).get(path) or known(path.parent).get(path)
        if entry is not None and entry.size != header.size:
            what = f"it has {header.size} bytes, the manifest says {entry.size}"
            found.differences.append(Difference(what, path))
            continue
        if header.crc is None and (entry is None or not entry.hashes):
            unrecorded.append(path)
        check_trailers({str(path): header}, 1, sampler(1), found)
        if entry is not None:
            named = entry._replace(path=path.name)
            check_hashes(path.parent, Manifest((named,), None, {}, 1), {path.name: header}, sampler(1), found)
    if found.differences:
        told = [str(difference) for difference in found.differences]
        raise FormatError(describe_problems("files are not what was recorded of them", told))
    return unrecorded


def _entries(folder: Path) -> dict[Path, Entry]:
    """The files of the result in a folder; none where it is no result."""
    try:
        return {folder / entry.path: entry for entry in read_result(folder).entries}
    except PlanError:
        return {}
