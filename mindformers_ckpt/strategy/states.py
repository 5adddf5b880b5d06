"""The states of an optimizer that a strategy leaves out: one that was declared, or saved for the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.state_names import state_of
from mindformers_ckpt.strategy.model import Strategy


def with_states(strategy: Strategy, shapes: Mapping[str, tuple[int, ...]]) -> Strategy:
    """The strategy, and the states that it leaves out of weights that it names, cut like their weights.

    `shapes` are those of the whole tensors. A state of another shape than its weight stays left out: it is whole.
    """
    named = strategy.names()
    left_out = shapes.keys() - named if named else ()
    if not left_out:
        return strategy
    found = {
        name: state.weight
        for name, shape in shapes.items()
        if name in left_out
        and (state := state_of(name, named, known=True)) is not None
        and shapes.get(state.weight) == shape
    }
    if not found:
        return strategy
    return replace(strategy, stages=tuple(_with(layouts, found) for layouts in strategy.stages))


def _with(layouts: Mapping[str, Layout], weights: Mapping[str, str]) -> dict[str, Layout]:
    return {**layouts, **{name: layouts[weight] for name, weight in weights.items() if weight in layouts}}
