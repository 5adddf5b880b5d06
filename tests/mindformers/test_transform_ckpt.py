"""MindFormers' own `TransformCkpt` and ours, on the same inputs. Runs where MindFormers is installed:
`bash tools/test_mindformers.sh`."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from recorded import Tensor, assert_same, random_model, read_tensors, recorded, slices_of, write_ranks, write_tensors

from mindformers_ckpt.errors import ConfigError, PlanError, PublishError
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.integrations import mindformers as replacement
from mindformers_ckpt.integrations.launch import main
from mindformers_ckpt.integrations.settings import settings
from mindformers_ckpt.strategy.files import rank_file_name, read_strategy, write_strategy

try:
    version("mindformers")
except PackageNotFoundError:
    pytest.skip("MindFormers is not installed; bash tools/test_mindformers.sh runs these", allow_module_level=True)

# MindFormers and what it imports warn of their own use of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

REPLICATED = {"global_step": (), "loss_scale": ()}
JOB = Path(__file__).with_name("load_job.py")


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """MindFormers' module with TransformCkpt. Its log goes to a folder of the tests."""
    os.environ["LOG_MF_PATH"] = str(tmp_path_factory.mktemp("log"))
    import mindspore

    mindspore.set_device("CPU")
    from mindformers.tools.ckpt_transform import transform_checkpoint

    found: ModuleType = transform_checkpoint
    return found


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "output"))
    return tmp_path / "output"


@pytest.fixture
def ours(module: ModuleType) -> Iterator[type[Any]]:
    replacement.install()
    yield module.TransformCkpt
    replacement.uninstall()


def files_of(folder: Path) -> set[str]:
    """The files below a folder, but for our manifest."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith("manifest.json")}


def model_of(*names: str) -> dict[str, Tensor]:
    """Random weights of what all of the configurations have. MindSpore's time goes by the number of tensors."""
    first, *others = map(recorded, names)
    shapes = {
        name: parameter.full_shape
        for name, parameter in first.parameters.items()
        if all(name in other.parameters for other in others) and not name.startswith(("accu_grads.", "adam_v."))
    }
    return random_model({**shapes, **REPLICATED})


def strategy_argument(name: str) -> str | None:
    config = recorded(name)
    return None if config.strategy.is_complete else str(config.file)


def assert_alike(theirs: Path, own: Path, *, bytewise: bool) -> None:
    """The same files, and in them the same tensors; the same bytes where MindSpore orders tensors as the source."""
    assert files_of(own) == files_of(theirs)
    checkpoints = [name for name in files_of(own) if name.endswith(".ckpt")]
    assert checkpoints
    for name in checkpoints:
        assert_same(read_tensors(own / name), read_tensors(theirs / name))
        if bytewise:
            assert (own / name).read_bytes() == (theirs / name).read_bytes()


# Installing


def test_the_class_is_replaced_in_place_once_and_comes_back(module: ModuleType) -> None:
    from mindformers.models import modeling_utils
    from mindformers.trainer import base_trainer, utils

    theirs = module.TransformCkpt
    before = theirs.__init__, theirs.__call__
    load = utils.transform_and_load_checkpoint
    signatures = inspect.signature(theirs), inspect.signature(theirs.__call__)
    replacement.install()
    try:
        assert replacement.installed()
        assert utils.TransformCkpt is modeling_utils.TransformCkpt is module.TransformCkpt is theirs
        during = theirs.__init__, theirs.__call__
        assert during[0] is not before[0]
        assert during[1] is not before[1]
        assert (inspect.signature(theirs), inspect.signature(theirs.__call__)) == signatures
        assert base_trainer.transform_and_load_checkpoint is utils.transform_and_load_checkpoint is not load
        replacement.install()
        assert (theirs.__init__, theirs.__call__) == during
    finally:
        replacement.uninstall()
    assert (theirs.__init__, theirs.__call__) == before
    assert base_trainer.transform_and_load_checkpoint is utils.transform_and_load_checkpoint is load
    replacement.uninstall()
    assert not replacement.installed()


