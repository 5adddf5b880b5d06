"""The hook on one card, in this process: the guide's cases, what is refused, and what MindSpore is told."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mindspore")

import mindspore
import numpy as np
from networks import Net, assert_holds, content_of, network_for
from rank_jobs import model_of
from recorded import Tensor, random_model, read_tensors, recorded, slices_of, write_ranks, write_tensors

from mindformers_ckpt import CheckpointHook, Layout, StrategySaved, load_checkpoint
from mindformers_ckpt.errors import CheckpointError, ConfigError, PlanError, StrategyError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.ms.hook import CheckpointHook as HookClass
from mindformers_ckpt.publish.manifest import read_manifests
from mindformers_ckpt.strategy.files import write_strategy

Tensors = dict[str, Tensor]
LAYERS = ("model.layers.0.attention.wq.weight", "model.norm_out.weight", "lm_head.weight")


def sharded(root: Path, name: str, format: str = "ckpt") -> tuple[Path, Path, Tensors]:
    """A checkpoint as ranks of a recorded configuration save it: its folder, its strategy and the whole tensors."""
    config = recorded(name)
    tensors = model_of(config)
    folder = write_ranks(root / "model", slices_of(config, tensors, replicated=("global_step",)), format)
    return folder, config.file, tensors


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """Keys of a job on one card with automatic conversion."""

    def build(**keys: Any) -> Config:
        defaults = {"output_dir": tmp_path / "output", "use_parallel": False, "auto_trans_ckpt": True}
        return Config.from_mapping({**defaults, **keys})

    return build


@pytest.mark.parametrize("value", ["", "None", None])
def test_conversion_without_a_checkpoint_is_told_once(
    value: str | None, config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    assert load(config(load_checkpoint=value), Net({"a": ("float32", (2,))})) == {}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("load_checkpoint is empty or not set: nothing is loaded, the network keeps its init")
    assert warnings[0].endswith("and auto_trans_ckpt: True has no effect")


def load(config: Config, network: Net, optimizer: Net | None = None) -> dict[str, Any]:
    hook = CheckpointHook(config)
    hook.prepare()
    return hook.load(network, optimizer)


@pytest.mark.parametrize("was_enabled", [True, False])
@pytest.mark.parametrize("is_refused", [True, False])
def test_the_collector_of_cycles_is_as_before_after_a_load(
    tmp_path: Path, config: Callable[..., Config], was_enabled: bool, is_refused: bool
) -> None:
    seen: list[bool] = []

    class Watched(Net):
        def parameters_and_names(self, *arguments: Any, **options: Any) -> Any:
            seen.append(gc.isenabled())
            return super().parameters_and_names(*arguments, **options)

    tensors = random_model({"a.weight": (6, 4)})
    file = write_tensors(tmp_path / "llama.ckpt", tensors)
    kind = tensors["a.weight"].dtype.name
    network = Watched({"a.weight": (kind, (6, 5 if is_refused else 4))})
    seen.clear()
    try:
        if not was_enabled:
            gc.disable()
        with pytest.raises(ConfigError) if is_refused else contextlib.nullcontext():
            load(config(load_checkpoint=file), network)
        after = gc.isenabled()
    finally:
        gc.enable()
    assert (set(seen), after) == ({False}, was_enabled)


# ------------------------------------------------------------------------------------- the guide's cases


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("auto", [True, False])
def test_complete_weights_on_one_card(tmp_path: Path, config: Callable[..., Config], auto: bool, suffix: str) -> None:
    tensors = random_model({"a.weight": (6, 4), "b.bias": (3,), "scalar": ()})
    file = write_tensors(tmp_path / f"llama.{suffix}", tensors)
    network = network_for(tensors)
    loaded = load(config(load_checkpoint=file, auto_trans_ckpt=auto), network)
    assert_holds(network, tensors)
    assert loaded.keys() == tensors.keys()
    assert not (tmp_path / "output" / "transformed_checkpoint").exists()


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
@pytest.mark.parametrize("by_rank", [True, False])
@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("dp4mp2_opt_size2", 2),
        ("dp2mp2pp2", 1),
        ("dp2mp4_json", 1),
        pytest.param("dp2mp2pp2", 2, marks=pytest.mark.slow),
        pytest.param("dp2mp4_json", 2, marks=pytest.mark.slow),
    ],
)
def test_sharded_weights_on_one_card(
    tmp_path: Path, config: Callable[..., Config], name: str, processes: int, by_rank: bool, format: str
) -> None:
    folder, strategy, tensors = sharded(tmp_path, name, format)
    network = network_for(tensors)
    keys = {"transform_by_rank": by_rank, "load_ckpt_format": format, "transform_process_num": processes}
    loaded = load(config(load_checkpoint=folder, src_strategy_path_or_dir=strategy, **keys), network)
    assert_holds(network, tensors)
    assert loaded.keys() == tensors.keys()
    result = tmp_path / "output" / "transformed_checkpoint"
    found = read_tensors(result / "model" / "rank_0" / f"checkpoint_0.{format}")
    assert {key: value.bits.tobytes() for key, value in found.items()} == {
        key: value.bits.tobytes() for key, value in tensors.items()
    }
    manifest = read_manifests(result).get("manifest.json")
    assert manifest is not None
    assert manifest["source_checkpoint"] == str(folder)


def test_the_strategy_may_be_a_folder(tmp_path: Path, config: Callable[..., Config]) -> None:
    folder, _, tensors = sharded(tmp_path, "dp2mp2pp2")
    network = network_for(tensors, LAYERS)
    load(config(load_checkpoint=folder, src_strategy_path_or_dir=recorded("dp2mp2pp2").folder), network)
    assert_holds(network, tensors)


def test_complete_weights_in_several_files(tmp_path: Path, config: Callable[..., Config]) -> None:
    tensors = random_model({"a": (4, 4), "b": (3,)})
    for name, tensor in tensors.items():
        write_tensors(tmp_path / "llama" / f"{name}.ckpt", {name: tensor})
    for auto in (True, False):
        network = network_for(tensors)
        load(config(load_checkpoint=tmp_path / "llama", auto_trans_ckpt=auto), network)
        assert_holds(network, tensors)
    write_tensors(tmp_path / "llama" / "another.ckpt", tensors)
    for auto in (True, False):
        with pytest.raises(PlanError, match=r"both hold a: .* name the file|several checkpoints, a is in two; name"):
            load(config(load_checkpoint=tmp_path / "llama", auto_trans_ckpt=auto), network_for(tensors))


def test_nothing_to_load(tmp_path: Path, config: Callable[..., Config]) -> None:
    before = tmp_path / "output" / "strategy" / "kept"
    before.mkdir(parents=True)
    network = Net({"a": ("float32", (2,))})
    for keys in ({}, {"load_checkpoint": ""}, {"load_checkpoint": None}):
        assert load(config(**keys), network) == {}
    assert network.a.asnumpy().tolist() == [1.0, 1.0]
    assert before.is_dir()  # nothing is converted, so nothing is cleared


def test_old_results_are_cleared(tmp_path: Path, config: Callable[..., Config]) -> None:
    output = tmp_path / "output"
    for name in ("strategy", "transformed_checkpoint/old/rank_0", "checkpoint"):
        (output / name).mkdir(parents=True)
        (output / name / "old").touch()
    folder, strategy, tensors = sharded(tmp_path, "dp2mp4")
    network = network_for(tensors, LAYERS)
    load(config(load_checkpoint=folder, src_strategy_path_or_dir=strategy), network)
    assert sorted(path.name for path in (output / "transformed_checkpoint").iterdir()) == ["manifest.json", "model"]
    assert list((output / "strategy").iterdir()) == []
    assert (output / "checkpoint" / "old").exists()
    # Of the next load nothing is transformed, so there is no transformed checkpoint.
    load(config(load_checkpoint=write_tensors(tmp_path / "whole.ckpt", tensors)), network)
    assert not (output / "transformed_checkpoint").exists()


# ------------------------------------------------------------------------------- run_mode, resume_training


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("mode", ["predict", "eval"])
def test_predict_and_eval_take_no_optimizer_state(
    tmp_path: Path, config: Callable[..., Config], mode: str, auto: bool
) -> None:
    folder, strategy, tensors = sharded(tmp_path, "dp2mp4_adam")
    source = folder if auto else write_tensors(tmp_path / "whole.ckpt", tensors)
    weights = [name for name in tensors if not name.startswith("adam_") and name != "global_step"]
    network, optimizer = network_for(tensors, weights), network_for(tensors, ["global_step"])
    keys = {"src_strategy_path_or_dir": strategy} if auto else {"auto_trans_ckpt": False}
    loaded = load(config(load_checkpoint=source, run_mode=mode, **keys), network, optimizer)
    assert_holds(network, {name: tensors[name] for name in weights})
    assert loaded.keys() == set(weights)
    assert_holds(optimizer, random_ones(optimizer))
    if auto:
        made = read_tensors(tmp_path / "output" / "transformed_checkpoint" / "model" / "rank_0" / "checkpoint_0.ckpt")
        assert made.keys() == set(weights)


def random_ones(network: Net) -> Tensors:
    """What a network holds that nothing was loaded into."""
    fresh = {}
    for _, parameter in network.parameters_and_names():
        ones = np.ones(parameter.shape, mindspore.dtype_to_nptype(parameter.dtype))
        fresh[parameter.name] = Tensor(None, ones)  # type: ignore[arg-type]
    return fresh


@pytest.mark.parametrize(
    ("mode", "resume", "is_loaded"),
    [("train", None, True), ("train", True, True), ("finetune", True, True), ("finetune", False, False)],
)
def test_the_optimizer_is_loaded_in_training_unless_it_starts_anew(
    tmp_path: Path, config: Callable[..., Config], mode: str, resume: bool | None, is_loaded: bool
) -> None:
    tensors = random_model({"a.weight": (6, 4), "global_step": (1,)})
    file = write_tensors(tmp_path / "llama.ckpt", tensors)
    network, optimizer = network_for(tensors, ["a.weight"]), network_for(tensors, ["global_step"])
    loaded = load(config(load_checkpoint=file, run_mode=mode, resume_training=resume), network, optimizer)
    assert_holds(network, tensors)
    assert_holds(optimizer, tensors if is_loaded else random_ones(optimizer))
    assert loaded.keys() == tensors.keys()


def test_the_step_to_resume_from(tmp_path: Path, config: Callable[..., Config]) -> None:
    config_ = recorded("dp2mp4")
    folder = tmp_path / "model"
    by_step = {}
    for step in (100, 90):
        by_step[step] = model_of(config_, seed=step)
        for rank, tensors in slices_of(config_, by_step[step], replicated=("global_step",)).items():
            write_tensors(folder / f"rank_{rank}" / f"llama_rank_{rank}-1_{step}.ckpt", tensors)
    keys = {"load_checkpoint": folder, "src_strategy_path_or_dir": config_.file}
    for resume, step in ((True, 90), ("llama-1_100.ckpt", 100), ("llama_rank_0-1_90", 90)):
        network = network_for(by_step[90], LAYERS)
        load(config(**keys, resume_training=resume), network)
        assert_holds(network, by_step[step])
    # Rank 7 holds the same as rank 3; had one of the two its file, nothing would be lost.
    (folder / "rank_3" / "llama_rank_3-1_100.ckpt").unlink()
    (folder / "rank_7" / "llama_rank_7-1_100.ckpt").unlink()
    with pytest.raises(PlanError) as caught:
        load(config(**keys, resume_training="llama-1_100.ckpt"), network_for(by_step[90], LAYERS))
    assert [line[:10] for line in str(caught.value).splitlines()[1:]] == ["  - rank_3", "  - rank_7"]


# ------------------------------------------------------------------------------------- what is refused


def refused(config: Config, network: Net | None = None) -> CheckpointError:
    """The error of a job that must not get past its preparation, whose output dir stays as it was."""
    root = Path(config.output_dir)
    (root / "strategy").mkdir(parents=True, exist_ok=True)
    (root / "strategy" / "ckpt_strategy_rank_0.ckpt").write_text("old")
    with pytest.raises(CheckpointError) as caught:
        CheckpointHook(config).prepare()
    assert (root / "strategy" / "ckpt_strategy_rank_0.ckpt").read_text() == "old"
    return caught.value


@pytest.mark.parametrize("place", ["model/strategy", "strategy", None])
def test_a_missing_strategy_and_what_lies_near(
    tmp_path: Path, config: Callable[..., Config], place: str | None
) -> None:
    folder, strategy, _ = sharded(tmp_path, "dp2mp2pp2")
    if place is not None:
        (tmp_path / place).mkdir()
        for file in strategy.parent.glob("ckpt_strategy_rank_*"):
            (tmp_path / place / file.name).write_bytes(file.read_bytes())
    error = refused(config(load_checkpoint=folder))
    assert isinstance(error, PlanError)
    assert "holds the shards of 8 ranks, but no source strategy is given" in str(error)
    assert ("could be" in str(error)) == (place is not None)
    if place is not None:
        assert str(tmp_path / place) in str(error)


@pytest.mark.parametrize("name", ["mp4_infer", "dp1"])
def test_a_strategy_near_that_does_not_fit_is_not_proposed(
    tmp_path: Path, config: Callable[..., Config], name: str
) -> None:
    folder, _, _ = sharded(tmp_path, "dp2mp2pp2")
    (tmp_path / "strategy").symlink_to(recorded(name).folder)
    assert "could be" not in str(refused(config(load_checkpoint=folder)))


def test_the_strategy_of_another_model(tmp_path: Path, config: Callable[..., Config]) -> None:
    folder, _, _ = sharded(tmp_path, "dp2mp4")
    other = tmp_path / "other.ckpt"
    write_strategy({"lm_head.weight": Layout.on({"mp": 4}, "mp", None)}, other)
    error = refused(config(load_checkpoint=folder, src_strategy_path_or_dir=other))
    assert "the strategy" in str(error)
    assert "is for 4 ranks" in str(error)
    wrong_rank = tmp_path / "dims.ckpt"
    write_strategy({"lm_head.weight": Layout.on({"mp": 8}, "mp", None, None)}, wrong_rank)
    error = refused(config(load_checkpoint=folder, src_strategy_path_or_dir=wrong_rank))
    assert "does not fit the strategy it is read with" in str(error)
    assert "lm_head.weight" in str(error)


@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ({"load_checkpoint": "nowhere"}, PlanError, "there is no checkpoint at"),
        ({"load_checkpoint": "nowhere", "auto_trans_ckpt": False}, PlanError, "there is no checkpoint at"),
        ({"load_checkpoint": "empty"}, PlanError, "neither rank_<n> folders nor"),
        ({"load_checkpoint": "model", "src_strategy_path_or_dir": "nowhere"}, StrategyError, "no strategy file or"),
        ({"load_checkpoint": "output/transformed_checkpoint"}, ConfigError, "nothing was touched"),
        (
            {"load_checkpoint": "model", "src_strategy_path_or_dir": "output/strategy"},
            ConfigError,
            "output/strategy is in",
        ),
        ({"load_checkpoint": "linked", "src_strategy_path_or_dir": "dp2mp4"}, ConfigError, "is a file in"),
        (
            {"only_save_strategy": True, "src_strategy_path_or_dir": "output/strategy"},
            ConfigError,
            "output/strategy is in",
        ),
    ],
)
def test_what_is_found_out_before_anything_is_cleared(
    tmp_path: Path, config: Callable[..., Config], keys: dict[str, Any], kind: type[CheckpointError], text: str
) -> None:
    sharded(tmp_path, "dp2mp4")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dp2mp4").symlink_to(recorded("dp2mp4").folder)
    inside = write_tensors(tmp_path / "output" / "transformed_checkpoint" / "a.ckpt", random_model({"a": (1,)}))
    for rank in range(8):
        (tmp_path / "linked" / f"rank_{rank}").mkdir(parents=True)
        (tmp_path / "linked" / f"rank_{rank}" / "a.ckpt").symlink_to(inside)
    paths = {key: tmp_path / value if isinstance(value, str) else value for key, value in keys.items()}
    error = refused(config(**paths))
    assert isinstance(error, kind), error
    assert text in str(error)


def test_a_source_that_does_not_match_says_what_to_switch_on(tmp_path: Path, config: Callable[..., Config]) -> None:
    folder, _, tensors = sharded(tmp_path, "dp2mp4")
    with pytest.raises(ConfigError) as caught:
        load(config(load_checkpoint=folder, auto_trans_ckpt=False), network_for(tensors, LAYERS))
    headline, *lines = str(caught.value).splitlines()
    assert "set auto_trans_ckpt: True, and src_strategy_path_or_dir to the strategy of a sharded" in headline
    assert [line.split(":")[0] for line in lines] == ["  - model.layers.0.attention.wq.weight", "  - lm_head.weight"]


@pytest.mark.parametrize("save", [True, False])
def test_rows_and_columns_exchanged_are_found_before_anything_is_written(
    tmp_path: Path, config: Callable[..., Config], save: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files cannot tell, where nothing is replicated; the network's own shapes can."""
    tensors = random_model({"w": (8, 6)})
    parts = {rank: {"w": tensors["w"].part(Box((4 * rank, 0), (4 * rank + 4, 6)))} for rank in range(2)}
    folder = write_ranks(tmp_path / "model", parts)
    write_strategy({"w": Layout.on({"mp": 2}, None, "mp")}, tmp_path / "columns.ckpt")
    monkeypatch.setattr("mindformers_ckpt.job.reslice.Run", None)
    keys = {"load_checkpoint": folder, "src_strategy_path_or_dir": tmp_path / "columns.ckpt", "auto_trans_save": save}
    with pytest.raises(ConfigError, match=r"its strategy the right one\?\n  - w: \[4, 12\] in the .*, \[8, 6\] in the"):
        load(config(**keys), network_for(tensors))


