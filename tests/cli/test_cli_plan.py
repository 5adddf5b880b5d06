"""`plan`: what it says is what `transform` does; plan files, whole and damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded import assert_ranks, write_tensors
from toy import MODEL, Result, command, listing, mp2pp2

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.file import Job, read_plan, write_plan
from mindformers_ckpt.planning.model import Place, Plan, Transfer, View

CONTENT = sum(len(tensor.bits.tobytes()) for tensor in MODEL.values())
WRITTEN = sum(len(tensor.bits.tobytes()) for rank in mp2pp2().values() for tensor in rank.values())


def test_a_plan_writes_nothing_and_says_what_transform_does(toy: Path) -> None:
    before = listing(toy)
    planned = _plan(toy, "--dst_checkpoint_dir", "out", "--json", "--transform_process_num", "2")
    assert planned.code == 0, planned
    assert listing(toy) == before
    said = json.loads(planned.out)
    done = _run(toy, "transform", "--dst_checkpoint_dir", "out", "--json")
    report = json.loads(done.out)
    assert {key: said[key] for key in ("destination", "ranks", "bytes_read", "bytes_written", "warnings")} == {
        key: report[key] for key in ("destination", "ranks", "bytes_read", "bytes_written", "warnings")
    }
    assert said["disk_needed"] == sum(path.stat().st_size for path in (toy / "out").glob("rank_*/*"))
    assert (said["files_read"], said["files_written"], said["parameters"]) == (2, 4, len(MODEL))
    assert (said["bytes_read"], said["bytes_written"], said["over_read"]) == (CONTENT, WRITTEN, 1.0)
    assert said["replicated"] == ["global_step"]
    assert (said["renamed"], said["dropped"], said["one_sided"]) == ({}, [], [])
    assert said["memory_needed"] < 2 * 200e6
    assert said["disk_free"] > said["disk_needed"]


def test_a_plan_for_people(toy: Path) -> None:
    result = _plan(toy, "--dst-checkpoint-dir", "out")
    assert result.code == 0, result
    lines = dict(line.split(":", 1) for line in result.out.splitlines())
    assert lines["read"].strip() == f"{CONTENT} B of tensors, 1.00 x what is needed"
    assert "1 whole on every target rank (global_step)" in lines["parameters"]
    assert lines["result"].strip() == str(toy / "out")


def test_a_plan_of_some_ranks_reads_what_they_need(toy: Path) -> None:
    """Ranks 0 and 1 are the first stage, which holds neither the second layer nor the norm."""
    said = json.loads(_plan(toy, "--ranks", "0-1", "--json").out)
    assert said["ranks"] == [0, 1]
    read = [path for rank in (0, 1) for path in (toy / f"sharded/rank_{rank}").iterdir()]
    assert said["files"] == [str(path.relative_to(toy / "sharded")) for path in read]
    assert said["files_read"] == 2
    assert f"files:       {said['files'][0]}, {said['files'][1]}\n" in _plan(toy, "--ranks", "0-1").out
    needed = ("embedding.weight", "layers.0.weight", "global_step")
    assert said["bytes_read"] == sum(len(MODEL[name].bits.tobytes()) for name in needed)
    # Rank 0 takes the first three columns of the embedding, and of the layer the first four rows.
    alone = json.loads(_plan(toy, "--ranks", "0", "--json").out)
    assert alone["bytes_needed"] == 8 * 3 * 2 + 4 * 6 * 4 + 4


def test_one_sided_and_dropped_parameters_are_named(toy: Path) -> None:
    from toy import DP2MP2

    from mindformers_ckpt.strategy.files import write_strategy

    layouts = {name: layout for name, layout in DP2MP2.items() if name != "norm.bias"}
    write_strategy(layouts, toy / "less/ckpt_strategy_rank_0.ckpt")
    said = json.loads(
        command(["plan", "--src-checkpoint", "sharded", "--src-strategy", "dp2mp2", "--dst-strategy", "less",
                 "--json"], toy).out
    )  # fmt: skip
    assert said["one_sided"] == ["norm.bias"]
    assert "norm.bias" in said["warnings"][0]


def test_a_plan_that_cannot_be_is_refused(toy: Path) -> None:
    result = _plan(toy, "--dst-checkpoint-dir", "sharded/out", "--out", "plan.json")
    assert result.code == 1
    assert "is in the source folder" in result.err
    assert not (toy / "plan.json").exists()


def test_a_plan_is_run_later_from_elsewhere(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert _plan(toy, "--dst-checkpoint-dir", "out", "--out", "plan.json").code == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    result = command(["transform", "--plan", toy / "plan.json", "--transform-process-num", "2"], elsewhere)
    assert result.code == 0, result
    assert_ranks(toy / "out", mp2pp2())
    other = command(["transform", "--plan", toy / "plan.json", "--dst-checkpoint-dir", "other"], elsewhere)
    assert other.code == 0, other
    assert_ranks(elsewhere / "other", mp2pp2())


def test_a_plan_of_some_ranks_adds_them(toy: Path) -> None:
    for ranks in ("0-2", "3"):
        assert _plan(toy, "--dst-checkpoint-dir", "out", "--ranks", ranks, "--out", "plan.json").code == 0
        result = command(["transform", "--plan", "plan.json"], toy)
        assert result.code == 0, result
    assert_ranks(toy / "out", mp2pp2())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefix", "x"], "the plan decides --prefix"),
        (["--src-checkpoint", "sharded", "--ranks", "0"], "the plan decides --src-checkpoint, --ranks"),
        ([], "Missing option '--dst-checkpoint-dir'"),
    ],
)
def test_options_beside_a_plan(toy: Path, options: list[str], message: str) -> None:
    assert _plan(toy, "--out", "plan.json").code == 0
    result = command(["transform", "--plan", "plan.json", *options], toy)
    assert result.code == 2, result
    assert message in result.err


def _change(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads(path.read_bytes())
        change(content)
        path.write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: os.truncate(path, 300), "is not a plan file, or damaged"),
        (lambda path: path.write_bytes(b"\x80pickle"), "is not a plan file, or damaged"),
        (lambda path: path.write_text("[1]"), "is not a plan file"),
        (lambda path: path.unlink(), "cannot read the plan file"),
        (_change(lambda content: content.update(mindformers_ckpt_plan=7)), "of version 7, this program reads"),
        (_change(lambda content: content["plan"]["boxes"][0][1].__setitem__(0, 2)), "does not go with its digest"),
        (_change(lambda content: content.pop("plan")), "does not go with its digest"),
    ],
)
def test_a_damaged_plan_file(toy: Path, spoil: Callable[[Path], None], message: str) -> None:
    assert _plan(toy, "--dst-checkpoint-dir", "out", "--out", "plan.json").code == 0
    spoil(toy / "plan.json")
    result = command(["transform", "--plan", "plan.json"], toy)
    assert result.code == 1, result
    assert message in result.err
    assert not (toy / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: os.utime(path, (1, 1)), "was written again after the plan was made"),
        (lambda path: write_tensors(path, {"w": MODEL["norm.bias"]}), "bytes, "),
    ],
)
def test_a_plan_whose_sources_were_changed(toy: Path, change: Callable[[Path], object], message: str) -> None:
    assert _plan(toy, "--dst-checkpoint-dir", "out", "--out", "plan.json").code == 0
    change(toy / "sharded/rank_1/checkpoint_1.ckpt")
    result = command(["transform", "--plan", "plan.json"], toy)
    assert result.code == 1, result
    assert "the sources of the plan" in result.err
    assert f"{toy}/sharded/rank_1/checkpoint_1.ckpt" in result.err
    assert message in result.err
    assert not (toy / "out").exists()


def test_a_plan_file_that_cannot_be_written(toy: Path) -> None:
    result = _plan(toy, "--out", "absent/plan.json")
    assert result.code == 1
    assert "cannot write the plan file absent/plan.json: No such file or directory; make its folder first" in result.err


def test_a_target_outside_of_the_folder_is_refused(toy: Path, tmp_path: Path) -> None:
    """The digest tells damage, it does not keep anybody from writing such a file."""
    job = _job(toy)
    (target, *rest) = job.plan.targets
    forged = Plan(job.plan.sources, (target._replace(path="../x.ckpt"), *rest), job.plan.transfers)
    write_plan(Job(forged, job.about, job.partial, job.destination), tmp_path / "forged.json")
    with pytest.raises(PlanError, match="leads out of the target folder"):
        read_plan(tmp_path / "forged.json")


def test_a_plan_file_gives_the_same_plan(toy: Path) -> None:
    job = _job(toy)
    write_plan(job, toy / "again.json")
    assert read_plan(toy / "again.json") == job
    assert (toy / "again.json").read_bytes() == (toy / "plan.json").read_bytes()
    first, second = job.plan.targets[0], job.plan.targets[1]
    assert first.tensors is second.tensors  # files with the same tensors are laid out once


def test_only_plans_of_transform_can_be_written(toy: Path) -> None:
    job = _job(toy)
    transfer = job.plan.transfers[0]
    turned = View((6, 8), Box((0, 0), (6, 8)), (1, 0))
    place = Place(0, Box((0, 0), (8, 6)), "", turned)
    plan = Plan(job.plan.sources, job.plan.targets, (Transfer(*transfer[:3], (place,), transfer.targets),))
    with pytest.raises(PlanError, match="rearranges or computes"):
        write_plan(Job(plan, {}, False, None), toy / "view.json")
    assert not (toy / "view.json").exists()


def test_another_name_is_one_of_a_source(toy: Path) -> None:
    job = _job(toy)
    transfer = job.plan.transfers[0]
    named = [place._replace(tensor="other.name") for place in transfer.sources]
    plan = replace(job.plan, transfers=(transfer._replace(sources=tuple(named)), *job.plan.transfers[1:]))
    write_plan(replace(job, plan=plan), toy / "named.json")
    assert read_plan(toy / "named.json").plan == plan
    targets = tuple(place._replace(tensor="other.name") for place in transfer.targets)
    plan = replace(job.plan, transfers=(transfer._replace(targets=targets), *job.plan.transfers[1:]))
    write_plan(replace(job, plan=plan), toy / "named.json", anything=True)
    with pytest.raises(PlanError, match="has another name in rank_0"):
        read_plan(toy / "named.json")


def test_repeated_parts_are_written_once(toy: Path) -> None:
    """Three hundred layers that are cut alike share boxes and lists of places: the file grows by a line each."""
    from toy import DP2MP2

    from mindformers_ckpt.strategy.files import write_strategy

    layers = {f"layers.{number}.weight": MODEL["layers.0.weight"] for number in range(300)}
    write_tensors(toy / "deep.ckpt", layers)
    write_strategy(dict.fromkeys(layers, DP2MP2["layers.0.weight"]), toy / "deep/ckpt_strategy_rank_0.ckpt")
    result = command(["plan", "--src-checkpoint", "deep.ckpt", "--dst-strategy", "deep", "--out", "deep.json"], toy)
    assert result.code == 0, result
    body = json.loads((toy / "deep.json").read_bytes())["plan"]
    assert (len(body["boxes"]), len(body["places"]), len(body["lists"])) == (3, 2, 1)
    assert (toy / "deep.json").stat().st_size < 300 * 100


def _job(toy: Path) -> Job:
    assert _plan(toy, "--dst-checkpoint-dir", "out", "--out", "plan.json").code == 0
    return read_plan(toy / "plan.json")


def _plan(toy: Path, *options: str) -> Result:
    return _run(toy, "plan", *options)


def _run(toy: Path, name: str, *options: str) -> Result:
    return command(
        [name, "--src-checkpoint", "sharded", "--src-strategy", "dp2mp2", "--dst-strategy", "mp2pp2", *options], toy
    )


def test_a_plan_replaces_plans_only(toy: Path) -> None:
    (toy / "plan.json").touch()
    for _ in range(2):
        assert _plan(toy, "--dst-checkpoint-dir", "out", "--out", "plan.json").code == 0
    before = (toy / "full.ckpt").read_bytes()
    refused = _plan(toy, "--dst-checkpoint-dir", "out", "--out", "full.ckpt")
    assert refused.code == 1
    assert "full.ckpt is not a plan file and is not replaced" in refused.err
    assert "--overwrite-anything" in refused.err
    assert (toy / "full.ckpt").read_bytes() == before
    merged = command(["merge-strategy", "mp2pp2", "full.ckpt"], toy)
    assert merged.code == 1
    assert "full.ckpt is not a strategy file and is not replaced" in merged.err
    assert (toy / "full.ckpt").read_bytes() == before
    assert _plan(toy, "--dst-checkpoint-dir", "out", "--out", "full.ckpt", "--overwrite-anything").code == 0
