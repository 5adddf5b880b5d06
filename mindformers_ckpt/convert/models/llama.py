"""Llama 2, 3 and 3.1."""

from mindformers_ckpt.convert.model import Model
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.rules import Drop

_NOTE = "the biases of the feed-forward layers (mlp_bias) have no place in MindFormers' network of Llama: left out"
_FLAG = "mlp_bias"

MODEL = Model(
    name="llama",
    aliases=("llama2", "llama3", "llama3_1", "llama3_2"),
    model_types=("llama",),
    tables={
        "legacy": (*decoder.without(decoder.LEGACY, _FLAG, _NOTE), Drop("rope.freqs")),
        "mcore": tuple(decoder.without(decoder.MCORE, _FLAG, _NOTE)),
        "legacy+qkv_concat": tuple(decoder.without(decoder.LEGACY_CONCAT, _FLAG, _NOTE)),
    },
    facts=decoder.facts,
    options=decoder.FUSED_OPTIONS,
    canonical={"ms": decoder.canonical_ms},
)
