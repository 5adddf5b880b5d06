"""`mindformers-ckpt inspect`, and `mc.inspect`: what is said of every kind of path, and at what cost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import simulate_scale
from recorded import CONFIGURATIONS, Tensor, random_bits, recorded, write_ranks, write_tensors
from safetensors.numpy import save_file
from toy import DP2MP2, MODEL, command, dp2mp2, mp2pp2, write_toy

import mindformers_ckpt as mc
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.files import write_strategy
from mindformers_ckpt.words import short_spans, spans


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    write_ranks(folder / "pipeline", mp2pp2())
    return folder


def said(*arguments: str | Path) -> str:
    done = command(["inspect", *arguments], Path())
    assert done.code == 0, done
    return done.out


# ------------------------------------------------------------------------------------------- checkpoints


def test_rank_folders_as_people_read_them(toy: Path) -> None:
    lines = said(toy / "sharded", "--strategy", toy / "dp2mp2").splitlines()
    assert lines[0] == f"{toy / 'sharded'}: rank folders"
    assert lines[-4:] == [
        "embedding.weight   bfloat16 [8, 6]  96 B  rows / 2, on ranks 0-3",
        "layers.0-1.weight  float32 [8, 6]  2 x 192 B  columns / 2, on ranks 0-3",
        "norm.bias          float32 [6]  24 B  whole, on ranks 0-3",
        "global_step        int32 []  4 B  whole, on ranks 0-3",
    ]
    step = int(MODEL["global_step"].bits.view(np.int32)[()])
    assert f"  counters:         global_step {step}" in lines
    assert "  mesh:             device matrix 2 x 2, the last axis varies fastest" in lines
    assert "  weights:          4 tensors, 504 B" in lines


def test_rank_folders_as_programs_read_them(toy: Path) -> None:
    content = json.loads(said(toy / "pipeline", "--src-strategy", toy / "mp2pp2", "--json"))
    assert (content["what"], content["ranks"], content["stages"]) == ("rank folders", 4, 2)
    assert content["totals"]["weights"] == {"tensors": 4, "nbytes": 504}
    by_name_ = {entry["name"]: entry for entry in content["parameters"]}
    assert by_name_["layers.1.weight"] == {
        "name": "layers.1.weight",
        "kind": "weights",
        "dtype": "float32",
        "shape": [8, 6],
        "nbytes": 192,
        "cut": [2, 1],
        "stages": [1],
        "ranks": "2-3",
        "replicas": 1,
    }
    assert by_name_["global_step"]["stages"] == [0, 1]


def test_the_boxes_of_a_parameter_and_who_holds_them(toy: Path) -> None:
    text = said(toy / "sharded", "--strategy", toy / "dp2mp2", "--name", "layers.1")
    assert "layers.1.weight: 2 boxes\n" in text
    assert "  [0:8, 3:6]               ranks 1,3\n" in text
    assert "embedding" not in text


def test_what_one_rank_holds_and_where(toy: Path) -> None:
    content = json.loads(said(toy / "pipeline", "--strategy", toy / "mp2pp2", "--rank", "3", "--json"))
    (entry,) = [entry for entry in content["parameters"] if entry["name"] == "layers.1.weight"]
    assert (entry["start"], entry["stop"]) == ([4, 0], [8, 6])
    data = Path(entry["file"]).read_bytes()[entry["offset"] :][: 4 * 6 * 4]
    assert data == mp2pp2()[3]["layers.1.weight"].bits.tobytes()
    text = said(toy / "pipeline", "--strategy", toy / "mp2pp2", "--rank", "3", "--name", "layers*")
    assert f"layers.1.weight float32 [4:8, 0:6], 96 B at byte {entry['offset']}" in text


def is_whole(name: str) -> bool:
    """Whether the strategy and the slices of all ranks were recorded."""
    try:
        return recorded(name).is_complete
    except mc.StrategyError:  # the files of one stage only
        return False


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if is_whole(name)])
def test_it_says_what_the_planner_sees(name: str, tmp_path: Path) -> None:
    """Shapes, stages, holders and boxes under strategies that MindSpore wrote, as from reading all headers."""
    job = recorded(name)
    random = np.random.default_rng(0)
    model = {
        parameter: random_bits(by_name("float16"), entry.full_shape, random)
        for parameter, entry in job.parameters.items()
    }
    for rank in job.ranks:
        held = {parameter: job.box(parameter, rank) for parameter in model}
        own = {parameter: model[parameter].part(box) for parameter, box in held.items() if box is not None}
        write_ranks(tmp_path, {rank: own})
    found = mc.inspect(tmp_path, job.strategy)
    tensors = Checkpoint(find_source(tmp_path), job.strategy).tensors()
    assert {one.name: (one.shape, one.stages) for one in found.parameters} == {
        name: (tensor.spec.shape, tensor.stages) for name, tensor in tensors.items()
    }
    for one in found.parameters:
        assert set(one.ranks) == {rank for rank in job.ranks if job.box(one.name, rank) is not None}
        first = tensors[one.name].stages[0]
        held_boxes = {shard.box for shard in tensors[one.name].shards}
        if len(one.stages) == 1:
            assert {box for box, _ in one.boxes(found.stage_size)} == held_boxes
        assert all(rank // found.stage_size == first for _, ranks in one.boxes(found.stage_size) for rank in ranks)
    for rank in job.ranks:
        for here in found.held_by(rank):
            assert here.box == job.box(here.name, rank)


def test_without_a_strategy_shards_are_not_taken_for_the_whole(toy: Path, tmp_path: Path) -> None:
    text = said(toy / "sharded")
    assert "their strategy is not known: shapes are those of shards" in text
    assert "layers.0-1.weight  float32 [8, 3]  2 x 96 B  a shard or all of it, on ranks 0-3" in text
    shutil.copytree(toy / "sharded", tmp_path / "ckpt")
    shutil.copytree(toy / "dp2mp2", tmp_path / "strategy")
    text = said(tmp_path / "ckpt")
    assert f"  strategy:         {tmp_path / 'strategy'} (found there; --strategy gives another)" in text
    assert "layers.0-1.weight  float32 [8, 6]" in text


# ------------------------------------------------------------------------------------------- what is odd


def odd(path: Path, strategy: Path) -> str:
    return "\n".join(mc.inspect(path, strategy).odd)


def test_missing_ranks_boxes_and_leftovers(toy: Path, tmp_path: Path) -> None:
    ranks = dp2mp2()
    del ranks[1], ranks[3]
    write_ranks(tmp_path / "lost", ranks)
    (tmp_path / "lost/rank_2/aaa-1_1.ckpt").write_bytes(b"x")
    text = odd(tmp_path / "lost", toy / "dp2mp2")
    assert "ranks of the strategy that have no folder: 1,3" in text
    assert "boxes that no file holds, of 3 tensors: embedding.weight [4:8, 0:6]" in text
    assert "further files in the rank folders, which are not read: rank_2/aaa-1_1.ckpt" in text


def test_saved_without_redundancy(toy: Path, tmp_path: Path) -> None:
    ranks = dp2mp2()
    for rank in (2, 3):
        del ranks[rank]["embedding.weight"]
    write_ranks(tmp_path / "single", ranks)
    text = odd(tmp_path / "single", toy / "dp2mp2")
    assert "saved without redundancy: 1 tensor is not on all ranks that need it (embedding.weight on 2 of 4)" in text
    assert "no file holds" not in text


def test_tied_and_replicated(tmp_path: Path) -> None:
    job = recorded("dp2mp2pp2_tied")
    random = np.random.default_rng(0)
    model = {name: random_bits(by_name("float16"), entry.full_shape, random) for name, entry in job.parameters.items()}
    ranks: dict[int, dict[str, Tensor]] = {
        rank: {name: model[name].part(box) for name in model if (box := job.box(name, rank)) is not None}
        for rank in job.ranks
    }
    write_ranks(tmp_path, ranks)
    text = "\n".join(mc.inspect(tmp_path, job.strategy).odd)
    tied = [name for name in model if {job.strategy.stage_of(r) for r in ranks if name in ranks[r]} == {0, 1}]
    assert tied
    assert f"tied, held by several stages: {tied[0]}" in text


def test_mixed_steps_damaged_files_and_wrong_strategies_are_told(toy: Path, tmp_path: Path) -> None:
    for rank, tensors in dp2mp2().items():
        write_tensors(tmp_path / f"rank_{rank}" / f"net_rank_{rank}-1_{10 if rank < 3 else 5}.ckpt", tensors)
    found = mc.inspect(tmp_path, toy / "dp2mp2")
    assert found.facts["saved at"] == "epoch 1, step 10 (net; by the names of the files)"
    assert any("ranks without a file that is read: 3 (its last file, net_rank_3-1_5.ckpt" in line for line in found.odd)
    data = (tmp_path / "rank_1/net_rank_1-1_10.ckpt").read_bytes()
    (tmp_path / "rank_1/net_rank_1-1_10.ckpt").write_bytes(data[:-3])
    assert any("rank_1/net" in line and "truncated" in line for line in mc.inspect(tmp_path, toy / "dp2mp2").odd)
    other = {**DP2MP2, "norm.bias": DP2MP2["embedding.weight"]}
    write_strategy(other, tmp_path / "other.ckpt")
    assert any(line.startswith("norm.bias: ") for line in mc.inspect(toy / "sharded", tmp_path / "other.ckpt").odd)


def test_errors(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no parameter is called like 'nothing'"):
        mc.inspect(toy / "full.ckpt").only("nothing")
    cases: tuple[tuple[list[str | Path], str], ...] = (
        ([tmp_path / "nowhere"], "there is no checkpoint at"),
        ([toy / "sharded", "--rank", "9"], "holds no file of rank 9; ranks with files: 0-3"),
        ([toy], "give the file to read"),
    )
    for arguments, message in cases:
        done = command(["inspect", *arguments], toy)
        assert done.code == 1, done
        assert message in done.err


# ------------------------------------------------------------------------------------------- other kinds


def test_complete_weights(toy: Path) -> None:
    for name in ("full.ckpt", "full.safetensors"):
        found = mc.inspect(toy / name)
        assert (found.what, {one.name for one in found.parameters}) == ("complete weights", set(MODEL))
        assert found.only("norm.bias").parameters[0].cut == "whole"
        assert found.odd == ()


@pytest.mark.parametrize("path", ["mp2pp2", "merged.ckpt", "mp2pp2/ckpt_strategy_rank_0.ckpt"])
def test_strategies(toy: Path, path: str) -> None:
    command(["merge-strategy", "mp2pp2", "merged.ckpt"], toy)
    done = command(["inspect", path], toy)
    if path.endswith("rank_0.ckpt"):  # of one stage alone, which read_strategy refuses with advice
        assert done.code == 1
        return
    assert f"{toy / path}: a strategy" in done.out
    assert "2 pipeline stages of 2 ranks" in done.out


def test_a_plan_and_a_result(toy: Path, tmp_path: Path) -> None:
    arguments: list[str | Path]
    arguments = ["--src-checkpoint", toy / "sharded", "--src-strategy", toy / "dp2mp2", "--dst-checkpoint-dir", "out"]
    assert command(["plan", *arguments, "--out", "plan.json"], tmp_path).code == 0
    found = mc.inspect(tmp_path / "plan.json")
    assert (found.what, len(found.parameters)) == ("a plan", len(MODEL))
    assert found.facts["files"].endswith("to read, 1 to write")
    assert command(["transform", *arguments], tmp_path).code == 0
    for path in ("out", "out/manifest.json"):
        found = mc.inspect(tmp_path / path)
        assert found.facts["made of"] == str(toy / "sharded")
        assert found.facts["made by"].startswith("mindformers_ckpt ")
    assert mc.inspect(tmp_path / "out").what == "rank folders"


def test_a_hugging_face_folder_and_an_adapter(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    save_file({"model.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float16)}, model / "model.safetensors")
    for path in (model, model / "config.json"):
        found = mc.inspect(path)
        assert (found.what, found.facts["config.json"]) == ("a Hugging Face model", "model_type llama, hidden_size 8")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.zeros((4, 8), np.float32)}, adapter / "adapter_model.safetensors")
    found = mc.inspect(adapter)
    assert (found.what, found.facts["rank"], found.facts["alpha"]) == ("an adapter", "4", "8")
    assert found.totals["adapter"].tensors == 1
    assert mc.inspect(adapter / "adapter_config.json").totals == found.totals


def test_json_that_is_none_of_these(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(mc.FormatError, match="neither a strategy, a plan"):
        mc.inspect(tmp_path / "other.json")


# ------------------------------------------------------------------------------------------- cost


def test_a_file_costs_a_few_small_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 ranks of a DeepSeek-V3 (1 TB, sparse): one file of a stage is read whole, of the others eight records."""
    strategy = simulate_scale.strategy_of(simulate_scale.mesh_of(128, 4))
    simulate_scale.write_source(tmp_path, strategy)
    requests: list[int] = []
    real = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        data = real(descriptor, length, offset)
        requests.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", pread)
    found = mc.inspect(tmp_path, strategy)
    tensors = len(found.parameters) / 4
    assert len(requests) < 4 * 2 * tensors + 128 * 10
    assert sum(requests) < 64 << 20
    assert found.totals["weights"].tensors + found.totals["optimizer states"].tensors == 3636


def test_words() -> None:
    assert spans([]) == "none"
    assert spans([3, 1, 2, 7, 9, 8, 1]) == "1-3,7-9"
    assert short_spans(range(0, 20, 2), 3) == "0,2,4,… (10)"
