from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import Tensor, assert_ranks, random_bits, random_model, read_ranks, write_ranks, write_tensors

from mindformers_ckpt.convert.output import write_name_map
from mindformers_ckpt.engine import ahead, descriptors, fetcher, sinks, tasks, views, ways
from mindformers_ckpt.engine.copier import Copier
from mindformers_ckpt.engine.pool import copy_tasks
from mindformers_ckpt.engine.sinks import FileSink
from mindformers_ckpt.engine.tasks import Done, Task, cut_into_tasks
from mindformers_ckpt.errors import CheckpointError, TransferError
from mindformers_ckpt.execution import run
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.execution.run import Run
from mindformers_ckpt.formats import TensorSpec, layout_file
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.model import Place, Plan, Transfer
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.sources.index import NAME_MAP_FILE
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

TYPES = ("bool", "int16", "float16", "bfloat16", "float32", "int64", "float64", "float8_e4m3fn", "complex64")
COMPLETE = Strategy.complete()
MP4 = Strategy.of_stages(({"w": Layout((4,), ((0,), ())), "v": Layout((4,), ((), (0,)))},), "mp4")
MP2 = Strategy.of_stages(({"w": Layout((2,), ((), (0,))), "v": Layout((2,), ((), (0,)))},), "mp2")


def parts(strategy: Strategy, model: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """What every rank holds: its part of the tensors of its stage, and what no strategy names."""
    ranks: dict[int, dict[str, Tensor]] = {}
    for rank in range(strategy.rank_count):
        stage = strategy.stages[strategy.stage_of(rank)]
        ranks[rank] = {}
        for name, tensor in model.items():
            if name in stage:
                ranks[rank][name] = tensor.part(stage[name].box(tensor.bits.shape, rank % strategy.stage_size))
            elif name not in strategy.names():
                ranks[rank][name] = tensor
    return ranks


def plan_from(root: Path, source: Strategy, target: Strategy, **options: Any) -> Plan:
    return build_plan(Checkpoint(find_source(root), source), target, **options)


def contents(root: Path) -> dict[str, bytes]:
    """All files under a folder but the manifest, which holds the time."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def worker_processes() -> list[psutil.Process]:
    """The living worker processes of this one."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_SMALLEST_TASK", 1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Strategy, Strategy, dict[str, tuple[str, tuple[int, ...]]]]:
    """Two strategies of up to two stages, and tensors (name -> type and shape) that both cut evenly."""
    matrices = [draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)) for _ in range(2)]
    stage_counts = [draw(st.integers(1, 2)) for _ in range(2)]
    strategies: list[list[dict[str, Layout]]] = [[{} for _ in range(count)] for count in stage_counts]
    tensors = {}
    for number in range(draw(st.integers(1, 4))):
        dimensions = draw(st.integers(0, 3))
        layouts = [draw(layouts_on(tuple(matrix), dimensions)) for matrix in matrices]
        shape = tuple(
            math.lcm(*(layout.cuts[axis] for layout in layouts)) * draw(st.integers(1, 2)) for axis in range(dimensions)
        )
        name = f"t{number}"
        tensors[name] = (draw(st.sampled_from(TYPES)), shape)
        if draw(st.integers(0, 5)):  # now and then a tensor that no strategy names
            for stages, layout in zip(strategies, layouts):
                stages[draw(st.integers(0, len(stages) - 1))][name] = layout
    for stages, matrix in zip(strategies, matrices):
        for stage in stages:
            stage.setdefault("known_to_all", Layout(tuple(matrix), ((),)))
    tensors["known_to_all"] = ("int8", (2,))
    source, target = (Strategy.of_stages(tuple(stages), "random") for stages in strategies)
    return source, target, tensors