def test_the_code_decides_not_the_version(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Releases that were looked at are replaced without a word, code that is alike with one, other code not at all."""
    monkeypatch.setattr(replacement, "version", lambda name: "9.9.0")
    replacement.install()
    replacement.uninstall()
    assert "is not the code of a release" not in caplog.text
    changed = tmp_path / "transform_checkpoint.py"
    changed.write_text("# patched")
    monkeypatch.setattr(module, "__file__", str(changed))
    replacement.install()
    replacement.uninstall()
    assert f"TransformCkpt in {changed}" in caplog.text
    monkeypatch.delattr(module, "is_main_rank")
    with pytest.raises(ConfigError, match=r"has no is_main_rank: this MindFormers cannot be changed"):
        replacement.install()
    assert not replacement.installed()


def test_another_signature_is_refused(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: Any, src_checkpoint: str, threads: int = 4) -> str:
        return src_checkpoint

    monkeypatch.setattr(module.TransformCkpt, "__call__", call)
    with pytest.raises(ConfigError, match=r"TransformCkpt\.call has other parameters.*'threads', 4"):
        replacement.install()
    assert not replacement.installed()
    assert module.TransformCkpt.__call__ is call


@pytest.mark.parametrize("timeout", ["soon", "-1", "inf", "0"])
def test_a_timeout_that_is_none_is_refused(timeout: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDFORMERS_CKPT_TIMEOUT", timeout)
    with pytest.raises(ConfigError, match="MINDFORMERS_CKPT_TIMEOUT"):
        replacement.install()


def test_settings_that_mean_something_else_are_refused(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together; a text is one pattern, not a pattern for each of its letters."""
    monkeypatch.setenv("MINDFORMERS_CKPT_TIMOUT", "60")
    with pytest.raises(ConfigError) as caught:
        replacement.install(timeout=0, allow_missing=["a", ""])
    for line in (
        "MINDFORMERS_CKPT_TIMOUT: did you mean MINDFORMERS_CKPT_TIMEOUT?",
        "a positive number of seconds was expected, not 0",
        "a list of parameter names was expected, not ['a', '']",
    ):
        assert line in str(caught.value)
    assert not replacement.installed()
    monkeypatch.delenv("MINDFORMERS_CKPT_TIMOUT")
    assert settings(60, "*.bias, head.weight") == (60.0, ("*.bias", "head.weight"))


def test_a_later_call_counts_for_what_it_names(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m mindformers_ckpt.run` has installed before the script does."""
    monkeypatch.setenv("MINDFORMERS_CKPT_TIMEOUT", "60")
    replacement.install()
    try:
        replacement.install(allow_missing=["*.bias"])
        replacement.install(timeout=5)
        replacement.install()
        held = replacement._current()
        assert (held.timeout, held.allow_missing) == (5.0, ("*.bias",))
    finally:
        replacement.uninstall()


# The same results


@pytest.mark.parametrize(
    ("source", "target", "bytewise", "by_rank"),
    [
        ("dp1", "dp4mp2_opt", True, False),
        ("dp1", "dp1mp4pp2", True, False),
        ("dp2mp4", "pp4", True, False),
        ("dp2mp4", "pp4", True, True),
        ("dp2mp2pp2", "dp4mp2_opt", False, False),
        ("dp1mp4pp2", "dp1", False, False),
        ("mp8", "dp1", True, False),
    ],
)
def test_offline_results_are_theirs(
    source: str, target: str, bytewise: bool, by_rank: bool, module: ModuleType, tmp_path: Path
) -> None:
    model = model_of(source, target)
    root = write_ranks(tmp_path / "llama", slices_of(recorded(source), model, REPLICATED))
    arguments = {"src_strategy": strategy_argument(source), "dst_strategy": strategy_argument(target)}
    size = recorded(target).strategy.rank_count

    def run(where: str) -> float:
        started = time.monotonic()
        transform = module.TransformCkpt(rank_id=0, world_size=size, transform_by_rank=by_rank)
        returned = transform(str(root), str(tmp_path / where), **arguments)
        assert returned == str(tmp_path / where)
        return time.monotonic() - started

    seconds = [run("theirs")]
    replacement.install()
    try:
        seconds.append(run("ours"))
    finally:
        replacement.uninstall()
    print(f"{source} to {target}{' by rank' * by_rank}: theirs {seconds[0]:.2f} s, ours {seconds[1]:.2f} s")
    assert_alike(tmp_path / "theirs", tmp_path / "ours", bytewise=bytewise)
    assert (tmp_path / "ours/llama/transform_succeed_rank_0.txt").is_file()


@pytest.mark.parametrize("source", ["dp1", "dp2mp4"])
def test_automatic_results_with_a_pipeline_are_theirs(
    source: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(source, "dp2mp2pp2")
    root = write_ranks(tmp_path / "llama", slices_of(recorded(source), model, REPLICATED))
    monkeypatch.setattr(module.ms, "get_auto_parallel_context", {"pipeline_stages": 2, "parallel_mode": "x"}.get)

    def run(where: str) -> Path:
        output = tmp_path / where
        monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(output))
        (output / "strategy").mkdir(parents=True)
        for file in recorded("dp2mp2pp2").folder.glob("ckpt_strategy_rank_*"):
            (output / "strategy" / file.name).write_bytes(file.read_bytes())
        transform = module.TransformCkpt(auto_trans_ckpt=True, rank_id=0, world_size=8)
        assert transform(str(root), src_strategy=strategy_argument(source)) == str(output / "transformed_checkpoint")
        return output

    theirs = run("theirs")
    replacement.install()
    try:
        own = run("ours")
    finally:
        replacement.uninstall()
    # MindSpore writes the stages of a merged file in the order of the operating system's list of the folder.
    merged = [read_strategy(output / "strategy" / "merged_ckpt_strategy.ckpt") for output in (theirs, own)]
    assert merged[0].stages == merged[1].stages
    assert files_of(own) == files_of(theirs)
    assert_alike(theirs / "transformed_checkpoint", own / "transformed_checkpoint", bytewise=True)


def test_names_of_results_are_theirs(module: ModuleType, tmp_path: Path) -> None:
    model = {name: tensor for name, tensor in model_of("dp1", "mp8").items() if not name.startswith("adam_")}
    names = list(model)
    parts = {"base.v2.ckpt": names[::2], "rest.ckpt": names[1::2]}
    for file, held in parts.items():
        write_tensors(tmp_path / "weights" / file, {name: model[name] for name in held})
    (tmp_path / "weights" / "notes.txt").touch()
    arguments = {"dst_strategy": strategy_argument("mp8"), "prefix": "llama_"}
    module.TransformCkpt()(str(tmp_path / "weights"), str(tmp_path / "theirs"), **arguments)
    replacement.install()
    try:
        module.TransformCkpt()(str(tmp_path / "weights"), str(tmp_path / "ours"), **arguments)
    finally:
        replacement.uninstall()
    assert_alike(tmp_path / "theirs", tmp_path / "ours", bytewise=True)
    assert "base/rank_7/llama_7.ckpt" in files_of(tmp_path / "ours")
    assert "rest/rank_0/llama_0.ckpt" in files_of(tmp_path / "ours")


# What is mended


def test_shares_of_processes_that_do_not_divide_the_ranks(ours: type[Any], tmp_path: Path) -> None:
    model = model_of("dp1", "mp8")
    source = write_ranks(tmp_path / "llama", {0: model})
    for rank in (0, 2, 4):
        transform = ours(rank_id=rank, world_size=8, transform_process_num="3", transform_by_rank="False")
        assert transform.transform_rank_id_list == [0, 2, 4]
        transform(str(source), str(tmp_path / "result"), dst_strategy=strategy_argument("mp8"))
    expected = slices_of(recorded("mp8"), model, REPLICATED)
    for rank in range(8):
        assert_same(read_tensors(tmp_path / f"result/llama/rank_{rank}/checkpoint_{rank}.ckpt"), expected[rank])
    marks = {name for name in files_of(tmp_path / "result/llama") if name.endswith(".txt")}
    assert marks == {f"transform_succeed_rank_{rank}.txt" for rank in (0, 2, 4)}
    with pytest.raises(ConfigError, match="rank_id 1 begins no share: 3 processes begin at 0, 2, 4"):
        ours(rank_id=1, world_size=8, transform_process_num=3)(
            str(source), str(tmp_path / "result"), dst_strategy=strategy_argument("mp8")
        )


def test_complete_weights_for_one_card_are_copied(ours: type[Any], output: Path, tmp_path: Path) -> None:
    model = random_model({"w": (4, 4), "v": (3,)})
    source = write_tensors(tmp_path / "llama.v2.ckpt", model)
    transform = ours(auto_trans_ckpt=True)
    assert transform(str(source)) == str(output / "transformed_checkpoint")
    copy = output / "transformed_checkpoint/llama/rank_0/checkpoint_0.ckpt"
    assert copy.read_bytes() == source.read_bytes()


def test_results_of_other_runs_are_told(
    ours: type[Any], output: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MindFormers' loader reads all of the folder; its Trainer clears it, who calls the class alone does not."""
    write_tensors(tmp_path / "model.ckpt", random_model({"w": (4, 4)}))
    write_tensors(
        output / "transformed_checkpoint" / "another" / "rank_0" / "checkpoint_0.ckpt", random_model({"v": (3,)})
    )
    for _ in range(2):  # its own result of before is replaced
        caplog.clear()
        ours(auto_trans_ckpt=True)(src_checkpoint=str(tmp_path / "model.ckpt"))
        assert "transformed_checkpoint also holds another, of other runs," in caplog.text


def test_the_source_strategy_folder_is_left_alone(ours: type[Any], tmp_path: Path) -> None:
    model = model_of("dp2mp2pp2", "dp1")
    root = write_ranks(tmp_path / "llama", slices_of(recorded("dp2mp2pp2"), model, REPLICATED))
    folder = tmp_path / "strategy"
    folder.mkdir(mode=0o755)
    for file in recorded("dp2mp2pp2").folder.glob("ckpt_strategy_rank_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    before = files_of(folder)
    ours()(str(root), str(tmp_path / "result"), src_strategy=str(folder))
    assert files_of(folder) == before
    assert_same(read_tensors(tmp_path / "result/llama/rank_0/checkpoint_0.ckpt"), model)


def test_the_name_decides_and_not_the_time(ours: type[Any], tmp_path: Path) -> None:
    old, new = (random_model({"w": (4, 4)}, seed) for seed in (1, 2))
    write_tensors(tmp_path / "llama/rank_0/llama-1_20.ckpt", new)
    write_tensors(tmp_path / "llama/rank_0/llama-1_10.ckpt", old)
    os.utime(tmp_path / "llama/rank_0/llama-1_20.ckpt", (0, 0))
    ours()(str(tmp_path / "llama"), str(tmp_path / "result"))
    assert_same(read_tensors(tmp_path / "result/llama/rank_0/checkpoint_0.ckpt"), new)


def test_the_old_result_stays_when_a_transformation_fails(ours: type[Any], tmp_path: Path) -> None:
    model = model_of("dp1", "mp8")
    source = write_tensors(tmp_path / "llama.ckpt", model)
    arguments = {"dst_checkpoint_dir": str(tmp_path / "result"), "dst_strategy": strategy_argument("mp8")}
    ours()(str(source), **arguments)
    before = {name: (tmp_path / "result" / name).read_bytes() for name in files_of(tmp_path / "result")}
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"llama\.ckpt"):
        ours()(str(source), **arguments)
    assert {name: (tmp_path / "result" / name).read_bytes() for name in files_of(tmp_path / "result")} == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"transform_process_num": 0}, ConfigError, "transform_process_num: a whole number of at least 1 .*, not 0"),
        (
            {"transform_process_num": "two", "transform_by_rank": "maybe"},
            ConfigError,
            "(?s)transform_process_num: .*'two'.*transform_by_rank: True or False was expected, not 'maybe'",
        ),
    ],
)
def test_wrong_arguments(arguments: Mapping[str, Any], error: type[Exception], message: str, ours: type[Any]) -> None:
    with pytest.raises(error, match=message):
        ours(**arguments)


def test_what_does_not_go_together(ours: type[Any], output: Path, tmp_path: Path) -> None:
    model = model_of("dp2mp4", "mp8")
    sharded = write_ranks(tmp_path / "llama", slices_of(recorded("dp2mp4"), model, REPLICATED))
    result, mp8 = str(tmp_path / "result"), strategy_argument("mp8")
    with pytest.raises(PlanError, match="there is no checkpoint at"):
        ours()(str(tmp_path / "nothing"), result)
    with pytest.raises(PlanError, match="holds the shards of 8 ranks, but no source strategy is given"):
        ours()(str(sharded), result, dst_strategy=mp8)
    with pytest.raises(ConfigError, match=r"world_size is 4, but the target strategy is for 8 ranks"):
        ours(world_size=4)(str(sharded), result, strategy_argument("dp2mp4"), mp8)
    with pytest.raises(PlanError, match="no rank has saved its strategy in"):
        (output / "strategy").mkdir(parents=True)
        replacement_mode = ours(auto_trans_ckpt=True, rank_id=0, world_size=8)
        replacement_mode.dst_strategy_dir = str(output / "strategy")
        with pytest.MonkeyPatch.context() as patch:
            context = {"parallel_mode": "semi_auto_parallel", "pipeline_stages": 1}
            patch.setattr(sys.modules[replacement.MODULE].ms, "get_auto_parallel_context", context.get)
            replacement_mode(str(sharded), src_strategy=strategy_argument("dp2mp4"))
    write_tensors(tmp_path / "two" / "a.1.ckpt", model)
    write_tensors(tmp_path / "two" / "a.2.ckpt", model)
    with pytest.raises(PlanError, match=r"would both be named a; rename one"):
        ours()(str(tmp_path / "two"), result, dst_strategy=mp8)
    (tmp_path / "result").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "llama").mkdir(parents=True)
    (tmp_path / "elsewhere" / "mine").mkdir()
    ours()(str(sharded), result, strategy_argument("dp2mp4"), mp8)
    assert (tmp_path / "elsewhere" / "mine").is_dir()
    with pytest.raises(PublishError, match="is a file"):
        (tmp_path / "file").mkdir()
        (tmp_path / "file" / "llama").touch()
        ours()(str(sharded), str(tmp_path / "file"), strategy_argument("dp2mp4"), mp8)


def test_modelarts_is_left_to_mindformers(
    ours: type[Any], module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "check_in_modelarts", lambda: True)
    with pytest.raises(ValueError, match="must be a power of 2"):
        ours(npu_num_per_node=6)


# The command


def test_scripts_that_cannot_run_on_ours_are_refused(
    module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 2
    assert "python -m mindformers_ckpt.run run_mindformer.py" in capsys.readouterr().err
    assert main(["--config", "x.yaml"]) == 2
    assert capsys.readouterr().err.endswith("error: the script comes first, its options after it\n")
    assert main(["--help"]) == 0
    assert "MINDFORMERS_CKPT_TIMEOUT" in capsys.readouterr().out
    assert main([str(tmp_path / "run.py")]) == 1
    assert capsys.readouterr().err.startswith(f"error: there is no script '{tmp_path / 'run.py'}' in {Path.cwd()}; ")
    (tmp_path / "launcher.sh").touch()
    assert main([str(tmp_path / "launcher.sh")]) == 1
    assert "is a shell script; start it with bash" in capsys.readouterr().err
    assert main([str(module.__file__), "--world_size=8"]) == 1
    assert "`mindformers-ckpt transform` takes the same options" in capsys.readouterr().err


def test_an_error_of_ours_in_a_script_is_one_message(module: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from mindformers_ckpt.errors import PlanError\nraise PlanError('the weights of another model')\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "mindformers_ckpt.run", str(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: the weights of another model"
    assert "Traceback" not in result.stderr


# MindFormers' way from a configuration to weights in the network


def configuration(**keys: Any) -> Any:
    """The keys of a MindFormers configuration that transform_and_load_checkpoint reads."""
    from mindformers.tools.register import MindFormerConfig

    return MindFormerConfig(
        **{
            "auto_trans_ckpt": True,
            "only_save_strategy": False,
            "load_ckpt_format": "ckpt",
            "load_ckpt_async": False,
            "use_parallel": False,
            "remove_redundancy": False,
            "transform_process_num": 2,
            "transform_by_rank": None,
            "npu_num_per_node": None,
            "resume_training": False,
            "output_dir": os.environ["LOCAL_DEFAULT_PATH"],
            "context": {"mode": 0},
            "model": {"model_config": {"type": "LlamaConfig"}},
            "runner_config": {"step_scale": None, "sink_mode": False, "epochs": 1, "sink_size": -1},
            **keys,
        }
    )


def network_of(tensors: Mapping[str, Tensor]) -> Any:
    """A network whose parameters have these names, types and shapes, all zero."""
    import mindspore as ms

    class Network(ms.nn.Cell):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for number, (name, tensor) in enumerate(tensors.items()):
                start = ms.ops.zeros(tensor.bits.shape, getattr(ms, tensor.dtype.name))
                setattr(self, f"weight_{number}", ms.Parameter(start, name=name))

    return Network()


def test_their_loading_path_runs_on_ours(ours: type[Any], output: Path, tmp_path: Path) -> None:
    from mindformers.trainer.utils import transform_and_load_checkpoint

    model = {name: tensor for name, tensor in model_of("dp2mp2pp2", "dp1").items() if tensor.dtype.name == "float32"}
    assert len(model) > 5
    root = write_ranks(tmp_path / "llama", slices_of(recorded("dp2mp2pp2"), model, REPLICATED))
    network = network_of(model)
    # Up to 1.8 load_checkpoint is the path that is read and changed, then that of the section.
    paths = {"load_checkpoint": str(root), "checkpoint": {"load_path": str(root)}}
    config = configuration(**paths, src_strategy_path_or_dir=strategy_argument("dp2mp2pp2"))
    transform_and_load_checkpoint(config, None, network, None)
    assert str(output / "transformed_checkpoint") in (config.load_checkpoint, config.checkpoint.load_path)
    assert (output / "transformed_checkpoint/llama/manifest.json").is_file()
    loaded = {parameter.name: parameter.asnumpy() for parameter in network.get_parameters()}
    assert loaded.keys() == model.keys()
    for name, tensor in model.items():
        assert loaded[name].tobytes() == tensor.bits.tobytes(), name


@pytest.mark.timeout(600)
def test_their_loading_path_in_a_job_of_two_ranks(module: ModuleType, tmp_path: Path) -> None:
    """Two ranks under msrun and `python -m mindformers_ckpt.run`: as one node, as two, then twice with a failure.

    Not real: MindSpore compiles no semi_auto_parallel network on a CPU, so the strategies are written before.
    """
    shapes = {"emb": (8, 6), "wq": (6, 8), "norm": (6,)}
    model = random_model(shapes)
    source = write_tensors(tmp_path / "base.ckpt", model)
    damaged = write_tensors(tmp_path / "damaged" / "base.ckpt", model)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    layouts = {
        "emb": Layout.on({"mp": 2}, "mp", None),
        "wq": Layout.on({"mp": 2}, None, "mp"),
        "norm": Layout.on({"mp": 2}, None),
    }
    output = tmp_path / "output"
    for rank in range(2):
        write_strategy(layouts, output / "strategy" / rank_file_name(rank))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("msrun")), "--worker_num=2", "--local_worker_num=2", "--join=True"),
        *("--master_addr=127.0.0.1", f"--master_port={port}", f"--log_dir={tmp_path / 'log'}", "python"),
        *("-m", "mindformers_ckpt.run", str(JOB), str(source), str(damaged), str(tmp_path)),
    ]
    environment = {
        **os.environ,
        "LOCAL_DEFAULT_PATH": str(output),
        "LOG_MF_PATH": str(tmp_path / "mindformers_log"),
        "MINDFORMERS_CKPT_TIMEOUT": "60",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    logs = "".join(path.read_text() for path in sorted((tmp_path / "log").glob("worker_*.log")))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    for rank in range(2):
        half = slice(4 * rank, 4 * rank + 4)
        parts = {"emb": model["emb"].bits[half], "wq": model["wq"].bits[:, half], "norm": model["norm"].bits}
        for nodes in (1, 2):
            loaded = np.load(tmp_path / f"loaded_{rank}_{nodes}.npz")
            assert {name: loaded[name].tobytes() for name in parts} == {
                name: bits.tobytes() for name, bits in parts.items()
            }
        assert "ranks [1] have saved no strategy in" in (tmp_path / f"lost_{rank}.txt").read_text()
        assert str(damaged) in (tmp_path / f"damaged_{rank}.txt").read_text()
        (made,) = (output / f"transformed_checkpoint/base/rank_{rank}").iterdir()
        assert_same(read_tensors(made), {name: Tensor(model[name].dtype, bits) for name, bits in parts.items()})
    assert (tmp_path / "damaged_0.txt").read_text().startswith("FormatError: ")
    assert (
        (tmp_path / "damaged_1.txt").read_text().startswith("RankError: rank 0 failed in step 'transform checkpoint'")
    )
    assert "the engine of mindformers_ckpt" in logs


def test_a_rank_that_dies_while_it_compiles_is_announced(module: ModuleType, tmp_path: Path) -> None:
    """The ranks meet before they compile, so that nobody waits 7,200 s in `TransformCkpt` for one that is dead."""
    source = write_tensors(tmp_path / "base.ckpt", random_model({"emb": (8, 6)}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "LOCAL_DEFAULT_PATH": str(tmp_path / "output"),
        "LOG_MF_PATH": str(tmp_path / "log"),
        "MINDFORMERS_CKPT_MASTER": address,
        "RANK_SIZE": "2",
    }
    job = Path(__file__).with_name("compile_job.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(job), str(source), str(tmp_path)],
            env={**environment, "RANK_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 9], outputs
    told = (tmp_path / "told_0.txt").read_text()
    assert told.startswith(("RankError: rank 1 ", "RankError: rank 1, which coordinates, died")), told
