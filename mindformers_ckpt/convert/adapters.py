"""PEFT adapters over MindSpore weights: their settings, and the MindSpore weights that their modules belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindformers_ckpt.convert.config import ModelConfig, read_config
from mindformers_ckpt.convert.model import Facts, Model, find_model, model_of_config, models
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
from mindformers_ckpt.errors import ConfigError, describe_problems
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.lora import Locate, Scaling, Spot
from mindformers_ckpt.sources.checkpoint import LogicalTensor

SETTINGS_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
# Settings by which the merged weight is not W + scaling · B · A over the weights of the original model.
_REFUSED = ("use_dora", "fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "trainable_token_indices")
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_scaling(adapter: Path) -> Scaling | None:
    """The scaling that the adapter_config.json beside an adapter tells, None when there is none.

    Raises ConfigError that lists all settings by which it cannot be merged: DoRA, transposed weights, starting
    values that are taken out of the base weights, and others.
    """
    path = (adapter if adapter.is_dir() else adapter.parent) / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("alpha_pattern") or {}, dict):
        raise ConfigError(f"{path} is no adapter_config.json of PEFT")
    problems = list(_faults(values))
    if problems:
        raise ConfigError(describe_problems(f"{path}: the adapter cannot be merged", problems))
    return Scaling(
        alpha=values.get("lora_alpha"),
        rank_stabilised=bool(values.get("use_rslora")),
        alphas=values.get("alpha_pattern") or {},
    )


def _faults(values: Mapping[str, Any]) -> Iterator[str]:
    kind, start = values.get("peft_type", "LORA"), values.get("init_lora_weights")
    if kind != "LORA":
        yield f"peft_type {kind!r} is not supported; merge it with PEFT"
    for name in _REFUSED:
        if values.get(name):
            yield f"{name} is not supported; merge it with PEFT"
    if start not in _PLAIN_STARTS:
        yield (
            f"init_lora_weights {start!r} changes the base weights, so the adapter does not belong to those of the "
            "original model; save it with path_initial_model_for_weight_conversion"
        )
    for name, alpha in {"lora_alpha": values.get("lora_alpha"), **(values.get("alpha_pattern") or {})}.items():
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
            yield f"{name} is {alpha!r}, a number is expected"


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
        plain = module[len(_PREFIX) :] if module.startswith(_PREFIX) else module
        if f"{plain}.weight" in weights:
            return Spot(f"{plain}.weight")
        if plain in spots:
            return spots[plain]
        hint = "; if its name is one of Hugging Face, give --model" if not spots and plain != module else ""
        raise ValueError(f"the weight {plain}.weight is not there{hint}")

    return locate


def _tables(
    weights: Mapping[str, LogicalTensor], name: str | None, hf_config: Path | None
) -> Iterator[tuple[Table, Facts]]:
    config = read_config(hf_config)
    model = model_of_config(config) if name is None else _model(name)
    if config.path is None:
        config = ModelConfig({**model.counted(weights), **config.values})
    for table in model.tables.values():
        yield table, model.facts(config)


def _model(name: str) -> Model:
    model = find_model(name)
    if model is None:
        raise ConfigError(f"unknown model {name!r}; known are {', '.join(models())}")
    return model


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
