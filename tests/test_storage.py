"""What is asked of the storage: requests, opened files, and pages that stay in memory. Counts, never times."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import assert_ranks, random_model, write_ranks
from slow_mount import mounted, why_not
from test_execute import MP2, MP4, parts, plan_from

from mindformers_ckpt.disk.waiting import is_memory, read_at_once
from mindformers_ckpt.engine import descriptors, fetcher, into_memory, tasks
from mindformers_ckpt.engine.ahead import Ahead, merged
from mindformers_ckpt.engine.fetcher import Extent, Fetcher
from mindformers_ckpt.engine.sinks import FileSink
from mindformers_ckpt.errors import FormatError, TransferError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.formats import ckpt_layout, guesses, layout_file
from mindformers_ckpt.formats.ckpt import scan
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.formats.tensor_file import TensorSpec
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job.cluster.rendezvous import RankError
from mindformers_ckpt.job.direct import read_direct
from mindformers_ckpt.objects.reading import Handle
from mindformers_ckpt.planning.model import Plan, TargetFile
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

A, B = Path("a"), Path("b")
KB, MB = 1 << 10, 1 << 20
needs_fuse = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([], []),
        ([(A, 5, 10)], [(A, 0, 4096)]),
        ([(A, 5, 4097)], [(A, 0, 8192)]),
        ([(B, 0, 10), (A, 8192, 8200), (A, 0, 4096)], [(A, 0, 4096), (A, 8192, 12288), (B, 0, 4096)]),
        ([(A, 0, 5000), (A, 5000, 9000)], [(A, 0, 12288)]),  # no page is read twice
        ([(A, 0, MB), (A, MB + 64 * KB, 2 * MB)], [(A, 0, 2 * MB)]),  # near, and little beside what is needed
        ([(A, 0, MB), (A, MB + 68 * KB, 2 * MB)], [(A, 0, MB), (A, MB + 68 * KB, 2 * MB)]),  # too far
        ([(A, 0, 16 * KB), (A, 48 * KB, 64 * KB)], [(A, 0, 16 * KB), (A, 48 * KB, 64 * KB)]),  # too much between
    ],
)
def test_what_is_read_together(extents: list[tuple[Path, int, int]], expected: list[tuple[Path, int, int]]) -> None:
    assert merged(Extent(*extent) for extent in extents) == [Extent(*extent) for extent in expected]


def test_ranges_hold_all_that_is_needed() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        starts = generator.integers(0, 4 * MB, 40)
        lengths = generator.integers(1, 200 * KB, 40)
        extents = [Extent(A, int(start), int(start + length)) for start, length in zip(starts, lengths)]
        ranges = merged(extents)
        assert all(any(held.start <= each.start and each.stop <= held.stop for held in ranges) for each in extents)
        assert all(held.start % 4096 == held.stop % 4096 == 0 for held in ranges)
        assert all(first.stop < second.start for first, second in zip(ranges, ranges[1:]))


class Reads:
    """Requests of the threads that read ahead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.bytes = self.most_held = 0
        self._real = fetcher._filled
        self._lock = threading.Lock()
        monkeypatch.setattr(fetcher, "_filled", self.filled)
        self._held: Counter[int] = Counter()
        self._start = Ahead._start
        monkeypatch.setattr(Ahead, "_start", lambda *arguments: self.start(*arguments))

    def start(self, held: Ahead[Any], batch: Any, extents: Sequence[Extent]) -> None:
        self._start(held, batch, extents)
        with self._lock:
            self._held[id(held)] = held._held
            self.most_held = max(self.most_held, sum(self._held.values()))

    def filled(self, descriptor: int, start: int, memory: memoryview) -> int:
        with self._lock:
            self.count += 1
            self.bytes += len(memory)
        return self._real(descriptor, start, memory)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Reading has to wait, as far as the reader knows."""
    monkeypatch.setattr(Fetcher, "has_to_wait", lambda *_: True)
    return Reads(monkeypatch)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often files are opened to be read past the page cache, by folder."""
    found: Counter[str] = Counter()
    real = os.open

    def counted(path: str | Path, flags: int, *rest: int, **more: int) -> int:
        found[Path(path).parent.name] += flags & (os.O_WRONLY | os.O_DIRECT) == os.O_DIRECT
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", counted)
    return found


