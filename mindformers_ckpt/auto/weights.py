"""Bytes into MindSpore parameters, copied once: from the file into the memory that the parameter keeps."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.errors import ConfigError, describe_problems
from mindformers_ckpt.formats import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from mindspore import Parameter
    from mindspore.nn import Cell

log = logging.getLogger("mindformers_ckpt")

_NUMPY_TYPES = frozenset(
    {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)


def parameter_of(spec: TensorSpec, content: np.ndarray[Any, Any]) -> Parameter:
    """A parameter that takes over the memory of `content` (bytes, writable).

    `Tensor(array)` and `Parameter(tensor)` copy; `Tensor.from_numpy` and `set_data` do not (MindSpore 2.10).
    Raises ConfigError where MindSpore has no parameters of the element type (fp8 on CPU).
    """
    import mindspore
    import numpy as np

    name = spec.dtype.name
    if name in _NUMPY_TYPES:
        tensor = mindspore.Tensor.from_numpy(content.view(np.dtype(name)).reshape(spec.shape))
        start = mindspore.Tensor([0], tensor.dtype)
    else:
        carried = mindspore.Tensor.from_numpy(content.view(spec.dtype.carrier).reshape(spec.shape))
        tensor = carried.view(getattr(mindspore, name))
        start = mindspore.Tensor.from_numpy(np.zeros(1, spec.dtype.carrier)).view(tensor.dtype)
    try:
        parameter = mindspore.Parameter(start, name=spec.name, requires_grad=False)
        parameter.set_data(tensor, slice_shape=True)
    except TypeError as error:
        raise ConfigError(
            f"{spec.name}: MindSpore {mindspore.__version__} makes no {name} parameters on this device; "
            "convert the checkpoint to another type first"
        ) from error
    return parameter


def parameters_of(tensors: Iterable[tuple[TensorSpec, np.ndarray[Any, Any]]]) -> dict[str, Any]:
    """Parameters by name; the text of `str` tensors as str, as `mindspore.load_checkpoint` gives it."""
    loaded: dict[str, Any] = {}
    for spec, content in tensors:
        if spec.dtype.name == "str":
            loaded[spec.name] = content.tobytes().decode("utf-32-le").rstrip("\0")
        else:
            loaded[spec.name] = parameter_of(spec, content)
    return loaded


def wanted_names(cells: Sequence[Cell]) -> set[str]:
    """The names of the parameters of the network and the optimizer."""
    return set(_parameters(cells))


def check_fit(cells: Sequence[Cell], loaded: Mapping[str, Any], advice: str) -> None:
    """Raise ConfigError that lists all parameters whose shape or values the network cannot take.

    Where only the element types differ MindSpore converts them, but not every type, and out of range it
    makes int64 another int32, and float32 the infinity of float16, without a word.
    """
    shapes, types = [], []
    narrowed: dict[str, list[str]] = {}
    for name, own in _parameters(cells).items():
        found = loaded.get(name)
        if found is None or isinstance(found, str):
            continue
        if tuple(found.shape) != tuple(own.shape):
            shapes.append(f"{name}: {list(found.shape)} in the checkpoint, {list(own.shape)} in the network")
        elif found.dtype != own.dtype:
            fault = _conversion_fault(found, own)
            if fault is not None:
                types.append(f"{name}: {found.dtype} in the checkpoint, {own.dtype} in the network: {fault}")
            elif _bits(found.dtype) > _bits(own.dtype):
                narrowed.setdefault(f"{found.dtype} to {own.dtype}", []).append(name)
    if shapes:
        raise ConfigError(describe_problems(f"the checkpoint does not fit the network; {advice}", [*shapes, *types]))
    if types:
        headline = "the checkpoint has element types that the network cannot take; convert it to the network's types"
        raise ConfigError(describe_problems(headline, types))
    for change, names in narrowed.items():
        report_names(f"rounded from {change}, the type in the network", names)


def _parameters(cells: Sequence[Cell]) -> dict[str, Any]:
    return {parameter.name: parameter for cell in cells for _, parameter in cell.parameters_and_names()}


def _kind(dtype: object) -> str:
    """float or int where MindSpore converts between the types of the kind, else the type itself."""
    name = str(dtype).lower()
    if name in ("float16", "float32", "float64", "bfloat16"):
        return "float"
    return "int" if name in ("int8", "int16", "int32", "int64") else name


def _bits(dtype: object) -> int:
    digits = str(dtype).lower().replace("bfloat", "").lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) if digits.isdecimal() else 0


def _conversion_fault(found: Parameter, own: Parameter) -> str | None:
    """Why a parameter cannot become one of the network's type, None when it can."""
    import mindspore
    import numpy as np

    kind, name = _kind(found.dtype), str(own.dtype).lower()
    if kind not in ("float", "int") or kind != _kind(own.dtype):
        return "MindSpore converts neither way"
    if kind == "int":
        values, limits = found.asnumpy(), np.iinfo(name)
        outside = values.size and (values.min() < limits.min or values.max() > limits.max)
    else:
        if name != "float16":
            return None  # the others have the range of float32
        values = found.astype(mindspore.float32).asnumpy()
        outside = bool((np.isfinite(values) & (np.abs(values) > np.finfo(np.float16).max)).any())
    return "it holds values that are out of range" if outside else None


def load_into(cells: Sequence[Cell], loaded: Mapping[str, Any]) -> None:
    """Set the parameters of the network and the optimizer, and report the names that only one side has."""
    import mindspore

    parameters = {name: value for name, value in loaded.items() if not isinstance(value, str)}
    known: set[str] = set()
    for cell in cells:
        names = set(_parameters([cell]))
        known |= names
        mindspore.load_param_into_net(cell, {name: parameters[name] for name in names & set(parameters)})
    # MindSpore makes accu_grads anew as it needs them.
    report_names(
        "not loaded, not in the checkpoint",
        [name for name in known - set(parameters) if not name.startswith("accu_grads")],
    )
    report_names("in the checkpoint, not found in the network", set(parameters) - known)


def report_names(what: str, names: Collection[str]) -> None:
    """Log which names were left over, shortened."""
    if names:
        listed = sorted(set(names))
        shown = ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
        log.warning("%s: %s", what, shown)