@st.composite
def layouts_on(draw: st.DrawFn, matrix: tuple[int, ...], dimensions: int) -> Layout:
    mapping: list[tuple[int, ...]] = [()] * dimensions
    for axis in draw(st.permutations(range(len(matrix)))):
        where = draw(st.integers(-1, dimensions - 1))
        if where >= 0:
            mapping[where] += (axis,)
    layout = Layout(matrix, tuple(mapping))
    free = layout.rank_count // math.prod(layout.cuts)
    if dimensions and free > 1 and draw(st.booleans()):
        return Layout(matrix, tuple(mapping), draw(st.sampled_from([-1, free])), 1)
    return layout


@given(
    case=cases(),
    seed=st.integers(0, 1 << 30),
    block=st.integers(1, 200),
    run=st.sampled_from([1, 8, 1 << 14]),
    is_slow=st.booleans(),
    formats=st.tuples(*[st.sampled_from(["ckpt", "safetensors"])] * 2),
    options=st.builds(Options, by_rank=st.booleans(), hashes=st.booleans(), crc=st.booleans()),
)
@settings(max_examples=60)
def test_any_layout_to_any_layout(
    case: tuple[Strategy, Strategy, dict[str, tuple[str, tuple[int, ...]]]],
    seed: int,
    block: int,
    run: int,
    is_slow: bool,
    formats: tuple[str, str],
    options: Options,
) -> None:
    """Through files, with blocks so small that their borders fall everywhere; a subset of the ranks as well."""
    source, target, tensors = case
    generator = np.random.default_rng(seed)
    model = {name: random_bits(by_name(dtype), shape, generator) for name, (dtype, shape) in tensors.items()}
    # hypothesis runs many examples in one test: the fixtures monkeypatch and tmp_path would be shared.
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for module in (tasks, views):
            patch.setattr(module, "BLOCK_BYTES", block)
        patch.setattr(views, "_RUN_BYTES", run)
        patch.setattr(ahead, "_BATCH_BYTES", block)
        patch.setattr(fetcher.Fetcher, "has_to_wait", lambda *_: is_slow)
        patch.setattr(tasks, "_SMALLEST_TASK", 1)
        folder = Path(name)
        root = write_ranks(folder / "source", parts(source, model), formats[0])
        plan = plan_from(root, source, target, format=formats[1])
        transform(plan, folder / "whole", options)
        (folder / "whole" / "manifest.json").unlink()
        assert_ranks(folder / "whole", parts(target, model))

        some = sorted(set(generator.integers(0, target.rank_count, 2).tolist()))
        transform(plan_from(root, source, target, format=formats[1], ranks=some), folder / "some", options)
        (folder / "some" / "manifest.json").unlink()
        whole = contents(folder / "whole")
        assert contents(folder / "some") == {
            path: data for path, data in whole.items() if int(path.split("/")[0][5:]) in some
        }


def test_hashes_are_those_of_the_written_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "BLOCK_BYTES", 64)
    model = random_model({"w": (16, 8), "v": (8, 16), "step": ()})
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4, model)), MP4, MP2)
    from mindformers_ckpt.publish.manifest import read_manifests

    transform(plan, tmp_path / "result", Options(hashes=True))
    manifest = read_manifests(tmp_path / "result").get("manifest.json")
    assert manifest is not None
    (tmp_path / "result" / "manifest.json").unlink()
    for entry in manifest["files"]:
        tensors = read_ranks(tmp_path / "result")[entry["rank"]]
        assert entry["xxh3_128"] == {
            name: xxhash.xxh3_128_hexdigest(tensor.bits.tobytes()) for name, tensor in tensors.items()
        }