@pytest.mark.parametrize("smallest_task", [1 << 20, 8 << 20])
def test_a_request_a_megabyte_and_few_opens(
    smallest_task: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: Reads, opened: Counter[str]
) -> None:
    """Of tensors that are cut by rows and by columns, in one process of two threads; nothing is read twice."""
    monkeypatch.setattr(tasks, "_SMALLEST_TASK", smallest_task)
    model = random_model({"w": (4096, 1024), "v": (4096, 1024)})
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4, model)), MP4, MP2)
    opened.clear()
    transform(plan, tmp_path / "result")
    (tmp_path / "result" / "manifest.json").unlink()
    assert_ranks(tmp_path / "result", parts(MP2, model))
    size = sum(file.size for file in plan.sources)
    assert size <= slow.bytes <= size * 1.1
    assert slow.count <= 2 * size / MB
    assert slow.most_held <= fetcher.AHEAD_BYTES + 2 * 9 * MB
    names = {file.path.parent.name for file in plan.sources}
    assert {name for name in opened if name in names} == names
    assert max(opened[name] for name in names) == 1


@pytest.mark.parametrize(("rows", "reads_a_source"), [(256, 1), (16384, 2)])
def test_short_runs_that_follow_each_other_are_read_at_once(
    rows: int, reads_a_source: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two targets take of each source: one read for both, where they are no more than a piece together."""
    lengths: list[int] = []
    real = descriptors.fill

    def fill(descriptor: Handle, path: Path, start: int, memory: memoryview) -> None:
        lengths.append(len(memory))
        real(descriptor, path, start, memory)

    monkeypatch.setattr(Fetcher, "has_to_wait", lambda *_: False)
    monkeypatch.setattr(fetcher, "fill", fill)
    source, target = (Strategy.of_stages(({"w": Layout((count,), ((0,), ()))},), str(count)) for count in (2, 4))
    model = random_model({"w": (rows, 64)})
    transform(plan_from(write_ranks(tmp_path / "source", parts(source, model)), source, target), tmp_path / "result")
    (tmp_path / "result" / "manifest.json").unlink()
    assert_ranks(tmp_path / "result", parts(target, model))
    assert lengths == [model["w"].bits.nbytes // 2 // reads_a_source] * 2 * reads_a_source


@pytest.mark.parametrize("what", ["nothing", "less"])
def test_what_could_not_be_read_ahead_is_read_in_the_ordinary_way(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fetcher, "has_to_wait", lambda *_: True)
    real = Fetcher._read
    few = {"nothing": lambda *_: 0, "less": lambda self, path, start, to: real(self, path, start, to[: len(to) // 2])}
    monkeypatch.setattr(Fetcher, "_read", few[what])
    model = random_model({"w": (512, 1024), "v": (512, 1024)})
    transform(plan_from(write_ranks(tmp_path / "source", parts(MP4, model)), MP4, MP2), tmp_path / "result")
    (tmp_path / "result" / "manifest.json").unlink()
    assert_ranks(tmp_path / "result", parts(MP2, model))


def test_an_error_of_the_disk_names_file_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: Reads
) -> None:
    model = random_model({"w": (512, 1024), "v": (512, 1024)})
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4, model)), MP4, MP2)
    real = os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        if offset + len(buffers[0]) > 100 * KB:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    before = set(threading.enumerate())
    with pytest.raises(TransferError, match=r"checkpoint_\d\.ckpt: reading at byte \d+ failed: Input/output error"):
        transform(plan, tmp_path / "result")
    assert set(threading.enumerate()) <= before
    assert slow.count > 0


# Into memory.

NAMES = [f"{name}{number}" for number in range(9) for name in "wv"]
MP4_OF_MANY = Strategy.of_stages(
    ({name: Layout((4,), ((0,), ()) if name[0] == "w" else ((), (0,))) for name in NAMES},), "mp4"
)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request has to wait, as far as the reader knows."""
    busy(monkeypatch)
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)  # so that nothing is known of the page cache


