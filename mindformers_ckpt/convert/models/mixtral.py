"""Mixtral: every layer has experts, stacked by number on the MindSpore side.

`use_gmm`, an option here as of MindSpore's network, has every expert's matrices turned, for grouped multiplication.
"""

from dataclasses import replace

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.rules import join, rename


def facts(config: ModelConfig) -> Facts:
    """Those of a decoder, and whether the experts are turned."""
    found = decoder.facts(config)
    return replace(found, flags=found.flags | {"gmm"}) if config.flag("use_gmm") else found


# w1 is the gate, w3 the up projection, [ffn, hidden]; w2 the down projection, [hidden, ffn].
EXPERTS = [
    join(
        f"feed_forward.ffn.{name}.weight",
        f"expert {' '.join(reversed(axes.split())) if turned else axes}",
        (f"block_sparse_moe.experts.{{expert}}.{name}.weight", 1, axes),
        when="gmm" if turned else "!gmm",
    )
    for name, axes in (("w1", "ffn hidden"), ("w2", "hidden ffn"), ("w3", "ffn hidden"))
    for turned in (False, True)
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
    facts=facts,
    canonical={"ms": decoder.canonical_ms},
    options=("use_gmm",),
)
