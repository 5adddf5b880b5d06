"""GLM-4.5: attention as in Qwen3, experts and prediction layers as in DeepSeek-V3. Under mcore names only."""

from __future__ import annotations

from mindformers_ckpt.convert.config import ModelConfig, product
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models import decoder, deepseek, qwen3
from mindformers_ckpt.convert.rules import Rule


def facts(config: ModelConfig) -> Facts:
    """Those of a decoder, with the experts and prediction layers of DeepSeek; its router always has a bias."""
    found = decoder.facts(config)
    hidden, expert_ffn = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    sizes = {
        **found.sizes,
        "expert": config.integer("n_routed_experts"),
        "shared_ffn": product(config.integer("n_shared_experts"), expert_ffn),
        "twice_hidden": product(2, hidden),
    }
    flags = {"router_bias"}
    flags |= {"shared"} if config.integer("n_shared_experts") else set()
    flags |= {"qk_norms"} if config.flag("use_qk_norm") else set()
    return Facts(sizes, deepseek.runs(config), found.flags - {"output_bias"} | flags)


_NORMS = [rule._replace(when="qk_norms") for rule in qwen3.QK_NORMS if isinstance(rule, Rule)]

MODEL = Model(
    name="glm4_moe",
    aliases=("glm4_5", "glm4_6"),
    model_types=("glm4_moe",),
    tables={"mcore": deepseek.mcore([*decoder.MCORE_ATTENTION, *_NORMS])},
    facts=facts,
    options=decoder.FUSED_OPTIONS,
)