@pytest.mark.parametrize("options", [{}, {"by_rank": True}, {"whole_tensors": True}])
def test_tasks_cover_every_block_once(
    options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mindformers_ckpt.engine.tasks.BLOCK_BYTES", 64)
    monkeypatch.setattr("mindformers_ckpt.engine.tasks._SMALLEST_TASK", 300)
    model = random_model({"w": (16, 8), "v": (8, 16), "u": (64, 64), "step": ()})
    plan = plan_from(write_tensors(tmp_path / "model.ckpt", model), COMPLETE, MP4)
    tasks = cut_into_tasks(plan, **options)
    assert [task.number for task in tasks] == list(range(len(tasks)))
    done = [(piece.transfer.name, number) for task in tasks for piece in task.slices for number in blocks_of(piece)]
    if options.get("by_rank"):
        assert len(tasks) == 4
        assert sum(task.bytes_written for task in tasks) == plan.bytes_written
        return
    assert len(set(done)) == len(done)
    assert sum(task.bytes_written for task in tasks) == pytest.approx(plan.bytes_written, rel=0.01)
    names = [{name for name, _ in done} for done in ([(p.transfer.name, 0) for p in task.slices] for task in tasks)]
    if options.get("whole_tensors"):
        assert sorted(name for task in names for name in task) == sorted(model)
    else:
        assert max(task.bytes_written for task in tasks) <= 300 + 4 * 64
        assert len(tasks) > 20
    assert tasks == cut_into_tasks(plan, **options)


def blocks_of(piece: tasks.Slice) -> range:
    return range(piece.first, piece.first + piece.blocks)


@pytest.mark.parametrize("options", [Options(), Options(by_rank=True), Options(hashes=True)])
def test_several_processes_write_what_one_writes(options: Options, tmp_path: Path, small_tasks: None) -> None:
    model = random_model({"w": (1024, 2048), "v": (2048, 512), "step": (), "u": (300, 7)})
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4, model)), MP4, MP2)
    told: list[tuple[int, int]] = []
    transform(plan, tmp_path / "one", options)
    together = Options(3, options.by_rank, options.hashes)
    transform(plan, tmp_path / "three", together, progress=lambda done, total: told.append((done, total)))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert told[-1] == (plan.bytes_written, plan.bytes_written)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert worker_processes() == []


