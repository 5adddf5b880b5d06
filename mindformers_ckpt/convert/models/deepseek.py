"""DeepSeek-V3, R1, V2 and Kimi-K2: latent attention, routed and shared experts, prediction (MTP) layers.

The legacy names are those of the first training network with grouped multiplication, which keeps the rotary
part of a head as two halves where Hugging Face keeps pairs. The mcore networks keep the pairs. There are three:

- projections as in Hugging Face (`mla_qkv_concat: False` in the yaml);
- the first projections of query and of key and value in one tensor (`mla_qkv_concat: True`);
- the same in PyNative mode, with experts in three dimensions and the router's bias beside the router.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mindformers_ckpt.convert import depth
from mindformers_ckpt.convert.config import ModelConfig, product, total
from mindformers_ckpt.convert.model import Facts, Model, Runs
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.rules import Copy, Entry, join, prefixed, rename, split
from mindformers_ckpt.errors import ConfigError

CONCAT = "mla_qkv_concat"
_HF_MTP = "model.layers.{m}."


def facts(config: ModelConfig) -> Facts:
    """Sizes of latent attention, and which layers are dense, sparse or MTP; MTP layers follow the others."""
    rope, nope = config.integer("qk_rope_head_dim"), config.integer("qk_nope_head_dim")
    latent, value = config.integer("kv_lora_rank"), config.integer("v_head_dim")
    hidden, expert_ffn = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    head, query_dim = config.integer("num_attention_heads"), total(nope, rope)
    return Facts(
        {
            "head": head,
            "pair": 2,
            "rope_pairs": config.quotient(rope, 2, "qk_rope_head_dim"),
            "nope_pairs": config.quotient(nope, 2, "qk_nope_head_dim"),
            "latent_pairs": config.quotient(latent, 2, "kv_lora_rank"),
            "nope": nope,
            "value": value,
            "latent": latent,
            "query_rank": config.integer("q_lora_rank"),
            "query_dim": query_dim,
            "query_rows": product(head, query_dim),
            "latent_rope": total(latent, rope),
            "nope_value": total(nope, value),
            "vocab": config.integer("vocab_size"),
            "hidden": hidden,
            "half": hidden,  # of the columns of a prediction layer's projection
            "twice_hidden": product(2, hidden),
            "ffn": config.integer("intermediate_size"),
            "expert_ffn": expert_ffn,
            "shared_ffn": product(config.integer("n_shared_experts"), expert_ffn),
            "expert": config.integer("n_routed_experts"),
        },
        runs(config),
        frozenset(_flags(config)),
    )


def runs(config: ModelConfig) -> Runs:
    """The numbers of all layers, of dense and sparse ones, and of prediction layers on both sides."""
    dense = config.integer("first_k_dense_replace") or 0
    experts = config.integer("n_routed_experts")
    layers = decoder.layer_run(config)["layer"]
    first = config.integer(depth.FIRST_PREDICTION)
    theirs = len(layers) if first is None else first
    predictions = range(config.integer(*depth.PREDICTIONS) or 0)
    return {
        "layer": layers,
        "dense": layers[:dense] if experts else layers,
        "sparse": layers[dense:] if experts else [],
        "mtp": [{"i": i, "m": theirs + i, "k": len(layers) + i} for i in predictions],
    }


def _flags(config: ModelConfig) -> set[str]:
    """Which of the model's tensors there are, and which of the mcore networks it is."""
    flags = {"tied"} if config.flag("tie_word_embeddings") else set()
    if config.integer("q_lora_rank"):
        flags.add("q_lora")
    if config.integer("n_shared_experts"):
        flags.add("shared")
    # DeepSeek-V2 chooses its experts without a bias.
    if config.text("topk_method") in ("", "noaux_tc") and config.text("model_type") != "deepseek_v2":
        flags.add("router_bias")
    flags |= decoder.layout_flags(config) - {"contiguous"}  # latent attention has no such rows
    if config.flag("pynative"):
        if "halves" in flags or config.values.get(CONCAT) is False:
            raise ConfigError(
                f"the PyNative network has its first projections in one tensor, and gate and up row by row in turn: "
                f"{CONCAT} False and use_interleaved_weight_layout_mlp False do not go with pynative"
            )
        flags |= {"pynative", "concat"}
    return flags | ({"concat"} if config.flag(CONCAT) else set())


def told(names: Collection[str], chosen: Collection[str]) -> Mapping[str, bool | None]:
    """Every one of the mcore networks has names that the others lack; PyNative's only where the router has a bias."""
    if "pynative" in chosen:
        return {}
    if any(name.endswith(".mlp.expert_bias") for name in names):
        return {"pynative": True}
    if any(name.endswith(".self_attention.linear_qkv.weight") for name in names):
        return {CONCAT: True}
    if any(name.endswith(".self_attention.linear_kv_down_proj.weight") for name in names):
        return {CONCAT: False}
    return {}


