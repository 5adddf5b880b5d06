"""A real job as on ModelArts: msrun, MindSpore on CPU, a disk for each node, an S3 server between them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

import quickstart  # noqa: E402
from s3_server import BUCKET, environment, s3_server  # noqa: E402

OPTIONS = ("--model.model_config.num_layers", "1", "--runner_config.steps", "2", "--parallel_config.data_parallel", "1")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("mindspore") is None, reason="runs MindSpore jobs")
def test_two_nodes_and_an_object_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of one card: weights of one card are cut over both, and the loss goes on where it was."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    one_card = quickstart.Job("one card", "", "pretrain_dp2mp2.yaml", 0, (*OPTIONS, "--use_parallel", "False"))
    before = quickstart.run_job(one_card, tmp_path / "source")
    (whole,) = (tmp_path / "source" / "checkpoint" / "rank_0").glob("*.ckpt")

    config = ROOT / "configs" / "tiny_llama" / "pretrain_dp2mp2.yaml"
    words = [str(Path(__file__).with_name("modelarts_run.py")), "--config", str(config), "--run_mode", "train"]
    words += [*OPTIONS, "--parallel_config.model_parallel", "2"]
    words += ["--auto_trans_ckpt=True", "--transform_process_num=2", "--npu_num_per_node=1"]
    words += [f"--load_checkpoint={whole}", f"--remote_save_url=s3://{BUCKET}/job"]
    launcher = ["bash", str(ROOT / "tools" / "msrun_launcher.sh"), " ".join(words), "2"]
    with s3_server() as port:
        variables = {**quickstart.environment(), **environment(port), "DISKS": str(tmp_path / "disks")}
        logs = tmp_path / "logs"
        command = [*launcher, str(quickstart.free_port()), str(logs), "True", "120"]
        ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)
    told = "".join(path.read_text() for path in sorted(logs.glob("worker_*.log")))
    assert ended.returncode == 0, told or ended.stderr

    after = quickstart.read_record(tmp_path / "disks" / "0" / "output" / "losses.jsonl")
    assert quickstart.relative_difference(after.after_load, before.before_save) < quickstart.LOAD_TOLERANCE
    for rank in range(2):
        results = tmp_path / "disks" / str(rank) / "output" / "transformed_checkpoint"
        assert [path.name for path in results.rglob("*.ckpt")] == [f"checkpoint_{rank}.ckpt"]
        assert f"node_{rank} re-slices 1 files" in told