def test_no_descriptors_are_left_open(tmp_path: Path) -> None:
    model = random_model({"w": (16, 8), "v": (8, 16)})
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4, model)), MP4, MP2)
    transform(plan, tmp_path / "first")
    before = set(os.listdir("/proc/self/fd"))
    transform(plan, tmp_path / "second")
    for rank in range(4):
        (tmp_path / "source" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt").write_bytes(b"damaged")
    with pytest.raises(TransferError):
        transform(plan, tmp_path / "third")
    assert set(os.listdir("/proc/self/fd")) == before


# Failures. A sparse source is large work without a large disk.


def sparse_source(folder: Path, megabytes: int) -> Path:
    """Four rank files of holes, cut as MP4 says: w by rows, v by columns."""
    rows = megabytes * 512  # 1024 float16 a row: half of the bytes in w, half in v
    specs = [
        TensorSpec("w", by_name("float16"), (rows // 8, 1024)),
        TensorSpec("v", by_name("float16"), (rows // 2, 256)),
    ]
    layout = layout_file("ckpt", specs)
    for rank in range(4):
        path = folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(layout.size)
            for offset, frame in layout.frames:
                os.pwrite(file.fileno(), frame, offset)
    return folder


def sparse_plan(folder: Path, megabytes: int) -> Plan:
    return plan_from(sparse_source(folder, megabytes), MP4, MP2)


def old_result(destination: Path) -> dict[str, bytes]:
    """A result of an earlier run."""
    (destination / "rank_7").mkdir(parents=True)
    (destination / "rank_7" / "checkpoint_7.ckpt").write_bytes(b"old")
    (destination / "manifest.json").write_text('{"mindformers_ckpt": "0.1.0"}')
    return {"rank_7/checkpoint_7.ckpt": b"old"}


def assert_untouched(destination: Path, old: Mapping[str, bytes]) -> None:
    assert contents(destination) == old
    assert names_in(destination.parent) == sorted({destination.name, "source"})


def names_in(folder: Path) -> list[str]:
    """What is in a folder, but for finished work that a failed run has kept."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".result.staging-"))


def blocks(process: int, number: signal.Signals) -> bool:
    """Whether a process has a signal blocked: for longer than the moment in which it starts a thread."""
    for _ in range(5):
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigBlk"))
        if not mask >> (number - 1) & 1:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("moment", ["start", "work"])
def test_a_killed_worker_fails_the_run(moment: str, tmp_path: Path, small_tasks: None) -> None:
    """Also the other workers end, and this process is not kept from ending."""
    plan = sparse_plan(tmp_path / "source", 128)
    old = old_result(tmp_path / "result")
    killed: list[int] = []

    def is_ready(worker: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return moment == "start" or any("checkpoint_" in file.path for file in worker.open_files())
        return False

    def kill_one() -> None:
        deadline = time.monotonic() + 20
        while not killed and worker_processes() and time.monotonic() < deadline:
            for worker in filter(is_ready, worker_processes()[:1]):
                # What ends the others must reach them: they may wait for a lock that the killed one takes with it.
                assert not blocks(worker.pid, signal.SIGTERM)
                worker.kill()
                killed.append(worker.pid)
            if moment == "start":
                break
            time.sleep(0.02)
        time.sleep(0.05)

    with pytest.raises(TransferError, match="a worker process died; was it killed"):
        transform(plan, tmp_path / "result", Options(processes=3, overwrite=True), check=kill_one)
    assert len(killed) == 1
    assert_untouched(tmp_path / "result", old)
    assert worker_processes() == []


def test_a_failing_report_ends_the_workers(tmp_path: Path, small_tasks: None) -> None:
    plan = sparse_plan(tmp_path / "source", 64)

    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:  # which holds the frames, and all that they hold
        transform(plan, tmp_path / "result", Options(processes=2), progress=fail)
    assert worker_processes() == []
    assert names_in(tmp_path) == ["source"]
    del raised


def test_a_failing_worker_fails_the_run(tmp_path: Path, small_tasks: None) -> None:
    plan = sparse_plan(tmp_path / "source", 64)
    first = tmp_path / "source" / "rank_0" / "checkpoint_0.ckpt"
    old = old_result(tmp_path / "result")
    os.truncate(first, first.stat().st_size - 1)
    # This process begins with the last tasks and is slow: the workers meet the damaged file.
    with pytest.raises(TransferError, match=r"rank_0/checkpoint_0\.ckpt: .*truncated"):
        transform(plan, tmp_path / "result", Options(processes=2, overwrite=True), check=lambda: time.sleep(0.05))
    assert_untouched(tmp_path / "result", old)
    assert worker_processes() == []


@pytest.mark.parametrize("where", ["helper", "caller", "check"])
def test_a_failure_in_either_thread_ends_both(
    where: str, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process copies in two threads; both have begun when one of them fails."""
    plan = sparse_plan(tmp_path / "source", 64)
    old = old_result(tmp_path / "result")
    caller = threading.current_thread()
    begun, waited = threading.Barrier(2), set()
    original = Copier.run

    def run(self: Copier, task: Task, check: Callable[[], None], following: Task | None = None) -> Done:
        thread = threading.current_thread()
        if thread not in waited:
            waited.add(thread)
            begun.wait(20)
        if where == ("caller" if thread is caller else "helper"):
            raise TransferError(f"the disk of the {where}")
        return original(self, task, check, following)

    def check() -> None:
        assert threading.current_thread() is caller
        if where == "check" and len(waited) == 2:
            raise TransferError("the disk of the check")

    monkeypatch.setattr(Copier, "run", run)
    before = set(threading.enumerate())
    with pytest.raises(TransferError, match=f"the disk of the {where}"):
        transform(plan, tmp_path / "result", Options(overwrite=True), check=check)
    assert set(threading.enumerate()) <= before
    assert_untouched(tmp_path / "result", old)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def vanish(path: Path) -> None:
    path.unlink()


def exchange_for_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def exchange_for_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"crc_num" + bytes(10))


def exchange_for_another_tensor(path: Path) -> None:
    size = path.stat().st_size
    layout = layout_file("ckpt", [TensorSpec("x", by_name("float16"), (512, 1024))])
    path.write_bytes(b"".join(frame for _, frame in layout.frames))
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, "has 1048\\d+ bytes, 2097\\d+ when the work was planned"),
        (vanish, "No such file"),
        (exchange_for_a_directory, "not a regular file"),
        (exchange_for_a_pipe, "not a regular file"),
        (lengthen, "bytes, 2097\\d+ when the work was planned: it was changed meanwhile"),
        (exchange_for_another_tensor, "."),
    ],
)
def test_a_source_that_changes_after_planning(
    change: Callable[[Path], None], message: str, tmp_path: Path, small_tasks: None
) -> None:
    plan = sparse_plan(tmp_path / "source", 8)
    old = old_result(tmp_path / "result")
    change(tmp_path / "source" / "rank_2" / "checkpoint_2.ckpt")
    with pytest.raises(CheckpointError, match=message) as raised:
        transform(plan, tmp_path / "result", Options(overwrite=True))
    assert "rank_2/checkpoint_2.ckpt" in str(raised.value)
    assert_untouched(tmp_path / "result", old)


@pytest.mark.parametrize(
    ("is_slow", "message"),
    [
        (False, r"checkpoint_3\.ckpt ends at byte \d+: it was shortened while"),
        # What was read ahead is whole, but then the file is not what it was.
        (True, r"were written or replaced while they were read[^$]*checkpoint_3\.ckpt|ends at byte \d+"),
    ],
)
def test_a_source_that_is_shortened_while_it_is_read(
    is_slow: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher.Fetcher, "has_to_wait", lambda *_: is_slow)
    for module in (tasks, views):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(tasks, "_SMALLEST_TASK", 1 << 30)  # a single task, and so a single thread
    plan = sparse_plan(tmp_path / "source", 32)
    path = tmp_path / "source" / "rank_3" / "checkpoint_3.ckpt"
    calls = 0

    def cut_off() -> None:
        nonlocal calls
        calls += 1
        if calls == 17:  # the first of v: the file is open, its header checked
            os.truncate(path, 1 << 20)

    with pytest.raises(TransferError, match=message):
        transform(plan, tmp_path / "result", check=cut_off)
    assert not (tmp_path / "result").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]


