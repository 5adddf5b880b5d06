"""The shapes that a config.json gives the tensors of MindSpore, by the tables of its model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import product
from pathlib import Path

from mindformers_ckpt.convert.config import LAYOUT_SETTINGS, ModelConfig, read_config, total
from mindformers_ckpt.convert.config import product as product_of
from mindformers_ckpt.convert.model import Facts, Model, model_of_config
from mindformers_ckpt.convert.rules import PART, Bound, Copy, Rule, Table, bind, fill, parse_axes
from mindformers_ckpt.convert.weights import config_folder
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.sources.shapes import Shape, Shapes, agrees


def shapes_of_config(path: Path, actual: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The shapes that a Hugging Face config.json (or its folder) gives tensors, by the names that MindSpore uses.

    Of a model's namings, layouts and settings that is taken which fits the `actual` names and shapes best. Raises
    PlanError and ConfigError when there is no config.json of a known model.
    """
    config = read_config(config_folder(path, path))
    model = model_of_config(config)
    canonical = model.canonical.get("ms", str)
    spelt = {canonical(name): name for name in actual}
    best: Shapes | None = None
    least: tuple[int, int, int] | None = None
    for candidate in _candidates(model, config, spelt):
        shapes = {spelt.get(name, name): shape for name, shape in candidate.items()}
        common = shapes.keys() & actual.keys()
        different = sum(not agrees(actual[name], shapes[name]) for name in common)
        misfit = (-len(common), len(shapes) - len(common), different)
        if least is None or misfit < least:
            best, least = shapes, misfit
    if best is None:
        raise ConfigError(f"{config.path}: does not tell the sizes of its model ({model.name})")
    return best


def _candidates(model: Model, config: ModelConfig, names: Collection[str]) -> Iterator[Shapes]:
    """The shapes under every table and all settings of the network; the usual ones first."""
    settings = [option for option in LAYOUT_SETTINGS if option in model.options]
    for values in product(*((LAYOUT_SETTINGS[option], not LAYOUT_SETTINGS[option]) for option in settings)):
        try:
            facts = model.facts(ModelConfig({**config.values, **dict(zip(settings, values))}, config.path))
        except ConfigError:
            continue  # settings that do not go together
        for table in model.tables.values():
            try:
                yield _shapes(table, facts, names)
            except ConfigError:
                continue  # a table of another layout, whose sizes this config.json lacks


def _shapes(table: Table, facts: Facts, names: Collection[str]) -> Shapes:
    """The tensors of a table. What need not be there counts only where it is among `names`."""
    found: dict[str, Shape | None] = {}
    for entry, captures in bind(table, facts.runs):
        if not facts.holds(entry.when):
            continue
        if isinstance(entry, Rule):
            shapes = _shapes_of_rule(fill(entry, captures, facts.sizes), facts)
            found.update((name, shape) for name, shape in shapes if not entry.optional or name in names)
        elif isinstance(entry, Copy) and "ms" in entry.name:
            name, original = (which["ms"].format(**captures) for which in (entry.name, entry.of))
            if name in names and original in found:
                found[name] = found[original]
    return found


def _shapes_of_rule(bound: Bound, facts: Facts) -> Iterator[tuple[str, Shape | None]]:
    """The tensors of MindSpore in a rule."""
    rule = bound.rule
    spans = [part.span if isinstance(part.span, int) else facts.sizes.get(part.span) for part in rule.parts]
    if rule.side == "ms":
        axes = rule.whole.axes or rule.shape  # of a tensor that is only renamed
        yield bound.whole, _shape(axes, {**facts.sizes, PART: total(*spans)})
        return
    for first in {part.name: part for part in reversed(rule.parts)}.values():
        shared = [span for part, span in zip(rule.parts, spans) if part.name == first.name]
        shape = _shape(first.axes, {**facts.sizes, PART: total(*shared)})
        yield from ((name, shape) for part, name, _ in bound.parts if part.name == first.name)


def _shape(axes: str, sizes: Mapping[str, int | None]) -> Shape | None:
    shape = tuple(product_of(*(sizes.get(axis) for axis in dimension)) for dimension in parse_axes(axes))
    return shape if any(extent is not None for extent in shape) else None
