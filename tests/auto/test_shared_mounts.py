"""Jobs of two nodes that see one disk through mounts of their own: names and attributes that are seconds old."""
# ruff: noqa: F811 (fixtures of rank_jobs)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import TARGET, TWO_NODES, Source, assert_loaded, expected, old_results, results, run, source  # noqa: F401
from slow_mount import mounted, why_not


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Node -> the folder in which it sees the disk."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    disk, scratch = tmp_path / "disk", tmp_path / "slowfs"
    disk.mkdir()
    folders = {name: tmp_path / name for name in ("alpha", "beta")}
    with ExitStack() as mounts:
        for folder in folders.values():
            mounts.enter_context(mounted(disk, folder, scratch=scratch, locks=request.param))
        yield folders


def job_of(given: Source) -> dict[str, Any]:
    return {**given.keys, "output_dir": "output"}


def test_two_nodes(run: Any, source: Source, nodes: dict[str, Path]) -> None:
    old_results(nodes["alpha"] / "output")
    outcomes = run(job_of(source), nodes=TWO_NODES, folders=nodes).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["clear", "transform", "wait", "publish", "keep"])
def test_killed_rank(run: Any, source: Source, nodes: dict[str, Path], fault: str) -> None:
    """The next job recovers."""
    output = nodes["alpha"] / "output"
    old = old_results(output)
    outcomes = run(job_of(source), nodes=TWO_NODES, folders=nodes, faults={0: fault}).outcomes()
    assert [outcome.code for outcome in outcomes[1:]] == [1] * 3 or fault == "keep"
    found = results(output)
    transformed = {name for name in found if name.startswith("transformed")}
    assert transformed <= set(old) or fault == "keep"
    outcomes = run(job_of(source), nodes=TWO_NODES, folders=nodes).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    hidden = {path.name for path in output.iterdir()} - {"strategy", "transformed_checkpoint", ".checkpoint_hook.lock"}
    assert hidden == set()
