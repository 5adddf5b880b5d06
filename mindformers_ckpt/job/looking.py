"""The ranks look together at a source of many rank folders: each at a share, and the main rank has what they found.

A thousand folders and their files take thousands of round trips of a network disk. Here every rank lists some of the
folders, says what the files are that the main rank has chosen in them, and compares these at samples with a file of
their size that the main rank has read. Such a header is likely: who reads the contents compares all heads.

    main rank   hand_out "look": {"list": [folder, …]}, {"state": [file, …]} or {"compare": [[file, [format, bytes,
                has a CRC, [[offset, head], …]]], …]} to each rank, null at the end
    others      collect "looked": {folder: [{name: is it a folder}, {file: [bytes, modified]}]} with the last files,
                {file: [bytes, modified]} or {file: CRC}, null for what cannot be read or is not so: the main rank
                looks itself, and has the message
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.disk.files import FileState
from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import CheckpointError, FormatError, PlanError
from mindformers_ckpt.formats import Header
from mindformers_ckpt.formats.headers import MANY_FILES, look_quickly, sampled
from mindformers_ckpt.formats.tensor_file import scan
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import MAX_VALUES
from mindformers_ckpt.planning.checked import bytes_of, list_of, number_of, text_of
from mindformers_ckpt.sources.find import holds_rank_folders
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.rank_folders import read, read_to_resume
from mindformers_ckpt.sources.source import Source

_SAMPLES = 2  # heads that are compared; all are when contents are read
_WAIT = 0.002  # seconds that one file is waited for before several are looked at at once

Answer = Mapping[str, Any]


class Looked(NamedTuple):
    """The files of a checkpoint, and their headers: those that could be read."""

    files: Source
    headers: Mapping[Path, Header]


def look_together(cluster: Cluster, root: Path, step: str | None, *, resume: bool) -> Looked | None:
    """Look at a checkpoint; all ranks call it. None on all but the main rank, and where there are not many folders.

    What is chosen is what `find_source` chooses. Raises PlanError on the main rank.
    """
    try:
        return _led(cluster, root, step, resume) if cluster.rank == MAIN_RANK else _followed(cluster, root)
    except CheckpointError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise PlanError(f"what another rank told of {root} cannot be read: {error}") from None


def _followed(cluster: Cluster, root: Path) -> Looked | None:
    """Look at what the main rank asks for, until it needs no more."""
    while (task := cluster.hand_out("look")) is not None:
        answer = _answer(root, task)
        # Of folders with thousands of files each: the main rank looks itself.
        is_short = len(json.dumps(answer)) <= MAX_VALUES // cluster.size
        cluster.collect("looked", answer if is_short else {}, here=False)
    return None


def _led(cluster: Cluster, root: Path, step: str | None, resume: bool) -> Looked | None:
    folders = _rank_folders(root) if cluster.size > 1 else []
    looked = None
    if len(folders) >= MANY_FILES:
        looking = _Looking(cluster, root, folders)
        listing = Listing(root, told=looking.entries())
        files = read_to_resume(listing, looking.fault_of) if resume and not step else read(listing, step)
        found = looking.headers(files.files)
        looked = Looked(files, {path: header for path, header in found.items() if isinstance(header, Header)})
    cluster.hand_out("look", [None] * cluster.size)
    return looked


def _rank_folders(root: Path) -> list[str]:
    """The names of the rank folders of a checkpoint; none of another kind."""
    if not root.is_dir():
        return []
    listing = Listing(root)
    return [folder.name for folder in listing.rank_folders.values()] if holds_rank_folders(listing) else []


class _Looking:
    """On the main rank: what all ranks find, each in its own share of the rank folders."""

    def __init__(self, cluster: Cluster, root: Path, folders: Sequence[str]) -> None:
        self._cluster, self._root = cluster, root
        self._looker = {folder: number % cluster.size for number, folder in enumerate(folders)}
        self._known: dict[Path, Header | FormatError] = {}
        self._states: dict[str, Any] = {}

    def entries(self) -> dict[str, dict[str, bool]]:
        """The entries of all folders, but of those that a rank could not list."""
        found: dict[str, dict[str, bool]] = {}
        for folder, told in self._asked("list", {folder: folder for folder in self._looker}).items():
            if folder in self._looker:
                entries, states = map(_table, list_of(told, 2))
                found[folder] = _entries(entries)
                self._states.update((f"{folder}/{name}", state) for name, state in states.items())
        return found

    def headers(self, files: Sequence[Path]) -> dict[Path, Header | FormatError]:
        """The headers of files in the folders, or what is wrong with a file."""
        new = [file for file in files if file not in self._known]
        if new:
            self._compare({file.relative_to(self._root).as_posix(): file for file in new})
            self._known.update(look_quickly([file for file in new if file not in self._known], _SAMPLES))
        return {file: self._known[file] for file in files}

    def fault_of(self, chosen: Mapping[int, Path]) -> str | None:
        """What keeps one of the files from being read."""
        found = self.headers(list(chosen.values())).values()
        return next((str(header) for header in found if isinstance(header, FormatError)), None)

    def _compare(self, files: Mapping[str, Path]) -> None:
        """Read a file of every size, and have the others compared with it."""
        new = {name: name for name in files if name not in self._states}
        self._states.update(self._asked("state", new) if new else {})
        states = {name: _State.of(self._states[name]) for name in files if name in self._states}
        alike: dict[tuple[str, int], list[str]] = {}
        for name, state in states.items():
            alike.setdefault((files[name].suffix, state.size), []).append(name)
        firsts = [files[names[0]] for names in alike.values()]
        self._known.update(look_quickly(firsts))  # several at once; each is the only one of its size
        like: dict[str, Header] = {}
        for first, names in zip(firsts, alike.values()):
            model = self._known[first]
            if isinstance(model, Header):
                like.update(dict.fromkeys(names[1:], model))
        for name, crc in self._asked("compare", {name: [name, _model(model)] for name, model in like.items()}).items():
            if name in like:
                model, path = like[name], files[name]
                crc = number_of(crc) if model.crc is not None else None
                is_likely = model.format == "ckpt"
                self._known[path] = replace(
                    model, path=path, modified=states[name].modified, crc=crc, is_likely=is_likely
                )

    def _asked(self, kind: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """What the ranks say of names, each of those in its folders: what is `wanted` of them, by name.

        Without what a rank cannot say.
        """
        shares: list[list[Any]] = [[] for _ in range(self._cluster.size)]
        for name, about in wanted.items():
            shares[self._looker[name.partition("/")[0]]].append(about)
        self._cluster.hand_out("look", [{kind: share} for share in shares])
        own = _answer(self._root, {kind: shares[MAIN_RANK]})
        told = self._cluster.collect("looked", here=True)
        answers = [own, *(answer for answer in told or () if isinstance(answer, dict))]
        return {name: found for answer in answers for name, found in answer.items() if found is not None}


class _State(NamedTuple):
    """What a rank says of a file."""

    size: int
    modified: int

    @classmethod
    def of(cls, told: Any) -> _State:
        return cls(*map(number_of, list_of(told, 2)))


def _answer(root: Path, task: Answer) -> dict[str, Any]:
    """What this rank finds at names that it was told, in its own view of the checkpoint."""
    if "compare" in task:
        pairs = [list_of(pair, 2) for pair in list_of(task["compare"])]
        like = {_path(root, name): _from_model(model) for name, model in pairs}
        found = each(lambda path: _crc_if_like(path, like[path]), list(like), patience=_WAIT)
        return dict(zip((name for name, _ in pairs), found))
    look: Callable[[Path], Any] = _listed if "list" in task else _state
    names = list_of(task["list" if "list" in task else "state"])
    return dict(zip(names, each(look, [_path(root, name) for name in names])))


def _path(root: Path, name: Any) -> Path:
    """The file or folder that the main rank named. Raises PlanError where it is not in the checkpoint."""
    path = Path(text_of(name))
    if path.is_absolute() or ".." in path.parts:
        raise PlanError(f"rank {MAIN_RANK} asks for {path}, which is not in {root}")
    return root / path


def _listed(folder: Path) -> list[dict[str, Any]] | None:
    """The entries of a folder, and the states of the last weight files by name, which are likely to be chosen."""
    listing = Listing(folder)
    try:
        entries = dict(listing.entries)
    except PlanError:
        return None
    last = {file.suffix: file for file in listing.weight_files()}
    return [entries, {file.name: state for file in last.values() if (state := _state(file)) is not None}]


def _state(path: Path) -> list[int] | None:
    state = FileState.seen(path)
    return None if state is None else [state.size, state.modified]


def _crc_if_like(path: Path, model: Header) -> int | None:
    """The CRC of a file (0 where it has none) whose header is like that of another one."""
    try:
        header = scan(path, model)
    except FormatError:
        return None
    return (header.crc or 0) if header.tensors is model.tensors else None


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a table must stand where {value!r:.80} does")
    return value


def _entries(found: Mapping[str, Any]) -> dict[str, bool]:
    """The entries of a folder, as another rank told them."""
    if any("/" in name or type(kind) is not bool for name, kind in found.items()):
        raise PlanError("another rank told of a folder what no folder holds")
    return dict(sorted(found.items()))


def _model(header: Header) -> list[Any]:
    """What others compare with a header."""
    heads = [[offset, head.decode("latin-1")] for offset, head in sampled(header, _SAMPLES).frames]
    return [header.format, header.size, header.crc is not None, heads]


def _from_model(told: Any) -> Header:
    """A header without tensors, for comparisons."""
    format, size, has_crc, heads = list_of(told, 4)
    frames = tuple((number_of(offset), bytes_of(head)) for offset, head in map(list_of, heads))
    return Header(Path(), text_of(format), number_of(size), {}, {}, 0 if has_crc else None, frames)