@pytest.mark.parametrize("mode", ["train", "predict"])
@pytest.mark.parametrize("auto", [True, False])
def test_a_weight_that_is_missing_is_an_error(
    tmp_path: Path, config: Callable[..., Config], auto: bool, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = random_model({"w": (2, 2), "head.weight": (2, 3)})
    file = write_tensors(tmp_path / "whole.ckpt", {"w": tensors["w"]})
    keys = {"load_checkpoint": file, "auto_trans_ckpt": auto, "run_mode": mode}
    network = network_for(tensors)
    with pytest.raises(ConfigError, match=r"allow_missing\n  - head.weight: not in the checkpoint$"):
        load(config(**keys), network)
    assert network.w.asnumpy().tolist() == np.ones((2, 2)).tolist()  # nothing was loaded
    for allow in (True, ["head.*"]):
        network = network_for(tensors)
        assert load(config(**keys, allow_missing=allow), network).keys() == {"w"}
        assert_holds_only(network, tensors, "w")
    assert "keep their initial values (allow_missing): head.weight" in caplog.text


def assert_holds_only(network: Net, tensors: Tensors, name: str) -> None:
    (held,) = [parameter for parameter in network.get_parameters() if parameter.name == name]
    assert content_of(held) == tensors[name].bits.tobytes()


MATRIX = Tensor(by_name("float32"), np.arange(4, dtype=np.uint32).reshape(2, 2))


def test_what_need_not_be_in_a_checkpoint(tmp_path: Path, config: Callable[..., Config]) -> None:
    """Adapters, states of another optimizer, gradients, caches and counters."""
    tensors = {"w": MATRIX, "moment1.w": MATRIX}
    file = write_tensors(tmp_path / "whole.ckpt", tensors)
    added = ("w.lora_A", "adam_m.w", "adam_v.w", "accu_grads.w", "attention.key_cache", "global_step", "scale_sense")
    network = Net(dict.fromkeys((*tensors, *added), ("float32", (2, 2))))
    assert load(config(load_checkpoint=file), network).keys() == tensors.keys()


def test_a_failed_load_leaves_the_old_results(tmp_path: Path, config: Callable[..., Config]) -> None:
    folder, strategy, tensors = sharded(tmp_path, "dp2mp4")
    keys = {"load_checkpoint": folder, "src_strategy_path_or_dir": strategy}
    load(config(**keys), network_for(tensors, LAYERS))
    (tmp_path / "output" / "strategy" / "old").touch()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("*") if path.is_file()}
    network = Net({"lm_head.weight": ("float32", (3, 3))})
    with pytest.raises(ConfigError, match="is it the checkpoint of this model, and its strategy the right one"):
        load(config(**keys), network)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("*") if path.is_file()}
    after.pop(tmp_path / "output" / ".checkpoint_hook.lock", None)
    before.pop(tmp_path / "output" / ".checkpoint_hook.lock", None)
    assert after == before
    assert {path.name for path in (tmp_path / "output").iterdir()} - {".checkpoint_hook.lock"} == {
        "strategy",
        "transformed_checkpoint",
    }
    load(config(**keys), network_for(tensors, LAYERS))


