"""Random folders are read as one little model of docs/sources.md says, or refused; never as a mixture.

The model here is naive on purpose: plain names and sets, nothing of the library. Every element of a tensor tells its
file and its place in the whole tensor.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st
from recorded import Tensor, read_tensors, write_tensors
from small_llama import write_index, write_pytorch

from mindformers_ckpt.convert.weights import read_weights
from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job.direct import read_direct
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_huggingface, find_source
from mindformers_ckpt.sources.source import Kind
from mindformers_ckpt.strategy.model import Strategy

FLOAT = by_name("float32")
REFUSED = None
Contents = Mapping[str, Any]


def whole(tag: int) -> dict[str, Any]:
    """A cut tensor and one that every rank holds."""
    return {
        "w": np.arange(100 * tag, 100 * tag + 8, dtype=np.float32).reshape(4, 2),
        "n": np.arange(100 * tag + 50, 100 * tag + 53, dtype=np.float32),
    }


def write(path: Path, arrays: Contents, state: str) -> None:
    """A file in one of the states in which files are found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if state == "link to nothing":
        path.symlink_to("nothing")
        return
    write_tensors(path, {name: Tensor(FLOAT, array.view(FLOAT.carrier)) for name, array in arrays.items()})
    if state == "cut off":
        os.truncate(path, path.stat().st_size - 3)
    elif state == "empty":
        os.truncate(path, 0)


def same(found: Contents, wanted: Contents) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].tobytes() == np.ascontiguousarray(wanted[name]).tobytes() for name in wanted
    )


@contextmanager
def empty_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "source"


# ------------------------------------------------------------------------------------------------ rank folders


class Saved(NamedTuple):
    """A file of a rank: what its name says, and in which state it is."""

    prefix: str
    run: int
    epoch: int
    step: int
    mark: str
    suffix: str
    state: str = "good"

    def name(self, rank: int) -> str:
        if self.epoch == 0:
            return f"{self.prefix}{self.suffix}"
        run = f"_{self.run}" if self.run else ""
        return f"{self.prefix}_rank_{rank}{run}-{self.epoch}_{self.step}{self.mark}{self.suffix}"

    @property
    def moment(self) -> tuple[int, int, int, str] | None:
        return None if self.epoch == 0 else (self.run, self.epoch, self.step, self.mark)

    @property
    def tag(self) -> int:
        """Different for files that do not belong together; the format of a file may be any."""
        return 1 + sorted(KINDS).index(self._replace(state="good", suffix=".ckpt"))


KINDS = [
    Saved(prefix, run, epoch, step, mark, suffix)
    for prefix in ("l", "m")
    for suffix in (".ckpt", ".safetensors")
    for run, epoch, step, mark in (
        (0, 0, 0, ""),
        (0, 1, 1, ""),
        (0, 1, 2, ""),
        (0, 9, 1, ""),
        (0, 10, 1, ""),
        (1, 1, 2, ""),
        (0, 1, 2, "_breakpoint"),
    )
]
STATES = st.sampled_from(["good"] * 12 + ["cut off", "empty", "link to nothing"])
# What else is in a rank's folder: name, whether it is a folder.
NOISE = st.sampled_from(
    [
        *((".hidden.ckpt", False), ("._z.ckpt", False), ("zz.ckpt.tmp", False), ("zz.CKPT", False)),
        *(("ckpt_strategy_rank_0.ckpt", False), ("zz.ckpt", True), ("meta.json", False)),
    ]
)
# What is in the place of a rank's folder.
PLACES = st.sampled_from(["folder"] * 10 + ["nothing", "file", "link to nothing"])