def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request takes long, and waits for whatever it may be."""
    monkeypatch.setattr(into_memory, "waits", itertools.count().__next__)
    monkeypatch.setattr(into_memory, "_QUICK_SECONDS", 0.0)


def loaded(plan: Plan, **more: Any) -> dict[str, bytes]:
    """The tensors of a plan of one target, read without files."""
    return {spec.name: content.tobytes() for spec, content in read_direct(plan, lambda: None, **more)}


def before_reads(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path, int], None]) -> None:
    """Have something happen before a request is read, through the page cache or past it."""

    def acting(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(fetcher: Fetcher, path: Path, start: int, *more: Any) -> Any:
            act(path, start)
            return real(fetcher, path, start, *more)

        return read

    for name in ("scatter", "fill"):
        monkeypatch.setattr(Fetcher, name, acting(getattr(Fetcher, name)))


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("is_shared", [True, False])
def test_small_tensors_are_loaded_a_megabyte_at_a_time(
    is_shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Counter[str]
) -> None:
    """Of tensors that are cut by rows and by columns; nothing is read twice but pages at which a request ends."""
    asked: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        asked.append(sum(map(len, buffers)))
        return real(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    model = random_model(dict.fromkeys(NAMES, (300, 1024)))
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4_OF_MANY, model)), MP4_OF_MANY, Strategy.complete())
    opened.clear()
    assert loaded(plan, is_shared=is_shared) == {name: tensor.bits.tobytes() for name, tensor in model.items()}
    size = sum(file.size for file in plan.sources)
    assert len(asked) <= 1.4 * size / MB + len(plan.sources)
    assert size - 4096 * len(plan.sources) <= sum(asked) <= size + 4096 * (len(asked) + len(plan.sources))
    assert max(opened.values()) == (0 if is_shared else 1)


@pytest.mark.parametrize("is_shared", [True, False])
def test_what_is_in_the_page_cache_is_read_by_one_thread(
    is_shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the machine is so busy that it takes long, and past the page cache where ranks do not share files."""
    model = random_model(dict.fromkeys(NAMES, (300, 1024)))
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4_OF_MANY, model)), MP4_OF_MANY, Strategy.complete())
    if not in_page_cache(plan.sources[0].path):
        pytest.skip("this file system does not say what is in the page cache")
    busy(monkeypatch)
    started: list[str] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name))
    assert loaded(plan, is_shared=is_shared) == {name: tensor.bits.tobytes() for name, tensor in model.items()}
    assert started == []


