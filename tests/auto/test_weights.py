"""Bytes into MindSpore parameters: copied once, every element type, and what does not fit told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore
from mindspore import Tensor
from networks import Net, content_of
from recorded import random_bits, write_tensors

from mindformers_ckpt.engine.whole_files import read_file
from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.ms.weights import (
    Parameters,
    are_cut,
    check_fit,
    check_loaded,
    load_into,
    own_shapes,
    shares_stages,
    tensor_of,
    tensors_of,
)

TYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
)
ADVICE = "the advice"


def bytes_of(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    bits = random_bits(by_name(dtype), shape, np.random.default_rng(seed)).bits
    return np.frombuffer(bits.tobytes(), np.uint8).copy()


@pytest.mark.parametrize("shape", [(3, 5), (), (1,)])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_network_keeps_the_memory_that_was_read_into(dtype: str, shape: tuple[int, ...]) -> None:
    content = bytes_of(dtype, shape)
    tensor = tensor_of(TensorSpec("w", by_name(dtype), shape), content)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, getattr(mindspore, dtype))
    net, empty = Net({"w": (dtype, shape)}), Net({})
    check_fit(Parameters([net]), {"w": tensor}, ADVICE)
    assert load_into(Parameters([net]), {"w": tensor})["w"] is net.w
    other = load_into(Parameters([empty]), {"w": tensor})["w"]
    assert (other.name, tuple(other.shape), other.dtype) == ("w", shape, getattr(mindspore, dtype))
    assert content_of(net.w) == content_of(other) == content.tobytes()
    content[:] = 1
    assert content_of(net.w) == content_of(other) == content.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_without_elements(dtype: str) -> None:
    tensor = tensor_of(TensorSpec("w", by_name(dtype), (0, 3)), np.empty(0, np.uint8))
    parameter = load_into(Parameters([Net({})]), {"w": tensor})["w"]
    for found in (tensor, parameter):
        assert (tuple(found.shape), found.dtype) == ((0, 3), getattr(mindspore, dtype))


def test_the_values_are_those_of_mindspores_own_reading(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    tensors = {name: random_bits(by_name(name), (4, 3), generator) for name in TYPES if not name.startswith("complex")}
    file = write_tensors(tmp_path / "a.ckpt", tensors)
    expected = mindspore.load_checkpoint(str(file))
    found = tensors_of(read_file(file))
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == expected[name].dtype
        assert content_of(parameter) == content_of(expected[name])


def test_text_is_read_as_mindspore_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    weight = {"name": "w", "data": Tensor(np.ones(2, np.float32))}
    mindspore.save_checkpoint([weight], str(file), append_dict={"epoch_num": 3, "note": "größer", "rate": 0.5})
    expected = mindspore.load_checkpoint(str(file))
    found = tensors_of(read_file(file))
    assert found.keys() == expected.keys() == {"w", "epoch_num", "note", "rate"}
    assert found["note"] == expected["note"] == "größer"
    assert found["epoch_num"].asnumpy() == expected["epoch_num"].asnumpy() == 3
    net = Net({"w": ("float32", (2,))})
    load_into(Parameters([net]), found)
    assert net.w.asnumpy().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("dtype", "told"), [("float8_e4m3fn", "Float8E4M3FN"), ("hifloat8", "HiFloat8")])
def test_fp8_parameters_that_mindspore_cannot_make_are_told(dtype: str, told: str) -> None:
    with pytest.raises(
        ConfigError, match=f"w: MindSpore .* makes no ({told}|{dtype}) parameters on this device; convert"
    ):
        load_into(
            Parameters([Net({})]), {"w": tensor_of(TensorSpec("w", by_name(dtype), (2, 2)), np.zeros(4, np.uint8))}
        )


def loaded_from(**tensors: tuple[str, Any]) -> dict[str, Any]:
    """Parameters as they come out of a file: name -> (dtype, values)."""
    found = {}
    for name, (dtype, values) in tensors.items():
        tensor = Tensor(np.asarray(values)).astype(getattr(mindspore, dtype))
        content = np.frombuffer(content_of(tensor), np.uint8).copy()
        found[name] = tensor_of(TensorSpec(name, by_name(dtype), tuple(tensor.shape)), content)
    return found


def test_names_that_only_the_checkpoint_has_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    net = Net({"both": ("float32", (2,)), "mine": ("float32", (2,)), "accu_grads.both": ("float32", (2,))})
    optimizer = Net({"both": ("float32", (2,)), "moment1.both": ("float32", (2,))})
    loaded = loaded_from(both=("float32", [3.0, 4.0]), theirs=("float32", [5.0]))
    check_fit(Parameters([net, optimizer]), loaded, ADVICE)
    load_into(Parameters([net, optimizer]), loaded)
    assert [record.getMessage() for record in caplog.records if record.name == "mindformers_ckpt"] == [
        "in the checkpoint, not found in the network: theirs",
    ]
    assert net.both.asnumpy().tolist() == optimizer.both.asnumpy().tolist() == [3.0, 4.0]
    assert net.mine.asnumpy().tolist() == [1.0, 1.0]


def test_counters_of_the_training_are_no_cause_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mindformers_ckpt")
    net = Net({"w": ("float32", (1,)), "global_step": ("int32", (1,))})
    loaded = loaded_from(**{name: ("int32", [1]) for name in ("epoch_num", "step_num", "loss_scale", "w_old")})
    load_into(Parameters([net]), {**loaded, **loaded_from(w=("float32", [2.0])), "note": "text"})
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "in the checkpoint, not found in the network: w_old"),
        ("INFO", "counters in the checkpoint, not found in the network: epoch_num, loss_scale, step_num"),
    ]


def test_a_missing_parameter_is_not_taken_from_one_whose_name_ends_alike() -> None:
    net = Net({"scale": ("float32", (1,)), "decoder.scale": ("float32", (1,))})
    loaded = load_into(Parameters([net]), loaded_from(**{"decoder.scale": ("float32", [5.0])}))
    assert (net.scale.asnumpy().tolist(), net.decoder_scale.asnumpy().tolist()) == ([1.0], [5.0])
    assert set(loaded) == {"decoder.scale"}


def test_all_wrong_shapes_are_told_at_once_with_the_advice() -> None:
    net = Net({"a": ("float32", (2,)), "b": ("float32", (2, 2)), "c": ("float32", (1,))})
    loaded = loaded_from(a=("float32", [1.0]), b=("float32", [[1.0, 2.0]]), c=("float32", [1.0]))
    with pytest.raises(ConfigError) as caught:
        check_fit(Parameters([net]), loaded, ADVICE)
    assert str(caught.value).splitlines() == [
        "the checkpoint does not fit the network; the advice",
        "  - a: [1] in the checkpoint, [2] in the network",
        "  - b: [1, 2] in the checkpoint, [2, 2] in the network",
    ]


@pytest.mark.parametrize(
    ("theirs", "ours", "values"),
    [
        ("bfloat16", "float32", [1.5, -2.0]),
        ("float16", "bfloat16", [1.5, -2.0]),
        ("float32", "float16", [1.5, float("inf")]),
        ("int64", "int32", [-(2**31), 2**31 - 1]),
        ("int8", "int64", [-128, 127]),
    ],
)
def test_other_types_are_converted_where_the_values_fit(theirs: str, ours: str, values: list[float]) -> None:
    net = Net({"w": (ours, (2,))})
    loaded = loaded_from(w=(theirs, values))
    check_fit(Parameters([net]), loaded, ADVICE)
    load_into(Parameters([net]), loaded)
    assert net.w.dtype == getattr(mindspore, ours)
    assert net.w.astype(mindspore.float64).asnumpy().tolist() == values


@pytest.mark.parametrize(
    ("theirs", "ours", "values", "fault"),
    [
        ("int64", "int32", [2**40, 5], "out of range"),  # MindSpore makes 0 of it
        ("float32", "float16", [1e9, 1.0], "out of range"),  # and infinity of this
        ("bfloat16", "float16", [-1e9, 1.0], "out of range"),
        ("int32", "float32", [1, 2], "MindSpore converts neither way"),
        ("bool", "float32", [True, False], "MindSpore converts neither way"),
        ("uint8", "int32", [1, 2], "MindSpore converts neither way"),
    ],
)
def test_values_are_never_lost_without_a_word(theirs: str, ours: str, values: list[Any], fault: str) -> None:
    net = Net({"w": (ours, (2,)), "v": (ours, (2,))})
    with pytest.raises(ConfigError) as caught:
        check_fit(Parameters([net]), loaded_from(w=(theirs, values), v=(theirs, values)), ADVICE)
    text = str(caught.value)
    assert "convert it to the network's types" in text
    assert text.count(fault) == 2


def test_rounding_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    net = Net({"w": ("bfloat16", (2,)), "v": ("float32", (2,))})
    loaded = loaded_from(w=("float32", [1.001, 1.0]), v=("bfloat16", [1.0, 2.0]))
    check_fit(Parameters([net]), loaded, ADVICE)
    assert [record.getMessage() for record in caplog.records if record.name == "mindformers_ckpt"] == [
        "rounded from Float32 to BFloat16, the type in the network: w"
    ]


def test_the_names_that_are_wanted() -> None:
    net, optimizer = Net({"a": ("float32", (2,))}), Net({"b": ("float32", (2,))})
    assert set(Parameters([net])) == {"a"}
    assert set(Parameters([net, optimizer])) == {"a", "b"}


def test_what_is_lacking_is_told_with_what_does_not_fit() -> None:
    net = Net({"a": ("float32", (2,)), "b": ("float32", (1,))})
    with pytest.raises(ConfigError) as caught:
        check_fit(Parameters([net]), loaded_from(a=("float32", [1.0])), ADVICE, ["b"])
    assert str(caught.value).splitlines() == [
        "the checkpoint does not fit the network; the advice",
        "  - a: [1] in the checkpoint, [2] in the network",
        "  - b: not in the checkpoint",
    ]
    with pytest.raises(ConfigError) as caught:
        check_fit(Parameters([net]), loaded_from(a=("float32", [1.0, 2.0])), ADVICE, ["b"])
    headline, *lines = str(caught.value).splitlines()
    assert headline == (
        "parameters of the network are not in the checkpoint, and would keep their initial values; the advice "
        "Where that is meant, name them in allow_missing"
    )
    assert lines == ["  - b: not in the checkpoint"]


def test_the_own_parameters_of_a_rank() -> None:
    """On a compiled pipeline every rank has the parameters of all stages; MindSpore marks those of its own."""
    shapes = {"w": (2,), "v": (3,), "tied": (4,), "accu_grads.w": (2,), "layer.attention.key_cache": (5,)}
    net = Net({name: ("float32", shape) for name, shape in shapes.items()})
    assert not are_cut(Parameters([net]))
    assert own_shapes(Parameters([net])) == {"w": (2,), "v": (3,), "tied": (4,)}
    net.w.sliced = net.tied.sliced = net.accu_grads_w.sliced = True
    assert are_cut(Parameters([net]))
    assert own_shapes(Parameters([net])) == {"w": (2,), "tied": (4,)}
    assert not shares_stages(Parameters([net]))
    net.tied.param_info.is_pipeline_shared_param = True
    assert shares_stages(Parameters([net]))
    assert own_shapes(Parameters([net])) == {"w": (2,)}


def test_a_parameter_that_does_not_hold_what_was_loaded_is_found() -> None:
    net = Net({"w": ("float32", (2,)), "v": ("float32", (1,))})
    loaded = loaded_from(w=("float32", [1.0, 2.0]))
    load_into(Parameters([net]), loaded)
    check_loaded(Parameters([net]), loaded)
    net.w.set_data(loaded_from(w=("float32", [1.0]))["w"], slice_shape=True)
    with pytest.raises(PlanError, match=r"do not train with it\n  - w: \[2\] in the checkpoint, \[1\] in the network"):
        check_loaded(Parameters([net]), loaded)