def test_what_check_raises_goes_through(tmp_path: Path) -> None:
    plan = sparse_plan(tmp_path / "source", 8)

    def stop() -> None:
        raise ZeroDivisionError("stop")

    for processes in (1, 2):
        with pytest.raises(ZeroDivisionError, match="stop"):
            transform(plan, tmp_path / "result", Options(processes), check=stop)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]
    assert worker_processes() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_too_small(tmp_path: Path, small_disk: Path) -> None:
    plan = sparse_plan(tmp_path / "source", 8)
    with pytest.raises(CheckpointError, match=r"the result needs 0\.01 GB, but the disk of .* has 0\.00 GB free"):
        transform(plan, small_disk / "result")
    assert list(small_disk.iterdir()) == []


def test_room_is_reserved_before_anything_is_copied(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "check_free_space", lambda folder, wanted: None)
    plan = sparse_plan(tmp_path / "source", 8)
    copied: list[int] = []
    with pytest.raises(TransferError, match=r"checkpoint_\d\.ckpt: cannot be written: No space left on device"):
        transform(plan, small_disk / "result", progress=lambda done, total: copied.append(done))
    assert copied == []
    assert list(small_disk.iterdir()) == []


def test_written_files_take_their_place_on_the_disk(tmp_path: Path) -> None:
    plan = sparse_plan(tmp_path / "source", 8)
    FileSink(tmp_path, plan.targets).prepare(0)
    status = (tmp_path / plan.targets[0].path).stat()
    assert status.st_size > 4 << 20
    assert status.st_blocks * 512 >= status.st_size


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_fills_up(
    processes: int, tmp_path: Path, small_disk: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "check_free_space", lambda folder, wanted: None)
    monkeypatch.setattr(sinks, "_reserve", os.ftruncate)  # a file system that cannot reserve
    plan = sparse_plan(tmp_path / "source", 8)
    old = old_result(small_disk / "result")
    with pytest.raises(TransferError, match=r"checkpoint_\d\.ckpt: writing failed: No space left on device"):
        transform(plan, small_disk / "result", Options(processes, overwrite=True))
    assert contents(small_disk / "result") == old
    assert names_in(small_disk) == ["result"]
    assert worker_processes() == []


