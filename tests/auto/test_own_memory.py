"""Weights are read into the memory that the parameters of the network have: it needs no other."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mindspore")

import mindspore
import numpy as np
from networks import Net, assert_holds, content_of, network_for
from rank_jobs import model_of
from recorded import Tensor, random_bits, random_model, recorded, slices_of, write_ranks, write_tensors

from mindformers_ckpt import CheckpointHook
from mindformers_ckpt.errors import ConfigError, TransferError
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.ms.weights import Parameters, own_memory

TYPES = ("bool", "int8", "int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64", "complex64")
SHAPE = (2, 3)
WAYS: dict[str, dict[str, Any]] = {
    "files of its own": {"auto_trans_ckpt": False},
    "parts of others": {"auto_trans_ckpt": True, "auto_trans_save": False},
    "a result": {"auto_trans_ckpt": True},
}


def load(folder: Path, source: Path, *cells: Any, **keys: Any) -> dict[str, Any]:
    config = {"output_dir": folder / "output", "use_parallel": False, "load_checkpoint": source, **keys}
    hook = CheckpointHook(Config.from_mapping(config))
    hook.prepare()
    return hook.load(*cells)


def singles(*names: str, shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    """Random tensors of float32."""
    generator = np.random.default_rng(0)
    return {name: random_bits(by_name("float32"), shape, generator) for name in names}


def views_of(network: Net) -> dict[str, np.ndarray[Any, Any]]:
    return {parameter.name: parameter.asnumpy() for parameter in network.get_parameters()}


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
@pytest.mark.parametrize("way", WAYS)
def test_the_network_keeps_its_memory(tmp_path: Path, way: str, format: str) -> None:
    config = recorded("dp4mp2_opt_size2")
    tensors = model_of(config)
    if WAYS[way]["auto_trans_ckpt"]:
        slices = slices_of(config, tensors, replicated=("global_step",))
        source, keys = write_ranks(tmp_path / "model", slices, format), {"src_strategy_path_or_dir": config.file}
    else:
        source, keys = write_tensors(tmp_path / f"whole.{format}", tensors), {}
    network = network_for(tensors)
    before = views_of(network)
    loaded = load(tmp_path, source, network, **keys, **WAYS[way])
    assert loaded.keys() == tensors.keys()
    assert_holds(network, tensors)
    after = views_of(network)
    assert all(np.shares_memory(before[name], after[name]) for name in tensors)
    assert {name: view.tobytes() for name, view in before.items()} == {
        name: tensor.bits.tobytes() for name, tensor in tensors.items()
    }


def test_no_other_memory_is_taken(tmp_path: Path) -> None:
    tensors = random_model({f"layers.{number}.weight": (1 << 10, 1 << 10) for number in range(8)})
    source = write_tensors(tmp_path / "whole.ckpt", tensors)
    network = network_for(tensors)
    tracemalloc.start()
    try:
        load(tmp_path, source, network, auto_trans_ckpt=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_holds(network, tensors)
    assert peak < 8 << 20  # of 32 MiB of weights


@pytest.mark.parametrize("shape", [SHAPE, (), (1,)])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type(dtype: str, shape: tuple[int, ...]) -> None:
    network = Net({"w": (dtype, shape)})
    spec = TensorSpec("w", by_name(dtype), shape)
    content = np.arange(spec.nbytes).astype(np.uint8) % 2
    own_memory(Parameters([network]), [spec])["w"][:] = content
    assert content_of(network.w) == content.tobytes()


@pytest.mark.parametrize(("dtype", "shape"), [("float16", SHAPE), ("float32", (3, 2))])
def test_none_where_one_tensor_does_not_fit(dtype: str, shape: tuple[int, ...]) -> None:
    """The load may be refused then, and leaves the network as it is."""
    parameters = Parameters([Net({"a": ("float32", SHAPE), "b": ("float32", SHAPE)})])
    fitting = TensorSpec("a", by_name("float32"), SHAPE)
    assert own_memory(parameters, [fitting, TensorSpec("other", by_name("float32"), SHAPE)]).keys() == {"a"}
    assert own_memory(parameters, [fitting, TensorSpec("b", by_name(dtype), shape)]) == {}


class Doubling(mindspore.nn.Cell):  # type: ignore[misc]
    """Gives twice its parameter, and sets that to it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = mindspore.Parameter(mindspore.Tensor(np.ones(SHAPE, np.float32)), name="w")
        self.assign = mindspore.ops.Assign()

    def construct(self, scale: Any) -> Any:
        self.assign(self.w, self.w * scale)
        return self.w + 0.0


