"""LoRA branches folded into the weights: the plan of a checkpoint that has the original model's parameters only.

A plan is made as for re-slicing, from the checkpoint without its LoRA parameters; then the places of every weight
that has a LoRA branch get the computation W + scaling · B · A. So merging, joining the shards of a distributed
checkpoint and cutting for another strategy are one pass, and B and A may be cut in any way themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import PlanError, describe_problems, raise_problems
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.lora_names import factor_name, is_adapter_name, is_dora_name, original_name, original_names
from mindformers_ckpt.lora_scaling import Scaling
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.computations import Factor, Merge, Piece
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Numbers, Plan, SourceFile
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.shards import LogicalTensor, Shard
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.words import counted, shortened

_TYPES = ("float16", "bfloat16", "float32")


class Unfit(ValueError):
    """Why a branch cannot be merged. `remedy` says what to do about it, in words that hold for all such branches."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.remedy = remedy


class Branch(NamedTuple):
    """The factors B ("up") and A ("down") of a LoRA branch by their names, and the module they belong to."""

    module: str
    up: str
    down: str


class Spot(NamedTuple):
    """The rows of a weight that a module's branch is added to.

    Attributes:
        weight: its name.
        view: a row-major reshape of the rows; () for a weight that is the module's alone.
        box: the module's part of the view, where several modules share the weight (fused query, key and value).
    """

    weight: str
    view: tuple[int, ...] = ()
    box: Box = Box((), ())


Locate = Callable[[str], Spot]


def own_weight(module: str) -> Spot:
    """The weight of a linear layer: all rows of "<module>.weight", by the name of the original model."""
    return Spot(f"{original_name(module)}.weight")


class Adapters(NamedTuple):
    """The LoRA branches among some names, and all names that belong to them (optimizer states too)."""

    branches: tuple[Branch, ...]
    names: frozenset[str]


class MergedBranch(NamedTuple):
    """What a plan does with a branch: B · A of a rank, multiplied by the scaling, is added to a weight."""

    module: str
    weight: str
    rank: int
    scaling: float


class MergePlan(NamedTuple):
    """The plan of the merged weights, and the branches that it folds into them."""

    plan: Plan
    branches: tuple[MergedBranch, ...]


def find_adapters(names: Iterable[str], origin: Path) -> Adapters:
    """Find the LoRA branches among the names of a checkpoint (`origin`, for messages).

    Raises PlanError that lists every half without its partner and everything that cannot be merged: DoRA,
    several adapters of one module, adapters that are not a LoRA of a linear layer.
    """
    known = sorted(set(names))
    factors = {name: factor for name in known if (factor := factor_name(name)) is not None}
    # "adam_m.<factor>" looks like a factor itself, of the module "adam_m.<module>".
    states = {name for name in known if name.partition(".")[2] in factors}
    halves: dict[str, dict[str, list[str]]] = {}
    problems = []
    for name in known:
        if name in states:
            continue
        if name in factors:
            module, end = factors[name]
            halves.setdefault(module, {}).setdefault(end, []).append(name)
        elif is_adapter_name(name):
            kind = "is of DoRA" if is_dora_name(name) else "belongs to an adapter that is not a LoRA of a linear layer"
            problems.append(f"{name}: {kind}, which is not supported; merge it where it was trained")
    branches = []
    for module, ends in halves.items():
        down, up = ends.get("a", []), ends.get("b", [])
        if len(down) > 1 or len(up) > 1:
            problems.append(f"{module}: several adapters of one module cannot be merged: {', '.join(down + up)}")
        elif down and up:
            branches.append(Branch(module, up[0], down[0]))
        else:
            problems.append(f"{(down + up)[0]}: its partner, the factor {'A' if up else 'B'}, is not there")
    raise_problems(PlanError, f"{origin}: LoRA parameters cannot be merged", problems)
    return Adapters(tuple(branches), frozenset(states.union(factors)))


class Weights(NamedTuple):
    """The weights of a checkpoint without its adapters.

    Attributes:
        tensors: by the names of the original model. Each spec has the name in the files, which is another one where
            PEFT had wrapped the model ("base_model.model.….q_proj.base_layer.weight").
        warnings: what the user should know of the choice.
    """

    tensors: Mapping[str, LogicalTensor]
    warnings: tuple[str, ...] = ()


