"""Automatic conversion in real jobs: msrun, several workers, MindSpore on CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import quickstart  # noqa: E402
from quickstart import Job, JobFailedError, Record  # noqa: E402
from recorded import read_tensors, write_tensors  # noqa: E402

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("mindspore") is None, reason="runs MindSpore jobs"),
]
needs_root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="makes network namespaces")

SMALL = ("--model.model_config.num_layers", "1", "--runner_config.steps", "2")
MESHES = {
    "one card": (0, ("--use_parallel", "False")),
    "dp2": (2, ("--parallel_config.data_parallel", "2", "--parallel_config.model_parallel", "1")),
    "mp2": (2, ("--parallel_config.data_parallel", "1", "--parallel_config.model_parallel", "2")),
}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    path = filter(None, [os.environ.get("PYTHONPATH"), str(ROOT), str(ROOT / "tests")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


def job_on(mesh: str, name: str, **keys: object) -> Job:
    workers, options = MESHES[mesh]
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value) or '""')]
    return Job(name, "", "pretrain_dp2mp2.yaml", workers, (*SMALL, *options, *words))


# ------------------------------------------------------------------------- source x target x strategy x auto


class Source(NamedTuple):
    checkpoint: Path
    strategy: Path | None
    record: Record


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Source]]:
    """Checkpoints of real jobs: complete, the same in two files, and of two ranks."""
    root = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        one_card = quickstart.run_job(job_on("one card", "one_card"), root / "one_card")
        two_cards = quickstart.run_job(job_on("mp2", "mp2"), root / "mp2")
    (whole,) = (root / "one_card" / "checkpoint" / "rank_0").glob("*.ckpt")
    tensors = list(read_tensors(whole).items())
    for number in range(2):
        write_tensors(root / "parts" / f"part_{number}.ckpt", dict(tensors[number::2]))
    yield {
        "complete": Source(whole, None, one_card),
        "several files": Source(root / "parts", None, one_card),
        "sharded": Source(root / "mp2" / "checkpoint", root / "mp2" / "strategy", two_cards),
    }


SWITCH_ON = "set auto_trans_ckpt: True"
CASES = [
    ("complete", "one card", "", False, ""),
    ("complete", "dp2", "", False, ""),
    ("complete", "mp2", "", False, SWITCH_ON),
    ("complete", "mp2", "", True, ""),
    ("complete", "dp2", "", True, ""),
    ("several files", "one card", "", False, ""),
    ("several files", "mp2", "", True, ""),
    ("sharded", "one card", "right", True, ""),
    ("sharded", "dp2", "right", True, ""),
    ("sharded", "mp2", "right", True, ""),  # equal: nothing is transformed
    ("sharded", "mp2", "right", False, ""),
    ("sharded", "mp2", "", False, ""),
    ("sharded", "dp2", "right", False, SWITCH_ON),
    ("sharded", "one card", "right", False, SWITCH_ON),
    ("sharded", "one card", "", True, "no source strategy is given; .* which could be .*/mp2/strategy"),
    ("sharded", "one card", "another", True, "holds no files of ranks \\[2, 3"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target", "strategy", "auto", "error"), CASES)
def test_the_table(
    sources: Mapping[str, Source], tmp_path: Path, source: str, target: str, strategy: str, auto: bool, error: str
) -> None:
    """What each combination gives; the same table is in docs/automatic.md."""
    given = sources[source]
    another = ROOT / "tests" / "data" / "strategies" / "dp2mp4" / "ckpt_strategy_rank_0.ckpt"
    chosen = {"": "", "right": given.strategy, "another": another}[strategy]
    keys = {"load_checkpoint": given.checkpoint, "src_strategy_path_or_dir": chosen, "auto_trans_ckpt": auto}
    job = job_on(target, "job", **keys)
    if error:
        with pytest.raises(JobFailedError, match=f"error: [^$]*({error})"):
            quickstart.run_job(job, tmp_path / "job")
        return
    record = quickstart.run_job(job, tmp_path / "job")
    assert quickstart.relative_difference(record.after_load, given.record.before_save) < quickstart.LOAD_TOLERANCE
    assert sorted(record.losses) == [3, 4]
    made = list((tmp_path / "job").rglob("transformed_checkpoint/*/rank_*/*.ckpt"))
    is_transformed = auto and (source, target) != ("sharded", "mp2")
    assert len(made) == (max(1, MESHES[target][0]) if is_transformed else 0)


def test_only_save_strategy_stops_all_workers_with_success(tmp_path: Path) -> None:
    workers, options = MESHES["mp2"]
    job = Job("job", "", "pretrain_dp2mp2.yaml", workers, (*SMALL, *options, "--only_save_strategy", "True"))
    with pytest.raises(JobFailedError, match="ended without an error, but logged no steps"):
        quickstart.run_job(job, tmp_path / "job")
    files = sorted(path.name for path in (tmp_path / "job" / "strategy").iterdir())
    assert files == ["ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt"]
    assert not (tmp_path / "job" / "checkpoint").exists()


# ------------------------------------------------------------------------------------------- several nodes


class Node(NamedTuple):
    """A node: how to run a command there, its name, and its working folder."""

    prefix: tuple[str, ...]
    name: str
    folder: Path


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes with addresses of their own: network namespaces, joined by a virtual cable."""
    mark = f"{os.getpid() % 10000}"
    names = [f"mfc{mark}a", f"mfc{mark}b"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        cable = ["link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]]
        subprocess.run(["ip", *cable], check=True)
        for number, name in enumerate(names):
            address = f"10.77.0.{number + 1}/24"
            subprocess.run(["ip", "-n", name, "addr", "add", address, "dev", "cable"], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "cable", "up"], check=True)
        found = []
        for number, name in enumerate(names):
            (tmp_path / f"node{number}").mkdir()
            found.append(Node(("ip", "netns", "exec", name), f"node{number}", tmp_path / f"node{number}"))
        yield found[0], found[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


class Ended(NamedTuple):
    """How the launcher ended on a node, and the logs of its workers by rank."""

    code: int
    logs: dict[int, str]


def launch(nodes: tuple[Node, Node], script: str, options: Mapping[str, object], within: float = 240) -> list[Ended]:
    """Call tools/msrun_launcher.sh on both nodes, as in the guide: 4 workers in all, 2 on each."""
    words = [script, "--config", str(ROOT / "configs" / "tiny_llama" / "pretrain_dp2mp2.yaml"), "--run_mode", "train"]
    words += [*SMALL, *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    started = []
    for number, node in enumerate(nodes):
        shutil.rmtree(node.folder / "logs", ignore_errors=True)
        command = [*node.prefix, "bash", str(ROOT / "tools" / "msrun_launcher.sh"), shlex.join(words)]
        command += ["4", "2", "10.77.0.1", "8118", str(number), "logs", "True", "120"]
        environment = {**quickstart.environment(), "MINDFORMERS_CKPT_NODE": node.name}
        started.append(
            subprocess.Popen(
                command, cwd=node.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )
    until = time.monotonic() + within
    try:
        codes = [process.wait(max(until - time.monotonic(), 1)) for process in started]
    finally:
        for process in started:
            quickstart.stop(process)
    ended = []
    for node, code in zip(nodes, codes):
        files = (node.folder / "logs").glob("worker_*.log")
        ended.append(Ended(code, {int(file.stem.split("_")[1]): file.read_text(errors="replace") for file in files}))
    return ended


@pytest.mark.slow
@needs_root
def test_two_nodes_with_a_shared_disk(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """The guide's way for several machines: the launcher with node_rank 0 and 1, then automatic conversion."""
    script = str(ROOT / "tools" / "run_mindformer.py")
    first = tmp_path / "shared" / "first"
    for ended in launch(nodes, script, {"output_dir": first}):
        assert ended.code == 0, ended.logs
    second = tmp_path / "shared" / "second"
    keys = {
        "output_dir": second,
        "load_checkpoint": first / "checkpoint",
        "src_strategy_path_or_dir": first / "strategy",
        "auto_trans_ckpt": True,
        "transform_process_num": 2,
        "transform_by_rank": True,
        "parallel_config.data_parallel": 1,
        "parallel_config.model_parallel": 4,
    }
    for ended in launch(nodes, script, keys):
        assert ended.code == 0, ended.logs
        # Each node has done its share.
        assert any("re-slicing: 0" in log for log in ended.logs.values()), ended.logs
    before, after = (quickstart.read_record(folder / "losses.jsonl") for folder in (first, second))
    assert quickstart.relative_difference(after.after_load, before.before_save) < quickstart.LOAD_TOLERANCE
    assert len(list((second / "transformed_checkpoint" / "checkpoint").glob("rank_*/*.ckpt"))) == 4


@pytest.mark.slow
@needs_root
def test_two_nodes_without_a_shared_disk(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """Refused before anything is cleared; then the guide's offline way to the end, by the commands of the error."""
    script = str(ROOT / "tools" / "run_mindformer.py")
    source = tmp_path / "source"
    quickstart.run_job(job_on("one card", "one_card"), source)
    (whole,) = (source / "checkpoint" / "rank_0").glob("*.ckpt")
    for node in nodes:
        (node.folder / "output" / "strategy").mkdir(parents=True)
        (node.folder / "output" / "strategy" / "old").touch()
    keys = {"output_dir": "output", "load_checkpoint": whole, "auto_trans_ckpt": True}
    refused = launch(nodes, script, keys)
    for node, ended in zip(nodes, refused):
        assert ended.code != 0
        for log in ended.logs.values():
            assert "is not shared by all nodes" in log
            assert "error: " in log
        assert [path.name for path in (node.folder / "output" / "strategy").iterdir()] == ["old"]

    for ended in launch(nodes, script, {"output_dir": "output", "only_save_strategy": True}):
        assert ended.code == 0, ended.logs
    (command,) = re.findall(r"^ +mindformers-ckpt (transform .*)$", refused[0].logs[0], re.MULTILINE)
    main, other = (node.folder / "output" for node in nodes)
    shutil.copytree(other / "strategy", main / "strategy", dirs_exist_ok=True)
    subprocess.run([sys.executable, "-m", "mindformers_ckpt", *shlex.split(command)], check=True, capture_output=True)
    (other / "offline_checkpoint").mkdir()
    for rank in (2, 3):
        shutil.move(main / "offline_checkpoint" / f"rank_{rank}", other / "offline_checkpoint")

    for ended in launch(nodes, script, {"output_dir": "output", "load_checkpoint": "output/offline_checkpoint"}):
        assert ended.code == 0, ended.logs
    before = quickstart.read_record(source / "losses.jsonl")
    after = quickstart.read_record(nodes[0].folder / "output" / "losses.jsonl")
    assert quickstart.relative_difference(after.after_load, before.before_save) < quickstart.LOAD_TOLERANCE


# ------------------------------------------------------------------------------------------ killed workers


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("fault", ["0:clear", "0:transform", "3:wait", "2:load"])
def test_a_worker_is_killed(
    nodes: tuple[Node, Node], tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill -9 of a worker of a job on two nodes: all others say the same, nothing is left, the next run works."""
    source = tmp_path / "source"
    quickstart.run_job(job_on("one card", "one_card"), source)
    (whole,) = (source / "checkpoint" / "rank_0").glob("*.ckpt")
    output = tmp_path / "shared"
    for name in ("strategy", "transformed_checkpoint"):
        (output / name).mkdir(parents=True)
        (output / name / "old").touch()
    keys = {"output_dir": output, "load_checkpoint": whole, "auto_trans_ckpt": True, "transform_process_num": 2}
    keys["transform_by_rank"] = True
    monkeypatch.setenv("FAULT", fault)
    script = str(ROOT / "tests" / "jobs" / "faulty_run.py")
    logs = {rank: log for ended in launch(nodes, script, keys) for rank, log in ended.logs.items()}
    killed = int(fault[0])
    for rank, log in logs.items():
        if rank != killed:
            assert re.search(rf"^error: rank {killed}\b.* died", log, re.MULTILINE), (rank, log)
    assert workers_left(script) == []
    for name in ("strategy", "transformed_checkpoint"):
        assert [path.name for path in (output / name).iterdir()] == ["old"]

    monkeypatch.delenv("FAULT")
    for ended in launch(nodes, script, keys):
        assert ended.code == 0, ended.logs
    assert quickstart.read_record(output / "losses.jsonl").after_load is not None


def workers_left(script: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if script in (process.info["cmdline"] or ())]
