"""Mixtral: every layer has experts, stacked by number on the MindSpore side."""

from mindformers_ckpt.convert.model import Model
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.rules import join, rename

# w1 is the gate, w3 the up projection, [ffn, hidden]; w2 the down projection, [hidden, ffn].
EXPERTS = [
    join(
        f"feed_forward.ffn.{name}.weight",
        f"expert {axes}",
        (f"block_sparse_moe.experts.{{expert}}.{name}.weight", 1, axes),
    )
    for name, axes in (("w1", "ffn hidden"), ("w2", "hidden ffn"), ("w3", "ffn hidden"))
]

MODEL = Model(
    name="mixtral",
    model_types=("mixtral",),
    tables={
        "legacy": (
            *decoder.LEGACY_START,
            *decoder.layers(
                [
                    *decoder.LEGACY_NORMS,
                    *decoder.LEGACY_QKV,
                    *decoder.LEGACY_OUTPUT,
                    rename("block_sparse_moe.gate.weight", "feed_forward.router.dense.weight"),
                    *EXPERTS,
                    *decoder.ATTENTION_LORA,
                    *decoder.BUFFERS,
                ]
            ),
            *decoder.LEGACY_END,
        )
    },
    facts=decoder.facts,
    canonical={"ms": decoder.canonical_ms},
)
