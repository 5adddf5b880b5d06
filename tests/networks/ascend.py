"""Numpy stand-ins for operators that MindSpore has for Ascend only, so that MindFormers' networks run on a CPU.

This is the only file that replaces anything of what the networks compute with, and it replaces operators of MindSpore
alone: what MindFormers does with its parameters before and after them, the order of rows and halves, stays its own
code. Graph-mode networks run in PyNative mode here, where numpy can be called: `Morph`, which MindSpore has in graph
mode only, calls its function, and shared experts take two of the three values that an MLP gives, which graph mode lets
them do. The loss of the indexer of DeepSeek-V3.2, which logits do not depend on, is nought.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


class StandIn:
    """An operator: what makes it is kept, and what only matters on several devices is taken and ignored."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self.given, self.options = given, options

    def add_prim_attr(self, *_: Any) -> StandIn:
        return self

    shard = recompute = add_prim_attr

    def __call__(self, *given: Any, **options: Any) -> Any:
        named = {name: _array(value) for name, value in options.items()}
        return _tensor(self.compute(*map(_array, given), **named))

    def compute(self, *given: Any, **options: Any) -> Any:
        """What the operator does, on arrays."""
        raise NotImplementedError


def _array(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_array(item) for item in value]
    return value.asnumpy() if hasattr(value, "asnumpy") else value


def _tensor(value: Any) -> Any:
    from mindspore import Tensor

    if isinstance(value, (list, tuple)):
        return tuple(map(_tensor, value))
    return value if value is None else Tensor(np.ascontiguousarray(value))


def _numpy(dtype: Any) -> Any:
    """numpy's type for one of MindSpore's, float32 where none is named."""
    from mindspore import Tensor

    return np.float32 if dtype is None else Tensor(0, dtype).asnumpy().dtype


def operator(function: Callable[..., Any]) -> type[StandIn]:
    """An operator that is made of nothing and does what a function does with arrays."""
    return type(function.__name__, (StandIn,), {"compute": staticmethod(function)})


def softmax(scores: Any) -> Any:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


