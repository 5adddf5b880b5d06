"""Has every tensor of a checkpoint, put together as its strategy says, the shape that it has in a reference?

Two dimensions that a strategy mixes up leave no trace in the files; only the shapes of the same model from
another place tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.complete import only_checkpoint
from mindformers_ckpt.sources.find import find_mindspore
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.words import shortened

# States that have the shape of their weight.
_STATES = ("adam_m", "adam_v", "moments", "moment1", "moment2", "accu_grads")

# None: a dimension, or a whole shape, that a reference does not tell.
Shape = tuple["int | None", ...]
Shapes = Mapping[str, "Shape | None"]


class Reference(NamedTuple):
    """Shapes to compare with, by the names of tensors."""

    origin: Path
    shapes: Shapes


def agrees(here: tuple[int, ...], there: Shape | None) -> bool:
    """Whether a shape is one that a reference allows."""
    if there is None:
        return True
    return len(here) == len(there) and all(other in (None, extent) for extent, other in zip(here, there))


def shapes_of_checkpoint(path: Path) -> Reference:
    """The full shapes of a checkpoint: complete, or sharded with its strategy in a folder `strategy` in or beside it.

    Raises what reading it raises, and PlanError when its strategy is not there.
    """
    files = find_mindspore(path)
    strategy = Strategy.complete()
    if files.own_strategy is not None:
        strategy = files.own_strategy
    elif files.sharded and len(files.by_rank) > 1:
        strategy = _strategy_of(path, max(files.by_rank) + 1)
    tensors = Checkpoint(only_checkpoint(files), strategy).tensors()
    return Reference(path, {name: tensor.spec.shape for name, tensor in tensors.items()})


def _strategy_of(path: Path, ranks: int) -> Strategy:
    from mindformers_ckpt.strategy.nearby import strategy_near  # protobuf

    strategy = strategy_near(path, ranks)
    if strategy is None:
        raise PlanError(
            f"{path} holds the shards of {ranks} ranks, and neither it nor the folder around it has a folder "
            "`strategy` for that many; put its strategy there, or give complete weights as the reference"
        )
    return strategy


def check_shapes(source: Checkpoint, reference: Reference) -> list[str]:
    """Compare the full shapes of a checkpoint; returns warnings of what could not be compared.

    Raises PlanError that lists all tensors of another shape.
    """
    actual = {name: tensor.spec.shape for name, tensor in source.tensors().items()}
    if not actual.keys() & reference.shapes.keys():
        raise PlanError(
            f"{source.files.root} and the reference {reference.origin} have no tensor in common: the one holds "
            f"{min(actual, default='nothing')}, …, the other {min(reference.shapes, default='nothing')}, …"
        )
    wanted = {name: _wanted(name, reference.shapes) for name in actual}
    problems = [
        f"{name}: {list(shape)} here, {_described(other)} there{_hint(shape, other)}"
        for name, shape in actual.items()
        if (other := wanted[name]) is not None and not agrees(shape, other)
    ]
    headline = (
        f"{source.files.root}, put together by its strategy ({source.strategy.origin}), has other shapes than "
        f"{reference.origin}; is it the strategy of this run?"
    )
    raise_problems(PlanError, headline, problems)
    warnings = []
    unknown = [name for name, other in wanted.items() if other is None]
    if unknown:
        warnings.append(
            f"{reference.origin} does not tell the shapes of {shortened(unknown, 20)}; they are not compared"
        )
    absent = [name for name in reference.shapes if name not in actual]
    if absent:
        warnings.append(f"only {reference.origin} has {shortened(absent, 20)}")
    return warnings


def _wanted(name: str, shapes: Shapes) -> Shape | None:
    """The shape of the reference, of a state that of its weight."""
    state, _, weight = name.partition(".")
    if name not in shapes and state in _STATES:
        return shapes.get(weight)
    return shapes.get(name)


def _described(shape: Shape) -> str:
    return f"[{', '.join('?' if extent is None else str(extent) for extent in shape)}]"


def _hint(here: tuple[int, ...], there: Shape) -> str:
    exchanged = (*there[:-2], *there[-2:][::-1])
    return " (rows and columns exchanged)" if len(here) > 1 and agrees(here, exchanged) else ""
