"""The headers of many files are read on all nodes, each file on one; and nothing is believed that could be wrong."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded import Tensor, random_model, write_tensors
from test_cluster import address, run_ranks  # noqa: F401

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats import tensor_file
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job import looking
from mindformers_ckpt.job.cluster.messages import Address
from mindformers_ckpt.job.looking import look_together
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.model import Strategy

COUNT = 70
NAMES = [f"layers.{number}.w" for number in range(6)]
DP = Strategy.of_stages(({name: Layout((COUNT,), ((), ())) for name in NAMES},), "dp")


def write(root: Path, others: Mapping[int, Mapping[str, Tensor]] | None = None) -> Path:
    """A source of so many ranks, with the same tensors on all but `others`."""
    model = random_model(dict.fromkeys(NAMES, (8, 16)))
    for rank in range(COUNT):
        write_tensors(root / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", (others or {}).get(rank, model))
    return root


def checkpoint(root: Path) -> Checkpoint:
    return Checkpoint(find_source(root), DP)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Any, str]]:
    """How often a file was read to see what it holds, by rank (its thread) and name."""
    found: Counter[tuple[Any, str]] = Counter()
    real = tensor_file.scan

    def scan(path: Path, like: Any = None) -> Any:
        found[getattr(threading.current_thread(), "rank", None), path.name] += 1
        return real(path, like)

    monkeypatch.setattr(tensor_file, "scan", scan)
    monkeypatch.setattr(tensor_file, "_KEPT", 0)  # ranks share no memory
    return found


def look(
    address: Address,  # noqa: F811
    root: Path,
    nodes: Sequence[str] = ("a", "b", "c"),
    roots: Mapping[int, Path] | None = None,
) -> Checkpoint:
    """What the main rank has when all have looked; ranks are on these nodes."""
    source = checkpoint(root)

    def work(cluster: Any) -> None:
        cluster.nodes = tuple(nodes)
        threading.current_thread().rank = cluster.rank  # type: ignore[attr-defined]
        look_together(cluster, source if cluster.rank == 0 else None, (roots or {}).get(cluster.rank, root))

    assert run_ranks(address, len(nodes), work) == [None] * len(nodes)
    return source


def assert_true(source: Checkpoint) -> None:
    """What is known of the files is what is in them."""
    for path in source.files.files:
        assert source.header(path) == tensor_file.scan(path)
        assert source.header(path).modified == path.stat().st_mtime_ns


def test_every_file_is_read_on_one_node(address: Address, tmp_path: Path, scans: Counter[tuple[Any, str]]) -> None:  # noqa: F811
    source = look(address, write(tmp_path), ["a", "b", "b", "c", "a"])
    of_rank = Counter(rank for rank, _ in scans.elements())
    assert (of_rank[1], of_rank[3]) == (23, 23)
    assert of_rank[2] == of_rank[4] == 0
    assert of_rank[0] <= 24 + 1
    assert source.unread() == []
    scans.clear()
    source.tensors()
    assert not scans
    assert_true(source)


def test_files_of_one_size_may_differ(address: Address, tmp_path: Path, scans: Counter[tuple[Any, str]]) -> None:  # noqa: F811
    """In the order of their tensors, their names, shapes, element types."""
    model = random_model(dict.fromkeys(NAMES, (8, 16)))
    others = {
        4: dict(reversed(model.items())),
        10: {name.replace("w", "v"): tensor for name, tensor in model.items()},
        11: {name: Tensor(tensor.dtype, tensor.bits.reshape(16, 8)) for name, tensor in model.items()},
        63: dict([*list(model.items())[1:], *list(model.items())[:1]]),
    }
    root = write(tmp_path, others)
    assert len({path.stat().st_size for path in root.rglob("*.ckpt")}) == 1
    source = look(address, root)
    assert source.unread() == []
    assert_true(source)


def test_a_node_that_sees_other_files_is_not_believed(
    address: Address,  # noqa: F811
    tmp_path: Path,
    scans: Counter[tuple[Any, str]],
) -> None:
    """It may have a copy, an older one, or none."""
    model = random_model(dict.fromkeys(NAMES, (8, 16)))
    root = write(tmp_path / "here")
    write(tmp_path / "there", {rank: dict(reversed(model.items())) for rank in range(COUNT)})
    (tmp_path / "nowhere").mkdir()
    source = look(address, root, roots={1: tmp_path / "there", 2: tmp_path / "nowhere"})
    assert len(source.unread()) >= COUNT // 2
    source.tensors()
    assert_true(source)


def test_a_file_that_is_written_meanwhile_is_read_again(
    address: Address,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scans: Counter[tuple[Any, str]],
) -> None:
    root = write(tmp_path)
    real = looking._adopt

    def adopt(source: Checkpoint, seen: Any) -> None:
        model = random_model(dict.fromkeys(NAMES, (8, 16)))
        file = write_tensors(root / "rank_5" / "checkpoint_5.ckpt", dict(reversed(model.items())))
        os.utime(file, ns=(1, 1))
        real(source, seen)

    monkeypatch.setattr(looking, "_adopt", adopt)
    source = look(address, root)
    assert source.unread() == [root / "rank_5" / "checkpoint_5.ckpt"]
    assert_true(source)


def test_a_folder_may_be_named_from_where_the_job_is(
    address: Address,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("source"))
    source = checkpoint(Path("source"))

    def work(cluster: Any) -> None:
        cluster.nodes = ("a", "b")
        look_together(cluster, source if cluster.rank == 0 else None, tmp_path / "source")

    assert run_ranks(address, 2, work) == [None] * 2
    assert source.unread() == []
    assert_true(source)


def test_no_more_is_told_than_a_step_of_a_job_takes(
    address: Address,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(looking, "MAX_VALUES", 3 * 20 * looking._BYTES_OF_FILE)
    source = look(address, write(tmp_path))
    assert len(source.unread()) == COUNT - 3 * 20
    header = source.header(source.files.files[0])
    about = looking._Seen.of(replace(header, size=1 << 45, modified=1 << 62, crc=(1 << 32) - 1))
    assert len(json.dumps(about)) <= looking._BYTES_OF_FILE - 2


def test_damaged_files_are_told_as_ever(address: Address, tmp_path: Path) -> None:  # noqa: F811
    root = write(tmp_path)
    for rank in (0, 7, 69):
        os.truncate(root / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", 500)
    with pytest.raises(FormatError) as alone:
        checkpoint(root).tensors()
    with pytest.raises(FormatError) as together:
        look(address, root).tensors()
    assert str(together.value) == str(alone.value)


def test_what_few_files_or_one_node_have_is_read_as_before(
    address: Address,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = write(tmp_path)
    assert len(look(address, root, ["a"]).unread()) == COUNT
    assert len(look(address, root, ["a", "a"]).unread()) == COUNT
    for rank in range(64 - 1, COUNT):
        shutil.rmtree(root / f"rank_{rank}")
    assert len(look(address, root).unread()) == 63


def test_ranks_that_anybody_may_be_are_asked_nothing(address: Address, tmp_path: Path) -> None:  # noqa: F811
    source = checkpoint(write(tmp_path))

    def work(cluster: Any) -> None:
        cluster.nodes, cluster.unproved = ("a", "b", "c"), (2,)
        look_together(cluster, source if cluster.rank == 0 else None, tmp_path)

    assert run_ranks(address, 3, work) == [None] * 3
    assert len(source.unread()) == COUNT


@pytest.mark.parametrize("answer", [7, [[1, 2, None]], [["size", 2, None, ""]], []])
def test_what_cannot_be_read_is_refused(
    answer: Any,
    address: Address,  # noqa: F811
    tmp_path: Path,
) -> None:
    source = checkpoint(write(tmp_path))

    def work(cluster: Any) -> Any:
        cluster.nodes = ("a", "b")
        if cluster.rank == 1:
            cluster.hand_out("files to look at")
            return cluster.gather("looked at", answer)
        return look_together(cluster, source if cluster.rank == 0 else None, tmp_path)

    assert "what another rank told of files cannot be read" in str(run_ranks(address, 2, work)[0])
