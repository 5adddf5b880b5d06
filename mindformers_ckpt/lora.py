"""LoRA branches folded into the weights: the plan of a checkpoint that has the original model's parameters only.

A plan is made as for re-slicing, from the checkpoint without its LoRA parameters; then the places of every weight
that has a LoRA branch get the computation W + scaling · B · A. So merging, joining the shards of a distributed
checkpoint and cutting for another strategy are one pass, and B and A may be cut in any way themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import PlanError, describe_problems
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.computations import Factor, Merge, Piece
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Plan, SourceFile
from mindformers_ckpt.sources.checkpoint import Checkpoint, LogicalTensor
from mindformers_ckpt.strategy.model import Strategy

# "wq.mindpet_delta_lora_a", "wq.tk_delta_lora_A", "linear_qkv.lora_a.weight", "q_proj.lora_A.default.weight"
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:mindpet_delta_|tk_delta_)?lora_(?P<end>[abAB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
)
_RELATED = re.compile(r"(?:^|[._])(?:lora|mindpet_delta|tk_delta)(?:[._]|$)", re.IGNORECASE)
_TYPES = ("float16", "bfloat16", "float32")
_LISTED = 10_000  # all names of a model: each of them has to be looked after


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
    """The weight of a linear layer: all rows of "<module>.weight"."""
    return Spot(f"{module}.weight")


@dataclass(frozen=True)
class Scaling:
    """What B · A is multiplied by: a number, or alpha / rank, or alpha / √rank (rsLoRA).

    Attributes:
        value: the number itself.
        alpha: lora_alpha of the training; the rank is that of the factors.
        rank: lora_rank of the training; factors of another rank are an error.
        rank_stabilised: rsLoRA.
        alphas: other alphas by patterns that the ends of module names match (`alpha_pattern` of PEFT).
    """

    value: float | None = None
    alpha: float | None = None
    rank: int | None = None
    rank_stabilised: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str, rank: int) -> float:
        """The scaling of a branch. Raises ValueError that says what is missing or does not fit."""
        if self.value is not None:
            return self.value
        matching = (alpha for pattern, alpha in self.alphas.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
        alpha = next(matching, self.alpha)
        if alpha is None:
            raise ValueError("its scaling is not known: give --lora_scaling, or --alpha")
        if self.rank is not None and self.rank != rank:
            raise ValueError(f"it is of rank {rank}, not {self.rank}; if it was padded, give --lora_scaling")
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


class Adapters(NamedTuple):
    """The LoRA branches among some names, and all names that belong to them (optimizer states too)."""

    branches: tuple[Branch, ...]
    names: frozenset[str]


def find_adapters(names: Iterable[str], origin: Path) -> Adapters:
    """Find the LoRA branches among the names of a checkpoint (`origin`, for messages).

    Raises PlanError that lists every half without its partner and everything that cannot be merged: DoRA,
    several adapters of one module, adapters that are no LoRA of a linear layer.
    """
    known = sorted(set(names))
    factors = {name: match for name in known if (match := _FACTOR.fullmatch(name)) is not None}
    # "adam_m.<factor>" looks like a factor itself, of the module "adam_m.<module>".
    states = {name for name in known if name.partition(".")[2] in factors}
    halves: dict[str, dict[str, list[str]]] = {}
    problems = []
    for name in known:
        if name in states:
            continue
        if name in factors:
            module, end = factors[name]["module"], factors[name]["end"].lower()
            halves.setdefault(module, {}).setdefault(end, []).append(name)
        elif _RELATED.search(name):
            kind = "is of DoRA" if "magnitude" in name else "belongs to an adapter that is no LoRA of a linear layer"
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
    if problems:
        raise PlanError(describe_problems(f"{origin}: LoRA parameters cannot be merged", problems, _LISTED))
    return Adapters(tuple(branches), frozenset(states.union(factors)))


def plan_merge(
    source: Checkpoint,
    target: Strategy,
    scaling: Scaling,
    *,
    adapter: Checkpoint | None = None,
    locate: Locate = own_weight,
    prefix: str = DEFAULT_PREFIX,
    format: str = "ckpt",
) -> Plan:
    """Plan the merged weights of `source` for the ranks of `target`.

    The branches are those of the source, or of a checkpoint of their own (`adapter`) over it; `locate` finds their
    weights.

    Raises PlanError that lists all branches without a weight or a scaling, or whose shapes do not fit, and whatever
    `find_adapters` and `build_plan` raise.
    """
    held = source.tensors()
    own = find_adapters(held, source.files.root)
    if adapter is not None and own.branches:
        raise PlanError(
            f"{source.files.root} has LoRA parameters of its own ({own.branches[0].down}, …) besides those of "
            f"{adapter.files.root}; merge them first, or leave the adapter out"
        )
    found, factors, origin = own, held, source.files.root
    warnings: tuple[str, ...] = ()
    if adapter is not None:
        factors, origin = adapter.tensors(), adapter.files.root
        found = find_adapters(factors, origin)
        others = {name: tensor for name, tensor in factors.items() if name not in found.names}
        warnings = _leftovers(others, held, origin)
    if not found.branches:
        raise PlanError(f"{origin} holds no LoRA parameters; are its weights merged already?")
    folds = _fit(found.branches, held, factors, scaling, locate, origin)
    base = Checkpoint(source.files, source.strategy, names=set(held) - own.names)
    plan = build_plan(base, _without_adapters(target), prefix=prefix, format=format)
    plan = replace(plan, warnings=(*plan.warnings, *warnings))
    return _with_branches(plan, folds)


def _leftovers(others: Mapping[str, LogicalTensor], base: Mapping[str, LogicalTensor], origin: Path) -> tuple[str, ...]:
    """Refuse weights of an adapter that are no LoRA parameters; warn of single numbers, like the training step."""
    trained = sorted(name for name, tensor in others.items() if name in base or tensor.spec.size > 1)
    if trained:
        headline = f"{origin} holds trained parameters besides LoRA branches, which cannot be merged"
        raise PlanError(describe_problems(headline, trained, _LISTED))
    return (f"{origin}: not used: {', '.join(sorted(others))}",) if others else ()


class _Fold(NamedTuple):
    """What is to be added to a weight: the branches' factors, and where their rows lie."""

    spots: tuple[Spot, ...]
    ups: tuple[LogicalTensor, ...]
    downs: tuple[LogicalTensor, ...]
    scaling: float


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
    problems = []
    for branch in branches:
        up, down = factors[branch.up], factors[branch.down]
        try:
            spot = locate(branch.module)
            _check_shapes(spot, weights.get(spot.weight), up, down)
            fold = _Fold((spot,), (up,), (down,), scaling.of(branch.module, down.spec.shape[0]))
            folds[spot.weight] = _joined(folds[spot.weight], fold) if spot.weight in folds else fold
        except ValueError as error:
            problems.append(f"{branch.up}, {branch.down}: {error}")
    if problems:
        raise PlanError(describe_problems(f"{origin}: LoRA branches cannot be merged", problems, _LISTED))
    return folds


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
    fits = all(len(shape) == 2 for shape in shapes) and shapes[0] == (*rows, shapes[1][0])
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
    return _Fold(first.spots + second.spots, first.ups + second.ups, first.downs + second.downs, first.scaling)


