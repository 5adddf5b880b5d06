"""A small checkpoint of a LoRA run, whole and cut by strategies, and the formula of its merged weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from recorded import Tensor, random_bits, write_ranks, write_tensors

from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import rank_file_name, write_strategy

SCALING = 16 / 8
RANK = 8
ROWS, COLUMNS = 192, 320  # neither a multiple of what is multiplied at a time
STEP = "global_step"

Model = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

_BASE = {
    "model.embedding.weight": ("bfloat16", (32, COLUMNS)),
    "model.layers.0.attention.wq.weight": ("float32", (ROWS, COLUMNS)),
    "model.layers.0.feed_forward.w2.weight": ("bfloat16", (ROWS, COLUMNS)),
    "model.layers.1.attention.w_qkv.weight": ("float16", (ROWS, COLUMNS)),
    "model.layers.1.attention.wo.weight": ("float32", (64, 64)),
    "model.norm.weight": ("float32", (COLUMNS,)),
}
ADAPTED = tuple(name for name in _BASE if ".layers." in name and ".wo." not in name)
SPELLING = ("{}.mindpet_delta_lora_a", "{}.mindpet_delta_lora_b")


def numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The values of a tensor, in double precision."""
    name = tensor.dtype.name
    kind = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    return np.ascontiguousarray(tensor.bits).view(kind).astype(np.float64)


def as_tensor(values: np.ndarray[Any, Any], name: str) -> Tensor:
    """Values rounded once to an element type."""
    kind: Any = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    dtype = by_name(name)
    return Tensor(dtype, np.ascontiguousarray(values.astype(kind)).view(dtype.carrier))


def base_model(seed: int = 0) -> Model:
    random = np.random.default_rng(seed)
    return {name: random_bits(by_name(dtype), shape, random) for name, (dtype, shape) in _BASE.items()}


def adapters(spelling: tuple[str, str] = SPELLING, dtype: str = "float32", seed: int = 1) -> Model:
    """LoRA factors of all adapted weights."""
    random = np.random.default_rng(seed)
    found = {}
    for weight in ADAPTED:
        module = weight[: -len(".weight")]
        for form, shape in zip(spelling, ((RANK, COLUMNS), (ROWS, RANK))):
            found[form.format(module)] = random_bits(by_name(dtype), shape, random)
    return found


def states(factors: Model) -> Model:
    """Optimizer states of the factors."""
    return {f"{kind}.{name}": tensor for kind in ("adam_m", "adam_v") for name, tensor in factors.items()}


def lora_model(spelling: tuple[str, str] = SPELLING, dtype: str = "float32") -> Model:
    factors = adapters(spelling, dtype)
    step = Tensor(by_name("int32"), np.array(7, np.uint32))
    return {**base_model(), **factors, **states(factors), STEP: step}


def merged_numbers(base: Model, factors: Model, scaling: float = SCALING) -> dict[str, np.ndarray[Any, Any]]:
    """W + scaling · B · A of every adapted weight, in double precision."""
    halves = {name: numbers(tensor) for name, tensor in factors.items()}
    found = {}
    for weight in ADAPTED:
        module = weight[: -len(".weight")]
        ((down,), (up,)) = (
            [value for name, value in halves.items() if name.startswith(f"{module}.") and value.shape == shape]
            for shape in ((RANK, COLUMNS), (ROWS, RANK))
        )
        found[weight] = numbers(base[weight]) + scaling * (up @ down)
    return found


def assert_merged(found: Mapping[str, Tensor], base: Model, expected: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Every merged weight is the exact sum rounded once (but for the last bit of single precision), the others are
    the bits of the base."""
    assert set(found) - {STEP} == set(base)
    for name, tensor in base.items():
        assert (found[name].dtype, found[name].bits.shape) == (tensor.dtype, tensor.bits.shape), name
        if name not in expected:
            assert found[name].bits.tobytes() == tensor.bits.tobytes(), name
            continue
        exact, values = expected[name], numbers(found[name])
        digits = {"bfloat16": 8, "float16": 11, "float32": 24}[tensor.dtype.name]
        allowed = np.abs(exact) * 2.0**-digits + np.abs(exact).max() * 2.0**-21
        assert (np.abs(values - exact) <= allowed).all(), name
        assert np.abs(values - numbers(tensor)).max() > 0.1, name


_MESH = {"dp": 2, "mp": 2}
# Rows or columns of a weight and of its factors, in all combinations: B cut along its rank too, A by the optimizer.
_CUTS: Mapping[str, tuple[str | None, ...]] = {
    "model.embedding.weight": ("mp", None),
    "model.layers.0.attention.wq.weight": ("mp", None),
    "model.layers.0.attention.wq.mindpet_delta_lora_a": (None, None),
    "model.layers.0.attention.wq.mindpet_delta_lora_b": ("mp", None),
    "model.layers.0.feed_forward.w2.weight": (None, "mp"),
    "model.layers.0.feed_forward.w2.mindpet_delta_lora_a": (None, "mp"),
    "model.layers.0.feed_forward.w2.mindpet_delta_lora_b": (None, None),
    "model.layers.1.attention.w_qkv.weight": ("mp", "dp"),
    "model.layers.1.attention.w_qkv.mindpet_delta_lora_a": ("mp", "dp"),
    "model.layers.1.attention.w_qkv.mindpet_delta_lora_b": ("dp", "mp"),
    "model.layers.1.attention.wo.weight": (None, "mp"),
    "model.norm.weight": (None,),
}
_OPTIMIZER_SHARDS = {
    "model.layers.0.attention.wq.weight": 2,
    "model.layers.0.attention.wq.mindpet_delta_lora_a": 2,
}


def layouts(part: str = "") -> dict[str, Layout]:
    """The layouts on four ranks of the parameters whose names hold `part`."""
    return {
        name: Layout.on(_MESH, *cut, optimizer_shards=_OPTIMIZER_SHARDS.get(name, 0))
        for name, cut in _CUTS.items()
        if part in name
    }


def pipeline() -> list[dict[str, Layout]]:
    """The layouts of two stages of four ranks."""
    first = {name: layout for name, layout in layouts().items() if ".1." not in name and "norm" not in name}
    return [first, {name: layout for name, layout in layouts().items() if name not in first}]


def write_strategies(folder: Path, stages: list[dict[str, Layout]]) -> Path:
    folder.mkdir()
    for rank in range(4 * len(stages)):
        write_strategy(stages[rank // 4], folder / rank_file_name(rank), stage=rank // 4)
    return folder


def write_distributed(folder: Path, model: Model, stages: list[dict[str, Layout]], format: str = "ckpt") -> Path:
    """The rank folders of a model cut by stages of four ranks; what no stage names is on every rank."""
    ranks: dict[int, Model] = {}
    for rank in range(4 * len(stages)):
        own, held = stages[rank // 4], {}
        for name, tensor in model.items():
            form = name.partition(".")[2] if name.startswith("adam") else name
            if form in own:
                held[name] = tensor.part(own[form].box(tensor.bits.shape, rank % 4)) if form == name else tensor
            elif not any(form in stage for stage in stages):
                held[name] = tensor
        ranks[rank] = held
    return write_ranks(folder, ranks, format)


def write_complete(path: Path, model: Model) -> Path:
    return write_tensors(path, model)