def test_a_disk_that_fills_up_while_a_name_map_is_written(tmp_path: Path) -> None:
    """Behind the weights; what is finished is kept, and nothing half-made is seen."""
    plan = sparse_plan(tmp_path / "source", 8)

    def companions(folder: Path) -> None:
        (folder / NAME_MAP_FILE).symlink_to("/dev/full")
        write_name_map(plan, folder)

    with pytest.raises(TransferError, match=rf"{NAME_MAP_FILE}: cannot be written: No space left on device") as raised:  # noqa: SIM117
        with Run(plan, tmp_path / "result", Options()) as run:
            run.prepare()
            run.copy()
            run.publish(companions)
    assert "--resume goes on" in str(raised.value)
    assert not (tmp_path / "result").exists()


def test_many_target_files_need_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "_MOST_FILES", 2)
    model = random_model({"w": (16, 16), "v": (16, 16)})
    strategy = Strategy.of_stages(({"w": Layout((16,), ((0,), ())), "v": Layout((16,), ((), (0,)))},), "mp16")
    transform(plan_from(write_ranks(tmp_path / "source", parts(MP4, model)), MP4, strategy), tmp_path / "result")
    (tmp_path / "result" / "manifest.json").unlink()
    assert_ranks(tmp_path / "result", parts(strategy, model))


# In processes of their own.

JOB = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_execute import MP2, MP4, plan_from
from mindformers_ckpt.engine import tasks
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.transform import transform
tasks._SMALLEST_TASK = 1
if __name__ == "__main__":
    plan = plan_from(Path({source!r}), MP4, MP2)
    {body}