def unfit(naming: str, facts: Facts) -> str | None:
    """The legacy networks for training always compress the query."""
    if naming != "legacy" or "q_lora" in facts.flags:
        return None
    return (
        "config.json has no q_lora_rank: no network with legacy names trains such a model, since all of them compress "
        "the query; take mcore names (--naming mcore, --to mcore)"
    )


def _mtp(hf: str, ms: str, axes: str = "hidden") -> Entry:
    return rename(_HF_MTP + hf, ms, axes, over="mtp", optional="mtp")


def _mtp_copies() -> list[Entry]:
    """An MTP layer of a Hugging Face file repeats the embedding and the output layer; MindSpore shares them."""
    return [
        Copy({"hf": _HF_MTP + hf}, {"hf": of}, over="mtp", optional="mtp", always=True)
        for hf, of in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", "lm_head.weight"),
        )
    ]


LEGACY_ATTENTION: list[Entry] = [
    rename("input_layernorm.weight", "attention_norm.weight", "hidden", precise=True),
    rename("self_attn.q_proj.weight", "attention.q_proj.weight", "(head query_dim) hidden", when="!q_lora"),
    rename("self_attn.q_a_proj.weight", "attention.q2l_proj.weight", "query_rank hidden", when="q_lora"),
    rename("self_attn.q_a_layernorm.weight", "attention.lq_norm.weight", "query_rank", when="q_lora", precise=True),
    split(
        "self_attn.q_b_proj.weight",
        "(head part pair) query_rank",
        ("attention.l2q_nope_proj.weight", "nope_pairs"),
        ("attention.l2q_pe_proj.weight", "rope_pairs", "(head pair part) query_rank"),
        when="q_lora",
    ),
    split(
        "self_attn.kv_a_proj_with_mqa.weight",
        "(part pair) hidden",
        ("attention.kv2l_latent_kv.weight", "latent_pairs"),
        ("attention.kv2l_k_pe.weight", "rope_pairs", "(pair part) hidden"),
    ),
    rename("self_attn.kv_a_layernorm.weight", "attention.lkv_norm.weight", "latent", precise=True),
    split(
        "self_attn.kv_b_proj.weight",
        "(head part) latent",
        ("attention.lkv2kv_k_nope.weight", "nope"),
        ("attention.lkv2kv_v.weight", "value"),
    ),
    rename("self_attn.o_proj.weight", "attention.wo.weight", "hidden (head value)"),
    rename("post_attention_layernorm.weight", "ffn_norm.weight", "hidden", precise=True),
]


def _legacy_ffn(hf: str, ms: str, ffn: str, when: str = "") -> list[Entry]:
    return [
        rename(f"{hf}.{name}_proj.weight", f"{ms}.{number}.weight", axes, when=when)
        for name, number, axes in (
            ("gate", "w1", f"{ffn} hidden"),
            ("down", "w2", f"hidden {ffn}"),
            ("up", "w3", f"{ffn} hidden"),
        )
    ]


def stacked_experts(gate_up: str, down: str, when: str = "") -> list[Entry]:
    """The experts in two tensors of three dimensions, turned; gate and up are halves of the columns."""
    return [
        join(
            gate_up,
            "expert hidden (part expert_ffn)",
            ("mlp.experts.{expert}.gate_proj.weight", 1, "expert_ffn hidden"),
            ("mlp.experts.{expert}.up_proj.weight", 1, "expert_ffn hidden"),
            when=when,
        ),
        join(
            down,
            "expert expert_ffn hidden",
            ("mlp.experts.{expert}.down_proj.weight", 1, "hidden expert_ffn"),
            when=when,
        ),
    ]


LEGACY_DENSE = _legacy_ffn("mlp", "feed_forward", "ffn")
LEGACY_SPARSE: list[Entry] = [
    rename("mlp.gate.weight", "feed_forward.routed_experts.router_dense.weight", "expert hidden", precise=True),
    rename(
        "mlp.gate.e_score_correction_bias",
        "feed_forward.routed_experts.topk_bias",
        "expert",
        precise=True,
        when="router_bias",
    ),
    *_legacy_ffn("mlp.shared_experts", "feed_forward.shared_experts", "shared_ffn", "shared"),
    *stacked_experts("feed_forward.routed_experts.ffn.w1", "feed_forward.routed_experts.ffn.w2"),
]

LEGACY: tuple[Entry, ...] = (
    *decoder.LEGACY_START,
    *decoder.layers(LEGACY_ATTENTION),
    *decoder.layers(LEGACY_DENSE, over="dense"),
    *decoder.layers(LEGACY_SPARSE, over="sparse"),
    _mtp("enorm.weight", "model.mtp_hidden_fusers.{i}.norm_emb.weight"),
    _mtp("hnorm.weight", "model.mtp_hidden_fusers.{i}.norm.weight"),
    # Hugging Face multiplies [embedding; hidden state], this network [hidden state; embedding].
    join(
        "model.mtp_hidden_fusers.{i}.dense.weight",
        "hidden (part half)",
        *((_HF_MTP + "eh_proj.weight", 1),) * 2,
        over="mtp",
        optional="mtp",
        backwards=True,
    ),
    *prefixed([*LEGACY_ATTENTION, *LEGACY_SPARSE], _HF_MTP, "model.layers.{k}.", over="mtp", optional="mtp"),
    _mtp("shared_head.norm.weight", "model.mtp_norms.{i}.weight"),
    *_mtp_copies(),
    *decoder.LEGACY_END,
)