def weights_of(tensors: Mapping[str, LogicalTensor], adapters: Collection[str], origin: Path) -> Weights:
    """The weights among the tensors of a checkpoint: all but those of `adapters`.

    Raises PlanError that lists the weights of which a wrapped model holds several.
    """
    found = original_names(name for name in tensors if name not in adapters)
    if found.clashes:
        problems = [f"{name}: {', '.join(held)}" for name, held in found.clashes.items()]
        headline = f"{origin} holds several parameters that are one in the original model; remove those not meant"
        raise PlanError(describe_problems(headline, problems))
    warnings: tuple[str, ...] = ()
    if found.replaced:
        copies = shortened(found.replaced, 20)
        warnings = (f"trained copies (modules_to_save) are taken instead of the originals: {copies}",)
    return Weights({plain: tensors[name] for plain, name in found.names.items()}, warnings)


def plan_merge(
    source: Checkpoint,
    target: Strategy,
    scaling: Scaling,
    *,
    adapter: Checkpoint | None = None,
    locator: Callable[[Mapping[str, LogicalTensor]], Locate] = lambda weights: own_weight,
    prefix: str = DEFAULT_PREFIX,
    format: str = "ckpt",
    allow_missing: bool | Sequence[str] = False,
    contents: str = "error",
) -> MergePlan:
    """Plan the merged weights of `source` for the ranks of `target`.

    The branches are those of the source, or of a checkpoint of their own (`adapter`) over it; `locator` makes of the
    weights, by the names of the original model, what finds those of the branches. The other arguments are those of
    `build_plan`.

    Raises PlanError that lists all branches without a weight or a scaling, or whose shapes do not fit, and whatever
    `find_adapters`, `build_plan` and `Scaling.for_modules` raise.
    """
    held = source.tensors()
    own = find_adapters(held, source.files.root)
    weights = weights_of(held, own.names, source.files.root)
    factors, origin, found, warnings = held, source.files.root, own, weights.warnings
    if adapter is not None:
        factors, origin = adapter.tensors(), adapter.files.root
        found = find_adapters(factors, origin)
        _check_alone(own, source, origin)
        others = {name: tensor for name, tensor in factors.items() if name not in found.names}
        warnings += _leftovers(others, weights.tensors, origin) if found.branches else ()
    elif own.branches and not weights.tensors:
        raise PlanError(f"{origin} holds LoRA parameters alone; give it as --adapter, and the weights they belong to")
    if not found.branches:
        raise PlanError(f"{origin} holds no LoRA parameters; are its weights merged already?")
    scaling, notes = _resolved(scaling, found.branches, origin)
    folds = _fit(found.branches, weights.tensors, factors, scaling, locator(weights.tensors), origin)
    base = partial(build_plan, prefix=prefix, format=format, allow_missing=allow_missing, contents=contents)
    plan = _base_plan(source, weights, target, base)
    plan = replace(plan, warnings=(*plan.warnings, *warnings, *notes))
    branches = sorted(branch for fold in folds.values() for branch in fold.branches)
    return MergePlan(_with_branches(plan, folds), tuple(branches))


def _check_alone(own: Adapters, source: Checkpoint, adapter: Path) -> None:
    if own.branches:
        raise PlanError(
            f"{source.files.root} has LoRA parameters of its own ({own.branches[0].down}, …) besides those of "
            f"{adapter}; merge them first, or leave the adapter out"
        )


def _resolved(scaling: Scaling, branches: Sequence[Branch], origin: Path) -> tuple[Scaling, tuple[str, ...]]:
    """The scaling by modules. Raises PlanError once for all branches when nothing tells it."""
    if not scaling.is_known:
        count = counted(len(branches), "LoRA branch", "LoRA branches")
        raise PlanError(
            f"{origin}: the scaling of its {count} is not known; give --lora_scaling (lora_alpha / lora_rank of the "
            "training, like 16/8), or --alpha"
        )
    return scaling.for_modules(branch.module for branch in branches)