def in_page_cache(path: Path) -> bool:
    with open(path, "rb") as stream:
        try:
            return os.preadv(stream.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except OSError:
            return False


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("cut", [1 << 10, 5_001, 70_003])
def test_tensors_of_several_records_are_loaded(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record may end within a row, and within an element."""
    monkeypatch.setattr(ckpt_layout, "RECORD_LIMIT", cut)
    model = random_model(dict.fromkeys(NAMES, (60, 96)))
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4_OF_MANY, model)), MP4_OF_MANY, Strategy.complete())
    assert loaded(plan) == {name: tensor.bits.tobytes() for name, tensor in model.items()}


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("is_shared", [True, False])
def test_a_failure_of_any_reader_ends_loading(is_shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(dict.fromkeys(NAMES, (300, 1024)))
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4_OF_MANY, model)), MP4_OF_MANY, Strategy.complete())
    before = set(threading.enumerate())

    def shorten(path: Path, start: int) -> None:
        if path == plan.sources[-1].path and start > MB:
            os.truncate(path, start)

    before_reads(monkeypatch, shorten)
    with pytest.raises(TransferError, match=r"checkpoint_3\.ckpt ends at byte \d+: it was shortened"):
        loaded(plan, is_shared=is_shared)
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("waits")
def test_loading_goes_on_where_no_threads_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    model = random_model(dict.fromkeys(NAMES, (300, 1024)))
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4_OF_MANY, model)), MP4_OF_MANY, Strategy.complete())
    assert loaded(plan, is_shared=False) == {name: tensor.bits.tobytes() for name, tensor in model.items()}


@pytest.mark.usefixtures("waits")
def test_a_job_that_ends_ends_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(dict.fromkeys(NAMES, (300, 1024)))
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4_OF_MANY, model)), MP4_OF_MANY, Strategy.complete())
    monkeypatch.setattr(into_memory, "_SECONDS_BETWEEN_CHECKS", 0)
    before, checks, is_over = set(threading.enumerate()), itertools.count(), threading.Event()

    def wait(path: Path, start: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            is_over.wait(60)

    before_reads(monkeypatch, wait)

    def check() -> None:
        if next(checks) == 2:
            is_over.set()
            raise RankError("rank 1 died", 1, "load")

    with pytest.raises(RankError, match="rank 1 died"):
        next(read_direct(plan, check))
    assert set(threading.enumerate()) <= before


# Heads of records.


def write_heads(path: Path, specs: Sequence[TensorSpec]) -> Path:
    """A sparse file: the heads of its records, and nothing between them."""
    layout = layout_file("ckpt", specs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        os.ftruncate(stream.fileno(), layout.size)
        for offset, data in layout.frames:
            os.pwrite(stream.fileno(), data, offset)
    return path


def like_a_llama(layers: int) -> list[TensorSpec]:
    weights: dict[str, tuple[int, ...]] = {"model.tok_embeddings.embedding_weight": (32000, 1024)}
    for layer in range(layers):
        for name, shape in {"attention.wq": (1024, 1024), "attention.wo": (1024, 512), "w1": (2816, 1024)}.items():
            weights[f"model.layers.{layer}.{name}.weight"] = shape
        weights[f"model.layers.{layer}.ffn_norm.weight"] = (4096,)
    weights["lm_head.weight"] = (32000, 1024)
    kinds = {"": "bfloat16", "adam_m.": "float32", "adam_v.": "float32"}
    return [
        TensorSpec(f"{prefix}{name}", by_name(kind), shape)
        for prefix, kind in kinds.items()
        for name, shape in weights.items()
    ]


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where heads are read that had not been guessed; every read counts as one that had to wait."""
    places: list[int] = []
    real = guesses.Pieces.read

    def read(self: guesses.Pieces, start: int, length: int) -> bytes:
        places.append(start)
        return real(self, start, length)

    monkeypatch.setattr(guesses.Pieces, "read", read)
    monkeypatch.setattr(guesses.Pieces, "_held", lambda *_: None)
    monkeypatch.setattr(guesses, "_QUICK_SECONDS", -1)
    monkeypatch.setattr(guesses, "waits", itertools.count().__next__)
    monkeypatch.setattr(guesses, "_slow_devices", set())
    return places


def test_the_heads_of_layers_and_moments_are_guessed(tmp_path: Path, waited: list[int]) -> None:
    specs = like_a_llama(60)
    header = scan(write_heads(tmp_path / "a.ckpt", specs))
    assert [record.spec for record in header.tensors.values()] == specs
    assert len(specs) > 700
    assert len(waited) <= 25


def test_few_guesses_are_wrong(tmp_path: Path, waited: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the moments it is known which one is the last; of the layers it is not."""
    asked: list[int] = []
    monkeypatch.setattr(guesses._FromDisk, "ask", lambda _, start, length: asked.append(start))
    header = scan(write_heads(tmp_path / "a.ckpt", like_a_llama(60)))
    starts = [start for start, _ in header.frames]
    wrong = [at for at in asked if not any(at <= start < at + guesses._WINDOW for start in starts)]
    assert len(asked) > 500
    assert len(wrong) <= guesses._GUESSES + 60  # of layers behind the last one, and of what was tried in the first


def test_in_the_first_layer_records_are_tried_as_long_as_others(tmp_path: Path, waited: list[int]) -> None:
    """Nothing is known of names; but four of seven matrices are as long as the one before, or as one before that."""
    scan(write_heads(tmp_path / "a.ckpt", like_a_llama(60)[:9]))
    assert len(waited) <= 7


def test_trying_ends_where_it_is_of_no_use(tmp_path: Path, waited: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of tensors without a pattern."""
    asked: list[int] = []
    monkeypatch.setattr(guesses._FromDisk, "ask", lambda _, start, length: asked.append(start))
    names = [f"{first}{second}" for first in "abcdefghijklmnop" for second in "abcdefghijklmnop"]
    specs = [TensorSpec(f"{name}.w", by_name("float32"), (9000 + 1100 * at,)) for at, name in enumerate(names)]
    scan(write_heads(tmp_path / "a.ckpt", specs))
    assert len(waited) > 0.9 * len(names)
    assert len(asked) <= 2 * guesses._TRIES  # those that happened to be right allowed some more


@pytest.mark.parametrize("is_late", [False, True])
def test_heads_that_are_compared_are_asked_for_in_time(
    is_late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, before it is read, and not too long before; by threads where asking has no effect."""
    first = scan(write_heads(tmp_path / "a.ckpt", like_a_llama(10)))
    second = write_heads(tmp_path / "b.ckpt", like_a_llama(10))
    asked: list[int] = []
    ahead_by: list[int] = []

    def timed(handle: int, start: int, length: int) -> tuple[bytes, bool]:
        ahead_by.append(len(asked) - len(ahead_by))
        return os.pread(handle, length, start), is_late

    monkeypatch.setattr(guesses, "_WAITS", 0)
    monkeypatch.setattr(guesses, "_slow_devices", set())
    monkeypatch.setattr(guesses, "_TRIED", 8)
    monkeypatch.setattr(guesses, "_timed", timed)
    monkeypatch.setattr(guesses._FromDisk, "ask", lambda _, start, length: asked.append(start))
    assert scan(second, first).tensors is first.tensors
    assert len(asked) == len(set(asked))
    assert 1 <= max(ahead_by) <= guesses._GUESSES
    assert len(ahead_by) == 8 if is_late else len(ahead_by) == len(asked) > 90


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=15)
def test_guesses_change_nothing(seed: int) -> None:
    """Names that repeat, and shapes that do not; a file that is cut off."""
    generator = np.random.default_rng(seed)
    specs = [
        TensorSpec(f"{prefix}l.{layer}.{name}", by_name("float32"), (int(generator.choice([1, 300, 5000])),))
        for prefix in ("", "m.")
        for layer in range(int(generator.integers(1, 12)))
        for name in generator.permutation(["a", "b", "c" * 300])
    ]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        whole = write_heads(Path(name) / "a.ckpt", specs)
        cut = Path(name) / "cut.ckpt"
        shutil.copy(whole, cut)
        os.truncate(cut, int(generator.integers(1, whole.stat().st_size)))
        patch.setattr(guesses, "waits", itertools.count().__next__)
        patch.setattr(guesses.Pieces, "_held", lambda *_: None)
        outcomes = []
        for threshold in (1e9, -1):
            patch.setattr(guesses, "_QUICK_SECONDS", threshold)
            patch.setattr(guesses, "_slow_devices", set())
            outcomes.append([_scanned(whole), _scanned(cut)])
        assert outcomes[0] == outcomes[1]


def _scanned(path: Path) -> object:
    try:
        header = scan(path)
    except FormatError as error:
        return str(error)
    return header.tensors, header.frames


# The page cache.


def pages_in_memory(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), size) as memory:
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(memory)
        assert libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), found) == 0, ctypes.get_errno()
        del start
    return sum(page & 1 for page in found) * mmap.PAGESIZE


@pytest.mark.parametrize(("processes", "crc"), [(1, True), (2, False)])
def test_nothing_stays_in_the_page_cache(processes: int, crc: bool, tmp_path: Path) -> None:
    model = random_model({"w": (4096, 1024), "v": (4096, 1024)})
    root = write_ranks(tmp_path / "source", parts(MP4, model))
    plan = plan_from(root, MP4, MP2)
    size = sum(file.size for file in plan.sources)
    held = {}
    for drop in (False, True):
        for file in plan.sources:
            with file.path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if pages_in_memory(file.path):
                pytest.skip("this file system keeps its files in memory")
        transform(plan, tmp_path / f"result_{drop}", Options(processes, crc=crc, drop_cache=drop))
        files = [*root.rglob("*.ckpt"), *(tmp_path / f"result_{drop}").rglob("*.ckpt")]
        held[drop] = sum(map(pages_in_memory, files))
    assert held[False] >= size  # the result at least
    assert held[True] <= size / 20


def test_memory_is_not_filled_before_it_is_written() -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("this machine has no /dev/shm")
    tensors = (TensorSpec("w", by_name("float32"), (4 * MB,)),)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, tempfile.TemporaryFile(dir=name) as stream:
        if not is_memory(stream.fileno()):
            pytest.skip("/dev/shm is no tmpfs here")
        FileSink(Path(name), [TargetFile("a.ckpt", 0, "ckpt", tensors)]).prepare(0)
        status = (Path(name) / "a.ckpt").stat()
    assert status.st_size > 16 * MB > status.st_blocks * 512 * 100


def test_files_that_are_memory_are_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where threads wait for each other, which is what can be seen of waiting for a disk."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("this machine has no /dev/shm")
    waits = itertools.count()
    monkeypatch.setattr(fetcher, "waits", lambda: next(waits))
    monkeypatch.setattr(fetcher, "_SECONDS_OF_MEMORY", 0)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as stream, contextlib.closing(Fetcher()) as files:
        if not is_memory(stream.fileno()):
            pytest.skip("/dev/shm is no tmpfs here")
        stream.write(bytes(range(100)))
        stream.flush()
        buffer = bytearray(8)
        assert read_at_once(stream.fileno(), [buffer], 40) == 8
        assert buffer == bytes(range(40, 48))
        assert not files.has_to_wait([Extent(Path(stream.name), 0, 100)])


# On a file system of its own.


@needs_fuse
@pytest.mark.parametrize("processes", [1, 2])
def test_requests_on_a_file_system_with_latency(processes: int, tmp_path: Path) -> None:
    model = random_model({"w": (4096, 1024), "v": (4096, 1024)})
    write_ranks(tmp_path / "data" / "source", parts(MP4, model))
    with mounted(tmp_path / "data", tmp_path / "mount", scratch=tmp_path / "scratch", latency_ms=30) as mount:
        plan = plan_from(tmp_path / "mount" / "source", MP4, MP2)
        before = mount.counters()
        transform(plan, tmp_path / "result", Options(processes))
        found = mount.counters()
    (tmp_path / "result" / "manifest.json").unlink()
    assert_ranks(tmp_path / "result", parts(MP2, model))
    size = sum(file.size for file in plan.sources)
    assert found["reads"] - before["reads"] <= 2 * size / MB + 8 * len(plan.sources)
    assert found["opens"] - before["opens"] <= 2 * processes * len(plan.sources)
    assert found["most_in_flight"] >= 4
