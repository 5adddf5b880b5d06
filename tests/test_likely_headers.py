"""Most of many files are looked at quickly; whoever reads the contents finds out where that was wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import Tensor, random_model, read_tensors, write_tensors

from mindformers_ckpt.engine.fetcher import Fetcher
from mindformers_ckpt.errors import FormatError, TransferError
from mindformers_ckpt.execution.run import Run
from mindformers_ckpt.formats import ckpt, read_header
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.formats.headers import look_quickly, sound_headers, wrong_headers
from mindformers_ckpt.formats.tensor_file import scan
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job.direct import read_direct
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.rank_plan import decode_rank, encode_ranks
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.sources.plausibility import check_contents
from mindformers_ckpt.strategy.model import Strategy

RANKS = 6
NAMES = [f"layers.{number:02}.w" for number in range(60)]
HIDDEN = 5  # the place of a head that is not among the samples, nor the one after it
ROWS = Layout.on({"mp": RANKS}, "mp", None)
MP = Strategy.of_stages((dict.fromkeys(NAMES, ROWS),), "mp")


def exchanged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two neighbours in the order of the other one, between two samples."""
    items = list(tensors.items())
    items[HIDDEN], items[HIDDEN + 1] = items[HIDDEN + 1], items[HIDDEN]
    return dict(items)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name if name != NAMES[HIDDEN] else "layers.xx.w": tensor for name, tensor in tensors.items()}


@pytest.fixture
def model() -> dict[str, Tensor]:
    return random_model(dict.fromkeys(NAMES, (2 * RANKS, 16)))


def write(folder: Path, model: Mapping[str, Tensor], rank: int, suffix: str = ".ckpt") -> dict[str, Tensor]:
    part = {name: tensor.part(ROWS.box((2 * RANKS, 16), rank)) for name, tensor in model.items()}
    write_tensors(folder / f"rank_{rank}" / f"checkpoint_{rank}{suffix}", part)
    return part


@pytest.fixture
def source(tmp_path: Path, model: dict[str, Tensor]) -> Path:
    for rank in range(RANKS):
        write(tmp_path / "source", model, rank)
    return tmp_path / "source"


def quick(source: Path) -> Checkpoint:
    checkpoint = Checkpoint(find_source(source), MP)
    checkpoint.look_quickly()
    return checkpoint


def loaded(checkpoint: Checkpoint, source: Path) -> dict[str, bytes]:
    """All weights, as the one rank of a job gets them that is told its plan."""
    plan = build_plan(checkpoint, Strategy.complete())
    own = decode_rank(next(encode_ranks(plan, source, checkpoint.header)), source)
    return {spec.name: content.tobytes() for spec, content in read_direct(own.plan, lambda: None, own.headers)}


def test_one_file_of_a_size_is_read_whole(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: Counter[str] = Counter()
    real = ckpt._Scanner._parsed

    def count(self: Any, at: int) -> Any:
        parsed[self._path.name] += 1
        return real(self, at)

    monkeypatch.setattr(ckpt._Scanner, "_parsed", count)
    files = find_source(source).files
    headers = dict(look_quickly(files))
    assert list(parsed) == ["checkpoint_0.ckpt"]
    assert list(headers) == list(files)
    for path, header in headers.items():
        assert not isinstance(header, FormatError)
        assert header == scan(path)
        assert header.modified == path.stat().st_mtime_ns
        assert header.is_likely == (path.name != "checkpoint_0.ckpt")


def test_one_file_of_a_stage_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages have other tensors, and their files often the same size."""
    first = random_model({f"layers.0.{number:02}.w": (4, 4) for number in range(20)})
    for number in range(12):
        stage = {name.replace("layers.0", f"layers.{number // 4}"): tensor for name, tensor in first.items()}
        write_tensors(tmp_path / f"{number:02}.ckpt", stage)
    files = sorted(tmp_path.rglob("*.ckpt"))
    parsed: Counter[Path] = Counter()
    real = ckpt._Scanner.tensors
    monkeypatch.setattr(ckpt._Scanner, "tensors", lambda self: (parsed.update([self._path]), real(self))[1])
    headers = dict(look_quickly(files))
    assert parsed == {files[0]: 1, files[4]: 1, files[8]: 1}
    monkeypatch.undo()
    assert headers == {path: scan(path) for path in files}


def test_few_heads_are_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far fewer than there are, once a file of the size is known."""
    files = find_source(source).files
    read_header(files[0])
    read: list[int] = []
    real = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        read.append(offset)
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)  # all is read by it then
    sound_headers(files, likely=True)
    assert len(read) <= 4 * (RANKS - 1) + 1  # the first one is small enough to be read at once


def test_what_is_likely_is_right(source: Path, model: dict[str, Tensor]) -> None:
    assert loaded(quick(source), source) == {name: tensor.bits.tobytes() for name, tensor in model.items()}


