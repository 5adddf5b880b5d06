"""Fewer layers than config.json says: `--num_layers` and `--num_nextn_predict_layers`.

The first layers of a model make a smaller one, for trials. Prediction layers stand behind all others in Hugging Face
files, so that theirs keep the numbers that they have in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mindformers_ckpt.convert.config import LAYERS, ModelConfig
from mindformers_ckpt.convert.model import layer_of
from mindformers_ckpt.convert.weights import Weights
from mindformers_ckpt.errors import ConfigError, raise_problems

PREDICTIONS = ("num_nextn_predict_layers", "num_mtp_layers")
# Where prediction layers begin in Hugging Face files, when that is not behind the last layer that is converted.
FIRST_PREDICTION = "first_prediction_layer"
# Lists in config.json that have an entry for each layer.
_PER_LAYER = ("layer_types", "mlp_layer_types")


def changes(config: ModelConfig, layers: int | None, predictions: int | None) -> Mapping[str, Any]:
    """What the options change in config.json. Raises ConfigError when it has fewer layers than they say."""
    found: dict[str, Any] = {}
    problems = []
    for option, keys, count in (
        ("num_layers", LAYERS, layers),
        ("num_nextn_predict_layers", PREDICTIONS, predictions),
    ):
        if count is None:
            continue
        known = config.integer(*keys)
        if known is not None and count > known:
            problems.append(f"--{option} {count}: {config.path} says {known}, and only fewer can be taken")
        found[next((key for key in keys if config.values.get(key) is not None), keys[0])] = count
    raise_problems(ConfigError, "options contradict the model's config.json", problems)
    if layers is not None:
        lists = {key: config.values.get(key) for key in _PER_LAYER}
        found |= {key: values[:layers] for key, values in lists.items() if isinstance(values, list)}
    return found


def shortened(config: ModelConfig, changed: Mapping[str, Any], *, whole: bool) -> ModelConfig:
    """The configuration with the changes; `whole` says that the source has all layers still."""
    values = {**config.values, **changed}
    known = config.integer(*LAYERS)
    if whole and known is not None:
        values[FIRST_PREDICTION] = known
    return replace(config, values=values)


def without_layers(source: Weights, config: ModelConfig) -> tuple[Weights, tuple[str, ...]]:
    """Hugging Face weights without the layers that a shortened configuration leaves out, and what to tell of them."""
    count, first = config.integer(*LAYERS), config.integer(FIRST_PREDICTION)
    begin = count if first is None else first
    if count is None or begin is None:
        return source, ()
    kept = {*range(count), *range(begin, begin + (config.integer(*PREDICTIONS) or 0))}
    left = [name for name in source.tensors if (layer := layer_of(name)) is not None and layer not in kept]
    if not left:
        return source, ()
    tensors = {name: found for name, found in source.tensors.items() if name not in set(left)}
    told = f"{len(left)} tensors of further layers are left out, as --num_layers or --num_nextn_predict_layers say"
    return replace(source, tensors=tensors), (told,)
