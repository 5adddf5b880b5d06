"""Networks with given parameters, and their contents as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, nn
from recorded import Tensor


class Net(nn.Cell):  # type: ignore[misc]
    """A network with the parameters of a mapping: name -> (element type, shape). All elements are 1."""

    def __init__(self, parameters: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        super().__init__(auto_prefix=False)
        for name, (dtype, shape) in parameters.items():
            start = mindspore.Tensor(np.ones(shape, np.float32)).astype(getattr(mindspore, dtype))
            self.insert_param_to_cell(name.replace(".", "_"), Parameter(start, name=name))


def network_for(tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> Net:
    """A network that takes just these tensors (those of `names`)."""
    chosen = tensors if names is None else {name: tensors[name] for name in names}
    return Net({name: (tensor.dtype.name, tensor.bits.shape) for name, tensor in chosen.items()})


def content_of(parameter: Any) -> bytes:
    """The bytes of a parameter."""
    return bytes(parameter.get_bytes())


def assert_holds(network: nn.Cell, tensors: Mapping[str, Tensor]) -> None:
    """Compare the parameters of a network with what they should be, bit for bit."""
    for name, parameter in ((parameter.name, parameter) for _, parameter in network.parameters_and_names()):
        assert content_of(parameter) == tensors[name].bits.tobytes(), name