def test_heads_are_told_of_tensors_that_are_cut_in_turn_in_two_ways(tmp_path: Path) -> None:
    """A plan is told by ways to cut, which is not the order of a file."""
    shape, source = (2 * RANKS, 2 * RANKS), tmp_path / "source"
    model = random_model(dict.fromkeys(NAMES, shape))
    columns = Layout.on({"mp": RANKS}, None, "mp")
    layouts = {name: (ROWS, columns)[number % 2] for number, name in enumerate(NAMES)}
    for rank in range(RANKS):
        part = {name: tensor.part(layouts[name].box(shape, rank)) for name, tensor in model.items()}
        write_tensors(source / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", part)
    checkpoint = Checkpoint(find_source(source), Strategy.of_stages((layouts,), "in turn"))
    checkpoint.look_quickly()
    assert [checkpoint.header(path).is_likely for path in checkpoint.files.files] == [False] + [True] * (RANKS - 1)
    plan = build_plan(checkpoint, Strategy.complete())
    own = decode_rank(next(encode_ranks(plan, source, checkpoint.header)), source)
    for header in own.headers.values():
        assert list(header.frames) == sorted(header.frames)
    assert wrong_headers(own.headers) == {}
    assert loaded(checkpoint, source) == {name: tensor.bits.tobytes() for name, tensor in model.items()}


def test_tensors_in_another_order_are_found(source: Path, model: dict[str, Tensor]) -> None:
    """In a file that looks like the others at all samples."""
    path = source / "rank_3" / "checkpoint_3.ckpt"
    write(source, exchanged(model), 3)
    assert list(read_tensors(path)) != NAMES
    checkpoint = quick(source)
    assert checkpoint.header(path).is_likely
    (true,) = wrong_headers({3: checkpoint.header(path)}).values()
    assert list(true.tensors) == list(read_tensors(path))
    assert loaded(checkpoint, source) == {name: tensor.bits.tobytes() for name, tensor in model.items()}


@pytest.mark.parametrize("processes", [1, 2])
def test_copying_looks_at_all_heads(source: Path, model: dict[str, Tensor], tmp_path: Path, processes: int) -> None:
    write(source, exchanged(model), 3)
    plan = build_plan(quick(source), Strategy.complete())
    with Run(plan, tmp_path / "out") as run:
        run.prepare()
        run.copy(processes=processes)
        run.publish()
    found = read_tensors(tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt")
    for name, tensor in model.items():
        assert np.array_equal(found[name].bits, tensor.bits)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_copied_of_a_file_that_only_seemed_to_be_like_the_others(
    source: Path, model: dict[str, Tensor], tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all is read ahead, with its heads, and only a part of each tensor is wanted."""
    monkeypatch.setattr(Fetcher, "has_to_wait", lambda self, extents: True)
    write(source, exchanged(model), 3)
    checkpoint = quick(source)
    plan = build_plan(checkpoint, Strategy.of_stages((dict.fromkeys(NAMES, Layout.on({"mp": 4}, "mp", None)),), "mp4"))
    assert [file.header is not None for file in plan.sources] == [False, True, True, True, True, True]
    with Run(plan, tmp_path / "out") as run:
        run.prepare()
        run.copy(processes=processes)
        run.publish()
    for rank in range(4):
        found = read_tensors(tmp_path / "out" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        for name, tensor in model.items():
            part = tensor.part(Layout.on({"mp": 4}, "mp", None).box((2 * RANKS, 16), rank))
            assert np.array_equal(found[name].bits, part.bits)


def test_heads_that_differ_do_not_make_contents_contradict_the_strategy(tmp_path: Path) -> None:
    """Replicas whose samples lie elsewhere in files: all heads are compared before it is said that they differ."""
    values = np.random.default_rng(0).standard_normal((len(NAMES), 32, 32)).astype(np.float32)
    model = {name: Tensor(by_name("float32"), values[number].view(np.uint32)) for number, name in enumerate(NAMES)}
    for rank in range(RANKS):
        write_tensors(tmp_path / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", exchanged(model) if rank else dict(model))
    whole = Strategy.of_stages((dict.fromkeys(NAMES, Layout.on({"dp": RANKS}, None, None)),), "dp")
    checkpoint = Checkpoint(find_source(tmp_path), whole)
    checkpoint.look_quickly()
    assert checkpoint.header(checkpoint.files.files[3]).is_likely
    assert check_contents(checkpoint, checkpoint.tensors()) == []
    assert not any(checkpoint.header(path).is_likely for path in checkpoint.files.files)


def test_a_tensor_that_only_seemed_to_be_there(source: Path, model: dict[str, Tensor]) -> None:
    write(source, renamed(model), 3)
    with pytest.raises(TransferError, match=rf"checkpoint_3\.ckpt: {NAMES[HIDDEN]} is not there"):
        loaded(quick(source), source)


def test_a_damaged_head(source: Path) -> None:
    path = source / "rank_3" / "checkpoint_3.ckpt"
    frame, _ = read_header(path).frames[HIDDEN]
    data = bytearray(path.read_bytes())
    data[frame + 1] ^= 0x01
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(FormatError, match=r"checkpoint_3\.ckpt"):
        loaded(quick(source), source)


@pytest.mark.parametrize("rank", [0, 3, 5])
def test_cut_off_files_are_reported_as_ever(source: Path, rank: int) -> None:
    for damaged in {rank, 5}:
        os.truncate(source / f"rank_{damaged}" / f"checkpoint_{damaged}.ckpt", 500)
    with pytest.raises(FormatError) as slow:
        sound_headers(find_source(source).files)
    with pytest.raises(FormatError) as fast:
        sound_headers(find_source(source).files, likely=True)
    assert str(fast.value) == str(slow.value)


def test_other_formats_are_compared_whole(tmp_path: Path, model: dict[str, Tensor]) -> None:
    for rank in range(RANKS):
        write(tmp_path, exchanged(model) if rank == 3 else model, rank, ".safetensors")
    files = find_source(tmp_path).files
    headers = sound_headers(files, likely=True)
    assert headers == sound_headers(files)
    assert not any(header.is_likely for header in headers.values())
    assert loaded(quick(tmp_path), tmp_path) == {name: tensor.bits.tobytes() for name, tensor in model.items()}
