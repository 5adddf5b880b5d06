"""Mixtral: every layer has experts, stacked by number on the MindSpore side.

For grouped multiplication MindSpore has two networks, with an option each:

- `use_gmm`: that for inference, where every expert's matrices are turned;
- `use_gmm_training`: that of a training yaml with `use_gmm: True`. Gate and up are turned and in one tensor, and some
  names are others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.rules import Entry, join, rename


def facts(config: ModelConfig) -> Facts:
    """Those of a decoder, and how the experts lie."""
    found = decoder.facts(config)
    flags = {"turned"} if config.flag("use_gmm") else set()
    if config.flag("use_gmm_training"):
        flags = {"training"}
    return replace(found, flags=found.flags | flags)


def told(names: Collection[str], chosen: Collection[str]) -> Mapping[str, bool | None]:
    """A training yaml says `use_gmm` too: only names tell the two networks apart."""
    if any(name.endswith((".feed_forward.ffn.w1", ".routed_experts.ffn.w1")) for name in names):
        return {"use_gmm_training": True, "use_gmm": None}
    return {}


_GATE = "block_sparse_moe.gate.weight"
# w1 is the gate, w3 the up projection, [ffn, hidden]; w2 the down projection, [hidden, ffn].
EXPERTS = [
    join(
        f"feed_forward.ffn.{name}.weight",
        f"expert {' '.join(reversed(axes.split())) if turned else axes}",
        (f"block_sparse_moe.experts.{{expert}}.{name}.weight", 1, axes),
        when="turned !training" if turned else "!turned !training",
    )
    for name, axes in (("w1", "ffn hidden"), ("w2", "hidden ffn"), ("w3", "ffn hidden"))
    for turned in (False, True)
]
_EXPERT = "block_sparse_moe.experts.{expert}."
TRAINING: list[Entry] = [
    rename(_GATE, "feed_forward.router_dense.weight", "expert hidden", when="training"),
    join(
        "feed_forward.ffn.w1",
        "expert hidden (part ffn)",
        (f"{_EXPERT}w1.weight", 1, "ffn hidden"),
        (f"{_EXPERT}w3.weight", 1, "ffn hidden"),
        when="training",
    ),
    join("feed_forward.ffn.w2", "expert ffn hidden", (f"{_EXPERT}w2.weight", 1, "hidden ffn"), when="training"),
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
                    rename(_GATE, "feed_forward.router.dense.weight", "expert hidden", when="!training"),
                    *EXPERTS,
                    *TRAINING,
                    *decoder.ATTENTION_LORA,
                    *decoder.BUFFERS,
                ]
            ),
            *decoder.LEGACY_END,
        )
    },
    facts=facts,
    canonical={"ms": decoder.canonical_ms},
    options=("use_gmm", "use_gmm_training"),
    told=told,
)
