"""Jobs of several ranks, each a process with the environment that msrun sets, and the checkpoints that they load."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from forks import template
from recorded import Recorded, Tensor, random_model, recorded, slices_of, write_ranks

from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job.cluster.environment import PORT_OFFSET
from mindformers_ckpt.strategy.files import write_strategy

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("rank.py")
# What a rank imports while it runs, and what beside it where there is an object storage.
IMPORTS = (
    "numpy.random",
    "xxhash",
    "google.protobuf.descriptor_pb2",
    "google.protobuf.message_factory",
    "mindformers_ckpt.formats.safetensors",
    "mindformers_ckpt.job.remote_reslice",
    "mindformers_ckpt.job.sharing.reads",
    "mindformers_ckpt.look.verify_model",
)
STORAGE = ("botocore.session", "botocore.awsrequest", "botocore.httpsession")
TIMEOUT = 60.0  # transform_timeout of the jobs
TARGET = "pp4"  # 4 stages of one rank: the strategies are merged
TWO_NODES = ("alpha", "alpha", "beta", "beta")
KILLED = r"rank {}\b.* died"  # "rank 3 on node:1f.. died", "rank 3, which coordinates, died"

PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

Tensors = Mapping[str, Tensor]


class Outcome(NamedTuple):
    """How a rank ended: exit code, the digests of what it loaded, its error, and what it logged."""

    code: int
    loaded: dict[str, str] | None
    error: str
    log: str
    requests: dict[str, int] | None = None


class Job:
    """Ranks of one job, started as processes: as forks of one that has imported everything, or `fresh`."""

    def __init__(self, config: Mapping[str, Any], ranks: int = 4, live: str | None = TARGET, **about: Any) -> None:
        faults: Mapping[int, str] = about.pop("faults", {})
        nodes: Sequence[str] = about.pop("nodes", ("node",) * ranks)
        folders: Mapping[str, Path] = about.pop("folders", {})
        own_keys: Mapping[int, Mapping[str, Any]] = about.pop("own_keys", {})
        self.mark = uuid.uuid4().hex
        port = about.pop("port", free_port())
        is_fresh = about.pop("fresh", False)
        imports = (*IMPORTS, *STORAGE) if "remote_save_url" in config else IMPORTS
        self.processes: list[Any] = []
        for rank in range(ranks):
            keys = {"transform_timeout": TIMEOUT, **config, **own_keys.get(rank, {})}
            job = {"config": keys, "live": live, "fault": faults.get(rank), **about}
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
            words = [str(PROGRAM), json.dumps(job, default=str)]
            folder = folders.get(nodes[rank], ROOT)
            started: Any
            if is_fresh:
                started = subprocess.Popen([sys.executable, *words], env=environment, cwd=folder, text=True, **PIPES)
            else:
                started = template(PROGRAM.stem, *imports, folder=PROGRAM.parent).start(words, environment, folder)
            self.processes.append(started)

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
        """Processes that carry the job's mark, or are in the session of one of its ranks."""
        own = {process.pid for process in self.processes}
        marked = []
        for process in psutil.process_iter():
            try:
                is_marked = os.getsid(process.pid) in own or process.environ().get("JOB_MARK") == self.mark
                if is_marked and process.status() != psutil.STATUS_ZOMBIE:
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
    """Whole tensors of a configuration, but for the gradients that no checkpoint holds; and a counter."""
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
