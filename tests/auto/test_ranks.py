"""Several ranks, each a process with the environment that msrun sets: the whole hook, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from checkpoint2_files import COMMON, write_checkpoint2
from recorded import STRATEGIES, Recorded, Tensor, random_model, recorded, slices_of, write_ranks, write_tensors

from mindformers_ckpt.formats.ckpt_crc import append_crc
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job.cluster.environment import PORT_OFFSET
from mindformers_ckpt.publish.manifest import read_manifests
from mindformers_ckpt.strategy.files import read_strategy, write_strategy

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("rank.py")
TIMEOUT = 60.0  # transform_timeout of the jobs
TARGET = "pp4"  # 4 stages of one rank: the strategies are merged

Tensors = Mapping[str, Tensor]


class Outcome(NamedTuple):
    """How a rank ended: exit code, the digests of what it loaded, its error, and what it logged."""

    code: int
    loaded: dict[str, str] | None
    error: str
    log: str
    requests: dict[str, int] | None = None


class Job:
    """Ranks of one job, started as processes."""

    def __init__(self, config: Mapping[str, Any], ranks: int = 4, live: str | None = TARGET, **about: Any) -> None:
        faults: Mapping[int, str] = about.pop("faults", {})
        nodes: Sequence[str] = about.pop("nodes", ("node",) * ranks)
        folders: Mapping[str, Path] = about.pop("folders", {})
        self.mark = uuid.uuid4().hex
        port = about.pop("port", free_port())
        self.processes = []
        for rank in range(ranks):
            job = {"config": {"transform_timeout": TIMEOUT, **config}, "live": live, "fault": faults.get(rank), **about}
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "MS_ROLE": "MS_WORKER",
                "MS_WORKER_NUM": str(ranks),
                "MS_NODE_ID": str(rank),
                "MS_SCHED_HOST": "127.0.0.1",
                "MS_SCHED_PORT": str(port - PORT_OFFSET),
                "MINDFORMERS_CKPT_NODE": nodes[rank],
                "JOB_MARK": self.mark,
            }
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            command = [sys.executable, str(PROGRAM), json.dumps(job, default=str)]
            folder = folders.get(nodes[rank], ROOT)
            self.processes.append(subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes))

    def outcomes(self, within: float = 120.0) -> list[Outcome]:
        """Wait for all ranks, and see that they left no process behind."""
        until = time.monotonic() + within
        found = []
        for process in self.processes:
            output, log = process.communicate(timeout=max(until - time.monotonic(), 0.1))
            lines = [line for line in output.splitlines() if line.startswith("{")]
            said = json.loads(lines[-1]) if lines else {}
            found.append(
                Outcome(process.returncode, said.get("loaded"), said.get("error", ""), log, said.get("requests"))
            )
        left = self.left()
        until = time.monotonic() + 5
        while left and time.monotonic() < until:
            time.sleep(0.05)
            left = self.left()
        assert left == []
        return found

    def left(self) -> list[int]:
        """Processes that carry the job's mark."""
        marked = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("JOB_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    marked.append(process.pid)
            except (psutil.Error, OSError):
                continue
        return marked

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def run() -> Iterator[Any]:
    jobs: list[Job] = []

    def start(*arguments: Any, **options: Any) -> Job:
        jobs.append(Job(*arguments, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def free_port() -> int:
    from test_cluster import free_address

    return free_address().port


def digests(tensors: Tensors) -> dict[str, str]:
    return {name: hashlib.blake2b(tensor.bits.tobytes(), digest_size=8).hexdigest() for name, tensor in tensors.items()}


def model_of(config: Recorded, seed: int = 0) -> dict[str, Tensor]:
    shapes = {name: item.full_shape for name, item in config.parameters.items() if not name.startswith("accu_grads")}
    return random_model({**shapes, "global_step": (1,)}, seed)


def expected(target: str, tensors: Tensors, ranks: int = 4) -> list[dict[str, str]]:
    """What the ranks of a recorded configuration should hold."""
    parts = slices_of(recorded(target), tensors, replicated=("global_step",))
    return [digests(parts[rank]) for rank in range(ranks)]


class Source(NamedTuple):
    folder: Path
    strategy: Path
    tensors: dict[str, Tensor]

    @property
    def keys(self) -> dict[str, Any]:
        return {"load_checkpoint": self.folder, "src_strategy_path_or_dir": self.strategy, "auto_trans_ckpt": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The checkpoint of 8 ranks, dp2 mp2 pp2, with optimizer state."""
    config = recorded("dp2mp2pp2")
    tensors = model_of(config)
    parts = slices_of(config, tensors, replicated=("global_step",))
    return Source(write_ranks(tmp_path_factory.mktemp("source") / "llama", parts), config.folder, tensors)


def results(output: Path) -> dict[str, bytes]:
    """The contents of the strategy folder and of the transformed checkpoint."""
    folders = [output / "strategy", output / "transformed_checkpoint"]
    files = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def old_results(output: Path) -> dict[str, bytes]:
    """Make results of an earlier job."""
    for name in ("strategy/ckpt_strategy_rank_0.ckpt", "transformed_checkpoint/llama/rank_0/checkpoint_0.ckpt"):
        (output / name).parent.mkdir(parents=True)
        (output / name).write_text(f"old {name}")
    return results(output)


def assert_loaded(outcomes: Sequence[Outcome], wanted: Sequence[Mapping[str, str]]) -> None:
    for outcome, tensors in zip(outcomes, wanted):
        assert outcome.code == 0, outcome.error or outcome.log
        assert outcome.loaded == tensors


# ----------------------------------------------------------------------------------------- the main job


@pytest.mark.parametrize(("processes", "by_rank"), [(1, False), (3, True)])
def test_sharded_weights_for_a_pipeline(
    run: Any, source: Source, tmp_path: Path, processes: int, by_rank: bool
) -> None:
    output = tmp_path / "output"
    old_results(output)
    keys = {"output_dir": output, "transform_process_num": processes, "transform_by_rank": by_rank}
    outcomes = run({**source.keys, **keys}).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    names = {f"ckpt_strategy_rank_{rank}.ckpt" for rank in range(4)} | {"merged_ckpt_strategy.ckpt"}
    assert {path.name for path in (output / "strategy").iterdir()} == names
    assert read_strategy(output / "strategy" / "merged_ckpt_strategy.ckpt").rank_count == 4
    files = sorted((output / "transformed_checkpoint").rglob("*.ckpt"))
    assert [str(file.relative_to(output)) for file in files] == [
        f"transformed_checkpoint/llama/rank_{rank}/checkpoint_{rank}.ckpt" for rank in range(4)
    ]
    manifest = read_manifests(output / "transformed_checkpoint").get("manifest.json")
    assert manifest is not None
    assert len(manifest["files"]) == 4
    if processes > 2:
        assert "transform_process_num: 2 processes are used on this node instead of 3" in outcomes[0].log


def test_without_the_detour_nothing_is_written(run: Any, source: Source, tmp_path: Path) -> None:
    """`auto_trans_save: False`: every rank reads its own parts of the source."""
    output = tmp_path / "output"
    outcomes = run({**source.keys, "output_dir": output, "auto_trans_save": False}).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    assert not (output / "transformed_checkpoint").exists()
    assert read_strategy(output / "strategy" / "merged_ckpt_strategy.ckpt").rank_count == 4


def many_ranks(folder: Path, ranks: int) -> Source:
    """A checkpoint of so many ranks, mp4, the files of which are four with many names."""
    recorded_shapes = recorded(TARGET)
    tensors = model_of(recorded_shapes)
    layouts = {
        name: Layout.on({"dp": ranks // 4, "mp": 4}, "mp", *[None] * (tensor.bits.ndim - 1))
        for name, tensor in tensors.items()
        if tensor.bits.shape[0] % 4 == 0
    }
    parts = {
        rank: {
            name: tensor.part(layouts[name].box(tensor.bits.shape, rank)) if name in layouts else tensor
            for name, tensor in tensors.items()
        }
        for rank in range(4)
    }
    source = write_ranks(folder / "llama", parts)
    for rank in range(4, ranks):
        (file,) = (source / f"rank_{rank % 4}").iterdir()
        (source / f"rank_{rank}").mkdir()
        os.link(file, source / f"rank_{rank}" / file.name.replace(f"{rank % 4}", f"{rank}"))
    write_strategy(layouts, folder / "strategy.ckpt", 0)
    return Source(source, folder / "strategy.ckpt", tensors)


def test_requests_of_a_rank_do_not_grow_with_the_source(run: Any, tmp_path: Path) -> None:
    """`auto_trans_save: False`: one rank looks at the files of all, and tells the others what is theirs."""
    source = many_ranks(tmp_path, 1024)
    keys = {**source.keys, "output_dir": tmp_path / "output", "auto_trans_save": False}
    outcomes = run(keys, counted=str(tmp_path)).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    counted = [outcome.requests for outcome in outcomes]
    main, *others = (sum(requests.values()) for requests in counted if requests is not None)
    assert 2 * 1024 < main < 6 * 1024, counted
    assert max(others) <= 40, counted


def test_complete_weights_for_model_parallelism(run: Any, tmp_path: Path) -> None:
    """No pipeline: nothing is merged (guide). Of predict the network's parameters are taken alone."""
    config = recorded("mp4_infer")
    weights = random_model({name: item.full_shape for name, item in config.parameters.items()})
    whole = {**weights, **random_model({"adam_m.lm_head.weight": (256, 64)})}
    file = write_tensors(tmp_path / "llama.safetensors", whole)
    keys = {"load_checkpoint": file, "auto_trans_ckpt": True, "run_mode": "predict", "output_dir": tmp_path / "output"}
    job = run({**keys, "load_ckpt_format": "safetensors"}, live="mp4_infer", names=list(weights))
    parts = slices_of(config, weights)
    assert_loaded(job.outcomes(), [digests(parts[rank]) for rank in range(4)])
    assert sorted(path.name for path in (tmp_path / "output" / "strategy").iterdir()) == [
        f"ckpt_strategy_rank_{rank}.ckpt" for rank in range(4)
    ]
    result = tmp_path / "output" / "transformed_checkpoint" / "llama" / "rank_2" / "checkpoint_2.safetensors"
    assert result.stat().st_size < file.stat().st_size / 2


@pytest.mark.parametrize("saved", [True, False])
def test_a_stage_that_has_a_parameter_in_no_strategy(run: Any, tmp_path: Path, saved: bool) -> None:
    """The main rank, which plans for all, does not have it; nor does it know by the strategy that others do."""
    config = recorded(TARGET)
    tensors = {**model_of(config), **random_model({"table": (8,), "unwanted": (8,)})}
    parts = slices_of(config, tensors, replicated=("table",))
    wanted = [{name: parts[rank][name] for name in parts[rank] if name != "table" or rank == 3} for rank in range(4)]
    file = write_tensors(tmp_path / "llama.ckpt", tensors)
    keys = {"load_checkpoint": file, "auto_trans_ckpt": True, "run_mode": "predict", "auto_trans_save": saved}
    names = {str(rank): list(held) for rank, held in enumerate(wanted)}
    outcomes = run({**keys, "output_dir": tmp_path / "output"}, names=names).outcomes()
    assert_loaded(outcomes, [digests(held) for held in wanted])


@pytest.mark.parametrize("auto", [True, False])
def test_the_same_strategy_is_loaded_as_it_is(run: Any, tmp_path: Path, auto: bool) -> None:
    config = recorded(TARGET)
    tensors = model_of(config)
    folder = write_ranks(tmp_path / "llama", slices_of(config, tensors, replicated=("global_step",)))
    strategy = tmp_path / "strategy.ckpt"
    shutil.copy(config.file, strategy)
    output = tmp_path / "output"
    old_results(output)
    keys = {"load_checkpoint": folder, "src_strategy_path_or_dir": strategy, "auto_trans_ckpt": auto}
    outcomes = run({**keys, "output_dir": output}).outcomes()
    assert_loaded(outcomes, expected(TARGET, tensors))
    assert (output / "transformed_checkpoint").exists() != auto


def without_redundancy(parts: Mapping[int, Tensors], spared: Sequence[str] = ()) -> dict[int, dict[str, Tensor]]:
    """Every distinct shard on one of the ranks that hold it, in turn, as MindSpore saves with remove_redundancy."""
    holders: dict[tuple[str, bytes], list[int]] = {}
    for rank, tensors in parts.items():
        for name, tensor in tensors.items():
            holders.setdefault((name, tensor.bits.tobytes()), []).append(rank)
    keepers = {key: ranks[number % len(ranks)] for number, (key, ranks) in enumerate(holders.items())}
    return {
        rank: {
            name: tensor
            for name, tensor in tensors.items()
            if name in spared or keepers[name, tensor.bits.tobytes()] == rank
        }
        for rank, tensors in parts.items()
    }


@pytest.mark.parametrize("how", ["saved", "direct", "as it is", "as it is, no strategy", "a rank is lost"])
def test_the_same_strategy_with_redundancy_removed(run: Any, tmp_path: Path, how: str) -> None:
    """Each rank's file has a share only; the rest comes from the files of others, whatever the keys say."""
    config = recorded("dp2mp2_tied")
    tensors = model_of(config)
    parts = slices_of(config, tensors, replicated=("global_step",))
    held: Mapping[int, Tensors] = without_redundancy(parts)
    if how == "a rank is lost":
        held = {rank: of_rank for rank, of_rank in parts.items() if rank != 3}
    folder = write_ranks(tmp_path / "llama", held)
    strategy = tmp_path / "strategy.ckpt"
    shutil.copy(config.file, strategy)
    keys = {
        "load_checkpoint": folder,
        "src_strategy_path_or_dir": strategy,
        "auto_trans_ckpt": how in ("saved", "direct"),
    }
    if how == "direct":
        keys["auto_trans_save"] = False
    if how == "as it is, no strategy":
        del keys["src_strategy_path_or_dir"]
    names = [name for name in parts[0] if name != "global_step"]
    outcomes = run({**keys, "output_dir": tmp_path / "output"}, live="dp2mp2_tied", names=names).outcomes()
    assert_loaded(outcomes, [digests(parts[rank]) for rank in range(4)])
    assert (tmp_path / "output" / "transformed_checkpoint").exists() == (how == "saved")


@pytest.mark.parametrize("how", ["re-sliced", "as it is", "shares", "other strategy, as it is"])
def test_checkpoint_2_brings_its_layouts(run: Any, tmp_path: Path, how: str) -> None:
    """`load_checkpoint: save path` of MindFormers' own format; no source strategy is named."""
    saved = "dp2mp2pp2" if how in ("re-sliced", "other strategy, as it is") else "dp2mp2_tied"
    live = TARGET if saved == "dp2mp2pp2" else saved
    tensors = model_of(recorded(saved))
    counters = {"global_step": tensors.pop("global_step")}
    strategy = recorded(saved).strategy

    def writes(name: str, rank: int) -> bool:
        """Of shares the last rank that holds a slice saves it."""
        cells = strategy.stages[strategy.stage_of(rank)][name].cells
        inner = rank % strategy.stage_size
        return how != "shares" or cells[inner] not in cells[inner + 1 :]

    write_checkpoint2(tmp_path / "saved", tensors, strategy, counters=counters, writes=writes)
    keys = {"load_checkpoint": tmp_path / "saved", "auto_trans_ckpt": how == "re-sliced"}
    names = list(slices_of(recorded(live), tensors)[0]) if live != TARGET else []
    outcomes = run({**keys, "output_dir": tmp_path / "output"}, live=live, names=names).outcomes()
    if how == "other strategy, as it is":
        assert all("was saved under another strategy" in outcome.error for outcome in outcomes)
        return
    parts = slices_of(recorded(live), {**tensors, **counters}, replicated=("global_step",))
    for rank, outcome in enumerate(outcomes):
        assert outcome.loaded is not None, outcome.error
        added = set(COMMON) - {"global_step"} if how in ("re-sliced", "shares") else set()  # where a plan is run
        assert outcome.loaded.keys() - digests(parts[rank]).keys() == added
        assert outcome.loaded.items() >= digests(parts[rank]).items()
    assert (tmp_path / "output" / "transformed_checkpoint").exists() == (how == "re-sliced")


@pytest.mark.parametrize("auto", [True, False])
def test_a_weight_that_nobody_holds_is_an_error(run: Any, tmp_path: Path, auto: bool) -> None:
    config = recorded("mp4_infer")
    tensors = random_model({name: item.full_shape for name, item in config.parameters.items()})
    lost = "model.norm_out.weight"
    parts = slices_of(config, {name: tensor for name, tensor in tensors.items() if name != lost})
    folder = write_ranks(tmp_path / "llama", parts)
    strategy = tmp_path / "strategy.ckpt"
    shutil.copy(config.file, strategy)
    keys = {"load_checkpoint": folder, "src_strategy_path_or_dir": strategy, "auto_trans_ckpt": auto}
    about = {"live": "mp4_infer", "names": list(tensors)}
    outcomes = run({**keys, "output_dir": tmp_path / "output"}, **about).outcomes()
    assert all(f"- {lost}: not in the checkpoint" in outcome.error for outcome in outcomes)
    assert all("allow_missing" in outcome.error for outcome in outcomes)
    allowed = run({**keys, "output_dir": tmp_path / "output", "allow_missing": ["*.norm_out.*"]}, **about).outcomes()
    assert_loaded(allowed, [digests(parts[rank]) for rank in range(4)])
    assert "1 parameters keep their initial values (allow_missing): model.norm_out.weight" in allowed[0].log


def test_the_first_start_of_a_job_that_resumes(run: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "rank_0").mkdir(parents=True)
    keys = {"load_checkpoint": tmp_path / "checkpoint", "output_dir": tmp_path / "output", "auto_trans_ckpt": True}
    outcomes = run({**keys, "resume_training": True}, ranks=2, live=None).outcomes()
    assert [(outcome.code, outcome.loaded) for outcome in outcomes] == [(0, {})] * 2
    assert ["a first start, nothing is loaded" in outcome.log for outcome in outcomes] == [True, False]
    outcomes = run({**keys, "resume_training": False}, ranks=2, live=None).outcomes()
    assert [outcome.code for outcome in outcomes] == [1, 1]


@pytest.mark.parametrize("kind", ["complete", "sharded"])
def test_data_parallel_only(run: Any, source: Source, tmp_path: Path, kind: str) -> None:
    """MindSpore saves no strategy then: every rank takes the complete weights."""
    keys: dict[str, Any] = source.keys if kind == "sharded" else {"auto_trans_ckpt": True}
    if kind == "complete":
        keys["load_checkpoint"] = write_tensors(tmp_path / "llama.ckpt", source.tensors)
    outcomes = run({**keys, "output_dir": tmp_path / "output"}, ranks=2, live=None).outcomes()
    assert_loaded(outcomes, [digests(source.tensors)] * 2)
    made = list((tmp_path / "output").rglob("checkpoint_*.ckpt"))
    assert len(made) == (1 if kind == "sharded" else 0)


def test_only_the_strategy(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"
    old_results(output)
    outcomes = run({"only_save_strategy": True, "output_dir": output, "load_checkpoint": "/nowhere"}).outcomes()
    assert [(outcome.code, outcome.error) for outcome in outcomes] == [(0, "")] * 4
    assert read_strategy(output / "strategy").rank_count == 4
    assert (output / "strategy" / "merged_ckpt_strategy.ckpt").is_file()
    assert (output / "transformed_checkpoint" / "llama" / "rank_0" / "checkpoint_0.ckpt").read_text().startswith("old")


def test_without_the_switch_stale_strategies_do_no_harm(run: Any, tmp_path: Path) -> None:
    """A first job that loads nothing, in an output dir with the strategy of a larger one."""
    output = tmp_path / "output"
    shutil.copytree(STRATEGIES / "dp2mp2pp2", output / "strategy", ignore=shutil.ignore_patterns("slices.json"))
    outcomes = run({"output_dir": output}).outcomes()
    assert [(outcome.code, outcome.loaded) for outcome in outcomes] == [(0, {})] * 4
    assert "the strategy files of this job are not merged" in outcomes[0].log


def test_without_the_switch_another_strategy_is_told(run: Any, tmp_path: Path) -> None:
    """The strategy is given and the switch is off: the source does not match, and the error says what to do."""
    config = recorded("mp4_infer")
    tensors = random_model({name: item.full_shape for name, item in config.parameters.items()})
    folder = write_ranks(tmp_path / "llama", slices_of(config, tensors))
    keys = {"load_checkpoint": folder, "src_strategy_path_or_dir": config.file, "output_dir": tmp_path / "output"}
    errors = [outcome.error for outcome in run(keys).outcomes()]
    assert all("was saved under another strategy" in error for error in errors)
    assert all("set auto_trans_ckpt: True" in error for error in errors)


# ------------------------------------------------------------------------------------- what is refused


def test_a_strategy_of_other_size_than_the_job(run: Any, source: Source, tmp_path: Path) -> None:
    outcomes = run({**source.keys, "output_dir": tmp_path / "output"}, ranks=2, live="mp8").outcomes()
    assert all("is for 8 ranks, but this job has 2" in outcome.error for outcome in outcomes)


def test_all_ranks_say_what_is_wrong(run: Any, source: Source, tmp_path: Path) -> None:
    output = tmp_path / "output"
    before = old_results(output)
    keys = {"load_checkpoint": source.folder, "auto_trans_ckpt": True, "output_dir": output}
    errors = [outcome.error for outcome in run(keys).outcomes()]
    assert all("holds the shards of 8 ranks, but no source strategy is given" in error for error in errors)
    assert all(error.startswith("rank 0 failed in step 'prepare': ") for error in errors[1:])
    assert results(output) == before


def test_two_jobs_on_one_output_dir(run: Any, source: Source, tmp_path: Path) -> None:
    keys = {**source.keys, "output_dir": tmp_path / "output"}
    first = run(keys, ranks=1, live=None, pause=True)
    assert first.processes[0].stdout.readline() == "prepared\n"
    second = run(keys, ranks=2, live=None).outcomes()
    assert all(f"another job (process {first.processes[0].pid} on " in outcome.error for outcome in second)
    first.processes[0].stdin.write("\n")
    first.processes[0].stdin.flush()
    assert_loaded(first.outcomes(), [digests(source.tensors)])


# ---------------------------------------------------------------------------------------- what goes wrong


KILLED = r"rank {}\b.* died"  # "rank 3 on node:1f.. died", "rank 3, which coordinates, died"


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


# ------------------------------------------------------------------------------------------ several nodes

TWO_NODES = ("alpha", "alpha", "beta", "beta")


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


@pytest.mark.parametrize("saved", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_while_it_looks_at_the_source(run: Any, tmp_path: Path, saved: bool) -> None:
    source, output = many_ranks(tmp_path, 128), tmp_path / "output"
    before = old_results(output)
    keys = {**source.keys, "output_dir": output, "auto_trans_save": saved}
    began = time.monotonic()
    outcomes = run(keys, nodes=TWO_NODES, faults={0: "looking"}).outcomes()
    assert time.monotonic() - began < TIMEOUT
    assert outcomes[0].code == -signal.SIGKILL
    for outcome in outcomes[1:]:
        assert outcome.code == 1
        (line,) = outcome.error.splitlines()
        assert re.search(KILLED.format(0), line), line
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


@pytest.mark.parametrize("saved", [True, False])
def test_check_contents_decides_about_replicas_that_differ(
    run: Any, source: Source, tmp_path: Path, saved: bool
) -> None:
    """Rank 2 should repeat rank 0, but holds another model."""
    config = recorded("dp2mp2pp2")
    parts = slices_of(config, source.tensors, replicated=("global_step",))
    other = slices_of(config, model_of(config, seed=1), replicated=("global_step",))
    folder = write_ranks(tmp_path / "llama", {**parts, 2: other[2]})
    keys = {**source.keys, "load_checkpoint": folder, "auto_trans_save": saved, "output_dir": tmp_path / "output"}
    for outcome in run(keys).outcomes():
        assert "contradict its strategy" in outcome.error
        assert "check_contents: warn" in outcome.error
    outcomes = run({**keys, "check_contents": "warn"}).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    assert any("those of the first rank are taken for all" in outcome.log for outcome in outcomes)


def test_verify_checkpoint_finds_a_damaged_file(run: Any, source: Source, tmp_path: Path) -> None:
    """Of each file one rank compares the CRC-32; what it finds is an error of all."""
    folder = shutil.copytree(source.keys["load_checkpoint"], tmp_path / "llama")
    for path in folder.glob("rank_*/*.ckpt"):
        append_crc(path)
    keys = {**source.keys, "load_checkpoint": folder, "verify_checkpoint": True, "output_dir": tmp_path / "output"}
    assert_loaded(run(keys).outcomes(), expected(TARGET, source.tensors))
    (path,) = (folder / "rank_3").glob("*.ckpt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for outcome in run(keys).outcomes():
        assert str(path) in outcome.error
        assert "CRC-32" in outcome.error
