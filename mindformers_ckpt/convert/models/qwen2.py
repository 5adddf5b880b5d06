"""Qwen2 and Qwen2.5: Llama with biases of query, key and value."""

from dataclasses import replace

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models import decoder


def facts(config: ModelConfig) -> Facts:
    """Those of a Llama; the biases are there whatever config.json says."""
    found = decoder.facts(config)
    return replace(found, flags=found.flags - {"output_bias"} | {"bias"})


MODEL = Model(
    name="qwen",
    aliases=("qwen2", "qwen2_5"),
    model_types=("qwen2",),
    tables={
        "legacy": decoder.LEGACY,
        "mcore": decoder.MCORE,
        "legacy+qkv_concat": decoder.LEGACY_CONCAT,
    },
    facts=facts,
    options=decoder.FUSED_OPTIONS,
    canonical={"ms": decoder.canonical_ms},
)