class FlashAttentionScore(StandIn):
    """Attention with a mask of what is hidden (1), over heads (BNSD) or with all heads in the last axis (BSH, SBH)."""

    def compute(self, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        mask = named["attn_mask"] if "attn_mask" in named else rest[3]
        heads, layout = self.options["head_num"], self.options["input_layout"]
        dim = query.shape[-1] // (1 if layout == "BNSD" else heads)
        q, k, v = (self._by_head(array.astype(np.float32), heads, layout, dim) for array in (query, key, value))
        scores = q @ k.swapaxes(-1, -2) * self.options["scale_value"]
        scores[np.broadcast_to(mask.astype(bool), scores.shape)] = -1e30
        found = softmax(scores) @ v
        if layout != "BNSD":
            found = found.swapaxes(1, 2).reshape(found.shape[0], found.shape[2], -1)
        return None, None, None, (found.swapaxes(0, 1) if layout == "SBH" else found).astype(query.dtype)

    @staticmethod
    def _by_head(array: Any, heads: int, layout: str, dim: int) -> Any:
        if layout == "SBH":
            array = array.swapaxes(0, 1)
        if layout != "BNSD":
            array = array.reshape(*array.shape[:2], -1, dim).swapaxes(1, 2)
        return array.repeat(heads // array.shape[1], axis=1)


class BatchMatMul(StandIn):
    """Products of matrices, with the axes before them repeated where one side lacks them."""

    def compute(self, first: Any, second: Any) -> Any:
        first = first.swapaxes(-1, -2) if self.options.get("transpose_a") else first
        return first @ (second.swapaxes(-1, -2) if self.options.get("transpose_b") else second)


class RmsNorm(StandIn):
    """Divided by the root of the mean of squares over the last axis, times a weight."""

    def compute(self, x: Any, weight: Any, epsilon: float = 1e-6) -> Any:
        (epsilon,) = self.given or (epsilon,)
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
        return (x / scale * weight).astype(x.dtype), scale


class StackExt(StandIn):
    """Tensors along a new axis."""

    def compute(self, parts: Any, dim: int = 0) -> Any:
        return np.stack(parts, (*self.given, *self.options.values(), dim)[0])


def grouped_matmul(rows: Any, matrices: Any, *rest: Any) -> Any:
    """Rows in groups, each multiplied by the matrix of its group; the last argument says where the groups end."""
    ends = [end for end in rest if end is not None][-1]
    bounds = zip([0, *ends[:-1]], ends)
    return [np.concatenate([rows[0][first:last] @ matrices[0][group] for group, (first, last) in enumerate(bounds)])]


def swiglu(x: Any, axis: int = -1) -> Any:
    """silu of the first half of an axis, times its second half."""
    gate, up = np.split(x, 2, axis)
    return gate / (1 + np.exp(-gate)) * up


def one_hot(numbers: Any, count: int = -1, on: Any = 1, off: Any = 0, *_: Any, **named: Any) -> Any:
    """A vector for every number, with one value in its place and another elsewhere."""
    count = named.get("num_classes", count)
    return np.where(np.arange(count) == numbers[..., None], on, off).astype(np.asarray(on).dtype)


def sort(x: Any, axis: int = -1, *_: Any, **named: Any) -> Any:
    """The elements of an axis, the smallest first, and where they stood."""
    axis = named.get("dim", axis)
    places = np.argsort(x, axis=axis, kind="stable")
    return np.take_along_axis(x, places, axis), places


def top(x: Any, count: int = 0, *_: Any, **named: Any) -> Any:
    """The largest elements of the last axis, the largest first, and where they stand."""
    count = named.get("k", count)
    places = np.argsort(-x, axis=-1, kind="stable")[..., :count]
    return np.take_along_axis(x, places, -1), places


def layer_norm(x: Any, _: Any, weight: Any, bias: Any, epsilon: float = 1e-5, **named: Any) -> Any:
    """Without the mean of the last axis, divided by the standard deviation; times a weight, and a bias."""
    apart = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((apart**2).mean(-1, keepdims=True) + named.get("eps", epsilon))
    return (apart / scale * weight + bias).astype(x.dtype)


def cumulated(x: Any, axis: int = 0, *_: Any, **named: Any) -> Any:
    """Sums of all elements up to each."""
    return np.cumsum(x, named.get("dim", axis)).astype(x.dtype)


def selected(x: Any, axis: int, indices: Any) -> Any:
    """Some of the indices of an axis."""
    return x.take(indices.astype(int), axis)


def lightning_indexer(query: Any, key: Any, weights: Any, **named: Any) -> Any:
    """Of every token the earlier ones with the highest scores (BSND); -1 where there are fewer."""
    q, k, w = (array.astype(np.float32) for array in (query, key, weights))
    scores = np.einsum("bsnt,bsn->bst", np.maximum(np.einsum("bsnd,btd->bsnt", q, k[:, :, 0]), 0), w)
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    found, places = top(scores, named["sparse_count"])
    return np.where(np.isinf(found), -1, places).astype(np.int32)[:, :, None], found[:, :, None]


def sparse_flash_attention(query: Any, key: Any, value: Any, places: Any, scale: float, **named: Any) -> Any:
    """Attention to the given places only, with one key and value for all heads (BSND)."""
    scores = np.einsum("bsnd,btd->bsnt", query, key[:, :, 0])
    scores += np.einsum("bsnd,btd->bsnt", named["query_rope"], named["key_rope"][:, :, 0])
    kept = (places[:, :, 0, :, None] == np.arange(key.shape[1])).any(2)  # batch, token, place
    scores = np.where(kept[:, :, None], scores * scale, -1e30)
    return np.einsum("bsnt,btd->bsnd", softmax(scores), value[:, :, 0]), None, None


# Operators by the names that modules import, and functions of `mindspore.mint` and `mindspore.ops`.
OPERATORS: dict[str, type[StandIn]] = {
    # What one device has of others is its own.
    "AllGather": operator(lambda x, *_: x),
    "AlltoAll": operator(lambda x, *_: x),
    "AlltoAllV": operator(lambda x, *_: x),
    "BatchMatMul": BatchMatMul,
    "CumsumExt": operator(cumulated),
    "FlashAttentionScore": FlashAttentionScore,
    "FmodScalar": operator(np.fmod),
    "GroupedMatmul": operator(grouped_matmul),
    "IndexSelect": operator(selected),
    "MoveTo": operator(lambda x, *_: x),
    "Muls": operator(lambda x, factor: x * x.dtype.type(factor)),
    "OneHotExt": operator(one_hot),
    "Outer": operator(np.outer),
    "RmsNorm": RmsNorm,
    "SortExt": operator(sort),
    "StackExt": StackExt,
    "Swiglu": operator(swiglu),
    "Swiglu_op": operator(swiglu),
    "TopkExt": operator(top),
    # Which takes its second argument by this name in graph mode only.
    "Zeros": operator(lambda shape, dtype=None: np.zeros(shape, _numpy(dtype))),
}
# What modules hold as functions and as operators that are made already.
INSTANCES: dict[str, Any] = {
    "D2H": operator(lambda x, *_: x)(),
    "create_group": lambda *_: None,
    "layer_norm": operator(layer_norm)(),
    "rms_norm": RmsNorm(),
}
MINT: dict[str, Callable[..., Any]] = {
    "arange": lambda *bounds, dtype=None: np.arange(*bounds).astype(_numpy(dtype)),
    "argsort": lambda x, *_, **__: np.argsort(x, kind="stable"),
    "cumsum": cumulated,
    "floor_divide": np.floor_divide,
    "full": lambda shape, value, dtype=None: np.full(shape, value).astype(_numpy(dtype)),
    "histc": lambda x, bins, **_: np.bincount(x.astype(int).flatten(), minlength=bins).astype(x.dtype),
    "index_select": selected,
    "ones_like": lambda x, dtype=None: np.ones(x.shape, x.dtype if dtype is None else _numpy(dtype)),
    "outer": np.outer,
    "sort": sort,
    "stack": lambda parts, dim=0: np.stack(parts, dim),
    "topk": top,
    "tril": np.tril,
    "triu": lambda x, diagonal=0: np.triu(x, diagonal),
    "zeros_like": lambda x, dtype=None: np.zeros(x.shape, x.dtype if dtype is None else _numpy(dtype)),
}
FUNCTIONAL: dict[str, Callable[..., Any]] = {"embedding": lambda numbers, table: table[numbers], "one_hot": one_hot}
OPS: dict[str, Callable[..., Any]] = {
    "lightning_indexer": lightning_indexer,
    "sparse_flash_attention": sparse_flash_attention,
}


def install(replace: Callable[[Any, str, Any], None]) -> None:
    """Put the stand-ins where modules of MindFormers take the operators from; `replace` is `monkeypatch.setattr`."""
    from mindspore import mint, ops
    from mindspore.ops import auto_generate, operations

    replace(operations.Morph, "__call__", lambda self, *given: self.__morph_fn__(*given))
    for module, functions in ((mint, MINT), (mint.nn.functional, FUNCTIONAL), (ops, OPS)):
        for name, function in functions.items():
            if hasattr(module, name):
                replace(module, name, operator(function)())
    modules = [module for name, module in sys.modules.items() if name.startswith("mindformers.")]
    for module in [*modules, auto_generate, auto_generate.gen_ops_prim, operations, ops]:
        for name in OPERATORS.keys() & vars(module).keys():
            if getattr(vars(module)[name], "__module__", "").startswith("mindspore."):
                replace(module, name, OPERATORS[name])
        for name in INSTANCES.keys() & vars(module).keys():
            replace(module, name, INSTANCES[name])
        if "DSAIndexerLoss" in vars(module):
            replace(module.DSAIndexerLoss, "construct", lambda *_: _tensor(np.zeros((), np.float32)))
        if hasattr(vars(module).get("DSASelfAttention"), "_indexer_loss"):
            replace(module.DSASelfAttention, "_indexer_loss", lambda *_: (None, None))
        if module.__name__.endswith("training_graph.transformer.moe.shared_experts"):
            for kind in (module.SharedExpertMLP, module.SharedExpertMLPInterleaved):
                replace(kind, "construct", lambda self, x, base=kind.__base__: base.construct(self, x)[:2])