class Rank(NamedTuple):
    place: str
    files: tuple[Saved, ...]
    noise: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Ranks:
    """A folder with rank folders of `replicas` times two ranks."""

    replicas: int
    ranks: tuple[Rank, ...]
    extra: str | None
    wanted: str | None
    resume: bool

    def write(self, root: Path) -> None:
        root.mkdir()
        for number, rank in enumerate(self.ranks):
            place = root / f"rank_{number}"
            if rank.place == "file":
                place.touch()
            elif rank.place == "link to nothing":
                place.symlink_to("nothing")
            elif rank.place == "folder":
                place.mkdir()
                for file in rank.files:
                    write(place / file.name(number), self.shard(file.tag, number), file.state)
                for name, is_folder in rank.noise:
                    (place / name).mkdir() if is_folder else (place / name).write_bytes(b"noise")
        if self.extra is not None:
            write(root / self.extra, whole(99), "good")

    def shard(self, tag: int, rank: int) -> dict[str, Any]:
        tensors = whole(tag)
        return {**tensors, "w": np.split(tensors["w"], 2)[rank % 2].copy()}

    @property
    def strategy(self) -> Strategy:
        mesh = {"dp": self.replicas, "mp": 2}
        layouts = {"w": Layout.on(mesh, "mp", None), "n": Layout.on(mesh, None)}
        return Strategy.of_stages((layouts,), "two ranks")

    def reading(self) -> int | None:
        """The tag of what is read, None for an error."""
        if self.extra is not None and "/" in self.extra:
            return REFUSED  # rank_00 beside rank_0, Rank_1 with weights
        held = {
            number: sorted(rank.files, key=lambda file, number=number: file.name(number))  # type: ignore[misc]
            for number, rank in enumerate(self.ranks)
            if rank.place == "folder"
        }
        chosen = self._resumed(held) if self.resume and self.wanted is None else self._chosen(held)
        if not chosen or any(file is REFUSED for file in chosen.values()):
            return REFUSED
        newest = self._of_one_moment(held, chosen)
        if newest is REFUSED or any(file.state != "good" for file in newest.values()):
            return REFUSED
        if {rank % 2 for rank in newest} != {0, 1}:
            return REFUSED
        tags = {file.tag for file in newest.values()}
        return tags.pop() if len(tags) == 1 else REFUSED

    def _chosen(self, held: Mapping[int, list[Saved]]) -> dict[int, Any]:
        """The file of every rank that has one; REFUSED where several could be meant."""
        chosen: dict[int, Any] = {}
        for rank, files in held.items():
            if self.wanted is not None:
                at_step = [file for file in files if f"{file.epoch}_{file.step}" == self.wanted]
                candidates = [file for file in at_step if not file.mark] or at_step
                if candidates:
                    chosen[rank] = candidates[0] if len(candidates) == 1 else REFUSED
            elif files:
                chosen[rank] = files[-1] if len({file.suffix for file in files}) == 1 else REFUSED
        return chosen

    def _resumed(self, held: Mapping[int, list[Saved]]) -> dict[int, Any]:
        """The last by name; where these are not of one moment and whole, the last moment that all ranks have."""
        chosen = self._chosen(held)
        if any(file is REFUSED for file in chosen.values()):
            return chosen
        if is_whole(chosen):
            return chosen
        moments = {file.moment for files in held.values() for file in files if file.moment and not file.mark}
        for moment in sorted(moments, reverse=True):
            of_ranks = {
                rank: next((file for file in reversed(files) if file.moment == moment), None)
                for rank, files in held.items()
                if files
            }
            if None not in of_ranks.values() and is_whole(of_ranks):
                return of_ranks
        return chosen

    def _of_one_moment(self, held: Mapping[int, list[Saved]], chosen: Mapping[int, Saved]) -> dict[int, Saved] | None:
        """The chosen files without those of earlier moments; REFUSED where they do not belong together."""
        moments = {file.moment for file in chosen.values()}
        prefixes = {(file.prefix, file.moment is None) for file in chosen.values()}
        if len(prefixes) > 1:
            return REFUSED
        if len(moments) == 1:
            return dict(chosen)
        newest = max(moment for moment in moments if moment is not None)
        older = [rank for rank, file in chosen.items() if file.moment != newest]
        if newest[3] or any(file.moment == newest for rank in older for file in held[rank]):
            return REFUSED
        return {rank: file for rank, file in chosen.items() if file.moment == newest}


def is_whole(files: Mapping[int, Any]) -> bool:
    return len({file.moment for file in files.values()}) <= 1 and all(file.state == "good" for file in files.values())


@st.composite
def rank_folders(draw: st.DrawFn) -> Ranks:
    """Most ranks hold the same files; some one more or less, or a damaged one."""
    replicas = draw(st.sampled_from([1, 1, 2]))
    common = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True))
    if draw(st.integers(0, 5)):  # formats that differ are refused, and nothing else would be seen
        common = list(dict.fromkeys(file._replace(suffix=".ckpt") for file in common))
    ranks = []
    for _ in range(2 * replicas):
        files = set(common)
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
            files ^= {draw(st.sampled_from(KINDS if not draw(st.integers(0, 3)) else common))}
        states = [file._replace(state=draw(STATES)) for file in sorted(files)]
        noise = draw(st.lists(NOISE, max_size=2, unique=True))
        ranks.append(Rank(draw(PLACES), tuple(states), tuple(noise)))
    extra = draw(st.sampled_from([None] * 8 + ["full.ckpt", "rank_00/a.ckpt", "Rank_1/a.ckpt"]))
    if extra == "rank_00/a.ckpt" and ranks[0].place != "folder":
        extra = None
    wanted = draw(st.sampled_from([None, None, None, "1_1", "1_2", "7_7"]))
    return Ranks(replicas, tuple(ranks), extra, wanted, draw(st.booleans()))


