from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from recorded import Tensor, assert_ranks, random_model, write_ranks

from mindformers_ckpt.disk import files
from mindformers_ckpt.engine import tasks
from mindformers_ckpt.engine.copier import Copier
from mindformers_ckpt.errors import PlanError, PublishError, TransferError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.execution.run import Run
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish.manifest import MANIFEST_FILE, read_manifests
from mindformers_ckpt.publish.replace import recover
from mindformers_ckpt.publish.staging import Staging
from mindformers_ckpt.publish.strays import find_strays
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

COMPLETE = Strategy.complete()
MODEL = random_model({"w": (16, 8), "v": (16, 8), "u": (16, 8)})


def strategy(ranks: int) -> Strategy:
    return Strategy.of_stages((dict.fromkeys(MODEL, Layout((ranks,), ((0,), ()))),), f"mp{ranks}")


def slices(ranks: int) -> dict[int, dict[str, Tensor]]:
    layout = Layout((ranks,), ((0,), ()))
    return {
        rank: {name: tensor.part(layout.box((16, 8), rank)) for name, tensor in MODEL.items()} for rank in range(ranks)
    }


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return Checkpoint(find_source(write_ranks(tmp_path / "source", slices(4))), strategy(4))


@pytest.fixture
def plan(source: Checkpoint) -> Plan:
    return build_plan(source, strategy(2))


@pytest.fixture
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tasks, "_SMALLEST_TASK", 1)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "out" / "result"


def siblings(destination: Path) -> set[str]:
    return {path.name for path in destination.parent.iterdir()}


def assert_result(destination: Path, ranks: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Any]:
    manifest = read_manifests(destination).get("manifest.json")
    assert manifest is not None
    assert {path.name for path in destination.iterdir()} == {MANIFEST_FILE, *(f"rank_{rank}" for rank in ranks)}
    moved = (destination / MANIFEST_FILE).rename(destination.parent / "moved")
    assert_ranks(destination, ranks)
    moved.rename(destination / MANIFEST_FILE)
    return manifest


def test_a_result_and_its_manifest(plan: Plan, destination: Path) -> None:
    report = transform(plan, destination, about={"source": "mp4", "target": "mp2"})
    manifest = assert_result(destination, slices(2))
    assert siblings(destination) == {"result"}
    assert (report.files, report.bytes_read, report.bytes_written, report.resumed_bytes) == (
        2,
        plan.bytes_read,
        plan.bytes_written,
        0,
    )
    assert (manifest["source"], manifest["target"]) == ("mp4", "mp2")
    assert [entry["path"] for entry in manifest["files"]] == [target.path for target in plan.targets]
    assert [entry["bytes"] for entry in manifest["files"]] == [
        (destination / target.path).stat().st_size for target in plan.targets
    ]
    assert [Path(entry["path"]) for entry in manifest["sources"]] == [file.path for file in plan.sources]


def test_incumbent_finding_15_no_ranks_of_an_old_run_are_left(source: Checkpoint, destination: Path) -> None:
    """MindSpore leaves ranks 2 to 7 of an old run beside the new ranks 0 and 1."""
    transform(build_plan(source, strategy(8)), destination)
    with pytest.raises(PublishError, match="is not empty; choose another folder, or allow it to be replaced"):
        transform(build_plan(source, strategy(2)), destination)
    assert_result(destination, slices(8))
    transform(build_plan(source, strategy(2)), destination, Options(overwrite=True))
    assert_result(destination, slices(2))
    assert siblings(destination) == {"result"}


def test_incumbent_finding_8_crc_on_request(plan: Plan, destination: Path) -> None:
    """MindSpore drops the checksum of its sources, and never looks at it."""
    from mindformers_ckpt.formats import ckpt_crc, read_header

    transform(plan, destination, Options(crc=True))
    for target in plan.targets:
        ckpt_crc.verify_crc(read_header(destination / target.path))
    assert_result(destination, slices(2))


