"""MindFormers' `load_checkpoint` with ours installed, for PyNative networks: each rank's part of their tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint2_files import SAMPLES
from played import full, transform

from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.integrations import mindformers as replacement
from mindformers_ckpt.log import log
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy

try:
    VERSION = version("mindformers")
except PackageNotFoundError:
    pytest.skip("MindFormers is not installed; bash tools/test_mindformers.sh runs these", allow_module_level=True)
if not VERSION.startswith("2."):
    pytest.skip("PyNative networks are distributed from 2.0 on", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")
SINGLE = "mf2.1.0/single"
LAYOUTS = ("mf2.1.0/dp2tp2", "mf2.1.0/pp2dp2tp2")
PLAIN = "decoder.final_layernorm.weight"  # a tensor of MindSpore, as MindFormers leaves some


@pytest.fixture
def mindspore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(os.environ, "LOG_MF_PATH", str(tmp_path / "log"))
    import mindspore

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE, device_target="CPU")
    yield mindspore
    replacement.uninstall()
    mindspore.set_context(mode=mindspore.GRAPH_MODE)


Placing = tuple[Layout, Sequence[int]]


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of our log."""
    found: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(log, level, lambda text, *values: found.append(text % values))
    return found


class Rank:
    """A rank of a job whose network and optimizer hold parts of tensors: name -> layout, and the ranks of that."""

    def __init__(
        self, mindspore: Any, rank: int, count: int, layouts: Mapping[str, Placing], tensors: Mapping[str, Any]
    ) -> None:
        from dtensors import Placed, dtensor

        self.rank, self.count = rank, count
        network: list[Any] = []
        optimizer: list[Any] = []
        self.expected: dict[str, Any] = {}
        for name, (layout, ranks) in layouts.items():
            self.expected[name] = tensors[name][layout.box(tensors[name].shape, ranks.index(rank)).slices()]
            start = np.zeros(self.expected[name].shape, np.float32)
            if name == PLAIN:
                made = mindspore.Parameter(mindspore.Tensor(start), name=name)
            else:
                made = dtensor(name, start, Placed.of(layout, ranks), tensors[name].shape)
            (optimizer if name.startswith("adam_") else network).append(made)
        optimizer.append(mindspore.Parameter(mindspore.Tensor([0], mindspore.int32), name="global_step"))
        self.network, self.optimizer = _cell(mindspore, network), _cell(mindspore, optimizer)

    def load(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Load by MindFormers' function, which takes this process for the rank."""
        from dtensors import get_current_layout
        from mindformers.checkpoint import checkpoint, layout_adapter, reshard, sharded_tensor

        for module in (checkpoint, reshard, sharded_tensor, layout_adapter):
            for name, value in (("get_real_rank", self.rank), ("get_real_group_size", self.count)):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, lambda value=value: value)
        monkeypatch.setattr(layout_adapter, "get_current_layout", partial(get_current_layout, self.rank))
        checkpoint.load_checkpoint(str(folder), self.network, self.optimizer, global_step=3)

    def content(self) -> dict[str, Any]:
        cells = (self.network, self.optimizer)
        return {own.name: own.asnumpy() for cell in cells for own in cell.get_parameters()}

    def assert_loaded(self) -> None:
        found = self.content()
        assert found.pop("global_step").tolist() == [3]
        assert found.keys() == self.expected.keys()
        for name, array in self.expected.items():
            np.testing.assert_array_equal(found[name], array, name)


def _cell(mindspore: Any, parameters: list[Any]) -> Any:
    cell = mindspore.nn.Cell(auto_prefix=False)
    for number, parameter in enumerate(parameters):
        cell.insert_param_to_cell(f"p{number}", parameter, check_name_contain_dot=False)
    return cell


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The iteration's folder of a checkpoint 2.0 that was written for a layout."""
    out = tmp_path_factory.mktemp("made") / "out"
    transform(SAMPLES / SINGLE, out, "--format", "checkpoint2", "--dst-strategy", SAMPLES / request.param)
    return out / "iteration_00000007"


def placings(strategy: Strategy, rank: int) -> dict[str, Placing]:
    """The layouts of a rank's stage."""
    stage, size = strategy.stage_of(rank), strategy.stage_size
    ranks = range(stage * size, (stage + 1) * size)
    return {name: (layout, ranks) for name, layout in strategy.stages[stage].items()}


@pytest.mark.parametrize("install", [lambda: None, replacement.install], ids=["theirs", "ours"])
@pytest.mark.parametrize("job", LAYOUTS)
def test_every_rank_has_its_part(
    mindspore: Any,
    messages: list[str],
    saved: Path,
    job: str,
    install: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strategy, tensors = read_strategy(SAMPLES / job), full(SINGLE)
    for number in range(strategy.rank_count):
        rank = Rank(mindspore, number, strategy.rank_count, placings(strategy, number), tensors)
        install()
        rank.load(saved, monkeypatch)
        rank.assert_loaded()
    read = [line for line in messages if "read from" in line]
    assert len(read) == (strategy.rank_count if install is replacement.install else 0)


def test_ranks_of_a_layout_need_not_follow_one_another(
    mindspore: Any, messages: list[str], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that only data parallelism cuts is on a mesh of ranks 0 and 2, or 1 and 3."""
    tensors = full(SINGLE)
    for number in range(4):
        layouts = {
            name: (Layout((2,), ((0,), *((),) * (array.ndim - 1))), (number % 2, number % 2 + 2))
            for name, array in tensors.items()
            if name not in ("global_step", PLAIN) and array.shape[0] % 2 == 0
        }
        rank = Rank(mindspore, number, 4, layouts, tensors)
        replacement.install()
        rank.load(saved, monkeypatch)
        rank.assert_loaded()
    assert not [line for line in messages if "own code" in line]


def test_what_is_missing_or_of_another_size_is_listed(
    mindspore: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, tensors = read_strategy(SAMPLES / LAYOUTS[0]), full(SINGLE)
    layouts = placings(strategy, 1)
    name, placing = next((name, layout) for name, layout in layouts.items() if tensors[name].ndim == 2)
    replacement.install()

    lacking = Rank(mindspore, 1, 4, {**layouts, "decoder.new": placing}, {**tensors, "decoder.new": tensors[name]})
    with pytest.raises(ConfigError, match=r"parameters of the network are not in the checkpoint(.|\n)*decoder\.new"):
        lacking.load(saved, monkeypatch)

    rows, columns = tensors[name].shape
    wider = {**tensors, name: np.zeros((2 * rows, 2 * columns), np.float32)}
    other = Rank(mindspore, 1, 4, layouts, wider)
    with pytest.raises(PlanError, match="cannot be loaded by rank 1") as caught:
        other.load(saved, monkeypatch)
    assert str(caught.value).splitlines()[1].startswith(f"  - {name}: [")
    for rank in (lacking, other):
        assert not any(array.any() for array in rank.content().values())
