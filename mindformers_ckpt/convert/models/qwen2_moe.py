"""Qwen2 with experts (Qwen1.5-MoE, Qwen2-57B-A14B): routed ones, stacked by number, and a shared one behind a gate.

For grouped multiplication it has the two networks of Mixtral: that for inference (`use_gmm`), where every expert's
matrices are turned, and that of a training yaml with `use_gmm: True` (`use_gmm_training`).
"""

from __future__ import annotations

from dataclasses import replace

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models import decoder, deepseek, mixtral, qwen3_moe
from mindformers_ckpt.convert.rules import Entry, join, rename


def facts(config: ModelConfig) -> Facts:
    """Those of Qwen3 with experts; query, key and value have biases whatever config.json says."""
    found = qwen3_moe.facts(config)
    flags = found.flags - {"output_bias"} | {"bias"} | ({"turned"} if config.flag("use_gmm") else set())
    if config.flag("use_gmm_training"):
        flags = flags - {"turned"} | {"training"}
    sizes = {**found.sizes, "shared_ffn": config.integer("shared_expert_intermediate_size"), "gate": 1}
    return replace(found, sizes=sizes, flags=flags)


# (Hugging Face, MindSpore, axes of the matrix, with those of the inside to fill in)
_PROJECTIONS = (("gate_proj", "w1", "{} hidden"), ("down_proj", "w2", "hidden {}"), ("up_proj", "w3", "{} hidden"))
EXPERTS: list[Entry] = [
    join(
        f"feed_forward.routed_experts.ffn.{ms}.weight",
        f"expert {' '.join(reversed(axes.split())) if turned else axes}",
        (f"mlp.experts.{{expert}}.{hf}.weight", 1, axes),
        when="turned !training" if turned else "!turned !training",
    )
    for hf, ms, axes in ((hf, ms, axes.format("expert_ffn")) for hf, ms, axes in _PROJECTIONS)
    for turned in (False, True)
]
SHARED: list[Entry] = [
    *(
        rename(f"mlp.shared_expert.{hf}.weight", f"feed_forward.shared_experts.{ms}.weight", axes.format("shared_ffn"))
        for hf, ms, axes in _PROJECTIONS
    ),
    rename("mlp.shared_expert_gate.weight", "feed_forward.shared_experts_gate.weight", "gate hidden"),
]
_ROUTED = "feed_forward.routed_experts."
TRAINING: list[Entry] = [
    rename("mlp.gate.weight", f"{_ROUTED}router.dense.weight", "expert hidden", when="!training"),
    rename("mlp.gate.weight", f"{_ROUTED}router_dense.weight", "expert hidden", when="training"),
    *deepseek.stacked_experts(f"{_ROUTED}ffn.w1", f"{_ROUTED}ffn.w2", "training"),
]

MODEL = Model(
    name="qwen2_moe",
    aliases=("qwen1_5_moe",),
    model_types=("qwen2_moe",),
    tables={
        "legacy": (
            *decoder.LEGACY_START,
            *decoder.layers([*decoder.LEGACY_NORMS, *decoder.LEGACY_QKV, *decoder.LEGACY_OUTPUT]),
            *decoder.layers(decoder.LEGACY_FFN, over="dense"),
            *decoder.layers([*EXPERTS, *TRAINING, *SHARED], over="sparse"),
            *decoder.LEGACY_END,
        )
    },
    facts=facts,
    options=("use_gmm", "use_gmm_training"),
    told=mixtral.told,
)