def test_an_empty_folder_is_filled(plan: Plan, destination: Path) -> None:
    destination.mkdir(parents=True)
    transform(plan, destination)
    assert_result(destination, slices(2))


def make_file(destination: Path) -> None:
    destination.write_text("")


def make_link(destination: Path) -> None:
    (destination.parent / "real").mkdir()
    destination.symlink_to("real")


def make_full(destination: Path) -> None:
    destination.mkdir()
    (destination / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_file, "is a file; a folder for the results was expected"),
        (make_link, "is a symbolic link"),
        (make_full, "is not empty"),
    ],
)
def test_destinations_that_are_refused(
    make: Callable[[Path], None], message: str, plan: Plan, destination: Path
) -> None:
    destination.parent.mkdir()
    make(destination)
    before = siblings(destination)
    with pytest.raises(PublishError, match=message):
        transform(plan, destination)
    assert siblings(destination) == before
    if make is make_full:
        assert (destination / "notes.txt").read_text() == "mine"


def test_a_mount_point_is_refused(plan: Plan) -> None:
    with pytest.raises(PublishError, match="is a mount point and cannot be replaced"):
        transform(plan, Path("/proc"), Options(overwrite=True))


@pytest.mark.parametrize("inside", [".", "rank_0", ".."])
def test_a_destination_that_holds_the_source_is_refused(inside: str, plan: Plan, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(PlanError, match="holds the source file"):
        transform(plan, tmp_path / "source" / inside, Options(overwrite=True))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_link_to_the_source_is_seen_through(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("source")
    with pytest.raises(PlanError, match="holds the source file"):
        transform(plan, tmp_path / "link" / "rank_0", Options(overwrite=True))


def test_a_second_run_is_refused_while_one_writes(source: Checkpoint, plan: Plan, destination: Path) -> None:
    refused: list[str] = []

    def start_another() -> None:
        if not refused:
            for other in (plan, build_plan(source, strategy(8))):
                with pytest.raises(PublishError) as raised:
                    transform(other, destination, Options(overwrite=True))
                refused.append(str(raised.value))

    transform(plan, destination, check=start_another)
    assert f"(process {os.getpid()} on " in refused[0]
    assert "another process is making the same result" in refused[0]
    assert "another process is writing" in refused[1]
    assert_result(destination, slices(2))
    assert siblings(destination) == {"result"}


def test_two_threads_at_once(plan: Plan, destination: Path) -> None:
    barrier = threading.Barrier(2)
    results: list[str] = []

    def run() -> None:
        barrier.wait()
        try:
            transform(plan, destination)
        except PublishError as error:
            results.append(str(error))
        else:
            results.append("done")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in results
    assert_result(destination, slices(2))
    assert siblings(destination) == {"result"}


def test_a_destination_that_is_filled_meanwhile_is_kept(plan: Plan, destination: Path) -> None:
    def fill() -> None:
        destination.mkdir(exist_ok=True)
        (destination / "notes.txt").write_text("mine")

    with pytest.raises(PublishError, match="was filled by somebody else while the result was made"):
        transform(plan, destination, check=fill)
    assert [path.name for path in destination.iterdir()] == ["notes.txt"]
    # What was made is kept, and takes its name when there is room for it.
    (destination / "notes.txt").unlink()
    report = transform(plan, destination, Options(resume=True))
    assert report.resumed_bytes == plan.bytes_written
    assert_result(destination, slices(2))
    assert siblings(destination) == {"result"}


def test_the_old_result_is_there_until_the_new_one_takes_its_place(source: Checkpoint, destination: Path) -> None:
    transform(build_plan(source, strategy(8)), destination)
    options = Options(overwrite=True)
    transform(build_plan(source, strategy(2)), destination, options, check=lambda: assert_count(destination, 8))
    assert_count(destination, 2)


def assert_count(destination: Path, ranks: int) -> None:
    assert len(list(destination.glob("rank_*"))) == ranks


# Interrupted runs.


def interrupt_after(tasks: int) -> Callable[[int, int], None]:
    """Progress that raises KeyboardInterrupt when so many tasks are done."""
    left = tasks

    def progress(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def tasks_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the tasks that are run."""
    numbers: list[int] = []
    original = Copier.run

    def run(
        self: Copier, task: tasks.Task, check: Callable[[], None] = lambda: None, following: tasks.Task | None = None
    ) -> tasks.Done:
        numbers.append(task.number)
        return original(self, task, check, following)

    monkeypatch.setattr(Copier, "run", run)
    return numbers


def staging_folders(destination: Path) -> list[Path]:
    return [path for path in destination.parent.glob(".result.staging-*") if path.is_dir()]


@pytest.mark.parametrize("options", [{}, {"hashes": True}, {"crc": True}, {"by_rank": True}])
def test_resume(
    options: dict[str, Any], source: Checkpoint, destination: Path, many_tasks: None, tasks_run: list[int]
) -> None:
    plan = build_plan(source, strategy(8))
    transform(plan, destination.with_name("direct"), Options(**options))
    everything = set(tasks_run)
    assert len(everything) >= 3
    tasks_run.clear()

    with pytest.raises(KeyboardInterrupt):
        transform(plan, destination, Options(**options), progress=interrupt_after(2))
    assert not destination.exists()
    assert len(staging_folders(destination)) == 1
    begun = set(tasks_run)
    assert len(begun) >= 2
    tasks_run.clear()
    report = transform(plan, destination, Options(**options, resume=True))
    assert begun | set(tasks_run) == everything
    assert len(set(tasks_run)) == len(tasks_run) <= len(everything) - 2  # those that had been reported were kept
    assert 0 < report.resumed_bytes < plan.bytes_written
    for target in plan.targets:
        assert (destination / target.path).read_bytes() == (destination.with_name("direct") / target.path).read_bytes()
    manifest, direct = (
        read_manifests(destination).get("manifest.json"),
        read_manifests(destination.with_name("direct")).get("manifest.json"),
    )
    assert manifest is not None
    assert direct is not None
    assert manifest["files"] == direct["files"]
    assert siblings(destination) == {"result", "direct"}


def test_nothing_is_done_when_the_result_is_there(plan: Plan, destination: Path, tasks_run: list[int]) -> None:
    transform(plan, destination)
    tasks_run.clear()
    report = transform(plan, destination, Options(resume=True))
    assert tasks_run == []
    assert report.resumed_bytes == plan.bytes_written


def test_without_resume_all_is_done_again(
    plan: Plan, destination: Path, many_tasks: None, tasks_run: list[int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        transform(plan, destination, progress=interrupt_after(3))
    tasks_run.clear()
    report = transform(plan, destination)
    assert report.resumed_bytes == 0
    assert len(tasks_run) == len(set(tasks_run)) > 3
    assert_result(destination, slices(2))
    assert siblings(destination) == {"result"}


def test_another_plan_is_not_resumed(
    source: Checkpoint, plan: Plan, destination: Path, many_tasks: None, tasks_run: list[int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        transform(plan, destination, progress=interrupt_after(3))
    tasks_run.clear()
    report = transform(build_plan(source, strategy(8)), destination, Options(resume=True))
    assert report.resumed_bytes == 0
    assert_result(destination, slices(8))
    assert siblings(destination) == {"result"}


def test_a_changed_source_is_not_resumed(source: Checkpoint, plan: Plan, destination: Path, many_tasks: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        transform(plan, destination, progress=interrupt_after(3))
    os.utime(plan.sources[0].path, (1, 1))
    assert transform(plan, destination, Options(resume=True)).resumed_bytes == 0
    assert_result(destination, slices(2))


def spoil_end(folder: Path) -> None:
    journal = folder / "journal"
    journal.write_text(journal.read_text()[:-5])


def spoil_all(folder: Path) -> None:
    (folder / "journal").write_bytes(b"\0" * 100)


def spoil_text(folder: Path) -> None:
    """Lines that are not UTF-8, no JSON, or JSON that is too deep or too large."""
    lines = [b"\xff\xfe", b'[1e999, 1, [], "", 0]', b"[" * 100_000, b"[1, 2]", b"null", b"[[1], 2, 3, 4, 5]"]
    with open(folder / "journal", "ab") as stream:
        stream.write(b"\n".join(lines) + b"\n")


def remove(folder: Path) -> None:
    (folder / "journal").unlink()
    (folder / "rank_99").mkdir()


def change_number(folder: Path) -> None:
    """Another task's number in the last record."""
    journal = folder / "journal"
    *lines, last = journal.read_text().splitlines()
    record = json.loads(last)
    record[0] += 5
    journal.write_text("\n".join([*lines, json.dumps(record)]) + "\n")


def shorten(folder: Path) -> None:
    os.truncate(folder / "rank_0" / "checkpoint_0.ckpt", 0)


def unlink(folder: Path) -> None:
    (folder / "rank_1" / "checkpoint_1.ckpt").unlink()


def overwrite(folder: Path) -> None:
    """Other bytes everywhere, in a file of the same size and times."""
    for file in folder.glob("rank_*/*"):
        status = file.stat()
        file.write_bytes(b"\x55" * status.st_size)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("spoil", "kept"),
    [
        *((spoil_end, {1}), (spoil_all, {0}), (spoil_text, {2}), (remove, {0})),
        # Tasks that wrote nothing to the spoilt file are kept: both, where one thread came to none of the file's.
        *((change_number, {1}), (shorten, {0, 1, 2}), (unlink, {0, 1, 2}), (overwrite, {0})),
    ],
)
def test_what_a_resumed_run_keeps_is_proved(
    spoil: Callable[[Path], None],
    kept: set[int],
    source: Checkpoint,
    destination: Path,
    many_tasks: None,
    tasks_run: list[int],
) -> None:
    plan = build_plan(source, strategy(2))
    transform(plan, destination.with_name("direct"))
    number = len(tasks_run)
    with pytest.raises(KeyboardInterrupt):
        transform(plan, destination, progress=interrupt_after(3))
    (folder,) = staging_folders(destination)
    records = (folder / "journal").read_text().splitlines()
    (folder / "journal").write_text("\n".join(records[:2]) + "\n")  # however far both threads came
    spoil(folder)
    tasks_run.clear()
    transform(plan, destination, Options(resume=True))
    assert number - len(tasks_run) in kept
    assert_result(destination, slices(2))
    assert siblings(destination) == {"result", "direct"}


def test_a_run_that_was_resumed_from_a_spoilt_journal_can_be_resumed_again(
    plan: Plan, destination: Path, many_tasks: None, tasks_run: list[int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        transform(plan, destination, progress=interrupt_after(3))
    (folder,) = staging_folders(destination)
    spoil_end(folder)
    with pytest.raises(KeyboardInterrupt):
        transform(plan, destination, Options(resume=True), progress=interrupt_after(2))
    transform(plan, destination, Options(resume=True))
    assert_result(destination, slices(2))


def test_a_failed_run_leaves_nothing(plan: Plan, destination: Path) -> None:
    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        transform(plan, destination, check=fail)
    assert list(destination.parent.iterdir()) == []


def test_leftovers_of_dead_runs_are_cleared_and_others_kept(plan: Plan, destination: Path) -> None:
    destination.parent.mkdir()
    for name in (".result.staging-0123456789abcdef", ".other.staging-0123456789abcdef", ".result2.staging-01"):
        (destination.parent / name / "rank_0").mkdir(parents=True)
    (destination.parent / ".result.staging-0123456789abcdef.lock").touch()  # as version 0.1 left them
    transform(plan, destination)
    assert siblings(destination) == {"result", ".other.staging-0123456789abcdef", ".result2.staging-01"}


def test_names_with_special_characters(source: Checkpoint, tmp_path: Path) -> None:
    for name in ("[a]*", "with space", "名字", ".hidden"):
        destination = tmp_path / "out" / name
        transform(build_plan(source, strategy(2)), destination)
        transform(build_plan(source, strategy(4)), destination, Options(overwrite=True))
        assert_result(destination, slices(4))
    assert len(list((tmp_path / "out").iterdir())) == 4


# Runs that make some of the ranks each.


def test_partial_runs_share_a_destination(source: Checkpoint, destination: Path) -> None:
    about = {"target": "mp8"}
    for ranks in ([0, 1, 2], [3, 4], [5, 6, 7]):
        plan = build_plan(source, strategy(8), ranks=ranks)
        transform(plan, destination, Options(partial=True), about=about)
    manifests = [path for path in destination.iterdir() if path.suffix == ".json"]
    assert len(manifests) == 3
    assert sorted(entry["rank"] for path in manifests for entry in json.loads(path.read_bytes())["files"]) == [
        *range(8)
    ]
    for path in manifests:
        path.unlink()
    assert_ranks(destination, slices(8))


def test_what_a_killed_run_put_together_goes_with_the_next_one(source: Checkpoint, destination: Path) -> None:
    """Also where the next one has nothing to do but to refuse: its ranks are there already."""
    ranks = build_plan(source, strategy(8), ranks=[0, 1])
    transform(ranks, destination, Options(partial=True))
    left = destination.with_name(f".{destination.name}.staging-part-0123456789abcdef-joined")
    (left / "rank_0").mkdir(parents=True)
    with pytest.raises(PublishError, match="already holds rank_0, rank_1"):
        transform(ranks, destination, Options(partial=True))
    assert siblings(destination) == {destination.name}


def test_partial_runs_do_not_replace_or_mix(source: Checkpoint, destination: Path) -> None:
    first = build_plan(source, strategy(8), ranks=[0, 1])
    transform(first, destination, Options(partial=True), about={"target": "mp8"})
    with pytest.raises(PublishError, match="already holds rank_1"):
        transform(
            build_plan(source, strategy(8), ranks=[1, 2]), destination, Options(partial=True), about={"target": "mp8"}
        )
    with pytest.raises(PublishError, match="holds ranks of another source or target"):
        transform(
            build_plan(source, strategy(4), ranks=[2]), destination, Options(partial=True), about={"target": "mp4"}
        )
    assert sorted(path.name for path in destination.glob("rank_*")) == ["rank_0", "rank_1"]
    assert siblings(destination) == {"result"}


def test_synchronised_results(plan: Plan, destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: list[str] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        synchronised.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    transform(plan, destination)
    assert synchronised == []
    transform(plan, destination, Options(fsync=True, overwrite=True))
    assert {"checkpoint_0.ckpt", "checkpoint_1.ckpt", "manifest.json", "rank_0", "rank_1", "out"} <= set(synchronised)


def test_no_manifest_is_no_result(tmp_path: Path) -> None:
    assert read_manifests(tmp_path).get("manifest.json") is None
    (tmp_path / MANIFEST_FILE).write_text("{")
    assert read_manifests(tmp_path).get("manifest.json") is None
    (tmp_path / MANIFEST_FILE).write_text('{"plan": "x"}')
    assert read_manifests(tmp_path).get("manifest.json") == {"plan": "x"}


def test_a_parent_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match="cannot be written"), Staging(tmp_path / "file" / "result", "0" * 16):
        pass


# What may be replaced.


def test_only_results_are_overwritten(plan: Plan, destination: Path) -> None:
    """A manifest makes a folder a result, whatever else somebody has put there."""
    destination.mkdir(parents=True)
    (destination / "notes.txt").write_text("mine")
    with pytest.raises(PublishError, match=r"is not an earlier result .*--overwrite-anything"):
        transform(plan, destination, Options(overwrite=True))
    assert (destination / "notes.txt").read_text() == "mine"
    (destination / MANIFEST_FILE).write_text('{"made by": "somebody else"}')
    with pytest.raises(PublishError, match="is not an earlier result"):
        transform(plan, destination, Options(overwrite=True))
    transform(plan, destination, Options(overwrite_anything=True))
    assert_result(destination, slices(2))
    (destination / "notes.txt").write_text("mine")
    transform(plan, destination, Options(overwrite=True))
    assert_result(destination, slices(2))


@pytest.mark.parametrize("where", [".", "..", "../.."])
def test_the_current_folder_is_refused(where: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = tmp_path / "work" / "inner" / "current"
    current.mkdir(parents=True)
    monkeypatch.chdir(current)
    with pytest.raises(PublishError, match="is the current folder, or one around it"):
        transform(plan, Path(where), Options(overwrite_anything=True))
    assert current.is_dir()


def test_what_cannot_be_removed_is_said(
    source: Checkpoint, destination: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new result is in its place: the run has not failed. The next run removes what is left."""
    transform(build_plan(source, strategy(8)), destination)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(files, "remove", refuse)
        transform(build_plan(source, strategy(2)), destination, Options(overwrite=True))
    assert_result(destination, slices(2))
    assert "is of an earlier run and cannot be removed" in caplog.text
    assert len(siblings(destination)) == 2
    transform(build_plan(source, strategy(4)), destination, Options(overwrite=True))
    assert_result(destination, slices(4))
    assert siblings(destination) == {"result"}


def test_a_lock_that_cannot_be_removed_is_not_published(
    source: Checkpoint, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network disk that answers ESTALE for a moment. What is finished is kept."""
    transform(build_plan(source, strategy(8)), destination)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "lock":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patched, pytest.raises(PublishError, match="would be in the result"):
        patched.setattr(Path, "unlink", refuse)
        transform(build_plan(source, strategy(2)), destination, Options(overwrite=True))
    assert_result(destination, slices(8))
    transform(build_plan(source, strategy(2)), destination, Options(overwrite=True, resume=True))
    assert_result(destination, slices(2))
    assert siblings(destination) == {"result"}


def test_a_result_that_lost_a_file_is_made_again(plan: Plan, destination: Path) -> None:
    transform(plan, destination)
    shutil.rmtree(destination / "rank_1")
    assert transform(plan, destination, Options(resume=True)).resumed_bytes == 0
    assert_result(destination, slices(2))


# Sources that are written while they are read.


def in_place(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.write(file.read_bytes())


def as_a_new_file(file: Path) -> None:
    status = file.stat()
    shutil.copy2(file, file.with_name("new"))
    os.replace(file.with_name("new"), file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [in_place, as_a_new_file, Path.unlink])
def test_a_source_that_is_written_during_the_run(
    change: Callable[[Path], None], source: Checkpoint, plan: Plan, destination: Path, many_tasks: None
) -> None:
    transform(build_plan(source, strategy(8)), destination)
    changed = plan.sources[2].path

    def late(done: int, total: int) -> None:
        if done == total:
            change(changed)

    with pytest.raises(TransferError) as raised:
        transform(plan, destination, Options(overwrite=True), progress=late)
    assert str(changed) in str(raised.value)
    assert "--resume" not in str(raised.value)
    assert_result(destination, slices(8))
    assert siblings(destination) == {"result"}


# Ranks that are added.


def test_ranks_of_another_source_are_refused_though_both_began_together(tmp_path: Path, destination: Path) -> None:
    plans = []
    for name in ("a", "b"):
        source = Checkpoint(find_source(write_ranks(tmp_path / name, slices(4))), strategy(4))
        plans.append(build_plan(source, strategy(8), ranks=[0, 1] if name == "a" else [2, 3]))
    inner: list[object] = []

    def other_run() -> None:
        if not inner:
            inner.append(transform(plans[1], destination, Options(partial=True), about={"source_path": "b"}))

    with pytest.raises(PublishError, match="holds ranks of another source"):
        transform(plans[0], destination, Options(partial=True), about={"source_path": "a"}, check=other_run)
    assert sorted(path.name for path in destination.iterdir()) == ["manifest_rank_2-3.json", "rank_2", "rank_3"]


def test_ranks_of_a_source_that_was_written_again_are_refused(source: Checkpoint, destination: Path) -> None:
    options = Options(partial=True)
    transform(build_plan(source, strategy(8), ranks=[0, 1]), destination, options)
    os.utime(source.files.by_rank[0][0])
    with pytest.raises(PublishError, match="holds ranks of another source"):
        transform(build_plan(source, strategy(8), ranks=[1, 2]), destination, Options(partial=True, overwrite=True))
    # Where none of the old ranks stays, they are replaced.
    transform(build_plan(source, strategy(8), ranks=[0, 1]), destination, Options(partial=True, overwrite=True))


def test_manifests_name_each_rank_once(source: Checkpoint, destination: Path) -> None:
    for ranks in ([0, 1, 2], [2, 3], [5, 6]):
        plan = build_plan(source, strategy(8), ranks=ranks)
        transform(plan, destination, Options(partial=True, overwrite=True))
    manifests = read_manifests(destination)
    named = [file["rank"] for manifest in manifests.values() for file in manifest["files"]]
    assert sorted(named) == [0, 1, 2, 3, 5, 6]
    assert {path.name for path in destination.glob("rank_*")} == {f"rank_{rank}" for rank in named}


def test_marks_beside_the_ranks_are_replaced_too(source: Checkpoint, destination: Path) -> None:
    options = Options(partial=True, overwrite=True)
    for mark in ("first", "second"):
        transform(
            build_plan(source, strategy(8), ranks=[0, 1]),
            destination,
            options,
            companions=lambda folder, mark=mark: (folder / "mark.txt").write_text(mark),  # type: ignore[misc]
        )
    transform(build_plan(source, strategy(8), ranks=[2]), destination, options)
    assert (destination / "mark.txt").read_text() == "second"
    assert siblings(destination) == {"result"}


def test_a_dead_part_can_be_resumed_after_others(source: Checkpoint, destination: Path, many_tasks: None) -> None:
    dead, other = (build_plan(source, strategy(8), ranks=ranks) for ranks in ([0, 1], [2, 3]))
    with pytest.raises(KeyboardInterrupt):
        transform(dead, destination, Options(partial=True), progress=interrupt_after(2))
    transform(other, destination, Options(partial=True, resume=True))
    assert transform(dead, destination, Options(partial=True, resume=True)).resumed_bytes > 0
    assert siblings(destination) == {"result"}


def test_strays_are_named(source: Checkpoint, plan: Plan, destination: Path, many_tasks: None) -> None:
    """Those of a run that is alive with its process; what is not of ours is not among them."""
    folder = destination.parent
    folder.mkdir()
    for name in (".bashrc.old", ".other.lock", ".result.part-xyz", "result.old"):
        (folder / name).touch()
    assert find_strays(folder) == []
    with Run(plan, destination) as run:
        (found,) = find_strays(folder)
        assert found.path == run.folder
        assert found.holder == f"process {os.getpid()} on {os.uname().nodename}"
        run.prepare()
        run.copy()
        run.publish()
    assert find_strays(folder) == []
    stopped = Stopped()
    with pytest.raises(KeyboardInterrupt):
        transform(build_plan(source, strategy(8)), destination, Options(overwrite=True), progress=stopped)
    (found,) = find_strays(folder)
    assert (found.what.endswith("--resume goes on with it"), found.holder) == (True, "")
    destination.rename(folder / ".result.old")
    assert next(stray.what for stray in find_strays(folder)) == "an old result that was being replaced"
    recover(destination)
    transform(build_plan(source, strategy(8)), destination, Options(overwrite=True))
    assert find_strays(folder) == []


class Stopped:
    """Progress that ends the run after its first task."""

    def __call__(self, done: int, total: int) -> None:
        raise KeyboardInterrupt
