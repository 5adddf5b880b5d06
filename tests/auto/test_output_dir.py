"""The output dir: what is refused, moved aside, put back and removed, also after a kill."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mindformers_ckpt.errors import ConfigError, PublishError
from mindformers_ckpt.job.output_dir import OutputDir
from mindformers_ckpt.publish.strays import find_strays

ROOT = Path(__file__).parents[2]
OWN_FILES = {".checkpoint_hook.lock", ".checkpoint_hook.holder"}


def tree(folder: Path) -> dict[str, str]:
    """Everything under a folder but the lock: path -> content, the aim of a link, "/" of a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name in OWN_FILES:
            continue
        content = f"-> {os.readlink(path)}" if path.is_symlink() else path.read_text() if path.is_file() else "/"
        found[str(path.relative_to(folder))] = content
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An output dir with the results of an earlier job."""
    output = tmp_path / "output"
    (output / "strategy").mkdir(parents=True)
    (output / "strategy" / "ckpt_strategy_rank_0.ckpt").write_text("old strategy")
    (output / "transformed_checkpoint" / "llama" / "rank_0").mkdir(parents=True)
    (output / "transformed_checkpoint" / "llama" / "rank_0" / "checkpoint_0.ckpt").write_text("old weights")
    (output / "checkpoint").mkdir()
    (output / "checkpoint" / "kept.ckpt").write_text("kept")
    return output


def write_strategy(output: OutputDir, text: str = "new strategy") -> None:
    (output.strategy / "ckpt_strategy_rank_0.ckpt").write_text(text)


# ---------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("load_checkpoint", "src_strategy", "texts"),
    [
        ("output/transformed_checkpoint/llama", "", ["load_checkpoint: .* is in .*transformed_checkpoint"]),
        ("output/transformed_checkpoint", "", ["load_checkpoint: .* is in"]),
        ("model", "output/strategy", ["src_strategy_path_or_dir: .* is in .*output/strategy"]),
        ("model", "output/strategy/ckpt_strategy_rank_0.ckpt", ["src_strategy_path_or_dir: .* is in"]),
        ("link/llama", "output/strategy", ["load_checkpoint: .*link/llama is in", "src_strategy_path_or_dir: "]),
        ("output", "", ["load_checkpoint: .*output contains .*strategy.*; set output_dir to a folder outside of"]),
        ("model/../output/./strategy/..", "", ["contains"]),
    ],
)
def test_sources_in_what_would_be_cleared(
    root: Path, tmp_path: Path, load_checkpoint: str, src_strategy: str, texts: list[str]
) -> None:
    (tmp_path / "link").symlink_to(root / "transformed_checkpoint")
    before = tree(tmp_path)
    strategy = str(tmp_path / src_strategy) if src_strategy else ""
    with pytest.raises(ConfigError, match="nothing was touched") as caught:
        OutputDir(root).check_apart(str(tmp_path / load_checkpoint), strategy)
    for text in texts:
        assert any(re.search(text, line) for line in str(caught.value).splitlines()[1:]), caught.value
    assert tree(tmp_path) == before


def test_the_advice_of_a_refusal_works(root: Path) -> None:
    """The shell commands in the message move the source away, and it is accepted then."""
    output = OutputDir(root)
    source = root / "transformed_checkpoint" / "llama"
    with pytest.raises(ConfigError) as caught:
        output.check_apart(str(source), "")
    command = str(caught.value).partition("e.g. ")[2].partition(", and set")[0]
    subprocess.run(["bash", "-ec", command], check=True)
    moved = root.parent / "checkpoint_source" / "llama"
    assert (moved / "rank_0" / "checkpoint_0.ckpt").read_text() == "old weights"
    output.check_apart(str(moved), "")


def test_files_of_a_source_that_link_into_what_would_be_cleared(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "model" / "rank_0" / "a.ckpt"
    file.parent.mkdir(parents=True)
    file.symlink_to(root / "transformed_checkpoint" / "llama" / "rank_0" / "checkpoint_0.ckpt")
    with pytest.raises(ConfigError, match=r"rank_0/a.ckpt is a file in .*transformed_checkpoint"):
        OutputDir(root).check_apart(str(tmp_path / "model"), "", [file])


def test_sources_beside_it_are_accepted(root: Path, tmp_path: Path) -> None:
    output = OutputDir(root)
    output.check_apart(str(root / "checkpoint"), str(tmp_path / "strategy"))
    output.check_apart(str(root / "strategy_of_last_week"), str(root / "transformed_checkpoint_old"))
    # only_save_strategy clears the strategy folder alone.
    output.check_apart(str(root / "transformed_checkpoint"), "", strategy_only=True)
    with pytest.raises(ConfigError, match="src_strategy_path_or_dir"):
        output.check_apart("", str(root / "strategy"), strategy_only=True)


def test_a_link_in_the_place_of_the_results_is_refused(root: Path, tmp_path: Path) -> None:
    os.rename(root / "transformed_checkpoint", tmp_path / "big_disk")
    (root / "transformed_checkpoint").symlink_to(tmp_path / "big_disk")
    with pytest.raises(ConfigError, match=r"is a link or a mount point.*set output_dir to a folder on the disk"):
        OutputDir(root).check_apart(str(tmp_path / "model"), "")


# -------------------------------------------------------------------------------- clearing and restoring


def test_errors_of_the_system_in_the_output_dir_are_explained(root: Path, tmp_path: Path) -> None:
    output = OutputDir(root)
    inside, full = root / "strategy" / "x", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # writing names no file
    said = f"{inside}: Permission denied; output_dir is {root}: it must be"
    with pytest.raises(PublishError, match=said), output.explained():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(inside))
    with pytest.raises(PublishError, match=f"^No space left on device; output_dir is {root}"), output.explained():
        raise full
    for other in (FileNotFoundError(errno.ENOENT, "gone", str(tmp_path / "other")), PublishError("said already")):
        with pytest.raises(type(other)) as caught, output.explained():
            raise other
        assert caught.value is other


def test_a_good_run_replaces_the_strategy(root: Path) -> None:
    output = OutputDir(root)
    output.clear()
    assert list(output.strategy.iterdir()) == []
    assert (root / "transformed_checkpoint" / "llama").is_dir()
    write_strategy(output)
    output.keep()
    assert tree(root) == {
        "checkpoint": "/",
        "checkpoint/kept.ckpt": "kept",
        "strategy": "/",
        "strategy/ckpt_strategy_rank_0.ckpt": "new strategy",
        "transformed_checkpoint": "/",
        "transformed_checkpoint/llama": "/",
        "transformed_checkpoint/llama/rank_0": "/",
        "transformed_checkpoint/llama/rank_0/checkpoint_0.ckpt": "old weights",
    }


def test_a_stale_transformed_checkpoint_is_removed_when_asked(root: Path) -> None:
    output = OutputDir(root)
    output.clear()
    output.keep(clear_transformed=True)
    assert tree(root) == {"checkpoint": "/", "checkpoint/kept.ckpt": "kept", "strategy": "/"}


@pytest.mark.parametrize("settled", [True, False])
def test_a_failed_run_leaves_everything_as_it_was(root: Path, settled: bool) -> None:
    before = tree(root)
    output = OutputDir(root)
    output.clear()
    write_strategy(output)
    output.restore(settled=settled)
    after = tree(root)
    if not settled:
        assert after.pop(".strategy.previous/ckpt_strategy_rank_0.ckpt") == "old strategy"
        assert after.pop(".strategy.previous") == "/"
    assert after == before


def test_a_rank_that_still_writes_has_not_the_last_word(root: Path) -> None:
    """One rank fails and puts back while another compiles; that one writes, then finds out and puts back too."""
    before = tree(root)
    output, late = OutputDir(root), OutputDir(root)
    output.clear()
    output.restore(settled=False)
    write_strategy(late, "of a job that failed")
    late.restore(settled=False)
    assert (root / "strategy" / "ckpt_strategy_rank_0.ckpt").read_text() == "old strategy"
    OutputDir(root).restore()  # the next job, whatever it does
    assert tree(root) == before


@pytest.mark.parametrize("settled", [True, False])
def test_where_there_was_no_strategy_there_is_none_again(tmp_path: Path, settled: bool) -> None:
    output = OutputDir(tmp_path / "new")
    output.clear()
    write_strategy(output)
    output.restore(settled=settled)
    assert not output.strategy.exists()
    OutputDir(output.root).restore()
    assert tree(output.root) == {}


def test_restoring_without_clearing_does_nothing(root: Path) -> None:
    before = tree(root.parent)
    OutputDir(root).restore()
    OutputDir(root.parent / "nowhere").restore()
    assert tree(root.parent) == before


def test_links_are_removed_not_followed(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    os.rename(root / "strategy", elsewhere)
    (elsewhere / "inner").symlink_to(root / "checkpoint")
    (root / "strategy").symlink_to(elsewhere)
    (root / "transformed_checkpoint" / "link").symlink_to(elsewhere)
    outside = tree(elsewhere)

    output = OutputDir(root)
    output.clear()
    assert not output.strategy.is_symlink()
    write_strategy(output)
    output.restore(settled=False)
    assert os.readlink(root / "strategy") == str(elsewhere)
    assert tree(elsewhere) == outside

    output.clear()
    write_strategy(output)
    output.keep(clear_transformed=True)
    assert tree(elsewhere) == outside
    assert (root / "checkpoint" / "kept.ckpt").read_text() == "kept"
    assert not (root / "transformed_checkpoint").exists()
    assert not (root / "strategy").is_symlink()


# ------------------------------------------------------------------------------------- kills, other jobs

PROGRAM = """
import sys, time
from pathlib import Path
from mindformers_ckpt.job.output_dir import OutputDir
output = OutputDir(Path(sys.argv[1]))
output.clear()
(output.strategy / "ckpt_strategy_rank_0.ckpt").write_text("new strategy")
print("cleared", flush=True)
time.sleep(60)
"""


@pytest.fixture
def job(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another job that has cleared the output dir."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(root)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "cleared\n"
    yield process
    process.kill()
    process.communicate()


def kill(job: subprocess.Popen[str]) -> None:
    job.send_signal(signal.SIGKILL)
    job.wait(10)


def test_a_second_job_is_refused_by_name_of_the_holder(root: Path, job: subprocess.Popen[str]) -> None:
    during = tree(root)
    second = OutputDir(root)
    holder = rf"process {job.pid} on {os.uname().nodename}"
    with pytest.raises(PublishError, match=rf"another job \({holder}\).*give this job another output_dir"):
        second.clear()
    second.restore()
    assert tree(root) == during
    kill(job)
    second.clear()
    second.keep()


def test_what_a_killed_job_left_is_healed_by_its_other_ranks(root: Path, job: subprocess.Popen[str]) -> None:
    during = tree(root)
    OutputDir(root).restore()
    assert tree(root) == during  # it is alive
    kill(job)
    OutputDir(root).restore()
    assert tree(root)["strategy/ckpt_strategy_rank_0.ckpt"] == "old strategy"
    assert ".strategy.previous" not in tree(root)


def test_what_a_killed_job_left_is_healed_by_the_next_job(root: Path, job: subprocess.Popen[str]) -> None:
    kill(job)
    output = OutputDir(root)
    output.clear()
    write_strategy(output, "newer strategy")
    output.restore()
    assert tree(root)["strategy/ckpt_strategy_rank_0.ckpt"] == "old strategy"
    output.clear()
    write_strategy(output, "newer strategy")
    output.keep()
    assert tree(root)["strategy/ckpt_strategy_rank_0.ckpt"] == "newer strategy"


def test_what_killed_ranks_left_goes_with_the_next_job(root: Path) -> None:
    (root / ".shared-disk-2155b41f305b00f3-2").touch()
    (root / ".removed-strategy-7").mkdir()
    found = {stray.path.name for stray in find_strays(root)}
    assert found == {".shared-disk-2155b41f305b00f3-2", ".removed-strategy-7"}
    output = OutputDir(root)
    output.clear()
    assert not found & {path.name for path in root.iterdir()}
    output.restore()


def test_a_rank_that_makes_the_folder_anew_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(root)
    output = OutputDir(root)
    output.clear()
    write_strategy(output)
    discard, times = output._discard, iter(range(3))

    def discard_and_lose_the_race(path: Path) -> None:
        discard(path)
        if path == output.strategy and next(times, None) is not None:
            output.strategy.mkdir()
            write_strategy(output, "late")

    monkeypatch.setattr(output, "_discard", discard_and_lose_the_race)
    output.restore()
    assert tree(root) == before


class KilledError(BaseException):
    """The process ends here."""


RMDIR, RENAME = os.rmdir, os.rename
OPERATIONS = 12


class FileOperations:
    """Lets so many operations pass; the next one is not done, or half done where it is many."""

    def __init__(self, allowed: int) -> None:
        self.left = allowed
        self.renamed: set[str] = set()

    def patched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                raise KilledError
            self.left -= 1
            if function is RENAME:
                self.renamed.add(Path(arguments[0]).name)
            return function(*arguments, **options)

        return run

    def rmtree(self, folder: Path, onerror: object) -> None:
        if self.left == 0:
            next(path for path in folder.rglob("*") if path.is_file()).unlink()
            raise KilledError
        self.left -= 1
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else RMDIR(path)
        RMDIR(folder)


@pytest.mark.parametrize("allowed", range(OPERATIONS))
@pytest.mark.parametrize("ends", ["keep", "restore", "restore unsettled"])
def test_killed_at_any_file_operation(root: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, ends: str) -> None:
    """Whichever rename, removal or mkdir is the last one: the next job finds the old strategy or the new one."""
    operations = FileOperations(allowed)
    output = OutputDir(root)
    with monkeypatch.context() as patch, contextlib.suppress(KilledError):
        patch.setattr(os, "rename", operations.patched(RENAME))
        for name in ("rmdir", "mkdir"):
            patch.setattr(Path, name, operations.patched(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", operations.rmtree)
        patch.setattr(shutil, "copytree", operations.patched(shutil.copytree))
        output.clear()
        write_strategy(output)
        if ends == "keep":
            output.keep(clear_transformed=True)
        else:
            output.restore(settled=ends == "restore")
    committed = ends == "keep" and ".strategy.previous" in operations.renamed
    assert operations.left == 0 or allowed > 4  # the last cases are runs that were not killed
    assert operations.left > 0 or allowed < OPERATIONS - 1
    output._lock.release(force=True)  # as the end of the process does

    healing = OutputDir(root)
    healing.restore()
    found = tree(root).get("strategy/ckpt_strategy_rank_0.ckpt")
    assert found == ("new strategy" if committed else "old strategy")
    assert committed or ends != "keep" or allowed < OPERATIONS - 1
    healing.clear()
    write_strategy(healing, "newest")
    healing.keep(clear_transformed=True)
    assert tree(root) == {
        "checkpoint": "/",
        "checkpoint/kept.ckpt": "kept",
        "strategy": "/",
        "strategy/ckpt_strategy_rank_0.ckpt": "newest",
    }


def test_a_disk_without_locks_is_used_with_a_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise NotImplementedError

    before = tree(root)
    monkeypatch.setattr("mindformers_ckpt.job.output_dir.FileLock.acquire", refuse)
    output = OutputDir(root)
    output.clear()
    assert "disk without file locks" in caplog.text
    OutputDir(root).restore()  # another rank cannot know whether the one that cleared lives
    write_strategy(output)
    output.restore()
    assert tree(root) == before
