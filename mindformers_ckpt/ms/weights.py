"""Bytes into MindSpore parameters, copied once: from the file into the memory that the parameter has, or keeps then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import ml_dtypes

from mindformers_ckpt.errors import ConfigError, PlanError, describe_problems, raise_problems
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.log import log
from mindformers_ckpt.state_names import COUNTERS, is_never_saved
from mindformers_ckpt.words import shortened

if TYPE_CHECKING:
    import numpy as np
    from mindspore import Parameter, Tensor
    from mindspore.nn import Cell


_NUMPY_TYPES = frozenset(
    {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)


class Parameters(Mapping[str, "Parameter"]):
    """The parameters of a network and its optimizer, by name: looked up once, which takes MindSpore long.

    Where several have one name the last one counts; `named` gives all.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._found: dict[str, list[Parameter]] = {}
        for cell in cells:
            for _, parameter in cell.parameters_and_names():
                same = self._found.setdefault(parameter.name, [])
                if all(parameter is not other for other in same):
                    same.append(parameter)

    def __getitem__(self, name: str) -> Parameter:
        return self._found[name][-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def named(self, name: str) -> Sequence[Parameter]:
        """All parameters of a name."""
        return self._found[name]

    @cached_property
    def own(self) -> Sequence[str]:
        """The names of those that this rank must have the values of.

        A compiled pipeline has the parameters of all stages on every rank, and MindSpore marks a rank's own as
        `sliced`; those that stages share are sent by one of them. What is never saved does not count.
        """
        compiled = are_cut(self)
        return [
            name
            for name, parameter in self.items()
            if (parameter.sliced or not compiled)
            and not parameter.param_info.is_pipeline_shared_param
            and not is_never_saved(name)
        ]

    @cached_property
    def memory(self) -> Mapping[str, np.ndarray[Any, np.dtype[np.uint8]]]:
        """The bytes of those in this process' memory that can be written, and are those of no other parameter.

        A network that has run goes on with what is written there (MindSpore 2.7 to 2.10, both modes; a test tries it).
        """
        import numpy as np

        found, spans = {}, []
        for name, own in self.items():
            if getattr(own, "device", "") != "CPU" or own.has_init:  # on a device, or MindSpore has not made its values
                continue
            array, start = own.asnumpy(), own.data_ptr()
            spans.append((start, start + array.nbytes, name))
            is_view = array.nbytes and array.__array_interface__["data"][0] == start
            if is_view and array.flags.writeable and array.flags.c_contiguous:
                found[name] = array.reshape(-1).view(np.uint8)
        end, last = 0, ""
        for start, stop, name in sorted(spans):
            if start < end:
                found.pop(name, None)
                found.pop(last, None)
            if stop > end:
                end, last = stop, name
        return found


def tensor_of(spec: TensorSpec, content: np.ndarray[Any, Any]) -> Tensor:
    """A tensor that takes over the memory of `content` (bytes, writable).

    `Tensor(array)` copies; `Tensor.from_numpy` does not (MindSpore 2.7 to 2.10). No operator is used where that can
    be: those are queued to MindSpore's threads, and each waits some milliseconds where the ranks have few cores.
    Raises ConfigError where MindSpore does not know the element type.
    """
    import mindspore
    import numpy as np

    name = spec.dtype.name
    if name in _NUMPY_TYPES:
        return mindspore.Tensor.from_numpy(content.view(np.dtype(name)).reshape(spec.shape))
    if name == "bfloat16":
        return mindspore.Tensor.from_numpy(content.view(ml_dtypes.bfloat16).reshape(spec.shape))
    try:  # MindSpore 2.7 has no views of another type, and not all types
        kind = getattr(mindspore, name)
        return mindspore.Tensor.from_numpy(content.view(spec.dtype.carrier).reshape(spec.shape)).view(kind)
    except (AttributeError, TypeError) as error:
        raise _unknown_type(spec.name, name) from error


def _unknown_type(tensor: str, dtype: str) -> ConfigError:
    import mindspore

    return ConfigError(
        f"{tensor}: MindSpore {mindspore.__version__} makes no {dtype} parameters on this device; "
        "convert the checkpoint to another type first"
    )


def tensors_of(
    contents: Iterable[tuple[TensorSpec, np.ndarray[Any, Any]]], parameters: Parameters | None = None
) -> dict[str, Any]:
    """Tensors by name; the text of `str` tensors as str, as `mindspore.load_checkpoint` gives it.

    A parameter itself where the content was read into its memory: nothing is to be set then.
    """
    loaded: dict[str, Any] = {}
    for spec, content in contents:
        if parameters is not None and parameters.memory.get(spec.name) is content:
            loaded[spec.name] = parameters[spec.name]
        elif spec.dtype.name == "str":
            loaded[spec.name] = content.tobytes().decode("utf-32-le").rstrip("\0")
        else:
            loaded[spec.name] = tensor_of(spec, content)
    return loaded


def own_memory(parameters: Parameters, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """The bytes of the parameters that tensors are loaded into, by name: read there, they need no memory of their own.

    Of parameters in this process' memory (MindSpore's `device` says so) that share it with no other: one that is made
    of a tensor copies it, but `set_data` does not. Not where several have one name. None at all where a tensor has
    another type or shape than its parameter, or a type that MindSpore may not have: then the load may be refused, and
    leaves the network as it is.
    """
    if not {spec.dtype.name for spec in specs} <= _NUMPY_TYPES | {"bfloat16", "str"}:
        return {}
    wanted = []
    for name, dtype, shape in specs:
        own = parameters.get(name)
        if own is None:
            continue
        if own.shape != shape or _name_of(own.dtype) != dtype.name:
            return {}
        if len(parameters.named(name)) == 1 and not own.param_info.is_pipeline_shared_param:
            wanted.append(name)
    memory = parameters.memory if wanted else {}
    return {name: memory[name] for name in wanted if name in memory}


@cache
def _name_of(dtype: Any) -> str:
    """The name of an element type of MindSpore; kept, for MindSpore makes it anew each time."""
    return str(dtype).lower()


def own_shapes(parameters: Parameters) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that this rank must have the values of, by name."""
    return {name: tuple(parameters[name].shape) for name in parameters.own}


def are_cut(parameters: Parameters) -> bool:
    """Whether MindSpore has compiled the network in parallel: then it has marked this rank's parameters."""
    return any(parameter.sliced for parameter in parameters.values())


def shares_stages(parameters: Parameters) -> bool:
    """Whether stages of a pipeline share parameters, of which one stage has the values (a tied embedding)."""
    return any(parameter.param_info.is_pipeline_shared_param for parameter in parameters.values())


def shape_faults(found: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]) -> list[str]:
    """A line for every parameter whose shape in the checkpoint is not the network's."""
    return [
        f"{name}: {list(found[name])} in the checkpoint, {list(shape)} in the network"
        for name, shape in own.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]


def check_fit(parameters: Parameters, loaded: Mapping[str, Any], advice: str, lacking: Sequence[str] = ()) -> None:
    """Raise ConfigError that lists all parameters whose shape or values the network cannot take.

    Where only the element types differ MindSpore converts them, but not every type, and out of range it
    makes int64 another int32, and float32 the infinity of float16, without a word. `lacking` are parameters that the
    checkpoint should have, but has not.
    """
    types = []
    narrowed: dict[str, list[str]] = {}
    apart = {name: value for name, value in loaded.items() if value is not parameters.get(name)}
    owners = {name: own for name, own in parameters.items() if hasattr(apart.get(name), "dtype")}
    shapes = shape_faults({name: loaded[name].shape for name in owners}, {n: own.shape for n, own in owners.items()})
    for name, own in owners.items():
        found = loaded[name]
        if found.shape == own.shape and found.dtype != own.dtype:
            fault = _conversion_fault(found, own)
            if fault is not None:
                types.append(f"{name}: {found.dtype} in the checkpoint, {own.dtype} in the network: {fault}")
            elif _bits(found.dtype) > _bits(own.dtype):
                narrowed.setdefault(f"{found.dtype} to {own.dtype}", []).append(name)
    raise_unfit(shapes, types, lacking, advice)
    for change, names in narrowed.items():
        log.warning("rounded from %s, the type in the network: %s", change, shortened(names))


def raise_unfit(shapes: Sequence[str], types: Sequence[str], lacking: Sequence[str], advice: str) -> None:
    """Raise ConfigError with all faults, under a headline for the gravest; nothing where there are none."""
    absent = [f"{name}: not in the checkpoint" for name in lacking]
    if shapes:
        headline = f"the checkpoint does not fit the network; {advice}"
    elif types:
        headline = "the checkpoint has element types that the network cannot take; convert it to the network's types"
    elif absent:
        headline = (
            "parameters of the network are not in the checkpoint, and would keep their initial values; "
            f"{advice} Where that is meant, name them in allow_missing"
        )
    else:
        return
    raise ConfigError(describe_problems(headline, [*shapes, *types, *absent]))


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


def load_into(parameters: Parameters, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Set the parameters of the network and the optimizer, and report names that only the checkpoint has.

    Returns all that was loaded, by name: the parameters of the network, and new ones where it has none.
    `load_param_into_net` would do, but for a parameter that is missing it takes another one whose name ends alike
    (`decoder.scale` for `scale`), without a word.
    """
    # First, for a failure leaves the network as it is.
    others = {name: as_parameter(name, value) for name, value in loaded.items() if name not in parameters}
    result = {**loaded, **others}
    for name, value in loaded.items():
        if name not in others and not isinstance(value, str):
            named = parameters.named(name)
            for own in named:
                _set(own, value)
            result[name] = named[0]
    surplus = {name for name, value in others.items() if not isinstance(value, str)}
    if surplus - COUNTERS:
        log.warning("in the checkpoint, not found in the network: %s", shortened(sorted(surplus - COUNTERS), 8))
    if surplus & COUNTERS:
        log.info("counters in the checkpoint, not found in the network: %s", ", ".join(sorted(surplus & COUNTERS)))
    return result


def check_loaded(parameters: Parameters, loaded: Mapping[str, Any]) -> None:
    """See that every parameter of this rank has the shape of what was loaded into it.

    It costs nothing, and holds whatever way the weights took. Raises PlanError.
    """
    shapes = {name: value.shape for name, value in loaded.items() if hasattr(value, "shape")}
    faults = shape_faults(shapes, own_shapes(parameters))
    raise_problems(PlanError, "the network does not hold what was loaded; do not train with it", faults)


def _set(own: Parameter, found: Tensor) -> None:
    """Give a parameter the values of a tensor, as `load_param_into_net` does: its memory, where the types agree.

    A parameter that was read into has them already.
    """
    if found is not own:
        import mindspore

        if own.param_info.is_pipeline_shared_param:
            return  # another stage sends it
        if found.dtype != own.dtype:
            found = mindspore.Tensor(found.asnumpy(), own.dtype)
        own.set_data(found, own.sliced)
    if not getattr(own, "init_param", True):
        own.init_param = True


def as_parameter(name: str, value: Any) -> Any:
    """A parameter of its own, which keeps the memory of the tensor. Text stays text."""
    import mindspore

    if isinstance(value, str):
        return value
    try:
        parameter = mindspore.Parameter(mindspore.Tensor([0], value.dtype), name=name, requires_grad=False)
    except TypeError as error:  # fp8 on CPU
        raise _unknown_type(name, str(value.dtype)) from error
    parameter.set_data(value, slice_shape=True)
    return parameter
