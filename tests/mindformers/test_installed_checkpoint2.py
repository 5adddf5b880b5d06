"""MindFormers' `load_checkpoint` of checkpoint 2.0 with ours installed: the same parameters as by its own code, on one
card and as ranks of several layouts; and what ours says of checkpoints that MindFormers loads in part, or not at all.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint2_files import SAMPLES
from played import cells, content, full, play, transform

from mindformers_ckpt.errors import ConfigError, FormatError, PlanError
from mindformers_ckpt.integrations import checkpoint2
from mindformers_ckpt.integrations import mindformers as replacement
from mindformers_ckpt.log import log
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy

try:
    VERSION = version("mindformers")
except PackageNotFoundError:
    pytest.skip("MindFormers is not installed; bash tools/test_mindformers.sh runs these", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")
replaces = pytest.mark.skipif(VERSION.startswith("1.7."), reason="1.7 has another loader, which is left alone")

SINGLE = "mf2.1.0/single"
LAYOUTS = ("mf2.1.0/dp2tp2", "mf2.1.0/pp2dp2tp2")


@pytest.fixture(scope="module")
def mindspore(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["LOG_MF_PATH"] = str(tmp_path_factory.mktemp("log"))
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
    return mindspore


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of our log."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    monkeypatch.setattr(log, "handlers", [Handler()])
    return found


@pytest.fixture
def ours(mindspore: Any, messages: list[str]) -> Iterator[Any]:
    replacement.install()
    yield mindspore
    replacement.uninstall()


def load(*arguments: Any, **options: Any) -> None:
    from mindformers.checkpoint import checkpoint

    checkpoint.load_checkpoint(*arguments, **options)


def made(target: str, folder: Path, source: str = SINGLE) -> Path:
    """The iteration's folder of a checkpoint 2.0 that was written for a layout."""
    out = transform(SAMPLES / source, folder / "made", "--format", "checkpoint2", "--dst-strategy", SAMPLES / target)
    return out / "iteration_00000007"


def change_metadata(folder: Path, change: Any) -> None:
    metadata = json.loads((folder / "metadata.json").read_text())
    change(metadata)
    (folder / "metadata.json").write_text(json.dumps(metadata))


def shapes_of(expected: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in expected.items()}