def _without_adapters(target: Strategy) -> Strategy:
    """The strategy of a LoRA run as that of the merged weights: nothing of the factors, nor of their states."""
    stages = [
        {name: layout for name, layout in stage.items() if _FACTOR.fullmatch(name) is None} for stage in target.stages
    ]
    return replace(target, stages=tuple(stages))


def _with_branches(plan: Plan, folds: Mapping[str, _Fold]) -> Plan:
    """The plan with the branches added to the source places of their weights."""
    files = {file.path: number for number, file in enumerate(plan.sources)}
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


def _up(fold: _Fold, rows: int, files: dict[Path, int]) -> Factor:
    """The factor B of a weight: the branches' own side by side, zero in the rows of other modules."""
    pieces: list[Piece] = []
    rank = 0
    for spot, tensor in zip(fold.spots, fold.ups):
        own = tensor.spec.shape[1]
        if spot.view:
            ((_, path, _),) = tensor.shards
            box = Box((*spot.box.start, rank), (*spot.box.stop, rank + own))
            pieces.append(Piece(_number(path, files), tensor.spec.name, box))
        else:
            pieces += [Piece(_number(path, files), tensor.spec.name, box) for _, path, box in tensor.shards]
        rank += own
    return Factor(fold.ups[0].spec.dtype, (rows, rank), (*(fold.spots[0].view or (rows,)), rank), tuple(pieces))


def _down(fold: _Fold, columns: int, files: dict[Path, int]) -> Factor:
    """The factor A of a weight: the branches' own, one below the other."""
    pieces: list[Piece] = []
    rank = 0
    for tensor in fold.downs:
        for _, path, box in tensor.shards:
            start, stop = (rank + box.start[0], box.start[1]), (rank + box.stop[0], box.stop[1])
            pieces.append(Piece(_number(path, files), tensor.spec.name, Box(start, stop)))
        rank += tensor.spec.shape[0]
    return Factor(fold.downs[0].spec.dtype, (rank, columns), (rank, columns), tuple(pieces))


def _number(path: Path, files: dict[Path, int]) -> int:
    """The number of a source file in the plan; new ones are put at the end."""
    return files.setdefault(path, len(files))
