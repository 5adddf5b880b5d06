"""Qwen3: norms of query and key. MindSpore Transformers has it under mcore names only."""

from mindformers_ckpt.convert.model import Model
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.rules import rename

_NOTE = "the bias of the attention's output (linear_proj.bias) has no place in MindFormers' network of Qwen3: left out"
ATTENTION = decoder.without(decoder.MCORE_ATTENTION, "output_bias", _NOTE)
QK_NORMS = [
    rename("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", "dim"),
    rename("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", "dim"),
]

MODEL = Model(
    name="qwen3",
    model_types=("qwen3",),
    tables={
        "mcore": (
            *decoder.MCORE_START,
            *decoder.layers([*ATTENTION, *QK_NORMS, *decoder.MCORE_FFN], decoder.MCORE_LAYER),
            *decoder.MCORE_END,
        )
    },
    facts=decoder.facts,
    options=decoder.FUSED_OPTIONS,
)
