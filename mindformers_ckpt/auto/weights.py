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
    """
    import mindspore
    import numpy as np

    name = spec.dtype.name
    if name in _NUMPY_TYPES:
        tensor = mindspore.Tensor.from_numpy(content.view(np.dtype(name)).reshape(spec.shape))
    else:
        carried = mindspore.Tensor.from_numpy(content.view(spec.dtype.carrier).reshape(spec.shape))
        tensor = carried.view(getattr(mindspore, name))
    parameter = mindspore.Parameter(mindspore.Tensor([0], tensor.dtype), name=spec.name, requires_grad=False)
    parameter.set_data(tensor, slice_shape=True)
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


def wanted_names(network: Cell, optimizer: Cell | None) -> set[str]:
    """The names of the parameters of the network and the optimizer."""
    cells = [network] if optimizer is None else [network, optimizer]
    return {parameter.name for cell in cells for _, parameter in cell.parameters_and_names()}


def check_shapes(cells: Sequence[Cell], loaded: Mapping[str, Any], advice: str) -> None:
    """Raise ConfigError that lists all parameters whose shape is not the network's."""
    problems = []
    for cell in cells:
        for _, parameter in cell.parameters_and_names():
            found = loaded.get(parameter.name)
            if found is not None and not isinstance(found, str) and tuple(found.shape) != tuple(parameter.shape):
                problems.append(
                    f"{parameter.name}: {list(found.shape)} in the checkpoint, {list(parameter.shape)} in the network"
                )
    if problems:
        raise ConfigError(describe_problems(f"the checkpoint does not fit the network; {advice}", problems))


def load_into(cells: Sequence[Cell], loaded: Mapping[str, Any]) -> None:
    """Set the parameters of the network and the optimizer, and report the names that only one side has."""
    import mindspore

    parameters = {name: value for name, value in loaded.items() if not isinstance(value, str)}
    known: set[str] = set()
    not_loaded: list[str] = []
    for cell in cells:
        names = {parameter.name for _, parameter in cell.parameters_and_names()}
        known |= names
        not_loaded += [name for name in names if name not in parameters]
        mindspore.load_param_into_net(cell, {name: parameters[name] for name in names & set(parameters)})
    report_names("not loaded, not in the checkpoint", not_loaded)
    report_names("in the checkpoint, not found in the network", set(parameters) - known)


def report_names(what: str, names: Collection[str]) -> None:
    """Log which names were left over, shortened."""
    if names:
        listed = sorted(set(names))
        shown = ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
        log.warning("%s: %s", what, shown)
