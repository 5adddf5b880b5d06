"""MindFormers' own loader of checkpoint 2.0 reads what we write: whole on one card, and as ranks of several layouts.

Played are the rank's number, barriers, and the layouts of a compiled network (`mindspore.Layout` made by hand).
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint2_files import SAMPLES
from played import cells, content, full, play, transform
from recorded import read_tensors

from mindformers_ckpt.strategy.files import read_strategy

try:
    VERSION = version("mindformers")
except PackageNotFoundError:
    pytest.skip("MindFormers is not installed; bash tools/test_mindformers.sh runs these", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")
loads = pytest.mark.skipif(VERSION.startswith("1.7."), reason="1.7 loads on several cards only, from compiled networks")

TRAINED = ("mf1.9.0/dp2tp2", "mf2.1.0/dp2tp2_no_redundancy", "mf2.1.0/pp2dp2tp2", "mf2.1.0/single")
TARGETS = ("mf2.1.0/dp2tp2", "mf2.1.0/pp2dp2tp2")


@pytest.fixture(scope="module")
def mindspore(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["LOG_MF_PATH"] = str(tmp_path_factory.mktemp("log"))
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
    return mindspore


@loads
@pytest.mark.parametrize("target", [*TARGETS, None])
@pytest.mark.parametrize("case", TRAINED)
def test_one_card_reads_all_of_it(mindspore: Any, case: str, target: str | None, tmp_path: Path) -> None:
    """Weights, moments and the step; of a checkpoint for several ranks MindFormers puts the slices together."""
    from mindformers.checkpoint.checkpoint import CommonInfo, load_checkpoint

    options = [] if target is None else ["--dst-strategy", SAMPLES / target]
    made = transform(SAMPLES / case, tmp_path / "made", "--format", "checkpoint2", *options)
    expected = full(case)
    network, optimizer = cells(mindspore, {name: array.shape for name, array in expected.items()})
    load_checkpoint(str(made), network, optimizer)
    found = {**content(optimizer), **content(network)}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
    assert found["global_step"].tolist() == [7]
    common = CommonInfo.load_common(str(made / "iteration_00000007/common.json"))
    assert (common.epoch_num, common.step_num, common.global_step) == (1, 7, 7)
    assert (common.loss_scale, common.global_batch_size) == (1.0, 4)


@loads
@pytest.mark.parametrize("job", TARGETS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_rank_reads_its_part(
    mindspore: Any, target: str, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job on the layout that the checkpoint was written for, and one on another, which MindFormers re-slices for."""
    case = "mf2.1.0/single"
    made = transform(SAMPLES / case, tmp_path / "made", "--format", "checkpoint2", "--dst-strategy", SAMPLES / target)
    expected, strategy = full(case), read_strategy(SAMPLES / job)
    for rank in range(strategy.rank_count):
        stage, inner = divmod(rank, strategy.stage_size)
        held = {name: array for name, array in expected.items() if name in strategy.stages[stage]}
        boxes = {name: strategy.stages[stage][name].box(array.shape, inner) for name, array in held.items()}
        network, optimizer = cells(mindspore, {name: box.shape for name, box in boxes.items()})
        play(monkeypatch, mindspore, rank, strategy, held)
        from mindformers.checkpoint.checkpoint import load_checkpoint

        load_checkpoint(str(made), network, optimizer)
        found = {**content(optimizer), **content(network)}
        for name, array in held.items():
            np.testing.assert_array_equal(found[name], array[boxes[name].slices()], f"{name} of rank {rank}")
        assert found["global_step"].tolist() == [7]


def test_a_checkpoint_that_mindformers_saves_is_read(mindspore: Any, tmp_path: Path) -> None:
    """Saved by the installed version itself, on one card."""
    from mindformers.checkpoint.checkpoint import CommonInfo, save_checkpoint

    expected = full("mf2.1.0/single")
    network, optimizer = cells(mindspore, {name: array.shape for name, array in expected.items()})
    for parameter in (*network.get_parameters(), *optimizer.get_parameters()):
        if parameter.name in expected:
            parameter.set_data(mindspore.Tensor(expected[parameter.name]))
    common = CommonInfo(epoch_num=2, step_num=9, global_step=9, loss_scale=1.0, global_batch_size=4)
    saved = tmp_path / "saved"
    saved.mkdir()
    save_checkpoint(9, network, optimizer, common_info=common, user_prefix="own", save_checkpoint_path=str(saved))
    out = transform(saved, tmp_path / "out", "--format", "safetensors")
    found = read_tensors(out / "rank_0/checkpoint_0.safetensors")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].bits.view(np.float32), array)
    assert int(found["step_num"].bits) == 9
    shutil.rmtree(saved)
