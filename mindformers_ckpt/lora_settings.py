"""The adapter_config.json of a PEFT adapter: its scaling, and the settings by which it cannot be merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import ConfigError, raise_problems
from mindformers_ckpt.lora_scaling import Scaling, number_fault, rank_fault
from mindformers_ckpt.text_files import read_json_object

# Settings by which the merged weight is not W + scaling · B · A over the weights of the original model.
_REFUSED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "weights that are stored transposed",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "rows of an embedding that were trained",
    "modules_to_save": "modules that were trained as a whole",
    "lora_bias": "biases in the factors",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_settings(path: Path) -> Scaling:
    """The scaling that an adapter_config.json tells.

    Raises ConfigError that lists all settings by which the adapter cannot be merged: DoRA, transposed weights, starting
    values that are taken out of the base weights, numbers that cannot be, and others.
    """
    values = read_json_object(path, ConfigError, infinite=True)  # numbers are checked one by one, by name
    problems = [*_unsupported(values), *_unfit_numbers(values)]
    raise_problems(ConfigError, f"{path}: the adapter cannot be merged", problems)
    return Scaling(
        alpha=values.get("lora_alpha"),
        rank=values.get("r"),
        rank_stabilised=bool(values.get("use_rslora")),
        alphas=values.get("alpha_pattern") or {},
        ranks=values.get("rank_pattern") or {},
        origin=str(path),
    )


def _unsupported(values: Mapping[str, Any]) -> Iterator[str]:
    kind, start = values.get("peft_type", "LORA"), values.get("init_lora_weights")
    if kind != "LORA":
        yield f"peft_type {kind!r} is not supported; merge it with PEFT"
    for name, meaning in _REFUSED.items():
        if values.get(name):
            yield f"{name} ({meaning}) is not supported; merge it with PEFT"
    if (values.get("bias") or "none") != "none":
        yield f"bias {values['bias']!r} (biases were trained) is not supported; merge it with PEFT"
    if not any(start is plain or (isinstance(plain, str) and start == plain) for plain in _PLAIN_STARTS):
        yield (
            f"init_lora_weights {start!r} changes the base weights, so the adapter does not belong to those of the "
            "original model; save it with path_initial_model_for_weight_conversion"
        )


def _unfit_numbers(values: Mapping[str, Any]) -> Iterator[str]:
    for name, fault_of in (("lora_alpha", number_fault), ("r", rank_fault)):
        fault = fault_of(values[name]) if values.get(name) is not None else None
        if fault is not None:
            yield f"{name} {fault}"
    for name, fault_of in (("alpha_pattern", number_fault), ("rank_pattern", rank_fault)):
        patterns = values.get(name) or {}
        if not isinstance(patterns, dict):
            yield f"{name} is {str(patterns)[:60]!r}; an object of patterns and numbers is expected"
            continue
        for pattern, value in patterns.items():
            fault = fault_of(value)
            if fault is not None:
                yield f"{name}: {pattern!r} {fault}"
    if not isinstance(values.get("use_rslora", False), (bool, type(None))):
        yield f"use_rslora is {values['use_rslora']!r}; true or false is expected"
