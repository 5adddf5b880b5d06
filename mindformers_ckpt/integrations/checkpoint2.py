"""Our engine under MindFormers' own loading of checkpoint 2.0 (`load_checkpoint` of `mindformers.checkpoint`).

What reads and re-slices there is one class, `ReshardLoader`: it is told the layouts of the network and of the
checkpoint, and gives this rank's parameters by name. The name of that class is replaced in the module that uses it;
what stands around it stays their own: which layouts the network has (graph mode, PyNative, balanced loading), the
global step, the broadcast, and `load_param_into_net`. `load_checkpoint` itself is wrapped, so that every parameter of
this rank is looked at: whether it is in the checkpoint, before anything is set, and whether it has got its shape.

Each rank reads by itself, as it does there, and opens only the files that it takes from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mindformers_ckpt.errors import PlanError, StrategyError, raise_problems
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.integrations.replacing import parameters_of, replace_everywhere
from mindformers_ckpt.log import log
from mindformers_ckpt.lora_names import is_adapter_name
from mindformers_ckpt.planning.missing import missing_names
from mindformers_ckpt.state_names import COUNTERS, find_states, state_of
from mindformers_ckpt.strategy.metadata import Recorded, recorded_of
from mindformers_ckpt.words import shortened

CHECKPOINT2 = "mindformers.checkpoint.checkpoint"
_LOAD, _LOADER = "load_checkpoint", "ReshardLoader"
_ADVICE = "is it the checkpoint of this model?"


class _Replaced(NamedTuple):
    """What was there before, and what has taken the place of `load_checkpoint`."""

    module: ModuleType
    load: Callable[..., Any]
    loader: Callable[..., Any]
    ours: Callable[..., Any]


class _Call(NamedTuple):
    """A call of `load_checkpoint`: what is to be loaded, and whether other ranks send a part of it."""

    cells: Sequence[Any]
    balanced: bool
    loaded: dict[str, Any]


_replaced: _Replaced | None = None
_call: _Call | None = None
_allowed: tuple[str, ...] = ()


def replaced() -> bool:
    """Whether checkpoints 2.0 are loaded by ours at the moment."""
    return _replaced is not None


def replace_in(module: ModuleType, allow_missing: Sequence[str] = ()) -> None:
    """Put our engine under `load_checkpoint` of MindFormers' module, where it is the code that can be replaced.

    Says what it lacks in one line of the log where it is not, and leaves it alone. `allow_missing`: names or patterns
    of parameters that a checkpoint may lack. Does nothing when ours is there already.
    """
    global _replaced
    if _replaced is not None:
        return
    unlike = _unlike(module)
    if unlike:
        level = logging.WARNING if hasattr(module, _LOADER) else logging.INFO  # 1.7 and 1.8 have no such class
        log.log(level, "MindFormers' own code loads checkpoints 2.0: its %s cannot be replaced (%s)", _LOAD, unlike)
        return
    allow(allow_missing)
    load, loader = getattr(module, _LOAD), getattr(module, _LOADER)
    ours = _checked(load)
    _replaced = _Replaced(module, load, loader, ours)
    setattr(module, _LOADER, _loader_of(loader))
    replace_everywhere(_LOAD, load, ours)
    log.info("checkpoints 2.0 are loaded with the engine of mindformers_ckpt")


def allow(patterns: Sequence[str]) -> None:
    """Let checkpoints lack other parameters than before."""
    global _allowed
    _allowed = tuple(patterns)


def put_back() -> None:
    """Put MindFormers' own code back. Does nothing when it is there."""
    global _replaced
    before, _replaced = _replaced, None
    if before is not None:
        setattr(before.module, _LOADER, before.loader)
        replace_everywhere(_LOAD, before.ours, before.load)


def _unlike(module: ModuleType) -> str:
    """What is another in a module than in the one that can be replaced; empty for nothing."""
    lacking = [name for name in (_LOAD, _LOADER, "get_real_rank") if not hasattr(module, name)]
    if lacking:
        return f"it has no {', '.join(lacking)}"
    for name, replaced_by in ((_LOAD, _checked), (_LOADER, _loader_of)):
        theirs = getattr(module, name)
        found = parameters_of(theirs)
        if found != parameters_of(replaced_by(theirs), is_wrapper=True):  # those of MindFormers 1.9 to 2.1
            return f"{name} has the parameters {found}"
    return "" if callable(getattr(getattr(module, _LOADER), "load", None)) else f"{_LOADER} has no load"


