"""Jobs of four nodes, each with a mount of its own: what they read of one checkpoint with `auto_trans_save: False`."""
# ruff: noqa: F811 (fixtures of rank_jobs)

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import Tensors, digests, run  # noqa: F401
from recorded import random_model, write_ranks, write_tensors
from slow_mount import Mount, mounted, why_not

from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import write_strategy

NODES = ("a", "b", "c", "d")
SHAPES = {f"layers.{layer}.weight": (1024, 1024) for layer in range(6)} | {"norm.weight": (64,)}  # 24 MB
MEANT = {"auto_trans_ckpt": True, "auto_trans_save": False}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A folder with a checkpoint, complete and cut by rows and columns, and the tensors."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("disk")
    tensors = random_model(SHAPES)
    write_tensors(folder / "complete.ckpt", tensors)
    cut = {"layers.0.weight": (None, "mp"), **{f"layers.{layer}.weight": ("mp", None) for layer in range(1, 6)}}
    layouts = {name: Layout.on({"mp": 2}, *axes) for name, axes in cut.items()}
    parts = {
        rank: {
            name: tensor.part(layouts[name].box(SHAPES[name], rank)) if name in layouts else tensor
            for name, tensor in tensors.items()
        }
        for rank in range(2)
    }
    write_ranks(folder / "ranks", parts)
    write_strategy(layouts, folder / "strategy.ckpt", 0)
    return folder, tensors


@pytest.fixture
def mounts(disk: tuple[Path, Tensors], tmp_path: Path) -> Iterator[dict[str, Mount]]:
    """Node -> the mount through which it sees the disk, slow enough that reading has to wait."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                mounted(disk[0], tmp_path / name, scratch=tmp_path / f"slowfs_{name}", latency_ms=2)
            )
            for name in NODES
        }


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDFORMERS_CKPT_SECRET", "the secret of this job")


def start(run: Any, mounts: Mapping[str, Mount], source: str, tmp_path: Path, **about: Any) -> Any:
    keys = {"load_checkpoint": source, "output_dir": tmp_path / "output", **MEANT, **about.pop("keys", {})}
    if source == "ranks":
        keys["src_strategy_path_or_dir"] = "strategy.ckpt"
    folders = {name: mount.mountpoint for name, mount in mounts.items()}
    return run(keys, live=None, names=list(SHAPES), nodes=NODES, folders=folders, **about)


def read_bytes(mounts: Mapping[str, Mount]) -> list[int]:
    return [mount.counters()["read_bytes"] for mount in mounts.values()]


@pytest.mark.parametrize("source", ["ranks", pytest.param("complete.ckpt", marks=pytest.mark.slow)])
def test_replicas_on_several_nodes_read_once(
    run: Any, disk: tuple[Path, Tensors], mounts: dict[str, Mount], tmp_path: Path, source: str
) -> None:
    tensors = disk[1]
    outcomes = start(run, mounts, source, tmp_path).outcomes()
    unique = sum(tensor.bits.nbytes for tensor in tensors.values())
    assert [outcome.loaded for outcome in outcomes] == [digests(tensors)] * 4, outcomes[0].log
    counts = read_bytes(mounts)
    assert sum(counts) <= 1.05 * unique
    assert max(counts) <= 0.35 * unique
    for outcome in outcomes:
        assert "came from 3 other ranks that need the same" in outcome.log


@pytest.mark.slow
@pytest.mark.parametrize("why", ["no secret", "off"])
def test_each_reads_for_itself(
    run: Any,
    disk: tuple[Path, Tensors],
    mounts: dict[str, Mount],
    tmp_path: Path,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys: dict[str, object] = {"share_reads": "off"}
    if why == "no secret":
        monkeypatch.delenv("MINDFORMERS_CKPT_SECRET")  # and the nodes have output dirs of their own
        keys = {"auto_trans_ckpt": False, "output_dir": f"{tmp_path}/output_${{MINDFORMERS_CKPT_NODE}}"}
    outcomes = start(run, mounts, "complete.ckpt", tmp_path, keys=keys).outcomes()
    assert [outcome.loaded for outcome in outcomes] == [digests(disk[1])] * 4, outcomes[0].log
    unique = sum(tensor.bits.nbytes for tensor in disk[1].values())
    assert min(read_bytes(mounts)) >= unique
    assert ("because the job has no secret" in outcomes[0].log) == (why == "no secret")


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_reads_ends_the_job_at_once(
    run: Any, mounts: dict[str, Mount], tmp_path: Path
) -> None:
    started = time.monotonic()
    outcomes = start(run, mounts, "ranks", tmp_path, faults={2: "read"}).outcomes(60)
    assert [outcome.code for outcome in outcomes] == [1, 1, -9, 1]
    for outcome in outcomes[:2] + outcomes[3:]:
        assert re.match(r"rank 2\b.* died", outcome.error)  # it may have been the one that coordinates
    assert time.monotonic() - started < 30