"""


def start_job(folder: Path, body: str) -> subprocess.Popen[str]:
    code = JOB.format(tests=str(Path(__file__).parent), source=str(folder / "source"), body=body)
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as the command line has it
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=one_thread)


@pytest.mark.parametrize("options", ["1", "2", "2, may_fork=True"])
def test_kill_9_in_the_middle(options: str, tmp_path: Path) -> None:
    sparse_source(tmp_path / "source", 64)
    old = old_result(tmp_path / "result")
    job = start_job(
        tmp_path,
        "import time; transform("
        f"plan, Path({str(tmp_path / 'result')!r}), Options({options}, overwrite=True),"
        "progress=lambda done, total: print(done, flush=True), check=lambda: time.sleep(0.2))",
    )
    assert job.stdout is not None
    assert int(job.stdout.readline()) > 0
    children = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert contents(tmp_path / "result") == old
    leftovers = {path.name for path in tmp_path.iterdir()} - {"source", "result"}
    assert any(name.startswith(".result.staging-") for name in leftovers)

    plan = plan_from(tmp_path / "source", MP4, MP2)
    transform(plan, tmp_path / "result", Options(overwrite=True))
    assert sorted(contents(tmp_path / "result")) == ["rank_0/checkpoint_0.ckpt", "rank_1/checkpoint_1.ckpt"]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "result"}


def test_boxes_that_overlap_are_read_once() -> None:
    """As of a tied embedding that one stage holds whole and the other in rows."""
    whole, upper, lower = Box((0, 0), (8, 4)), Box((0, 0), (4, 4)), Box((4, 0), (8, 4))
    places = tuple(Place(file, box) for file, box in enumerate((upper, lower, lower)))
    transfer = Transfer("w", by_name("float32"), (8, 4), (Place(0, whole),), places)
    assert ways.is_cut_by_rows(transfer)
    assert not ways.is_cut_by_rows(transfer._replace(targets=(*places, Place(3, whole))))


def test_what_is_kept_of_a_way_does_not_grow_with_blocks_times_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "_COPIES", 18)
    monkeypatch.setattr(tasks, "BLOCK_BYTES", 64)
    model = random_model({"w": (64, 16), "v": (4, 4)})
    plan = plan_from(write_ranks(tmp_path / "source", parts(MP4, model)), MP4, MP2)
    transfer = next(transfer for transfer in plan.transfers if transfer.name == "w")
    way, blocks = ways.Way(transfer, by_rows=True), list(tasks.block_boxes(transfer))
    assert len(blocks) > 9
    for block in blocks:
        assert {file for take in way.takes(block, False) for file in take.files} == {0, 1}
        assert len(way._takes) <= 3
    transform(plan, tmp_path / "result")
    (tmp_path / "result" / "manifest.json").unlink()
    assert_ranks(tmp_path / "result", parts(MP2, model))


@pytest.mark.parametrize("may_fork", [False, True])
def test_a_worker_killed_however_it_was_started(may_fork: bool, tmp_path: Path) -> None:
    sparse_source(tmp_path / "source", 64)
    old = old_result(tmp_path / "result")
    body = f"""
    import multiprocessing, time
    from mindformers_ckpt.errors import TransferError
    def kill():
        time.sleep(0.05)
        for worker in multiprocessing.active_children():
            print(worker._start_method, flush=True)
            worker.kill()
    try:
        transform(plan, Path({str(tmp_path / "result")!r}), Options(2, overwrite=True, may_fork={may_fork}), check=kill)
    except TransferError as error:
        print(str(error).splitlines()[0])
    print(multiprocessing.active_children())
    """
    output, _ = start_job(tmp_path, body.strip()).communicate(timeout=120)
    first, *_, error, left = output.splitlines()
    assert first == ("fork" if may_fork and sys.version_info >= (3, 11) else "spawn")
    assert error.startswith("a worker process died")
    assert left == "[]"
    assert_untouched(tmp_path / "result", old)


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """What is in the page cache is not read ahead, which would take up to 72 MiB."""
    for path in sparse_source(tmp_path / "source", 300).rglob("*.ckpt"):
        path.read_bytes()
    body = f"""
    peak = 0
    def private():
        global peak
        lines = open("/proc/self/smaps_rollup").read().splitlines()
        sizes = [int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean"))]
        peak = max(peak, sum(sizes) // 1024)
    before = private() or peak
    transform(plan, Path({str(tmp_path / "result")!r}), check=private)
    print(before, peak)
    """
    job = start_job(tmp_path, body.strip())
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0
    before, peak = map(int, output.split())
    assert sum(path.stat().st_size for path in (tmp_path / "result").rglob("*.ckpt")) > 300 * 1000 * 1000
    assert peak - before < 30
    assert peak < 120  # MiB, with pytest and hypothesis that the job imports


def test_an_empty_plan_makes_nothing(tmp_path: Path) -> None:
    model = random_model({"w": (4, 4), "v": (4, 4)})
    plan = plan_from(write_tensors(tmp_path / "model.ckpt", model), COMPLETE, MP2).for_targets([])
    assert cut_into_tasks(plan) == []
    assert list(copy_tasks(plan, tmp_path, [])) == []


def test_a_scalar_is_copied(tmp_path: Path) -> None:
    """It once was not: an array of no dimensions, indexed with (), gives a copy."""
    model = {name: Tensor(by_name("float32"), np.array(number, np.uint32)) for name, number in (("a", 7), ("b", 9))}
    transform(plan_from(write_tensors(tmp_path / "model.ckpt", model), COMPLETE, COMPLETE), tmp_path / "result")
    (tmp_path / "result" / "manifest.json").unlink()
    assert_ranks(tmp_path / "result", {0: model})


def test_boxes_of_a_plan_are_what_is_written(tmp_path: Path) -> None:
    model = random_model({"w": (8, 8), "v": (8, 8)})
    plan = plan_from(write_tensors(tmp_path / "model.ckpt", model), COMPLETE, MP4, ranks=[2])
    assert plan.transfers[0].targets[0].box == Box((4, 0), (6, 8))
