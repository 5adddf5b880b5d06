"""Llama 2, 3 and 3.1."""

from mindformers_ckpt.convert.model import Model
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.rules import Drop

MODEL = Model(
    name="llama",
    aliases=("llama2", "llama3", "llama3_1", "llama3_2"),
    model_types=("llama",),
    tables={
        "legacy": (*decoder.LEGACY, Drop("rope.freqs")),
        "mcore": decoder.MCORE,
        "legacy+qkv_concat": decoder.LEGACY_CONCAT,
    },
    facts=decoder.facts,
    options=decoder.FUSED_OPTIONS,
    canonical={"ms": decoder.canonical_ms},
)
