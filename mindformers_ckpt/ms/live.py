"""The strategy of the network in hand.

On Ascend MindSpore itself saves it while it compiles the network; here it is told where. A network whose
parallelism is written by hand (as on CPU, where MindSpore compiles no semi_auto_parallel) declares its
layouts instead, and the file is written where MindSpore would have written it.

MindSpore may compile without saving (with its compile cache, or when another setting came after ours). Then the
layouts that it keeps of a compiled network say the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.errors import StrategyError
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.log import log
from mindformers_ckpt.state_names import State, state_of
from mindformers_ckpt.strategy.files import rank_file_name, read_rank_file, read_strategy, write_strategy
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.strategy.schema import unread_map_class
from mindformers_ckpt.words import shortened

if TYPE_CHECKING:
    from mindspore.nn import Cell


class LiveFile:
    """The strategy file of one rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / rank_file_name(rank)
        self.rank = rank
        self._before = _state_of(self.path)
        self._read: tuple[tuple[int, int] | None, Mapping[str, Layout]] | None = None

    @property
    def is_written(self) -> bool:
        """Whether the file was written since this was made."""
        return _state_of(self.path) != self._before

    def save_at_compile(self, network: Any = None) -> None:
        """Have MindSpore save the strategy of all parameters when the network is compiled.

        Sets the auto-parallel context, and `network` as well when it is an `AutoParallel` cell, which does not
        look at the context. All parameters, not only the trainable ones: what a strategy does not name cannot
        be re-sliced.
        """
        import mindspore

        unread_map_class()  # made here, as a module is imported: `load` reads the file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        config = {"save_file": str(self.path), "only_trainable_params": False}
        mindspore.set_auto_parallel_context(strategy_ckpt_config=config)
        if hasattr(network, "save_param_strategy_file"):
            network.save_param_strategy_file(str(self.path))
            network.disable_strategy_file_only_for_trainable_params()

    def declare(self, layouts: Mapping[str, Layout], stage: int = 0) -> None:
        """Write the file from declared layouts."""
        write_strategy(layouts, self.path, stage)

    def strategy(self) -> Strategy:
        """The strategy that the file alone tells: that of one stage."""
        return Strategy.of_stages((self._layouts(),), str(self.path))

    def _layouts(self) -> Mapping[str, Layout]:
        """The layouts in the file; it is read again where it was written since."""
        state = _state_of(self.path)
        if self._read is None or self._read[0] != state:
            self._read = state, read_rank_file(self.path)
        return self._read[1]

    def complete(self, cells: Sequence[Cell], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Add the layouts of own parameters that the file lacks, from what MindSpore keeps of compiled networks.

        Where it wrote no file that is all of them; where a second network was compiled, for evaluation, it
        wrote over those that only the first has. `shapes` are those of the own parameters. States whose layout is
        not to be had have that of their weight, where they have its shape: of layouts that were declared those of the
        weights are enough.
        """
        found = self._layouts() if self.is_written else {}
        compiled = compiled_layouts(cells, shapes)
        lost = {name: compiled[name] for name in shapes if name not in found and name in compiled}
        if not found and not lost:
            return
        known = {**found, **lost}
        states = {name: state_of(name, known) for name in shapes if name not in known}
        alike = {
            name: known[state.weight]
            for name, state in states.items()
            if state is not None and shapes.get(state.weight) == shapes[name]
        }
        self._warn_of_others({name: state for name, state in states.items() if name not in alike}, shapes, known)
        if not lost and not alike:
            return
        if lost:
            reason = "MindSpore wrote no strategy" if not found else "the strategy lacks parameters of the network"
            log.info("rank %d: %s; added from the compiled network: %s", self.rank, reason, shortened(lost))
        if alike:
            log.info("rank %d: added to the strategy, cut like their weights: %s", self.rank, shortened(alike))
        known.update(alike)
        size = next(iter(known.values())).rank_count
        write_strategy(known, self.path, self.rank // size)

    def _warn_of_others(
        self, states: Mapping[str, State | None], shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Layout]
    ) -> None:
        """Say which states have no layout, and another shape than their weight, which is cut: theirs cannot be told."""
        doubtful = [
            f"{name}{list(shapes[name])} of {state.weight}{list(shapes.get(state.weight, ()))}"
            for name, state in states.items()
            if state is not None and math.prod(shapes[name]) > 1 and max(known[state.weight].cuts, default=1) > 1
        ]
        if doubtful:
            log.warning(
                "rank %d: no layout says how these states are cut, and they have not the shape of their weights; they "
                "are taken as whole on every rank. Declare their layouts if each rank holds a part: %s",
                self.rank,
                shortened(doubtful),
            )


def compiled_layouts(cells: Sequence[Cell], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layout]:
    """The layouts of own parameters that MindSpore keeps of all networks it has compiled; {} when there are none."""
    found: dict[str, Any] = {}
    try:
        from mindspore.graph.api import _get_parameter_layout
    except ImportError:  # before MindSpore 2.9
        try:
            from mindspore.common.api import _get_parameter_layout
        except ImportError:
            _get_parameter_layout = dict
    found.update(_get_parameter_layout())
    for cell in cells:
        found.update(getattr(cell, "parameter_layout_dict", None) or {})
    layouts = {name: _layout_of(found[name], shape) for name, shape in shapes.items() if name in found}
    return {name: layout for name, layout in layouts.items() if layout is not None}


def _layout_of(entry: Sequence[Any], shape: tuple[int, ...]) -> Layout | None:
    """A layout from an entry of `parameter_layout_dict`: device matrix, tensor map, slice, …, whole shape.

    None where it cannot be told: a dimension cut along several axes, which the entry shows reshaped, and an optimizer
    shard in a network from the compile cache, where the whole shape is empty.
    """
    matrix, axes, cut, group, whole = entry[0], entry[1], entry[2], entry[5], entry[6]
    if len(axes) != len(shape):
        return None
    layout = Layout(tuple(matrix), tuple(() if axis < 0 else (axis,) for axis in axes))
    if not whole:
        return layout if tuple(cut) == shape and not group else None
    if len(whole) != len(shape):
        return None
    if shape and group:  # of an optimizer shard, which cuts dimension 0 further
        pieces = whole[0] // (layout.cuts[0] * shape[0])
        layout = Layout(layout.device_matrix, layout.tensor_map, pieces if pieces > 1 else 0)
    return layout if layout.full_shape(shape) == tuple(whole) else None


def why_not_written(file: Path, network: Any) -> StrategyError:
    """What to say where a network was compiled in parallel, but its strategy is neither written nor kept."""
    import mindspore

    saved = str(mindspore.get_auto_parallel_context("strategy_ckpt_save_file") or "")
    cell = getattr(network, "_save_strategy_file_path", None)
    if cell is not None and cell != str(file):
        reason = "the AutoParallel cell was not given to it: call hook.prepare(network) before the network is compiled"
    elif saved != str(file):
        now = f"is now {saved!r}" if saved else "was reset"
        reason = f"strategy_ckpt_config {now}: set the auto-parallel context first, then call hook.prepare()"
    elif os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1" or mindspore.get_context("enable_compile_cache"):
        reason = "the compile cache was used: switch it off for this job (MS_COMPILER_CACHE_ENABLE=0)"
    else:
        reason = "was the network compiled between hook.prepare() and hook.load()?"
    return StrategyError(
        f"the network is parallel, but MindSpore wrote no strategy to {file} after hook.prepare(); {reason}"
    )


def whole_strategy(file: LiveFile, size: int) -> Strategy | None:
    """The strategy of a job of `size` ranks as this rank can tell it; None where it cannot.

    From the files of all ranks where they are in one folder, else from the own one where there is no pipeline.
    """
    with suppress(StrategyError):
        strategy = read_strategy(file.path.parent)
        if strategy.rank_count == size:
            return strategy
    strategy = file.strategy()
    return strategy if strategy.rank_count == size else None


def saves_whole_optimizer_shards() -> bool:
    """Whether MindSpore puts optimizer shards together when it saves: its strategy then does not tell of them."""
    import mindspore

    settings = ("enable_parallel_optimizer", "optimizer_weight_shard_aggregated_save")
    return all(mindspore.get_auto_parallel_context(setting) is True for setting in settings)


def dry_run_rank() -> int | None:
    """The rank that a dry run (MS_SIMULATION_LEVEL) plays in one process; None in a real job."""
    if not os.environ.get("MS_SIMULATION_LEVEL"):
        return None
    text = os.environ.get("RANK_ID", "0")
    return int(text) if text.isdecimal() else 0


def _state_of(file: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew; None when there is no file."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino
