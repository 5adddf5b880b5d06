"""The quickstart: its comparisons, its yaml files, and a small variant of its chain as real msrun jobs."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import quickstart  # noqa: E402
from quickstart import Job, Record  # noqa: E402

FIVE_KEYS = {
    "auto_trans_ckpt",
    "load_checkpoint",
    "src_strategy_path_or_dir",
    "transform_by_rank",
    "transform_process_num",
}
CHAIN = [Job(f"job{number}", "", "", 0) for number in range(2)]


def read(name: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "configs" / "tiny_llama" / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("resume_mp4.yaml", {"parallel_config"}),
        ("resume_one_card.yaml", {"use_parallel"}),
        ("resume_dp2mp2.yaml", set()),
    ],
)
def test_the_yaml_files_differ_only_in_the_strategy_and_the_five_keys(name: str, others: set[str]) -> None:
    first, later = read("pretrain_dp2mp2.yaml"), read(name)
    assert first.keys() == later.keys()
    differing = {key for key in first if first[key] != later[key]}
    assert {"load_checkpoint", "auto_trans_ckpt"} <= differing <= FIVE_KEYS | others
    assert others <= differing


def chain_of(first: Record, second: Record) -> dict[Job, Record]:
    return dict(zip(CHAIN, [first, second]))


REFERENCE = Record({1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}, None, 0.9)
FIRST = Record({1: 4.0, 2: 3.0}, None, 2.5)


def verdicts(second: Record) -> list[bool]:
    return [finding.holds for finding in quickstart.compare(REFERENCE, chain_of(FIRST, second))]


def test_an_equal_chain_holds() -> None:
    assert verdicts(Record({3: 2.0, 4: 1.0}, 2.5, 0.9)) == [True, True]


@pytest.mark.parametrize("after_load", [2.5001, math.nan, None])
def test_another_loss_after_the_load_does_not_hold(after_load: float | None) -> None:
    assert verdicts(Record({3: 2.0, 4: 1.0}, after_load, 0.9)) == [False, True]


@pytest.mark.parametrize(
    "losses",
    [
        {3: 2.0, 4: 1.002},  # drifted
        {3: 2.0},  # a step is missing
        {1: 4.0, 2: 3.0},  # the global step began anew
        {3: 2.0, 4: 1.0, 5: 0.5},  # a step too many
        {3: 2.0, 4: math.nan},
    ],
)
def test_other_losses_do_not_hold(losses: dict[int, float]) -> None:
    assert verdicts(Record(losses, 2.5, 0.9)) == [True, False]


def test_a_job_that_logged_nothing_has_failed(tmp_path: Path) -> None:
    with pytest.raises(quickstart.JobFailedError, match="logged no steps"):
        quickstart.read_record(tmp_path / "losses.jsonl")


@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("mindspore") is None, reason="runs MindSpore jobs")
@pytest.mark.timeout(900)
def test_a_chain_of_real_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 workers, then 4 that take over: 3 + 3 steps give the losses of 6 on one card."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])))
    small = ("--model.model_config.num_layers", "1")
    one_card = ("--use_parallel", "False", "--runner_config.steps", "6")
    reference = Job("reference", "", "pretrain_dp2mp2.yaml", 0, (*small, *one_card))
    first_mesh = ("--parallel_config.data_parallel", "1", "--runner_config.steps", "3")
    first = Job("mp2", "", "pretrain_dp2mp2.yaml", 2, (*small, *first_mesh))
    source = tmp_path / first.name
    keys = (
        ("--load_checkpoint", f"{source}/checkpoint"),
        ("--src_strategy_path_or_dir", f"{source}/strategy"),
    )
    second_options = (*small, "--runner_config.steps", "3", *(word for pair in keys for word in pair))
    second = Job("dp2mp2", "", "resume_dp2mp2.yaml", 4, second_options)

    records = {job: quickstart.run_job(job, tmp_path / job.name) for job in (reference, first, second)}

    findings = quickstart.compare(records.pop(reference), records)
    assert [finding for finding in findings if not finding.holds] == []
    assert len(findings) == 2
    assert sorted(records[second].losses) == [4, 5, 6]
    sizes = {path.stat().st_size for path in (tmp_path / second.name / "checkpoint").glob("rank_*/*.ckpt")}
    whole = next((tmp_path / reference.name / "checkpoint").glob("rank_0/*.ckpt"))
    assert max(sizes) < 0.75 * whole.stat().st_size


def test_the_log_of_the_rank_that_failed_is_shown(tmp_path: Path) -> None:
    logs = tmp_path / "msrun_log"
    logs.mkdir()
    (tmp_path / "console.log").write_text("Traceback of msrun\n")
    (logs / "worker_0.log").write_text("[WARNING] native\nerror: rank 1 failed\n")
    assert "rank 1 failed" in quickstart.failing_log(tmp_path)
    (logs / "worker_1.log").write_text("Traceback (most recent call last):\nKeyError: 'x'\n")
    shown = quickstart.failing_log(tmp_path)
    assert "worker_1.log" in shown
    assert "KeyError: 'x'" in shown
    assert "native" not in shown
