"""Every family under every naming: the settings of its network, and the options of `convert` that go with them."""

from __future__ import annotations

from typing import Any

import built_networks as of
from tiny_models import MODELS, SEQUENCE

SINGLE = "float32"
# What the yaml of a training adds to config.json.
COMMON: of.Values = {
    "seq_length": SEQUENCE,
    "compute_dtype": SINGLE,
    "layernorm_compute_dtype": SINGLE,
    "softmax_compute_dtype": SINGLE,
    "rotary_dtype": SINGLE,
    "params_dtype": SINGLE,
    "rope_theta": 10000.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "use_flash_attention": True,
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "hidden_act": "silu",
}
ROUTED: of.Values = {
    **COMMON,
    "router_dense_type": SINGLE,
    "moe_grouped_gemm": True,
    "use_pad_tokens": False,
    "moe_token_dispatcher_type": "alltoall",
}
# The router of Qwen: softmax.
PLAIN: of.Values = {**ROUTED, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
# The router of DeepSeek-V3 and GLM-4.5: sigmoid, and a bias for the choice of experts.
BIASED: of.Values = {
    **ROUTED,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
LATENT: of.Values = {**BIASED, "qk_layernorm": True, "multi_latent_attention": True, "rotary_scaling_factor": 1.0}
V2: of.Values = {
    **LATENT,
    "norm_topk_prob": False,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
}
SPARSE: of.Values = {
    **LATENT,
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 64,
    "dsa_indexer_head_dim": 128,
    "dsa_indexer_topk": 4,
    "dsa_indexer_use_sparse_loss": True,
}
# Sizes of heads under MindFormers' own names: the network of TeleChat3 does not take them from those of config.json.
HEADS = {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8}
LEGACY: of.Values = {
    "seq_length": SEQUENCE,
    "compute_dtype": SINGLE,
    "layernorm_compute_type": SINGLE,
    "softmax_compute_type": SINGLE,
    "rotary_dtype": SINGLE,
    "param_init_type": SINGLE,
    "use_flash_attention": False,
    "fused_rms_norm": False,
}
MOE = {
    "expert_num": 4,
    "num_experts_chosen": 2,
    "routing_policy": "TopkRouterV2",
    "enable_sdrop": False,
    "capacity_factor": -1.0,
    "norm_topk_prob": True,
}
GMM = {**MOE, "use_gmm": True}
SHARED = {**MOE, "norm_topk_prob": False, "shared_expert_num": 2, "use_shared_expert_gating": True}
QWEN2_MOE = {**LEGACY, "qkv_has_bias": True, "intermediate_size": 24}
ONE_GROUP = {"n_group": None, "topk_group": None}  # of experts: the same as 1, and less to stand in for
GPT = {**COMMON, "normalization": "RMSNorm"}
QWEN2 = {"add_qkv_bias": True}
GLM: of.Values = {
    **BIASED,
    **GPT,
    "rotary_percent": 0.5,
}
GLM4: of.Values = {
    "seq_length": SEQUENCE,
    "num_layers": 2,
    "padded_vocab_size": 96,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "multi_query_group_num": 2,
    "layernorm_epsilon": 1e-6,
    "compute_dtype": SINGLE,
    "layernorm_compute_type": SINGLE,
    "param_init_type": SINGLE,
    "rotary_dtype": SINGLE,
    "post_self_attn_layernorm": True,
    "post_mlp_layernorm": True,
    "use_flash_attention": True,
}
PYNATIVE, TRAINING = {"naming": "mcore", "pynative": True}, {"use_gmm_training": True}
CONCAT, SEPARATE = {"mla_qkv_concat": True}, {"mla_qkv_concat": False}
FUSED = {"use_contiguous_weight_layout_attention": True, "use_interleaved_weight_layout_mlp": False}


def _latent(family: str, model: str, build: of.Build, yaml: of.Values, **more: Any) -> list[of.Case]:
    """The two networks of graph mode."""
    return [
        of.Case(family, model, naming, build, {**yaml, **setting}, {"naming": "mcore", **setting}, **more)
        for naming, setting in (("mcore, separate", SEPARATE), ("mcore, concatenated", CONCAT))
    ]


CASES: list[of.Case] = [
    of.Case("Qwen3", "qwen3", "mcore", of.QWEN3, COMMON),
    of.Case("Qwen3", "qwen3", "mcore, contiguous, halves", of.QWEN3, {**COMMON, **FUSED}, FUSED),
    of.Case("Qwen3", "qwen3", "PyNative", of.QWEN3_PYNATIVE, COMMON, since="2.0"),
    of.Case("Qwen3 with experts", "qwen3_moe", "mcore", of.QWEN3_MOE, PLAIN),
    *_latent("DeepSeek-V3", "deepseek_v3", of.DEEPSEEK, LATENT),
    *_latent("Moonlight", "moonlight", of.DEEPSEEK, LATENT),
    *_latent("DeepSeek-V2", "deepseek_v2", of.DEEPSEEK, V2),
    *_latent("DeepSeek-V3.2", "deepseek_v32", of.DEEPSEEK, SPARSE, since="1.9"),
    *(
        of.Case(family, model, "PyNative", of.DEEPSEEK_PYNATIVE, {**yaml, **ONE_GROUP}, PYNATIVE, since="2.0")
        for family, model, yaml in (
            ("DeepSeek-V3", "deepseek_v3", LATENT),
            ("Moonlight", "moonlight", LATENT),
            ("DeepSeek-V2", "deepseek_v2", V2),
            ("DeepSeek-V3.2", "deepseek_v32", SPARSE),
        )
    ),
    of.Case("TeleChat3", "llama", "mcore", of.TELECHAT3, {**COMMON, "head_dim": 8}, since="1.9", as_model="telechat3"),
    *_latent(
        "TeleChat3 with experts",
        "deepseek_v3",
        of.TELECHAT3_MOE,
        {**LATENT, **HEADS},
        since="1.9",
        as_model="telechat3_moe",
    ),
    *(
        of.Case(family, model, naming, of.gpt_model, {**GPT, **yaml, **setting}, {"naming": "mcore", **setting})
        for family, model, yaml in (
            ("Llama", "llama", {}),
            ("Mistral", "mistral", {}),
            ("Qwen2", "qwen2", QWEN2),
            ("Qwen2.5-VL, text", "qwen2_5_vl", QWEN2),
        )
        for naming, setting in (("mcore", {}), ("mcore, contiguous, halves", FUSED))
    ),
    of.Case("GLM-4.5", "glm4_moe", "mcore", of.gpt_model, GLM),
    *(
        of.Case(family, model, naming, of.legacy_llama, {**LEGACY, **yaml, **setting}, setting)
        for family, model, yaml in (
            ("Llama", "llama", {}),
            ("Llama, tied", "llama_tied", {}),
            ("Mistral", "mistral", {}),
            ("Qwen2", "qwen2", {"qkv_has_bias": True}),
            ("Qwen2.5-VL, text", "qwen2_5_vl", {"qkv_has_bias": True}),
        )
        for naming, setting in (("legacy", {}), ("legacy, qkv_concat", {"qkv_concat": True}))
    ),
    of.Case("Mixtral", "mixtral", "legacy", of.legacy_llama, {**LEGACY, "moe_config": MOE}),
    of.Case("Mixtral", "mixtral", "legacy, use_gmm", of.legacy_llama, {**LEGACY, "moe_config": GMM}, TRAINING),
    of.Case("Qwen2 with experts", "qwen2_moe", "legacy", of.legacy_llama, {**QWEN2_MOE, "moe_config": SHARED}),
    of.Case(
        "Qwen2 with experts",
        "qwen2_moe",
        "legacy, use_gmm",
        of.legacy_llama,
        {**QWEN2_MOE, "moe_config": {**SHARED, "use_gmm": True}},
        TRAINING,
    ),
    *(
        of.Case("GLM4", "glm4", naming, of.legacy_glm, {**GLM4, **setting}, setting)
        for naming, setting in (
            ("legacy", {}),
            ("legacy, apart", {"qkv_concat": False, "mlp_concat": False}),
            ("legacy, rearranged", {"use_rearrange_rope": True}),
        )
    ),
]


def values_of(case: of.Case) -> of.Values:
    """What the network is built with."""
    values = {**of.text_values(case.model), **case.yaml}
    if "n_routed_experts" in values:
        values["num_nextn_predict_layers"] = MODELS[case.model][2]
    for name in ("rope_parameters", "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "topk_method"):
        values.pop(name, None)
    return values