@pytest.mark.parametrize("mode", [mindspore.GRAPH_MODE, mindspore.PYNATIVE_MODE], ids=["graph", "PyNative"])
def test_a_network_that_has_run_goes_on_with_what_was_loaded(mode: int, tmp_path: Path) -> None:
    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mode)
    try:
        network, two = Doubling(), mindspore.Tensor(2.0)
        for value in (3.0, 5.0):
            network(two)
            content = np.full(SHAPE, value, np.float32)
            source = write_tensors(
                tmp_path / "whole.ckpt", {"w": Tensor(by_name("float32"), content.view(by_name("float32").carrier))}
            )
            loaded = load(tmp_path, source, network, auto_trans_ckpt=False)
            assert loaded["w"] is network.w
            assert np.array_equal(network(two).asnumpy(), content * 2)
            assert np.array_equal(network.w.asnumpy(), content * 2)
    finally:
        mindspore.set_context(mode=before)


def test_values_that_are_given_as_a_copy_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`asnumpy` gives a copy of a tensor that is transposed, say."""
    tensors = singles("a", "b")
    network = network_for(tensors)
    view = network.a.asnumpy
    monkeypatch.setattr(network.a, "asnumpy", lambda: view().copy(), raising=False)
    specs = [TensorSpec(name, by_name("float32"), SHAPE) for name in tensors]
    assert own_memory(Parameters([network]), specs).keys() == {"b"}
    monkeypatch.undo()
    monkeypatch.setattr(network.a, "asnumpy", lambda: np.zeros(SHAPE, np.float32), raising=False)
    load(tmp_path, write_tensors(tmp_path / "whole.ckpt", tensors), network, auto_trans_ckpt=False)
    monkeypatch.undo()
    assert_holds(network, tensors)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_read_in_place_is_not_set(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = singles("a", "b", "c")
    network = network_for(tensors)
    source = write_tensors(tmp_path / "whole.ckpt", tensors)
    found = []
    real = mindspore.Parameter.set_data

    def set_data(own: Any, *rest: Any) -> Any:
        found.append(own.name)
        return real(own, *rest)

    monkeypatch.setattr(network.b, "asnumpy", lambda: np.zeros(SHAPE, np.float32), raising=False)
    monkeypatch.setattr(mindspore.Parameter, "set_data", set_data)
    load(tmp_path, source, network, **WAYS[way])
    monkeypatch.undo()
    assert found == ["b"]
    assert_holds(network, tensors)


def test_all_parameters_of_a_name_are_set(tmp_path: Path) -> None:
    tensors = singles("a", "b")
    cells = [network_for(tensors), network_for(tensors)]
    specs = [TensorSpec(name, by_name("float32"), SHAPE) for name in tensors]
    assert own_memory(Parameters(cells), specs) == {}
    load(tmp_path, write_tensors(tmp_path / "whole.ckpt", tensors), *cells, auto_trans_ckpt=False)
    for cell in cells:
        assert_holds(cell, tensors)


class _Elsewhere:
    """A parameter in the memory of an NPU, which this machine has not."""

    def __init__(self, like: Any, **others: Any) -> None:
        self._like, self._others = like, others

    def __getattr__(self, name: str) -> Any:
        return self._others[name] if name in self._others else getattr(self._like, name)

    def asnumpy(self) -> None:
        raise AssertionError("it is copied from the device for nothing")


@pytest.mark.parametrize("other", [{"device": "Ascend:0"}, {"has_init": True}])
def test_parameters_elsewhere_are_left_alone(other: dict[str, Any]) -> None:
    parameters = Parameters([Net({"w": ("float32", SHAPE)})])
    parameters._found["w"] = [_Elsewhere(parameters["w"], **other)]
    assert own_memory(parameters, [TensorSpec("w", by_name("float32"), SHAPE)]) == {}


def test_parameters_that_share_memory_get_their_own(tmp_path: Path) -> None:
    """`set_data` keeps the memory of what it is given: read in place, one would have the values of the other."""
    tensors = singles("a", "b", "c")
    network = network_for(tensors)
    network.b.set_data(network.a)
    shared = np.shares_memory(network.a.asnumpy(), network.b.asnumpy())
    specs = [TensorSpec(name, by_name("float32"), SHAPE) for name in tensors]
    assert own_memory(Parameters([network]), specs).keys() == ({"c"} if shared else tensors.keys())
    assert own_memory(Parameters([network]), specs[1:]).keys() == ({"c"} if shared else {"b", "c"})
    load(tmp_path, write_tensors(tmp_path / "whole.ckpt", tensors), network, auto_trans_ckpt=False)
    assert_holds(network, tensors)


def test_none_beside_a_type_that_mindspore_may_not_have() -> None:
    parameters = Parameters([Net({"a": ("float32", SHAPE)})])
    specs = [TensorSpec("a", by_name("float32"), SHAPE), TensorSpec("other", by_name("hifloat8"), SHAPE)]
    assert own_memory(parameters, specs) == {}


def test_what_another_stage_sends_is_left_alone() -> None:
    parameters = Parameters([Net({"w": ("float32", SHAPE)})])
    parameters["w"].param_info.is_pipeline_shared_param = True
    assert own_memory(parameters, [TensorSpec("w", by_name("float32"), SHAPE)]) == {}


@pytest.mark.parametrize(
    "network",
    [{"a": ("float32", SHAPE), "b": ("int32", SHAPE)}, {"a": ("float32", SHAPE), "absent": ("float32", SHAPE)}],
    ids=["a type that MindSpore cannot convert", "a parameter that the checkpoint lacks"],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_refused_load_leaves_the_network_as_it_is(tmp_path: Path, network: dict[str, Any], way: str) -> None:
    source = write_tensors(tmp_path / "whole.ckpt", singles("a", "b"))
    cell = Net(network)
    before = {name: view.copy() for name, view in views_of(cell).items()}
    with pytest.raises(ConfigError):
        load(tmp_path, source, cell, **WAYS[way])
    assert all(np.array_equal(before[name], view) for name, view in views_of(cell).items())


def test_types_are_still_converted(tmp_path: Path) -> None:
    source = write_tensors(tmp_path / "whole.ckpt", singles("a", "b"))
    network = Net({"a": ("float32", SHAPE), "b": ("float64", SHAPE)})
    loaded = load(tmp_path, source, network, auto_trans_ckpt=False)
    single = Net({"a": ("float32", SHAPE), "b": ("float32", SHAPE)})
    load(tmp_path, source, single, auto_trans_ckpt=False)
    assert content_of(loaded["a"]) == content_of(single.a)
    assert np.array_equal(network.b.asnumpy(), single.b.asnumpy().astype(np.float64), equal_nan=True)


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of both are in the network then; the error is no less one."""
    source = write_tensors(tmp_path / "whole.ckpt", singles("a", "b", shape=(512, 512)))
    network = Net({"a": ("float32", (512, 512)), "b": ("float32", (512, 512))})

    def cut(parameters: Parameters, specs: Any) -> Any:
        source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        return own_memory(parameters, specs)

    monkeypatch.setattr("mindformers_ckpt.ms.weights.own_memory", cut)
    with pytest.raises(TransferError, match=r"whole\.ckpt"):
        load(tmp_path, source, network, auto_trans_ckpt=False)
