"""The hook on a network that MindSpore itself compiles in parallel (its front end alone, on CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

from forks import Fork, template
from frontend import is_possible
from recorded import Tensor, write_tensors

from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.strategy.files import read_strategy

PROGRAM = Path(__file__).with_name("compiled_rank.py")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not is_possible(), reason="this build of MindSpore does not compile the front end alone"),
]

# Whole values; the network cuts `w` by columns and `b` by elements.
WEIGHTS = {"w": np.arange(64.0).reshape(8, 8), "b": np.arange(8.0)}
STATES = {f"{kind}.{name}": value + 100 for kind in ("moment1", "moment2") for name, value in WEIGHTS.items()}


def write(path: Path, values: dict[str, np.ndarray[Any, Any]]) -> Path:
    kind = by_name("float32")
    return write_tensors(path, {name: Tensor(kind, value.astype("f4").view("u4")) for name, value in values.items()})


def part(values: dict[str, np.ndarray[Any, Any]], rank: int) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.ascontiguousarray(np.split(value, 2, axis=-1)[rank]) for name, value in values.items()}


def start_fork(words: list[str], environment: Mapping[str, str], folder: Path) -> Fork:
    return template(PROGRAM.stem, folder=PROGRAM.parent).start(words, environment, folder)


def start_python(words: list[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)


def run(
    folder: Path, case: str, ranks: int = 2, start: Callable[..., Any] = start_fork, **keys: Any
) -> tuple[list[int], list[dict[str, Any]], str]:
    """Exit codes, what the ranks say, and the log."""
    from test_cluster import free_address

    config = json.dumps({"output_dir": folder / "output", "transform_timeout": 100, **keys}, default=str)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", PROGRAM.parent))),
        "MINDFORMERS_CKPT_MASTER": f"127.0.0.1:{free_address().port}",
    }
    roles = [{"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": str(ranks), "MS_NODE_ID": str(rank)} for rank in range(ranks)]
    if case == "dry run":
        roles = [{"MS_SIMULATION_LEVEL": "0", "RANK_SIZE": "2", "RANK_ID": str(ranks - 1)}]
    words = [str(PROGRAM), config, case, str(folder)]
    processes = [start(words, {**environment, **role}, folder) for role in roles]
    log = "".join(process.communicate(timeout=250)[1] for process in processes)
    files = sorted(folder.glob("[0-9]*.json"))
    return [process.returncode for process in processes], [json.loads(file.read_text()) for file in files], log


def assert_holds(said: list[dict[str, Any]], values: dict[str, np.ndarray[Any, Any]], log: str) -> None:
    for rank, of_rank in enumerate(said):
        assert "error" not in of_rank, of_rank["error"]
        for name, value in part(values, rank).items():
            assert np.array_equal(of_rank["held"][name], value), (name, log)


@pytest.mark.parametrize("case", ["plain", "set after prepare", "evaluation between"])
def test_slices_are_those_that_mindspore_cuts(tmp_path: Path, case: str) -> None:
    """Also where MindSpore writes no strategy, or writes over it: it keeps the layouts of what it has compiled."""
    whole = write(tmp_path / "whole.ckpt", {**WEIGHTS, **STATES})
    start = start_python if case == "plain" else start_fork
    codes, said, log = run(tmp_path, case, start=start, load_checkpoint=whole, auto_trans_ckpt=True)
    assert_holds(said, {**WEIGHTS, **STATES}, log)
    assert codes == [0, 0]
    strategy = read_strategy(tmp_path / "output" / "strategy")
    assert strategy.names() == {*WEIGHTS, *STATES}
    assert [layout.cuts for layout in (strategy.layout("w", 0), strategy.layout("moment2.b", 0)) if layout] == [
        (1, 2),
        (2,),
    ]
    assert ("added from the compiled network" in log) == (case != "plain")
    # Counters that the checkpoint lacks are said once; nothing else is worth a warning.
    warnings = [line for line in log.splitlines() if "mindformers_ckpt WARNING" in line]
    assert len(warnings) == 1
    assert "counters of the training that are not in the source" in warnings[0]
    # MindSpore marks what is the rank's own.
    assert all(said[0]["sliced"].values())


def test_a_network_from_the_compile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore then cuts nothing and writes no strategy, but keeps the layouts."""
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    monkeypatch.setenv("MS_COMPILER_CACHE_PATH", str(tmp_path / "cache"))
    whole = write(tmp_path / "whole.ckpt", {**WEIGHTS, **STATES})
    for is_cached in (False, True):
        codes, said, log = run(tmp_path, "plain", load_checkpoint=whole, auto_trans_ckpt=True)
        assert ("Use the compilation cache" in log) == is_cached
        assert_holds(said, {**WEIGHTS, **STATES}, log)
        assert codes == [0, 0]
        assert ("added from the compiled network" in log) == is_cached
        strategy = read_strategy(tmp_path / "output" / "strategy")
        layouts = [strategy.layout(name, 0) for name in ("w", "moment1.w", "b")]
        assert [layout.cuts for layout in layouts if layout] == [(1, 2), (1, 2), (2,)]


