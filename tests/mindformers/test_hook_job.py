"""A job of two ranks through the hook itself, with the MindSpore (2.7) that MindFormers brings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
from recorded import random_bits, write_ranks

from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import rank_file_name, write_strategy

try:
    version("mindformers")
except PackageNotFoundError:
    pytest.skip("MindFormers is not installed; bash tools/test_mindformers.sh runs these", allow_module_level=True)

JOB = Path(__file__).with_name("hook_job.py")
SHAPES = {"emb": ("bfloat16", (8, 6)), "wq": ("float32", (8, 6)), "norm": ("float32", (6,))}


def free_port() -> int:
    """A port whose neighbour, where the ranks meet, is most likely free as well."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize("saved", [True, False])
def test_a_job_of_two_ranks(tmp_path: Path, saved: bool) -> None:
    generator = np.random.default_rng(3)
    tensors = {name: random_bits(by_name(dtype), shape, generator) for name, (dtype, shape) in SHAPES.items()}
    halves = {
        rank: {
            "emb": tensors["emb"]._replace(bits=tensors["emb"].bits[:, 3 * rank : 3 * rank + 3]),
            "wq": tensors["wq"]._replace(bits=tensors["wq"].bits[4 * rank : 4 * rank + 4]),
            "norm": tensors["norm"],
        }
        for rank in range(2)
    }
    source = write_ranks(tmp_path / "model", halves)
    mesh = {"mp": 2}
    layouts = {"emb": Layout.on(mesh, None, "mp"), "wq": Layout.on(mesh, "mp", None), "norm": Layout.on(mesh, None)}
    strategy = tmp_path / rank_file_name(0)
    write_strategy(layouts, strategy)
    config = {
        "load_checkpoint": str(source),
        "src_strategy_path_or_dir": str(strategy),
        "auto_trans_ckpt": True,
        "auto_trans_save": saved,
        "output_dir": str(tmp_path / "output"),
        "transform_timeout": 60,
    }
    common = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "MINDFORMERS_CKPT_MASTER": f"127.0.0.1:{free_port()}"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(JOB), json.dumps(config), str(tmp_path)],
            env={**os.environ, **common, "MS_NODE_ID": str(rank), "PYTHONPATH": str(JOB.parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for rank in range(2):
        held = np.load(tmp_path / f"{rank}.npz")
        assert held["emb"].tobytes() == tensors["emb"].bits[4 * rank : 4 * rank + 4].tobytes()
        assert held["wq"].tobytes() == tensors["wq"].bits[:, 3 * rank : 3 * rank + 3].tobytes()
        assert held["norm"].tobytes() == tensors["norm"].bits.tobytes()