def held_by(rank: int, strategy: Strategy, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank has, of the whole tensors."""
    stage, inner = divmod(rank, strategy.stage_size)
    layouts = strategy.stages[stage]
    return {name: a[layouts[name].box(a.shape, inner).slices()] for name, a in expected.items() if name in layouts}


def assert_held(network: Any, optimizer: Any, expected: Mapping[str, Any]) -> None:
    for cell in (network, optimizer):
        found = content(cell)
        for name, array in expected.items():
            if name in found and (cell is network or name.startswith("adam_")):
                np.testing.assert_array_equal(found[name], array, name)


# Installing


@replaces
def test_it_is_replaced_wherever_it_was_imported_and_comes_back(mindspore: Any) -> None:
    from mindformers.checkpoint import checkpoint
    from mindformers.pynative.trainer import trainer
    from mindformers.trainer import base_trainer

    theirs, loader = checkpoint.load_checkpoint, checkpoint.ReshardLoader
    replacement.install()
    try:
        assert checkpoint2.replaced()
        assert checkpoint.ReshardLoader is not loader
        for module in (checkpoint, base_trainer, trainer):
            assert module.load_checkpoint is not theirs
            assert inspect.signature(module.load_checkpoint) == inspect.signature(theirs)
        replacement.install()
        assert checkpoint.load_checkpoint.__wrapped__ is theirs
    finally:
        replacement.uninstall()
    assert (checkpoint.load_checkpoint, checkpoint.ReshardLoader) == (theirs, loader)
    assert base_trainer.load_checkpoint is theirs
    assert trainer.load_checkpoint is theirs


@replaces
def test_another_signature_is_left_alone_and_said(
    mindspore: Any, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mindformers.checkpoint import checkpoint

    def theirs(checkpoint: str, network: Any, mode: str = "lazy") -> None: ...

    monkeypatch.setattr(checkpoint, "load_checkpoint", theirs)
    replacement.install()
    try:
        assert replacement.installed()
        assert not checkpoint2.replaced()
        assert checkpoint.load_checkpoint is theirs
    finally:
        replacement.uninstall()
    (line,) = [line for line in messages if "cannot be replaced" in line]
    assert "MindFormers' own code loads checkpoints 2.0: its load_checkpoint cannot be replaced" in line
    assert "('mode', 'lazy')" in line


@replaces
def test_a_script_gets_it_by_run(mindspore: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from mindformers.trainer import base_trainer\n"
        "from mindformers_ckpt.integrations import checkpoint2\n"
        "print(checkpoint2.replaced(), hasattr(base_trainer.load_checkpoint, '__wrapped__'))\n"
    )
    environment = {**os.environ, "LOG_MF_PATH": str(tmp_path / "log"), "MINDFORMERS_CKPT_ALLOW_MISSING": "a.*,b"}
    command = [sys.executable, "-W", "ignore", "-m", "mindformers_ckpt.run", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1] == "True True", done.stderr


@pytest.mark.skipif(not VERSION.startswith("1.7."), reason="1.7 alone")
def test_the_loader_of_1_7_is_left_alone_and_said(ours: Any, messages: list[str]) -> None:
    """Its function does all in one: there is nothing in it that could be replaced without writing it anew."""
    from mindformers.checkpoint import checkpoint

    assert not checkpoint2.replaced()
    assert checkpoint.load_checkpoint.__module__ == checkpoint.__name__
    assert "it has no ReshardLoader" in "\n".join(messages)


# Loading


@replaces
@pytest.mark.parametrize("case", ["mf1.9.0/dp2tp2", "mf2.1.0/dp2tp2_no_redundancy", "mf2.1.0/pp2dp2tp2", SINGLE])
def test_one_card_has_all_of_it(ours: Any, case: str) -> None:
    expected = full(case)
    network, optimizer = cells(ours, shapes_of(expected))
    load(str(SAMPLES / case), network, optimizer, 5)  # as the trainer gives it, who reads common.json
    assert_held(network, optimizer, expected)
    # Where there is no metadata.json it is a tensor like the others, for MindFormers, too.
    assert content(optimizer)["global_step"].tolist() == [7 if case == SINGLE else 5]


@replaces
@pytest.mark.parametrize("job", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_rank_has_its_part_as_by_their_own_code(
    mindspore: Any, messages: list[str], target: str, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected, strategy = made(target, tmp_path), full(SINGLE), read_strategy(SAMPLES / job)
    for rank in range(strategy.rank_count):
        held = held_by(rank, strategy, expected)
        play(monkeypatch, mindspore, rank, strategy, {name: expected[name] for name in held})
        found = []
        for install in (False, True):
            if install:
                replacement.install()
            network, optimizer = cells(mindspore, shapes_of(held))
            try:
                load(str(folder), network, optimizer, global_step=3)
            finally:
                replacement.uninstall()
            assert_held(network, optimizer, held)
            found.append({**content(optimizer), **content(network)})
        theirs, own = found
        assert own.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(own[name], array, name)
        assert own["global_step"].tolist() == [3]
    read = [line for line in messages if "read from" in line]
    assert len(read) == strategy.rank_count


@replaces
def test_weights_alone_need_no_files_of_the_optimizer(ours: Any, messages: list[str], tmp_path: Path) -> None:
    folder, expected = made(LAYOUTS[0], tmp_path), full(SINGLE)
    weights = {name: array for name, array in expected.items() if not name.startswith("adam_")}
    network, _ = cells(ours, shapes_of(weights))
    load(str(folder), network)
    assert_held(network, network, weights)
    (line,) = [line for line in messages if "read from" in line]
    assert f"rank 0: {len(weights)} parameters" in line


@replaces
def test_states_that_the_compiled_network_has_no_layouts_of_are_loaded(
    ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.9 would leave them at zero, without a word."""
    folder, expected, strategy = made(LAYOUTS[1], tmp_path), full(SINGLE), read_strategy(SAMPLES / LAYOUTS[0])
    weights = {name: array for name, array in expected.items() if not name.startswith("adam_")}
    for rank in range(strategy.rank_count):
        held = held_by(rank, strategy, expected)
        network, optimizer = cells(ours, shapes_of(held))
        play(monkeypatch, ours, rank, strategy, weights)
        load(str(folder), network, optimizer)
        assert_held(network, optimizer, held)


@replaces
def test_adapters_alone_are_left_to_them(ours: Any, messages: list[str], tmp_path: Path) -> None:
    """Their weights come from another checkpoint, which MindFormers loads before."""
    network = ours.nn.Cell()
    for number, name in enumerate(("layer.weight", "layer.lora_A.weight")):
        start = ours.Tensor(np.zeros((2, 3), np.float32))
        setattr(network, f"p{number}", ours.Parameter(start, name=name))
    adapter = ours.Parameter(ours.Tensor(np.ones((2, 3), np.float32)), name="layer.lora_A.weight")
    ours.save_checkpoint([adapter], str(tmp_path / "CKP-model-0000000-0000001"), format="safetensors")
    load(str(tmp_path), network)
    assert content(network)["layer.lora_A.weight"].all()
    assert not content(network)["layer.weight"].any()
    assert sum("by MindFormers' own code: it holds adapters alone" in line for line in messages) == 1


@replaces
def test_layouts_that_ours_cannot_read_are_left_to_them(
    ours: Any, messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = made(LAYOUTS[0], tmp_path), full(SINGLE)
    shapes = shapes_of(expected)

    def change(metadata: Any) -> None:
        for entry in metadata["state_dict_metadata"].values():
            if entry["layout"] is not None:
                entry["layout"]["rank_list"] = [3, 2, 1, 0]

    change_metadata(folder, change)
    network, optimizer = cells(ours, shapes)
    load(str(folder), network, optimizer)
    (line,) = [line for line in messages if "own code" in line]
    assert "its ranks [3, 2, 1, 0] are not the 4 ranks of a stage in their order" in line


# What is wrong


@replaces
def test_a_gap_in_cover_is_an_error(ours: Any, tmp_path: Path) -> None:
    folder, expected = made(LAYOUTS[0], tmp_path), full(SINGLE)
    entries = json.loads((folder / "metadata.json").read_text())["state_dict_metadata"]
    name = next(name for name, entry in entries.items() if len(entry["chunk"]) == 2)

    def change(metadata: Any) -> None:
        del metadata["storage_data"][str((name, (1,)))]

    change_metadata(folder, change)
    network, optimizer = cells(ours, shapes_of(expected))
    with pytest.raises(PlanError, match=r"cannot be loaded by rank 0") as caught:
        load(str(folder), network, optimizer)
    assert str(caught.value).splitlines()[1].startswith(f"  - {name}[")
    assert str(caught.value).endswith("(slice 1) is in no file")
    assert not any(array.any() for array in content(network).values())


@replaces
def test_a_missing_parameter_is_an_error_unless_it_is_allowed(ours: Any, messages: list[str], tmp_path: Path) -> None:
    folder, expected = made(LAYOUTS[0], tmp_path), full(SINGLE)
    network, optimizer = cells(ours, {**shapes_of(expected), "decoder.new.weight": (4, 6)})
    with pytest.raises(ConfigError, match=r"parameters of the network are not in the checkpoint(.|\n)*new\.weight"):
        load(str(folder), network, optimizer)
    assert not any(array.any() for array in content(network).values())
    replacement.uninstall()
    replacement.install(allow_missing=["decoder.new.*"])
    load(str(folder), network, optimizer)
    assert_held(network, optimizer, expected)
    assert "1 parameters keep their initial values (allow_missing): decoder.new.weight" in messages


@replaces
def test_another_model_is_an_error_that_names_all(ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, expected, strategy = made(LAYOUTS[0], tmp_path), full(SINGLE), read_strategy(SAMPLES / LAYOUTS[1])
    wider = {name: np.zeros(tuple(4 * n for n in array.shape), array.dtype) for name, array in expected.items()}
    held = held_by(5, strategy, wider)
    network, optimizer = cells(ours, shapes_of(held))
    play(monkeypatch, ours, 5, strategy, {name: wider[name] for name in held})
    with pytest.raises(PlanError, match=r"cannot be loaded by rank 5") as caught:
        load(str(folder), network, optimizer)
    lines = str(caught.value).splitlines()
    assert len(lines) >= min(20, len(held))
    assert all(" in the checkpoint, " in line for line in lines[1 : min(20, len(held))])


@replaces
def test_a_network_that_is_cut_otherwise_than_its_layouts_say_is_an_error(
    ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected, strategy = made(LAYOUTS[0], tmp_path), full(SINGLE), read_strategy(SAMPLES / LAYOUTS[0])
    network, optimizer = cells(ours, shapes_of(expected))
    play(monkeypatch, ours, 1, strategy, expected)
    with pytest.raises(ConfigError, match="the checkpoint does not fit the network; is it the checkpoint of this"):
        load(str(folder), network, optimizer)


@replaces
def test_files_of_another_checkpoint_are_an_error(ours: Any, tmp_path: Path) -> None:
    """With metadata.json of this one."""
    folder, expected = made(LAYOUTS[0], tmp_path), full(SINGLE)
    model, optimizer_file = sorted(folder.glob("*-0000000-0000004.safetensors"))
    shutil.copy(optimizer_file, model)
    network, optimizer = cells(ours, shapes_of(expected))
    with pytest.raises(PlanError, match="files and their metadata do not belong together") as caught:
        load(str(folder), network, optimizer)
    assert f"{model.name} lacks " in str(caught.value)


@replaces
def test_damaged_files_are_named(ours: Any, tmp_path: Path) -> None:
    folder, expected = made(LAYOUTS[0], tmp_path), full(SINGLE)
    file = min(folder.glob("*-model-*"))
    file.write_bytes(file.read_bytes()[:-20])
    network, optimizer = cells(ours, shapes_of(expected))
    with pytest.raises(FormatError, match=file.name):
        load(str(folder), network, optimizer)
