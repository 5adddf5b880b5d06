"""The files that each rank loads as they are: its own folder, one step on all ranks, and what is said where not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from recorded import random_model, write_tensors
from test_cluster import free_address

from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.own_files import find_own_files, holds_nothing

MODEL = random_model({"w": (2, 2)})


def on_ranks(size: int, action: Callable[[Cluster], Any]) -> list[Any]:
    """What an action gives on every rank of a job: a value, or the text of an error."""
    address = free_address()

    def run(rank: int) -> Any:
        with Cluster.connect(rank, size, address, 60, node="node") as cluster:
            try:
                return action(cluster)
            except CheckpointError as error:
                return f"error: {error}"

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


def saved(root: Path, names: Mapping[int, list[str]]) -> Path:
    """A checkpoint with files of these names in the folders of ranks."""
    for rank, files in names.items():
        (root / f"rank_{rank}").mkdir(parents=True)
        for name in files:
            write_tensors(root / f"rank_{rank}" / name, MODEL)
    return root


def chosen(root: Path, size: int, **keys: Any) -> list[Any]:
    """For every rank the file it takes, relative to the checkpoint, or the error."""
    config = Config.from_mapping({"load_checkpoint": root, **keys})
    found = on_ranks(size, lambda cluster: find_own_files(config, cluster))
    return [
        about if isinstance(about, str) else [str(file.relative_to(root)) for file in about.files] for about in found
    ]


STEPS = {rank: [f"llama_rank_{rank}-1_{step}.ckpt" for step in (2, 4, 6)] for rank in range(3)}


def test_the_last_by_name_on_every_rank(tmp_path: Path) -> None:
    root = saved(tmp_path / "ck", STEPS)
    assert chosen(root, 3) == [[f"rank_{rank}/llama_rank_{rank}-1_6.ckpt"] for rank in range(3)]
    wanted = chosen(root, 3, resume_training="llama_rank_0-1_4.ckpt")
    assert wanted == [[f"rank_{rank}/llama_rank_{rank}-1_4.ckpt"] for rank in range(3)]


def test_each_rank_lists_its_own_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = saved(tmp_path / "ck", STEPS)
    listed: list[str] = []
    scandir = os.scandir

    def counted(path: Any) -> Any:
        listed.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    chosen(root, 3)
    in_root = [path for path in listed if path.startswith(str(root))]
    # The main rank looks at the names of the folders, too.
    assert sorted(in_root) == [str(root), *(str(root / f"rank_{rank}") for rank in range(3))]


def test_ranks_of_different_steps_are_named_on_all_ranks(tmp_path: Path) -> None:
    """The newest step is there on rank 0 too, so it is no older folder: nothing tells which is meant."""
    root = saved(tmp_path / "ck", {0: ["a-1_4.ckpt", "b-1_6.ckpt"], 1: ["a-1_4.ckpt"], 2: ["a-1_6.ckpt"]})
    found = chosen(root, 3)
    assert len(set(found)) == 1
    assert "of different epochs and steps" in found[0]


def test_a_restarted_job_goes_on_at_the_last_step_that_all_ranks_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = saved(tmp_path / "ck", {**STEPS, 1: [f"llama_rank_1-1_{step}.ckpt" for step in (2, 4)]})
    wanted = [[f"rank_{rank}/llama_rank_{rank}-1_4.ckpt"] for rank in range(3)]
    assert chosen(root, 3, resume_training=True) == wanted
    assert "1_4, the last whole step that all ranks have, is resumed" in caplog.text
    # A last file that is cut off is not a step to go on at.
    cut = root / "rank_2" / "llama_rank_2-1_4.ckpt"
    cut.write_bytes(cut.read_bytes()[:-3])
    assert chosen(root, 3, resume_training=True) == [[f"rank_{rank}/llama_rank_{rank}-1_2.ckpt"] for rank in range(3)]


def test_a_folder_whose_rank_is_not_clear(tmp_path: Path) -> None:
    root = saved(tmp_path / "ck", {rank: ["a.ckpt"] for rank in range(2)})
    for rank in range(2):
        write_tensors(root / f"Rank_{rank}" / "a.ckpt", MODEL)
    config = Config.from_mapping({"load_checkpoint": root})

    def find(cluster: Cluster) -> Any:
        with cluster.step("find"):
            return find_own_files(config, cluster)

    for error in on_ranks(2, find):
        assert "'Rank_0' is almost the name of a rank's folder" in error


def test_a_rank_whose_files_are_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = saved(tmp_path / "ck", {0: ["a.ckpt"], 1: []})
    assert chosen(root, 3) == [["rank_0/a.ckpt"], [], []]
    assert "has no file for ranks 1-2" in caplog.text


def test_complete_weights_are_those_of_all_ranks(tmp_path: Path) -> None:
    file = write_tensors(tmp_path / "whole" / "a.ckpt", MODEL)
    assert chosen(file.parent, 2) == [["a.ckpt"]] * 2
    root = saved(tmp_path / "one", {0: ["a.ckpt"]})
    assert chosen(root, 2) == [["rank_0/a.ckpt"]] * 2


@pytest.mark.parametrize(
    ("files", "nothing"),
    [({}, True), ({0: [], 1: []}, True), ({0: ["a.ckpt"], 1: []}, False), ({1: ["a.ckpt"]}, False)],
)
def test_a_folder_without_a_checkpoint(tmp_path: Path, files: dict[int, list[str]], nothing: bool) -> None:
    (tmp_path / "ck").mkdir()
    root = saved(tmp_path / "ck", files)
    assert on_ranks(2, lambda cluster: holds_nothing(str(root), cluster)) == [nothing] * 2
    assert on_ranks(2, lambda cluster: holds_nothing(str(root / "nowhere"), cluster)) == [False] * 2
