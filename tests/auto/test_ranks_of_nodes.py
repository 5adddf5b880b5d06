"""Ranks of two nodes, with a disk that both see and without."""
# ruff: noqa: F811 (fixtures of rank_jobs)

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import ROOT, TARGET, TWO_NODES, Source, assert_loaded, expected, old_results, results, run, source  # noqa: F401
from recorded import write_tensors


@pytest.mark.parametrize("processes", [1, 3])
def test_two_nodes_with_a_shared_disk(run: Any, source: Source, tmp_path: Path, processes: int) -> None:
    keys = {**source.keys, "output_dir": tmp_path / "output", "transform_process_num": processes}
    outcomes = run({**keys, "transform_by_rank": True}, nodes=TWO_NODES).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    copying = [rank for rank, outcome in enumerate(outcomes) if "GB/s" in outcome.log]
    assert copying == ([0] if processes == 1 else [0, 2])
    assert not list((tmp_path / "output").glob(".shared-disk-*"))


def test_two_nodes_that_see_different_sources(run: Any, source: Source, tmp_path: Path) -> None:
    folders = {"alpha": tmp_path / "a", "beta": tmp_path / "b"}
    for folder in folders.values():
        shutil.copytree(source.folder, folder / "llama")
    file = folders["beta"] / "llama" / "rank_3" / "checkpoint_3.ckpt"
    write_tensors(file, {"lm_head.weight": source.tensors["lm_head.weight"]})
    keys = {**source.keys, "load_checkpoint": "llama", "output_dir": tmp_path / "output", "transform_process_num": 2}
    outcomes = run(keys, nodes=TWO_NODES, folders=folders).outcomes()
    assert all(outcome.code == 1 for outcome in outcomes)
    assert all("rank 2 failed" in outcome.error or outcome is outcomes[2] for outcome in outcomes)


def test_two_nodes_without_a_shared_disk(run: Any, source: Source, tmp_path: Path) -> None:
    """Refused before anything is cleared; then the guide's way, with the commands that the error names."""
    folders = {"alpha": tmp_path / "a", "beta": tmp_path / "b"}
    before = {}
    for name, folder in folders.items():
        before[name] = old_results(folder / "output")
    job = run({**source.keys, "output_dir": "output"}, nodes=TWO_NODES, folders=folders)
    outcomes = job.outcomes()
    for outcome in outcomes:
        assert "is not shared by all nodes:\n  ranks 2-3 do not see what rank 0 writes" in outcome.error
        assert "Nothing was cleared" in outcome.error
    for name, folder in folders.items():
        assert results(folder / "output") == before[name]
        assert {path.name for path in (folder / "output").iterdir()} == {"strategy", "transformed_checkpoint"}

    strategies = run({"only_save_strategy": True, "output_dir": "output"}, nodes=TWO_NODES, folders=folders)
    assert [outcome.code for outcome in strategies.outcomes()] == [0] * 4
    for name, ranks in (("alpha", (0, 1)), ("beta", (2, 3))):
        found = {path.name for path in (folders[name] / "output" / "strategy").iterdir()}
        assert found == {f"ckpt_strategy_rank_{rank}.ckpt" for rank in ranks}

    output = folders["alpha"] / "output"
    scp, command, share = (line.strip() for line in outcomes[0].error.splitlines() if line.startswith("     "))
    assert scp == f"scp beta:{output}/strategy/ckpt_strategy_rank_* {output}/strategy/"
    shutil.copytree(folders["beta"] / "output" / "strategy", output / "strategy", dirs_exist_ok=True)
    words = shlex.split(command)
    assert words[0] == "mindformers-ckpt"
    subprocess.run([sys.executable, "-m", "mindformers_ckpt", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    result = output / "offline_checkpoint"
    assert share == (f"ssh beta mkdir -p {result} && scp -r {result}/rank_2 {result}/rank_3 beta:{result}/")
    (folders["beta"] / "output" / "offline_checkpoint").mkdir()
    for rank in (2, 3):
        shutil.move(result / f"rank_{rank}", folders["beta"] / "output" / "offline_checkpoint")

    keys = {"load_checkpoint": "output/offline_checkpoint", "output_dir": "output"}
    loading = run(keys, nodes=TWO_NODES, folders=folders)
    assert_loaded(loading.outcomes(), expected(TARGET, source.tensors))


def test_a_node_that_dies(run: Any, source: Source, tmp_path: Path) -> None:
    output = tmp_path / "output"
    before = old_results(output)
    keys = {**source.keys, "output_dir": output, "transform_process_num": 2, "transform_by_rank": True}
    outcomes = run(keys, nodes=TWO_NODES, faults={2: "transform", 3: "wait"}).outcomes()
    for outcome in outcomes[:2]:
        assert re.search(r"rank [23]\b.* died", outcome.error)
    assert results(output) == before
    assert_loaded(run(keys, nodes=TWO_NODES).outcomes(), expected(TARGET, source.tensors))