def _base_plan(
    source: Checkpoint, weights: Weights, target: Strategy, build: Callable[[Checkpoint, Strategy], Plan]
) -> Plan:
    """The plan of the weights without their branches, by the names of the original model."""
    in_file = {plain: tensor.spec.name for plain, tensor in weights.tensors.items()}
    base = Checkpoint(source.files, source.strategy, names=frozenset(in_file.values()))
    plan = build(base, _without_adapters(target, in_file))
    plain = {name: original for original, name in in_file.items() if original != name}
    if not plain:
        return plan
    transfers = tuple(
        transfer._replace(
            name=plain.get(transfer.name, transfer.name),
            sources=tuple(place._replace(tensor=place.tensor or transfer.name) for place in transfer.sources),
        )
        for transfer in plan.transfers
    )
    targets = tuple(
        file._replace(tensors=tuple(spec._replace(name=plain.get(spec.name, spec.name)) for spec in file.tensors))
        for file in plan.targets
    )
    return replace(plan, transfers=transfers, targets=targets)


def _leftovers(others: Mapping[str, LogicalTensor], base: Collection[str], origin: Path) -> tuple[str, ...]:
    """Refuse weights of an adapter that are no LoRA parameters; warn of single numbers, like the training step."""
    trained = sorted(name for name, tensor in others.items() if original_name(name) in base or tensor.spec.size > 1)
    headline = (
        f"{origin} holds trained parameters besides LoRA branches, which cannot be merged; merge it with PEFT, or "
        "where it was trained"
    )
    raise_problems(PlanError, headline, trained)
    return (f"{origin}: not used: {shortened(sorted(others), 20)}",) if others else ()


class _Fold(NamedTuple):
    """What is to be added to a weight: the branches' factors, and where their rows lie."""

    spots: tuple[Spot, ...]
    ups: tuple[LogicalTensor, ...]
    downs: tuple[LogicalTensor, ...]
    scaling: float
    branches: tuple[MergedBranch, ...]


def _fit(
    branches: Sequence[Branch],
    weights: Mapping[str, LogicalTensor],
    factors: Mapping[str, LogicalTensor],
    scaling: Scaling,
    locate: Locate,
    origin: Path,
) -> dict[str, _Fold]:
    """Weight -> what is added to it. Raises PlanError that lists everything that does not fit."""
    folds: dict[str, _Fold] = {}
    problems: dict[str, list[str]] = {}
    remedies: dict[str, None] = {}
    for branch in branches:
        up, down = factors[branch.up], factors[branch.down]
        try:
            spot = locate(branch.module)
            _check_shapes(spot, weights.get(spot.weight), up, down)
            rank = down.spec.shape[0]
            merged = MergedBranch(branch.module, spot.weight, rank, scaling.of(branch.module, rank))
            fold = _Fold((spot,), (up,), (down,), merged.scaling, (merged,))
            folds[spot.weight] = _joined(folds[spot.weight], fold) if spot.weight in folds else fold
        except ValueError as error:
            problems.setdefault(str(error), []).append(f"{branch.up}, {branch.down}")
            if isinstance(error, Unfit) and error.remedy:
                remedies[error.remedy] = None
    if problems:
        count = sum(map(len, problems.values()))
        headline = f"{origin}: {count} of {len(branches)} LoRA branches cannot be merged"
        raise PlanError("\n  ".join([describe_problems(headline, _by_cause(problems)), *remedies]))
    return folds


