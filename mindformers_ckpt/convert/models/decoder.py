"""What the decoders of the Llama family have in common: their sizes, and the rules for a layer's inside.

Layers are written without their prefix, so that they serve wherever such a layer stands.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindformers_ckpt.convert.config import ModelConfig, quotient
from mindformers_ckpt.convert.model import Facts, Runs
from mindformers_ckpt.convert.rules import Copy, Drop, Entry, join, prefixed, rename

HF_LAYER = "model.layers.{n}."
LEGACY_LAYER = "model.layers.{n}."
MCORE_LAYER = "decoder.layers.{n}."


def layer_run(config: ModelConfig) -> Runs:
    """The captures of all layers."""
    count = config.integer("num_hidden_layers", "n_layer", "num_layers") or 0
    return {"layer": [{"n": number} for number in range(count)]}


def facts(config: ModelConfig) -> Facts:
    """Sizes and flags of a decoder whose config.json has the usual keys."""
    heads = config.integer("num_attention_heads")
    groups = config.integer("num_key_value_heads") or heads
    flags = {"tied"} if config.flag("tie_word_embeddings") else set()
    if config.flag("attention_bias"):
        flags |= {"bias", "output_bias"}
    if config.flag("mlp_bias"):
        flags.add("mlp_bias")
    return Facts(
        {
            "group": groups,
            "queries": quotient(heads, groups),
            "dim": config.integer("head_dim") or quotient(config.integer("hidden_size"), heads),
            "ffn": config.integer("intermediate_size"),
            "heads": heads,
            "expert": config.integer("num_local_experts", "num_experts"),
            "expert_ffn": config.integer("moe_intermediate_size"),
        },
        layer_run(config),
        frozenset(flags),
    )


def tied_head(hf_embedding: str, ms_embedding: str, hf: str, ms: str) -> list[Entry]:
    """The output layer: a tensor of its own, or a copy of the embedding where config.json ties them."""
    return [
        rename(hf, ms, when="!tied"),
        Copy({"hf": hf, "ms": ms}, {"hf": hf_embedding, "ms": ms_embedding}, when="tied"),
    ]


LEGACY_START = [rename("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight")]
LEGACY_END = [
    rename("model.norm.weight", "model.norm_out.weight"),
    *tied_head(
        "model.embed_tokens.weight", "model.tok_embeddings.embedding_weight", "lm_head.weight", "lm_head.weight"
    ),
]
MCORE_START = [rename("model.embed_tokens.weight", "embedding.word_embeddings.weight")]
MCORE_END = [
    rename("model.norm.weight", "decoder.final_layernorm.weight"),
    *tied_head(
        "model.embed_tokens.weight", "embedding.word_embeddings.weight", "lm_head.weight", "output_layer.weight"
    ),
]

LEGACY_NORMS = [
    rename("input_layernorm.weight", "attention_norm.weight"),
    rename("post_attention_layernorm.weight", "ffn_norm.weight"),
]
LEGACY_QKV: list[Entry] = [
    rename(f"self_attn.{hf}_proj.{kind}", f"attention.w{hf}.{kind}", when="" if kind == "weight" else "bias")
    for hf in "qkv"
    for kind in ("weight", "bias")
]
LEGACY_OUTPUT = [
    rename("self_attn.o_proj.weight", "attention.wo.weight"),
    rename("self_attn.o_proj.bias", "attention.wo.bias", when="output_bias"),
]
_FFN = (("gate", "w1"), ("down", "w2"), ("up", "w3"))
LEGACY_FFN: list[Entry] = [
    rename(f"mlp.{hf}_proj.{kind}", f"feed_forward.{ms}.{kind}", when="" if kind == "weight" else "mlp_bias")
    for hf, ms in _FFN
    for kind in ("weight", "bias")
]


def qkv_by_group(ms: str, bias: str = "bias") -> list[Entry]:
    """Query, key and value in one tensor: of every group of heads its queries, its key and its value."""
    spans: tuple[tuple[str, int | str], ...] = (("q", "queries"), ("k", 1), ("v", 1))
    return [
        join(
            f"{ms}.{kind}",
            "(group part dim)" + (" hidden" if kind == "weight" else ""),
            *((f"self_attn.{name}_proj.{kind}", span) for name, span in spans),
            when="" if kind == "weight" else bias,
        )
        for kind in ("weight", "bias")
    ]


def gate_up_by_row(ms: str, hf: str = "mlp.", ffn: str = "ffn") -> list[Entry]:
    """Gate and up in one matrix, their rows taking turns."""
    return [
        join(
            f"{ms}.{kind}",
            f"({ffn} part)" + rest,
            (f"{hf}gate_proj.{kind}", 1, ffn + rest),
            (f"{hf}up_proj.{kind}", 1, ffn + rest),
            when=when,
        )
        for kind, rest, when in (("weight", " hidden", ""), ("bias", "", "mlp_bias"))
    ]


def lora(pairs: Sequence[tuple[str, str]]) -> list[Entry]:
    """The adapters that a LoRA run adds to linear layers (Hugging Face name, MindSpore name)."""
    return [
        rename(f"{hf}.lora_{end.upper()}.weight", f"{ms}.tk_delta_lora_{end}", optional=f"adapter of {ms}")
        for hf, ms in pairs
        for end in "ab"
    ]


def canonical_ms(name: str) -> str:
    """The other spelling of adapters in MindSpore files."""
    return name.replace(".mindpet_delta_lora_", ".tk_delta_lora_")


ATTENTION_LORA = lora([(f"self_attn.{hf}_proj", f"attention.w{hf}") for hf in "qkvo"])
FFN_LORA = lora([(f"mlp.{hf}_proj", f"feed_forward.{ms}") for hf, ms in _FFN])
BUFFERS: list[Entry] = [Drop("self_attn.rotary_emb.inv_freq")]


def layers(entries: Sequence[Entry], ms: str = LEGACY_LAYER, over: str = "layer") -> list[Entry]:
    """The rules of a layer, for all layers."""
    return prefixed(entries, HF_LAYER, ms, over=over)


LEGACY_LAYERS = layers([*LEGACY_NORMS, *LEGACY_QKV, *LEGACY_OUTPUT, *LEGACY_FFN, *ATTENTION_LORA, *FFN_LORA, *BUFFERS])
LEGACY = (*LEGACY_START, *LEGACY_LAYERS, *LEGACY_END)

# "High performance" names of MindFormers 1.4 and later; files of 1.3 have the same names with plain [q; k; v].
LEGACY_CONCAT = (
    *LEGACY_START,
    *layers(
        [
            *LEGACY_NORMS,
            *qkv_by_group("attention.w_qkv"),
            *LEGACY_OUTPUT,
            *gate_up_by_row("feed_forward.w_gate_hidden"),
            rename("mlp.down_proj.weight", "feed_forward.w2.weight"),
            rename("mlp.down_proj.bias", "feed_forward.w2.bias", when="mlp_bias"),
            *BUFFERS,
        ]
    ),
    *LEGACY_END,
)

MCORE_ATTENTION: list[Entry] = [
    rename("input_layernorm.weight", "input_layernorm.weight"),
    *qkv_by_group("self_attention.linear_qkv"),
    rename("self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
    rename("self_attn.o_proj.bias", "self_attention.linear_proj.bias", when="output_bias"),
    rename("post_attention_layernorm.weight", "pre_mlp_layernorm.weight"),
]
MCORE_FFN: list[Entry] = [
    *gate_up_by_row("mlp.linear_fc1"),
    rename("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
    rename("mlp.down_proj.bias", "mlp.linear_fc2.bias", when="mlp_bias"),
]
# Experts in two matrices for grouped multiplication: rows (expert, hidden), columns first gate, then up.
MCORE_EXPERTS: list[Entry] = [
    join(
        "mlp.experts.weight1",
        "(expert hidden) (part expert_ffn)",
        ("mlp.experts.{expert}.gate_proj.weight", 1, "expert_ffn hidden"),
        ("mlp.experts.{expert}.up_proj.weight", 1, "expert_ffn hidden"),
    ),
    join(
        "mlp.experts.weight2",
        "(expert expert_ffn) hidden",
        ("mlp.experts.{expert}.down_proj.weight", 1, "hidden expert_ffn"),
    ),
]
MCORE = (*MCORE_START, *layers([*MCORE_ATTENTION, *MCORE_FFN, *BUFFERS], MCORE_LAYER), *MCORE_END)