_Q, _Q_A, _KV_A = "self_attn.q_proj.weight", "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"
_SEPARATE: list[Entry] = [
    rename(_Q, "self_attention.linear_q_proj.weight", "(head query_dim) hidden", when="!concat !q_lora"),
    rename(_Q_A, "self_attention.linear_q_down_proj.weight", "query_rank hidden", when="!concat q_lora"),
    rename(_KV_A, "self_attention.linear_kv_down_proj.weight", "latent_rope hidden", when="!concat"),
]
_CONCATENATED: list[Entry] = [
    join(
        "self_attention.linear_qkv.weight",
        "part hidden",
        (query, rows),
        (_KV_A, "latent_rope"),
        when=f"concat {flag}",
    )
    for query, rows, flag in ((_Q_A, "query_rank", "q_lora"), (_Q, "query_rows", "!q_lora"))
]
# (Hugging Face, separate, concatenated, axes, flag)
_LATENT = (
    ("q_a_layernorm", "q_layernorm", "q_layernorm", "query_rank", "q_lora"),
    ("q_b_proj", "linear_q_up_proj", "linear_qb", "(head query_dim) query_rank", "q_lora"),
    ("kv_a_layernorm", "kv_layernorm", "k_layernorm", "latent", ""),
    ("kv_b_proj", "linear_kv_up_proj", "linear_kvb", "(head nope_value) latent", ""),
)
MCORE_ATTENTION: list[Entry] = [
    rename("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    *_SEPARATE,
    *_CONCATENATED,
    *(
        rename(f"self_attn.{hf}.weight", f"self_attention.{ms}.weight", axes, when=f"{concat} {flag}".strip())
        for hf, separate, concatenated, axes, flag in _LATENT
        for ms, concat in ((separate, "!concat"), (concatenated, "concat"))
    ),
    rename("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "hidden (head value)"),
    rename("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "hidden"),
]
_BIAS = "mlp.gate.e_score_correction_bias"
MCORE_SPARSE: list[Entry] = [
    rename("mlp.gate.weight", "mlp.router.weight", "expert hidden"),
    rename(_BIAS, "mlp.router.expert_bias", "expert", precise=True, when="router_bias !pynative"),
    rename(_BIAS, "mlp.expert_bias", "expert", precise=True, when="router_bias pynative"),
    *(
        entry._replace(when=f"shared {entry.when}".strip())
        for entry in (
            *decoder.gate_up_by_row("mlp.shared_experts.linear_fc1", "mlp.shared_experts.", "shared_ffn")[:2],
            rename("mlp.shared_experts.down_proj.weight", "mlp.shared_experts.linear_fc2.weight", "hidden shared_ffn"),
        )
    ),
    *(entry._replace(when="!pynative") for entry in decoder.MCORE_EXPERTS),
    *stacked_experts("mlp.experts.weight1", "mlp.experts.weight2", "pynative"),
]


def mcore(attention: Sequence[Entry]) -> tuple[Entry, ...]:
    """The table of a model with this attention: dense and sparse layers, and prediction layers, which are sparse."""
    return (
        *decoder.MCORE_START,
        *decoder.layers(attention, decoder.MCORE_LAYER),
        *decoder.layers(decoder.MCORE_FFN, decoder.MCORE_LAYER, over="dense"),
        *decoder.layers(MCORE_SPARSE, decoder.MCORE_LAYER, over="sparse"),
        _mtp("enorm.weight", "mtp.layers.{i}.enorm.weight"),
        _mtp("hnorm.weight", "mtp.layers.{i}.hnorm.weight"),
        _mtp("eh_proj.weight", "mtp.layers.{i}.eh_proj.weight", "hidden twice_hidden"),
        *prefixed(
            [*attention, *MCORE_SPARSE], _HF_MTP, "mtp.layers.{i}.transformer_layer.", over="mtp", optional="mtp"
        ),
        _mtp("shared_head.norm.weight", "mtp.layers.{i}.final_layernorm.weight"),
        *_mtp_copies(),
        *decoder.MCORE_END,
    )


MCORE = mcore(MCORE_ATTENTION)

MODEL = Model(
    name="deepseek",
    aliases=(
        *("deepseekv3", "deepseek_v3", "deepseek3", "deepseek_r1"),
        *("deepseek_v2", "deepseekv2", "kimi_k2", "kimi", "moonlight"),
    ),
    model_types=("deepseek_v3", "deepseek_v2", "kimi_k2"),
    tables={"legacy": LEGACY, "mcore": MCORE},
    facts=facts,
    options=("use_interleaved_weight_layout_mlp", CONCAT, "pynative"),
    told=told,
    unfit=unfit,
)