def _checked(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`load_checkpoint`, with a look at what the network holds in the end."""

    @wraps(theirs)
    def load(
        checkpoint: str,
        network: Any,
        optimizer: Any = None,
        global_step: int | None = None,
        balanced_load: bool = False,
        reshard_worker_num: int = 1,
    ) -> Any:
        global _call
        from mindformers_ckpt.ms import weights

        _call = _Call([cell for cell in (network, optimizer) if cell is not None], balanced_load, {})
        loaded = _call.loaded
        try:
            result = theirs(checkpoint, network, optimizer, global_step, balanced_load, reshard_worker_num)
            if not _are_distributed(_call.cells):
                weights.check_loaded(weights.Parameters(_call.cells), loaded)
            return result
        finally:
            _call = None

    return load


def _loader_of(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """What takes the place of the class: it makes ours, or one of theirs for what ours does not do."""

    @wraps(theirs)
    def make(
        checkpoint_dir: str,
        dst_sharded_tensor_metas: Mapping[str, Any],
        src_sharded_tensor_metas: Mapping[str, Any],
        param_file_mappings: Mapping[str, Any],
        reshard_worker_num: int = 1,
        template: Any = None,
    ) -> Any:
        given = checkpoint_dir, dst_sharded_tensor_metas, src_sharded_tensor_metas, param_file_mappings
        try:
            if template is not None:
                raise _LeftToThemError("Hugging Face weights are converted there")
            return _Loader(*given)
        except _LeftToThemError as reason:
            log.info("%s is loaded by MindFormers' own code: %s", checkpoint_dir, reason)
        except StrategyError as error:
            log.warning("%s is loaded by MindFormers' own code, since ours cannot: %s", checkpoint_dir, error)
        return theirs(*given, reshard_worker_num, template)

    return make


class _LeftToThemError(Exception):
    """What ours does not do, and why."""


class _Loader:
    """Takes the place of one `ReshardLoader`.

    `asked`: name -> what MindFormers says of this rank's part of a parameter; `held`: name -> the slices that the
    checkpoint has; `stored`: the files of each slice. Raises StrategyError where layouts cannot be read.
    """

    def __init__(
        self, folder: str, asked: Mapping[str, Any], held: Mapping[str, Any], stored: Mapping[str, Any]
    ) -> None:
        assert _replaced is not None
        self._folder, self._stored = Path(folder), stored
        self._rank: int = _replaced.module.get_real_rank()
        self._call = _call or _Call((), False, {})
        self._held = held.keys()
        weights = [name for name in held if name not in COUNTERS and state_of(name, held) is None]
        if weights and all(map(is_adapter_name, weights)):
            raise _LeftToThemError("it holds adapters alone, whose weights come from another checkpoint")
        self._own = _own_parameters(self._call.cells)
        wanted = [name for name in asked if name in held]
        self._targets = {name: recorded(name, asked[name], self._rank) for name in wanted}
        self._sources = {name: recorded(name, held[name][0]) for name in {*wanted, *self._own} & held.keys()}
        self._boxes = {name: self._box(target) for name, target in self._targets.items()}

    def load(self) -> dict[str, Any]:
        """This rank's parameters by name. Raises PlanError, ConfigError or FormatError for what does not fit."""
        from mindformers_ckpt.job.direct import read_direct
        from mindformers_ckpt.ms import weights
        from mindformers_ckpt.planning.one_rank import Held, Wanted, plan_of_rank

        started = time.perf_counter()
        self._add_states()
        self._check()
        wanted = {name: Wanted(self._targets[name].shape, box) for name, box in self._boxes.items()}
        held = {name: Held(self._sources[name], partial(self._file_of, name)) for name in wanted}
        plan = plan_of_rank(self._rank, wanted, held, self._folder)
        own = weights.Parameters(() if _are_distributed(self._call.cells) else self._call.cells)
        memory = partial(weights.own_memory, own)
        tensors = weights.tensors_of(read_direct(plan.plan, lambda: None, plan.headers, given=memory))
        weights.check_fit(own, tensors, _ADVICE)
        self._call.loaded.update(tensors)
        log.info(
            "rank %d: %d parameters, %.2f GB, read from %d files of %s in %.2f s",
            *(self._rank, len(tensors), plan.plan.bytes_written / 1e9, len(plan.plan.sources), self._folder),
            time.perf_counter() - started,
        )
        return {name: weights.as_parameter(name, tensor) for name, tensor in tensors.items()}

    def _box(self, target: Recorded) -> Box:
        if target.layout is None:
            return Box.whole(target.shape)
        return target.layout.box(target.shape, self._rank - target.first)

    def _file_of(self, name: str, number: int) -> Path | None:
        """The file of a slice: this rank's, else the first that is named; None where none is. Raises PlanError."""
        places = self._stored.get(str((name, (number,))))
        if not places:
            return None
        place = next((place for place in places if place["storage_rank"] == self._rank), places[0])
        file = str(place["file_name"])
        if "/" in file:
            raise PlanError(f"{self._folder}: {file!r:.80}, the file of {name}, is outside of the folder")
        return self._folder / file

    def _add_states(self) -> None:
        """Ask for own parameters that the checkpoint has, and MindFormers does not ask for.

        It asks for what the compiled network has layouts of; 1.9 leaves out states of an optimizer that has none there
        (`muon_m.*` of some stages), and trains on with zeros. Those are cut as their weights are. Raises PlanError for
        others.
        """
        if self._call.balanced:
            return  # other ranks may be asked, and send them
        lost = []
        for name in sorted(self._own.keys() & self._held - self._boxes.keys()):
            state, shape = state_of(name, self._boxes), self._own[name]
            if state is not None and self._boxes[state.weight].shape == shape:
                self._targets[name], self._boxes[name] = self._targets[state.weight], self._boxes[state.weight]
            elif shape == self._sources[name].shape:
                self._targets[name], self._boxes[name] = Recorded(shape, None, 0), Box.whole(shape)
            else:
                lost.append(f"{name}{list(shape)}: of {list(self._sources[name].shape)} in the checkpoint")
        raise_problems(PlanError, "the compiled network has no layouts of parameters to be loaded", lost)

    def _check(self) -> None:
        """Before anything is read: the shapes are those of the network, and all parameters are there."""
        from mindformers_ckpt.ms import weights

        missing = missing_names(self._own.keys() - _started_anew(self._own), self._held, _allowed)
        own = {} if _are_distributed(self._call.cells) else self._own
        shapes = weights.shape_faults({name: box.shape for name, box in self._boxes.items()}, own)
        weights.raise_unfit(shapes, (), missing.required, _ADVICE)
        if self._rank == 0:
            for note in missing.notes:
                log.warning("%s", note)
            if missing.allowed:
                names = shortened(missing.allowed, 20)
                log.warning("%d parameters keep their initial values (allow_missing): %s", len(missing.allowed), names)


def recorded(name: str, entry: Any, rank: int | None = None) -> Recorded:
    """What a `ShardedTensor` of MindFormers says of a parameter. Raises StrategyError where it cannot be read.

    A layout of the network is given with the `rank` that asks. Its ranks may stand in any order (PyNative: those that
    share the same part of a model, like 1 and 3), and `first` is as if they followed one another.
    """
    try:
        layout = None if entry.layout is None else {k: _lists(v) for k, v in entry.layout.to_dict().items()}
        first = None
        if layout is not None and rank is not None:
            ranks = layout["rank_list"]
            if rank not in ranks:
                raise StrategyError(f"rank {rank} is none of the ranks of its layout")
            first, layout["rank_list"] = rank - ranks.index(rank), list(range(len(ranks)))
        sizes = {key: _lists(getattr(entry, key)) for key in ("global_shape", "axis_fragmentations")}
        found = recorded_of({**sizes, "layout": layout})
        return found if first is None else found._replace(first=first)
    except (StrategyError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StrategyError(f"{name}: {error if isinstance(error, StrategyError) else f'{error!r:.200}'}") from error


def _lists(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    return [_lists(part) for part in value] if isinstance(value, (list, tuple)) else value


def _own_parameters(cells: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that this rank must have the values of, by name."""
    from mindformers_ckpt.ms import weights

    if not _are_distributed(cells):
        return weights.own_shapes(weights.Parameters(cells))
    parameters = [parameter for cell in cells for parameter in cell.get_parameters()]
    local = {own.name: own.to_local() if hasattr(own, "to_local") else own for own in parameters}
    return {name: tuple(own.shape) for name, own in local.items()}


def _are_distributed(cells: Sequence[Any]) -> bool:
    """Whether parameters are tensors of hyper-parallel (PyNative), which know a part and the whole."""
    return any(hasattr(parameter, "to_local") for cell in cells for parameter in cell.get_parameters())


def _started_anew(own: Collection[str]) -> set[str]:
    """Counters, which MindFormers sets itself, and what networks and optimizers need not save."""
    states = find_states(own, own)
    return {*states.counters, *states.buffers, *(name for name in states.optimizer if state_of(name, own) is None)}
