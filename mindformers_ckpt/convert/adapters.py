"""PEFT adapters over MindSpore weights: the weights that their modules belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mindformers_ckpt.convert.config import ModelConfig, read_config
from mindformers_ckpt.convert.model import Facts, model_of_config, named_model
from mindformers_ckpt.convert.rules import (
    PART,
    Bound,
    Rule,
    Table,
    Tensor,
    bind,
    fill,
    flat,
    inner_captures,
    measure,
    parse_axes,
)
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.lora import Locate, Spot, Unfit
from mindformers_ckpt.lora_names import original_name
from mindformers_ckpt.sources.shards import LogicalTensor


def locator(weights: Mapping[str, LogicalTensor], model: str | None, hf_config: Path | None) -> Locate:
    """Find the weights of modules among `weights`: under their own names, or under those of a conversion table.

    `model` is the name of the model, left out where `hf_config` holds its config.json. Of all namings of the model
    that is taken whose weights are there.
    """
    spots: dict[str, Spot] = {}
    if model is not None or hf_config is not None:
        for table, facts in _tables(weights, model, hf_config):
            for module, spot in _spots(table, facts, weights):
                spots.setdefault(module, spot)

    def locate(module: str) -> Spot:
        plain = original_name(module)
        if f"{plain}.weight" in weights:
            return Spot(f"{plain}.weight")
        if plain in spots:
            return spots[plain]
        remedy = "" if spots or plain == module else "If these names are those of Hugging Face, give --model."
        raise Unfit(f"the weight {plain}.weight is not there", remedy)

    return locate


def _tables(
    weights: Mapping[str, LogicalTensor], name: str | None, hf_config: Path | None
) -> Iterator[tuple[Table, Facts]]:
    config = read_config(hf_config)
    model = model_of_config(config) if name is None else named_model(name)
    if config.path is None:
        config = ModelConfig({**model.counted(weights), **config.values})
    for table in model.tables.values():
        yield table, model.facts(config)


def _spots(table: Table, facts: Facts, weights: Mapping[str, LogicalTensor]) -> Iterator[tuple[str, Spot]]:
    """Hugging Face module -> where its rows lie, of all weights of a table that are there."""
    for entry, captures in bind(table, facts.runs):
        if not isinstance(entry, Rule) or not facts.holds(entry.when) or inner_captures(entry):
            continue
        bound = fill(entry, captures, facts.sizes)
        if not entry.whole.axes:
            ((hf,), (ms,)) = bound.names("hf"), bound.names("ms")
            if hf.endswith(".weight") and ms in weights:
                yield hf[: -len(".weight")], Spot(ms)
        elif entry.side == "ms" and bound.whole in weights:
            yield from _fused(bound, facts, weights[bound.whole].spec.shape)


def _fused(bound: Bound, facts: Facts, shape: tuple[int, ...]) -> Iterator[tuple[str, Spot]]:
    """The modules that share a weight, where each holds rows of it in their order and all columns."""
    axes = parse_axes(bound.rule.whole.axes)
    if len(axes) != 2 or len(axes[1]) != 1 or PART not in axes[0]:
        return
    if len(bound.names("hf")) < len(bound.parts):
        return
    first = 0
    try:
        spans = [_span(part, facts) for part in bound.rule.parts]
        extents = measure(axes, shape, {**facts.sizes, PART: sum(spans)})
    except ValueError as error:
        raise ConfigError(f"{bound.whole}: {error}; give the folder of the model's config.json (--hf_config)") from None
    for (part, name, _), span in zip(bound.parts, spans):
        own = flat(parse_axes(part.axes))
        if own == tuple(axis for axis in flat(axes) if axis in own) and name.endswith(".weight"):
            start = tuple(first if axis == PART else 0 for axis in axes[0])
            stop = tuple(first + span if axis == PART else extents[axis] for axis in axes[0])
            view = tuple(extents[axis] for axis in axes[0])
            yield name[: -len(".weight")], Spot(bound.whole, view, Box(start, stop))
        first += span


def _span(part: Tensor, facts: Facts) -> int:
    """How much of its whole a part takes. Raises ValueError when nothing tells."""
    span = facts.sizes.get(part.span) if isinstance(part.span, str) else part.span
    if span is None:
        raise ValueError(f"the size {part.span} is not known")
    return span
