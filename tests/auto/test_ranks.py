"""Several ranks, each a process with the environment that msrun sets: the whole hook, and what it refuses."""
# ruff: noqa: F811 (fixtures of rank_jobs)

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoint2_files import COMMON, write_checkpoint2
from rank_jobs import (  # noqa: F401
    TARGET,
    Source,
    Tensors,
    assert_loaded,
    digests,
    expected,
    many_ranks,
    model_of,
    old_results,
    results,
    run,
    source,
)
from recorded import STRATEGIES, Tensor, random_model, recorded, slices_of, write_ranks, write_tensors

from mindformers_ckpt.formats.ckpt_crc import append_crc
from mindformers_ckpt.publish.manifest import read_manifests
from mindformers_ckpt.strategy.files import read_strategy


@pytest.mark.parametrize(("processes", "by_rank"), [(1, False), (3, True)])
def test_sharded_weights_for_a_pipeline(
    run: Any, source: Source, tmp_path: Path, processes: int, by_rank: bool
) -> None:
    output = tmp_path / "output"
    old_results(output)
    keys = {"output_dir": output, "transform_process_num": processes, "transform_by_rank": by_rank}
    outcomes = run({**source.keys, **keys}, fresh=not by_rank).outcomes()
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


def test_ranks_share_the_looking(run: Any, tmp_path: Path) -> None:
    """`auto_trans_save: False`: each of four ranks looks at a fourth of the files, before the main one tells of all."""
    source = many_ranks(tmp_path, 1024)
    keys = {**source.keys, "output_dir": tmp_path / "output", "auto_trans_save": False}
    outcomes = run(keys, counted=str(tmp_path)).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    counted = [outcome.requests for outcome in outcomes]
    main, *others = (sum(requests.values()) for requests in counted if requests is not None)
    assert 3 * 256 < main < 5 * 256, counted
    assert max(others) <= 3 * 256 + 40, counted


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


@pytest.mark.parametrize(
    ("own", "lines"),
    [
        ({"load_checkpoint": "elsewhere"}, ["load_checkpoint: '.*' on ranks 0-1, 3, 'elsewhere' on rank 2"]),
        (
            {"auto_trans_ckpt": False, "transform_process_num": 3},
            [
                "auto_trans_ckpt: 'True' on ranks 0-1, 3, 'False' on rank 2",
                "transform_process_num: '1' on .*'3' on rank 2",
            ],
        ),
    ],
    ids=["path", "keys"],
)
def test_a_rank_with_other_settings_is_told_from_the_others(
    run: Any, source: Source, tmp_path: Path, own: dict[str, object], lines: list[str]
) -> None:
    """The main rank's settings do not count for it without a word."""
    job = run({**source.keys, "output_dir": tmp_path / "output"}, own_keys={2: own})
    for outcome in job.outcomes():
        assert outcome.code == 1
        for line in lines:
            assert re.search(line, outcome.error)
    assert not (tmp_path / "output" / "transformed_checkpoint").exists()


@pytest.mark.parametrize("name", ["file", "file/output"])
def test_an_output_dir_that_cannot_be_made(run: Any, source: Source, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    for outcome in run({**source.keys, "output_dir": tmp_path / name}).outcomes():
        assert outcome.code == 1
        assert f"output_dir is {tmp_path / name}: it must be a folder that this job can write to" in outcome.error
    assert (tmp_path / "file").read_text() == "mine"


def test_ranks_that_load_as_it_is_may_name_other_folders(run: Any, tmp_path: Path) -> None:
    """Nodes may have disks of their own; one warning names the folders."""
    tensors = model_of(recorded(TARGET))
    for name in ("one", "other"):
        write_ranks(tmp_path / name, slices_of(recorded(TARGET), tensors, ("global_step",)))
    keys = {"load_checkpoint": tmp_path / "one", "output_dir": tmp_path / "output"}
    job = run(keys, own_keys={1: {"load_checkpoint": tmp_path / "other"}})
    outcomes = job.outcomes()
    assert_loaded(outcomes, expected(TARGET, tensors))
    warnings = [outcome.log.count("the ranks do not load the same checkpoint") for outcome in outcomes]
    assert warnings == [1, 0, 0, 0]


def test_two_jobs_on_one_output_dir(run: Any, source: Source, tmp_path: Path) -> None:
    keys = {**source.keys, "output_dir": tmp_path / "output"}
    first = run(keys, ranks=1, live=None, pause=True)
    assert first.processes[0].stdout.readline() == "prepared\n"
    second = run(keys, ranks=2, live=None).outcomes()
    assert all(f"another job (process {first.processes[0].pid} on " in outcome.error for outcome in second)
    first.processes[0].stdin.write("\n")
    first.processes[0].stdin.flush()
    assert_loaded(first.outcomes(), [digests(source.tensors)])


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
