"""Ranks that fail, die or hang: all ranks are told, and the old results stay."""
# ruff: noqa: F811 (fixtures of rank_jobs)

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import (  # noqa: F401
    KILLED,
    TARGET,
    TIMEOUT,
    TWO_NODES,
    Source,
    assert_loaded,
    expected,
    many_ranks,
    old_results,
    results,
    run,
    source,
)

from mindformers_ckpt.publish.manifest import read_manifests


@pytest.mark.parametrize(
    ("fault", "rank", "text"),
    [
        ("clear", 0, KILLED),
        pytest.param("compile", 2, KILLED, marks=pytest.mark.slow),
        pytest.param("merge", 0, KILLED, marks=pytest.mark.slow),
        ("transform", 0, KILLED),
        pytest.param("wait", 3, KILLED, marks=pytest.mark.slow),
        ("load", 1, KILLED),
        pytest.param("load", 0, KILLED, marks=pytest.mark.slow),
        pytest.param("publish", 0, KILLED, marks=pytest.mark.slow),
        ("worker", 0, "a worker process died"),
        ("source vanishes", 0, "rank_5/checkpoint_5.ckpt"),
        ("raise", 1, KILLED),
    ],
)
def test_a_failure_reaches_all_ranks_and_leaves_the_old_results(
    run: Any, source: Source, tmp_path: Path, fault: str, rank: int, text: str
) -> None:
    """Kill -9 at every stage of the main job; the same job runs then without a file removed by hand."""
    folder = tmp_path / "llama"
    shutil.copytree(source.folder, folder)
    output = tmp_path / "output"
    before = old_results(output)
    keys = {**source.keys, "load_checkpoint": folder, "output_dir": output}
    keys |= {"transform_process_num": 2, "transform_by_rank": True}
    began = time.monotonic()
    outcomes = run(keys, faults={rank: fault}).outcomes()
    assert time.monotonic() - began < TIMEOUT
    survivors = [outcome for outcome in outcomes if outcome.error]
    assert len(survivors) == (4 if fault in ("worker", "source vanishes") else 3)
    for outcome in survivors:
        assert re.search(text.format(rank), outcome.error.splitlines()[0]), outcome.error
        assert outcome.code == 1
    assert results(output) == before

    if fault == "source vanishes":
        (folder / "gone").rename(folder / "rank_5")
    assert_loaded(run(keys).outcomes(), expected(TARGET, source.tensors))
    left = {path.name for path in output.iterdir()} - {".checkpoint_hook.lock"}
    assert left == {"strategy", "transformed_checkpoint"}


def test_killed_after_the_result_is_in_place(run: Any, source: Source, tmp_path: Path) -> None:
    output = tmp_path / "output"
    old_results(output)
    keys = {**source.keys, "output_dir": output}
    outcomes = run(keys, faults={0: "keep"}).outcomes()
    assert [outcome.code for outcome in outcomes[1:]] == [1, 1, 1]
    assert read_manifests(output / "transformed_checkpoint").get("manifest.json") is not None
    assert_loaded(run(keys).outcomes(), expected(TARGET, source.tensors))


def test_a_rank_that_hangs_is_named(run: Any, source: Source, tmp_path: Path) -> None:
    output = tmp_path / "output"
    before = old_results(output)
    job = run({**source.keys, "output_dir": output, "transform_timeout": 8}, faults={2: "hang"})
    waiting = [process for rank, process in enumerate(job.processes) if rank != 2]
    said = [json.loads(process.communicate(timeout=30)[0]) for process in waiting]
    for text in said:
        assert text["error"].startswith("step 'transformed': rank 2 has not arrived within 8 s")
    job.processes[2].kill()
    assert results(output) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_fills(run: Any, source: Source, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(output)], check=False)
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        before = old_results(output)
        keys = {**source.keys, "output_dir": output, "transform_process_num": 2}
        outcomes = run(keys, faults={0: "disk fills"}).outcomes()
        assert all("No space left on device" in outcome.error for outcome in outcomes)
        assert results(output) == before
        (output / "filler").unlink()
        assert_loaded(run(keys).outcomes(), expected(TARGET, source.tensors))
        # A disk that is too small from the start is found out before the first byte is written.
        (output / "filler").write_bytes(bytes(20 << 20))
        outcomes = run(keys).outcomes()
        assert all("the result needs" in outcome.error and "GB free" in outcome.error for outcome in outcomes)
    finally:
        subprocess.run(["umount", str(output)], check=True)


@pytest.mark.parametrize(("saved", "rank"), [(True, 0), (False, 3), pytest.param(False, 0, marks=pytest.mark.slow)])
def test_killed_while_it_looks_at_the_source(run: Any, tmp_path: Path, saved: bool, rank: int) -> None:
    source, output = many_ranks(tmp_path, 128), tmp_path / "output"
    before = old_results(output)
    keys = {**source.keys, "output_dir": output, "auto_trans_save": saved}
    began = time.monotonic()
    outcomes = run(keys, nodes=TWO_NODES, faults={rank: "looking"}).outcomes()
    assert time.monotonic() - began < TIMEOUT
    killed = outcomes.pop(rank)
    assert killed.code == -signal.SIGKILL
    for outcome in outcomes:
        assert outcome.code == 1
        (line,) = outcome.error.splitlines()
        assert re.search(KILLED.format(rank), line), line
    assert results(output) == before
    assert_loaded(run(keys, nodes=TWO_NODES).outcomes(), expected(TARGET, source.tensors))
    left = {path.name for path in output.iterdir()} - {".checkpoint_hook.lock"}
    assert left <= {"strategy", "transformed_checkpoint"}


@pytest.mark.slow
def test_a_rank_that_hangs_while_it_looks_is_named(run: Any, tmp_path: Path) -> None:
    source = many_ranks(tmp_path, 128)
    keys = {**source.keys, "output_dir": tmp_path / "output", "transform_timeout": 8}
    job = run(keys, nodes=TWO_NODES, faults={0: "hangs looking"})
    for process in job.processes[1:]:
        said = json.loads(process.communicate(timeout=30)[0])
        assert "rank 0 has not arrived within 8 s" in said["error"], said
    job.processes[0].kill()