def _by_cause(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for every cause, with the branches that have it."""
    shown = max(1, 10 // len(problems))  # of a branch two names are said
    return [
        f"{branches[0]}: {cause}" if len(branches) == 1 else f"{cause}: {shortened(branches, shown)}"
        for cause, branches in problems.items()
    ]


def _check_shapes(spot: Spot, weight: LogicalTensor | None, up: LogicalTensor, down: LogicalTensor) -> None:
    if weight is None:
        raise ValueError(f"the weight {spot.weight} is not there")
    for tensor in (weight, up, down):
        if tensor.spec.dtype.name not in _TYPES:
            raise ValueError(f"{tensor.spec.name} is {tensor.spec.dtype.name}; one of {', '.join(_TYPES)} is expected")
        if tensor is not weight and tensor.missing:
            box, ranks = tensor.missing[0]
            raise ValueError(f"the box {box} of {tensor.spec.name} is in none of the files of ranks {list(ranks)}")
    if spot.view and len(up.shards) > 1:
        raise ValueError(f"{up.spec.name} is sharded, and {spot.weight} is fused; make the adapter complete first")
    shapes = [tensor.spec.shape for tensor in (up, down, weight)]
    rows = (spot.box.volume,) if spot.view else weight.spec.shape[:1]
    fits = all(len(shape) == 2 for shape in shapes) and shapes[0] == (*rows, shapes[1][0]) and shapes[1][0] > 0
    if not fits or shapes[1][1] != shapes[2][1] or (spot.view and math.prod(spot.view) != shapes[2][0]):
        described = " · ".join(str(list(shape)) for shape in shapes[:2])
        raise ValueError(f"B · A is {described}, which does not fit {spot.weight} {list(shapes[2])}")


def _joined(first: _Fold, second: _Fold) -> _Fold:
    """Branches of several modules that share a weight, as one of their joint rank."""
    dtypes = {tensor.spec.dtype for fold in (first, second) for tensor in (*fold.ups, *fold.downs)}
    if not second.spots[0].view or second.spots[0] in first.spots:
        raise ValueError(f"another branch is added to {second.spots[0].weight} as well")
    if first.scaling != second.scaling or len(dtypes) > 1:
        raise ValueError(f"another branch of the fused {second.spots[0].weight} has another scaling or type")
    return _Fold(
        first.spots + second.spots,
        first.ups + second.ups,
        first.downs + second.downs,
        first.scaling,
        first.branches + second.branches,
    )


def _without_adapters(target: Strategy, in_file: Mapping[str, str]) -> Strategy:
    """The strategy of a LoRA run as that of the merged weights: nothing of the factors, nor of their states.

    The names are those of the files (`in_file` has them by the names of the original model).
    """
    stages = [
        {in_file.get(name, name): layout for name, layout in stage.items() if factor_name(name) is None}
        for stage in target.stages
    ]
    return replace(target, stages=tuple(stages))


def _with_branches(plan: Plan, folds: Mapping[str, _Fold]) -> Plan:
    """The plan with the branches added to the source places of their weights."""
    files = Numbers({file.path: number for number, file in enumerate(plan.sources)})
    transfers = []
    for transfer in plan.transfers:
        fold = folds.get(transfer.name)
        if fold is not None:
            rows, columns = transfer.shape
            task = Merge(transfer.dtype, _up(fold, rows, files), _down(fold, columns, files), fold.scaling)
            sources = tuple(place._replace(compute=task) for place in transfer.sources)
            transfer = transfer._replace(sources=sources)
        transfers.append(transfer)
    sizes = (SourceFile(path, path.stat().st_size) for path in files)
    return replace(plan, sources=tuple(sizes), transfers=tuple(transfers))


def _up(fold: _Fold, rows: int, files: Numbers[Path]) -> Factor:
    """The factor B of a weight: the branches' own side by side, zero in the rows of other modules."""
    pieces: list[Piece] = []
    rank = 0
    for spot, tensor in zip(fold.spots, fold.ups):
        own = tensor.spec.shape[1]
        if spot.view:
            (shard,) = tensor.shards
            box = Box((*spot.box.start, rank), (*spot.box.stop, rank + own))
            pieces.append(_piece(shard, tensor, box, files))
        else:
            pieces += [_piece(shard, tensor, shard.box, files) for shard in tensor.shards]
        rank += own
    return Factor(fold.ups[0].spec.dtype, (rows, rank), (*(fold.spots[0].view or (rows,)), rank), tuple(pieces))


def _down(fold: _Fold, columns: int, files: Numbers[Path]) -> Factor:
    """The factor A of a weight: the branches' own, one below the other."""
    pieces: list[Piece] = []
    rank = 0
    for tensor in fold.downs:
        for shard in tensor.shards:
            (first, left), (last, right) = shard.box
            pieces.append(_piece(shard, tensor, Box((rank + first, left), (rank + last, right)), files))
        rank += tensor.spec.shape[0]
    return Factor(fold.downs[0].spec.dtype, (rank, columns), (rank, columns), tuple(pieces))


def _piece(shard: Shard, tensor: LogicalTensor, box: Box, files: Numbers[Path]) -> Piece:
    """A shard as a box of a factor. A file that the plan does not have yet is put at the end."""
    return Piece(files[shard.path], shard.tensor or tensor.spec.name, box)