@given(folder=rank_folders())
def test_rank_folders_give_one_reading_or_an_error(folder: Ranks) -> None:
    with empty_folder() as root:
        folder.write(root)
        reading = folder.reading()
        try:
            source = find_source(root, folder.wanted, resume=folder.resume)
            plan = build_plan(Checkpoint(source, folder.strategy), Strategy.complete())
            found = {spec.name: content for spec, content in read_direct(plan, lambda: None)}
        except CheckpointError as error:
            event("refused")
            assert reading is REFUSED, error
            return
        event("read")
        assert reading is not REFUSED
        assert same(found, whole(reading))


# ------------------------------------------------------------------------------- complete weights, Hugging Face


STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
NAMES = ("p", "q", "r")
FILES = (
    *("model.safetensors", "pytorch_model.bin", "a.safetensors", "b.safetensors", "a.ckpt", "b.ckpt", "w.bin"),
    *("x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors", "x-00001-of-00002.ckpt"),
    *("y-00001-of-00002.bin", "y-00002-of-00002.bin", ".h.safetensors", "._model.safetensors", "c.ckpt.part"),
    *("adapter_model.safetensors", "optimizer.bin", "my_ckpt_strategy.ckpt", "z.SAFETENSORS"),
)
NO_WEIGHTS = ("adapter_model", "optimizer")


class Held(NamedTuple):
    """A file: the tensors in it, whether MindSpore wrote it, its state."""

    names: tuple[str, ...]
    by_mindspore: bool
    state: str


@dataclass(frozen=True)
class Folder:
    """A folder without rank folders."""

    files: Mapping[str, Held]
    indexes: Mapping[str, Mapping[str, str]]  # name -> tensor -> file
    config: str | None

    def tensor(self, file: str, name: str) -> Any:
        first = 100 * sorted(self.files).index(file) + 10 * NAMES.index(name)
        return np.arange(first, first + 4, dtype=np.float32)

    def write(self, root: Path) -> None:
        root.mkdir()
        if self.config is not None:
            (root / "config.json").write_text(self.config)
        for file, held in self.files.items():
            arrays = {name: self.tensor(file, name) for name in held.names}
            path = root / file
            if held.state == "link to nothing":
                path.symlink_to("nothing")
                continue
            if path.suffix == ".bin" or not held.by_mindspore:
                write_pytorch(path, arrays)
            elif path.suffix in (".ckpt", ".safetensors"):
                write(path, arrays, "good")
            else:
                path.write_bytes(b"noise")
            if held.state != "good":
                os.truncate(path, 0 if held.state == "empty" else path.stat().st_size - 3)
        for name, places in self.indexes.items():
            by_file: dict[str, list[str]] = {}
            for tensor, file in places.items():
                by_file.setdefault(file, []).append(tensor)
            write_index(root / name, by_file)

    # The model: what a user reads in the table.

    def weights(self, *suffixes: str) -> list[str]:
        visible = [name for name in self.files if not name.startswith(".") and "ckpt_strategy" not in name]
        return sorted(name for name in visible if os.path.splitext(name)[1] in suffixes)

    def standard(self) -> list[str]:
        return [name for name in STANDARD if name in self.files or name in self.indexes]

    def is_of_mindspore(self, file: str) -> bool:
        held = self.files[file]
        return file.endswith(".safetensors") and held.by_mindspore and held.state in ("good",)

    def is_model(self) -> bool | None:
        """REFUSED where it cannot be told."""
        if self.config is None:
            return False
        files = self.weights(".safetensors", ".bin")
        there = self.standard()
        if there and there[0] != "model.safetensors.index.json":
            files = [there[0]] if there[0] in self.files else []
        if not (files or there) or any(map(self.is_of_mindspore, files)):
            return False
        try:
            return "model_type" in json.loads(self.config)
        except ValueError:
            return REFUSED

    def reading(self) -> dict[str, str] | None:
        """Tensor -> file, None for an error."""
        model = self.is_model()
        if model is REFUSED:
            return REFUSED
        if model:
            return self.as_hugging_face()
        files = self.weights(".ckpt", ".safetensors")
        index = self.indexes.get("model.safetensors.index.json")
        if not files and index is None:
            return self.as_hugging_face() if self.weights(".bin") else REFUSED
        if index is None:
            return self.all_of(files) if all(map(self.is_whole_set, files)) else REFUSED
        if "model.safetensors" in files and set(index.values()) != {"model.safetensors"}:
            return self.all_of(["model.safetensors"])
        return self.assigned(index)

    def as_hugging_face(self) -> dict[str, str] | None:
        there = self.standard()
        if there:
            name = there[0]
            return self.assigned(self.indexes[name]) if name in self.indexes else self.all_of([name])
        for suffix in (".safetensors", ".bin"):
            files = [file for file in self.weights(suffix) if not file.startswith(NO_WEIGHTS)]
            if files:
                sets = {re.sub(r"-\d+-of-", "", file) if "-of-" in file else None for file in files}
                one = len(sets) == 1 and all(map(self.is_whole_set, files))
                return self.all_of(files) if one else REFUSED
        return REFUSED

    def is_whole_set(self, file: str) -> bool:
        match = re.fullmatch(r"(.)-0000.-of-00002(\.\w+)", file)
        return match is None or all(f"{match[1]}-0000{n}-of-00002{match[2]}" in self.files for n in (1, 2))

    def all_of(self, files: list[str]) -> dict[str, str] | None:
        found: dict[str, str] = {}
        for file in files:
            held = self.files[file]
            if held.state != "good" or found.keys() & set(held.names):
                return REFUSED
            found.update(dict.fromkeys(held.names, file))
        return found

    def assigned(self, index: Mapping[str, str]) -> dict[str, str] | None:
        files = [self.files.get(file) for file in index.values()]
        if any(held is None or held.state != "good" for held in files):
            return REFUSED
        return dict(index) if all(name in self.files[file].names for name, file in index.items()) else REFUSED