def test_a_strategy_that_complete_weights_do_not_need(
    tmp_path: Path, config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    tensors = random_model({"a": (4, 2)})
    file = write_tensors(tmp_path / "a.ckpt", tensors)
    network = network_for(tensors)
    load(config(load_checkpoint=file, src_strategy_path_or_dir=recorded("dp2mp4").file), network)
    assert_holds(network, tensors)
    assert "is read as complete weights, src_strategy_path_or_dir is not used" in caplog.text


def test_loading_before_preparing() -> None:
    hook = HookClass(Config())
    with pytest.raises(ConfigError, match=r"call hook.prepare\(\) before the network is compiled"):
        hook.load(Net({}))


# ---------------------------------------------------------------------------------- the public functions


def test_from_yaml_and_all_in_one_call(tmp_path: Path) -> None:
    folder, strategy, tensors = sharded(tmp_path, "mp8")
    yaml = tmp_path / "finetune.yaml"
    lines = [f"load_checkpoint: {folder}", f"src_strategy_path_or_dir: {strategy}", "auto_trans_ckpt: True"]
    yaml.write_text("\n".join([*lines, "use_parallel: False", f"output_dir: {tmp_path}/output", "seed: 1"]))
    hook = CheckpointHook.from_yaml(yaml, overrides={"transform_process_num": "2"})
    assert hook.config.transform_process_num == 2
    assert hook.strategy_dir == tmp_path / "output" / "strategy"
    assert hook.transformed_dir == tmp_path / "output" / "transformed_checkpoint"

    steps = []
    network = network_for(tensors, LAYERS)

    def compile_network() -> None:
        steps.append((tmp_path / "output" / "strategy").is_dir())

    loaded = load_checkpoint(yaml, network, compile=compile_network)
    assert steps == [True]
    assert_holds(network, tensors)
    assert loaded.keys() == tensors.keys()
    again = network_for(tensors, LAYERS)
    load_checkpoint(Config.from_yaml(yaml), again, None)
    assert_holds(again, tensors)


def test_only_save_strategy_is_an_answer_of_the_hook(tmp_path: Path, config: Callable[..., Config]) -> None:
    old = tmp_path / "output" / "transformed_checkpoint"
    old.mkdir(parents=True)
    keys = config(only_save_strategy=True, load_checkpoint="/nowhere")
    with pytest.raises(StrategySaved, match=f"the strategy is in {tmp_path / 'output' / 'strategy'}; the job stops"):
        load(keys, Net({"a": ("float32", (2,))}))
    assert old.is_dir()  # nothing but the strategy folder is cleared


def test_only_save_strategy_ends_the_process_of_who_calls_load_checkpoint(
    tmp_path: Path, config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mindformers_ckpt")
    with pytest.raises(SystemExit) as caught:
        load_checkpoint(config(only_save_strategy=True, load_checkpoint="/nowhere"), Net({"a": ("float32", (2,))}))
    assert caught.value.code == 0
    assert f"the strategy is in {tmp_path / 'output' / 'strategy'}" in caplog.text


# ------------------------------------------------------------------------------- what MindSpore is told


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A parallel job of 4 ranks as one of them sees it; the others are taken to do the same."""
    from mindformers_ckpt.job.cluster.cluster import Cluster

    class Alone(Cluster):
        def gather(self, step: str, value: object = None) -> list[Any]:
            return [value] * self.size

    def join(rank: int) -> None:
        def from_environment(timeout: float, env: object, folder: Path) -> Cluster:
            return Alone(rank, 4, ("node",) * 4, timeout, None)

        monkeypatch.setattr(Cluster, "from_environment", staticmethod(from_environment))

    yield join
    mindspore.reset_auto_parallel_context()


def test_mindspore_is_told_to_save_the_strategy(tmp_path: Path, alone: Callable[[int], None]) -> None:
    alone(3)
    hook = CheckpointHook(Config(output_dir=str(tmp_path / "output")))
    hook.prepare()
    file = str(tmp_path / "output" / "strategy" / "ckpt_strategy_rank_3.ckpt")
    assert mindspore.get_auto_parallel_context("strategy_ckpt_config") == {
        "load_file": "",
        "save_file": file,
        "only_trainable_params": False,
    }
    assert mindspore.get_auto_parallel_context("strategy_ckpt_save_file") == file


def test_an_auto_parallel_cell_is_told_too(
    tmp_path: Path, alone: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mindspore.parallel import auto_parallel

    monkeypatch.setattr(auto_parallel, "get_rank", lambda: 2)
    monkeypatch.setattr(auto_parallel, "get_group_size", lambda: 4)
    network = auto_parallel.AutoParallel(Net({"a": ("float32", (2,))}), parallel_mode="semi_auto")
    alone(2)
    monkeypatch.chdir(tmp_path)
    hook = CheckpointHook(Config())  # ./output, which must not depend on where the job goes on
    hook.prepare(network)
    assert network._save_strategy_file_path == str(tmp_path / "output" / "strategy" / "ckpt_strategy_rank_2.ckpt")
    assert network._only_trainable_params is False


def test_mindspore_is_told_nothing_on_one_card(tmp_path: Path, config: Callable[..., Config]) -> None:
    mindspore.reset_auto_parallel_context()
    CheckpointHook(config()).prepare()
    assert mindspore.get_auto_parallel_context("strategy_ckpt_save_file") == ""
    assert not os.path.exists(tmp_path / "output" / "strategy")