def test_a_parallel_network_without_strategy_is_not_taken_for_data_parallel(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.ckpt", WEIGHTS)
    codes, said, _ = run(tmp_path, "reset after prepare", load_checkpoint=whole, auto_trans_ckpt=True)
    assert codes == [1, 1]
    for of_rank in said:
        assert "the network is parallel, but MindSpore wrote no strategy" in of_rank["error"]
        assert "set the auto-parallel context first, then call hook.prepare()" in of_rank["error"]


@pytest.fixture(scope="module")
def strategy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The strategy of the network, as a job has left it; it is only read."""
    folder = tmp_path_factory.mktemp("job")
    codes, _, log = run(folder, "plain", load_checkpoint=write(folder / "w.ckpt", WEIGHTS), auto_trans_ckpt=True)
    assert codes == [0, 0], log
    return folder / "output" / "strategy"


@pytest.mark.parametrize("auto", [True, False])
def test_redundancy_was_removed_when_it_was_saved(tmp_path: Path, strategy: Path, auto: bool) -> None:
    """What is alike on all ranks, here a counter, is in one rank's file alone."""
    kind = by_name("int32")
    for rank in range(2):
        values = part({**WEIGHTS, **STATES}, rank)
        tensors = {name: Tensor(by_name("float32"), value.astype("f4").view("u4")) for name, value in values.items()}
        if rank == 1:
            tensors["global_step"] = Tensor(kind, np.array([7], "u4"))
        write_tensors(tmp_path / "ck" / f"rank_{rank}" / "net.ckpt", tensors)
    keys: dict[str, Any] = {"load_checkpoint": tmp_path / "ck", "src_strategy_path_or_dir": strategy}
    codes, said, log = run(tmp_path, "plain", auto_trans_ckpt=auto, **keys)
    assert codes == [0, 0], said
    assert_holds(said, {**WEIGHTS, **STATES}, log)
    assert [of_rank["held"]["global_step"] for of_rank in said] == [[7], [7]]


LAYERS = {name: np.arange(64.0).reshape(8, 8) + start for name, start in (("first.w", 0), ("last.w", 500))}
MOMENTS = {f"{kind}.{name}": value + 1000 for kind in ("moment1", "moment2") for name, value in LAYERS.items()}


def of_stage(rank: int) -> dict[str, np.ndarray[Any, Any]]:
    """What a rank of the pipeline holds: two stages of two ranks."""
    return {name: value for name, value in {**LAYERS, **MOMENTS}.items() if ("first" in name) == (rank < 2)}


def assert_is_pipeline(said: list[dict[str, Any]], codes: list[int], log: str) -> None:
    assert codes == [0] * 4, said
    for rank, of_rank in enumerate(said):
        for name, value in {**LAYERS, **MOMENTS}.items():
            if name in of_stage(rank):
                own = np.split(value, 2, axis=-1)[rank % 2]
            else:  # MindSpore keeps the parameters of other stages as they were made
                own = np.full((8, 8), -1 if name in LAYERS else 0)
            assert np.array_equal(of_rank["held"][name], own), (rank, name, log)
    # Parameters of other stages are not missing.
    assert not [line for line in log.splitlines() if "WARNING" in line and "mindformers_ckpt" in line and ".w" in line]


@pytest.mark.slow
def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    """From complete weights into two stages, from these into one, and back."""
    for folder in ("pipeline", "one", "again"):
        (tmp_path / folder).mkdir()
    whole = write(tmp_path / "whole.ckpt", {**LAYERS, **MOMENTS})
    codes, said, log = run(tmp_path / "pipeline", "pipeline", 4, load_checkpoint=whole, auto_trans_ckpt=True)
    assert_is_pipeline(said, codes, log)
    for rank in range(4):
        write(tmp_path / "staged" / f"rank_{rank}" / "net.ckpt", part(of_stage(rank), rank % 2))
    keys: dict[str, Any] = {"auto_trans_ckpt": True, "load_checkpoint": tmp_path / "staged"}
    strategy = tmp_path / "pipeline" / "output" / "strategy"
    codes, said, log = run(tmp_path / "one", "layers", **keys, src_strategy_path_or_dir=strategy)
    assert codes == [0, 0], said
    assert_holds(said, {**LAYERS, **MOMENTS}, log)
    for rank in range(2):
        write(tmp_path / "flat" / f"rank_{rank}" / "net.ckpt", part({**LAYERS, **MOMENTS}, rank))
    keys["load_checkpoint"] = tmp_path / "flat"
    strategy = tmp_path / "one" / "output" / "strategy"
    codes, said, log = run(tmp_path / "again", "pipeline", 4, **keys, src_strategy_path_or_dir=strategy)
    assert_is_pipeline(said, codes, log)


def test_a_dry_run_gives_the_strategy_of_its_rank(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"only_save_strategy": True, "load_checkpoint": "/nowhere"}
    codes, _, log = run(tmp_path, "dry run", **keys)
    assert codes == [0], log
    file = tmp_path / "output" / "strategy" / "ckpt_strategy_rank_1.ckpt"
    assert f"dry run: the strategy of rank 1 is in {file}" in log
    assert read_strategy(file).names() == {*WEIGHTS, *STATES}