@st.composite
def folders(draw: st.DrawFn) -> Folder:
    files = {}
    for name in draw(st.lists(st.sampled_from(FILES), max_size=4, unique=True)):
        drawn = draw(st.sets(st.sampled_from(NAMES), min_size=1))
        files[name] = Held(tuple(sorted(drawn)), draw(st.booleans()) or name.endswith(".ckpt"), draw(STATES))
    if draw(st.booleans()):  # of which each tensor is in one file only, as in folders that are whole
        left = list(NAMES)
        for name, held in files.items():
            own = tuple(name for name in held.names if name in left)
            left = [name for name in left if name not in own]
            files[name] = held._replace(names=own)
    files = {name: held for name, held in files.items() if held.names}
    indexes = {}
    for index, suffix in (("model.safetensors.index.json", ".safetensors"), ("pytorch_model.bin.index.json", ".bin")):
        if draw(st.integers(0, 2)) == 0:
            choices = [(name, file) for file, held in files.items() if file.endswith(suffix) for name in held.names]
            places = dict(draw(st.lists(st.sampled_from(choices), min_size=1))) if choices else {}
            if not draw(st.integers(0, 5)):
                places["p"] = draw(st.sampled_from([f"a{suffix}", f"gone{suffix}"]))
            if places:
                indexes[index] = places
    config = draw(st.sampled_from([None, '{"model_type": "llama"}', '{"model_type": "llama"}', "{}", '{"model']))
    return Folder(files, indexes, config)


@given(folder=folders())
def test_folders_of_files_give_one_reading_or_an_error(folder: Folder) -> None:
    with empty_folder() as root:
        folder.write(root)
        reading = folder.reading()
        try:
            source = find_source(root)
            found = {name: (tensor.path, name) for name, tensor in read_weights(source).tensors.items()}
        except CheckpointError as error:
            event("refused")
            assert reading is REFUSED, error
            return
        event("read")
        assert reading is not REFUSED
        contents = {name: folder.tensor(file, name) for name, file in reading.items()}
        assert {name: path.name for name, (path, _) in found.items()} == reading
        if source.kind is Kind.HUGGING_FACE:
            asked = find_huggingface(root)
            assert (asked.by_rank, asked.owners) == (source.by_rank, source.owners)
        elif source.owners is not None or not any(root.glob("*.bin")):
            plan = build_plan(Checkpoint(source, Strategy.complete()), Strategy.complete())
            assert same({spec.name: content for spec, content in read_direct(plan, lambda: None)}, contents)
        for name, (path, _) in found.items():
            if path.suffix != ".bin":
                assert read_tensors(path)[name].bits.tobytes() == contents[name].tobytes()
