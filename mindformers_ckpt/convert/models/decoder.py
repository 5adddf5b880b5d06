"""What the decoders of the Llama family have in common: their sizes, and the rules for a layer's inside.

Layers are written without their prefix, so that they serve wherever such a layer stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mindformers_ckpt.convert.config import LAYERS, ModelConfig
from mindformers_ckpt.convert.model import Facts, Runs
from mindformers_ckpt.convert.rules import Copy, Drop, Entry, Rule, join, prefixed, rename

HF_LAYER = "model.layers.{n}."
LEGACY_LAYER = "model.layers.{n}."
MCORE_LAYER = "decoder.layers.{n}."


# The axes of an embedding and an output layer.
EMBEDDING = "vocab hidden"


def layer_run(config: ModelConfig) -> Runs:
    """The captures of all layers."""
    count = config.integer(*LAYERS) or 0
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
    flags |= layout_flags(config)
    return Facts(
        {
            "vocab": config.integer("vocab_size"),
            "hidden": config.integer("hidden_size"),
            "group": groups,
            "queries": config.quotient(heads, groups, "num_attention_heads", "num_key_value_heads"),
            "dim": config.integer("head_dim")
            or config.quotient(config.integer("hidden_size"), heads, "hidden_size", "num_attention_heads"),
            "ffn": config.integer("intermediate_size"),
            "heads": heads,
            "expert": config.integer("num_local_experts", "num_experts"),
            "expert_ffn": config.integer("moe_intermediate_size"),
        },
        layer_run(config),
        frozenset(flags),
    )


# Settings of MindSpore's networks that have query, key and value, and gate and up, in one tensor each.
FUSED_OPTIONS = ("use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp")


def layout_flags(config: ModelConfig) -> set[str]:
    """Whether rows of query, key and value are contiguous, and those of gate and up as well."""
    attention, mlp = FUSED_OPTIONS
    flags = {"contiguous"} if config.flag(attention) else set()
    return flags | ({"halves"} if config.values.get(mlp) is False else set())


def tied_head(hf_embedding: str, ms_embedding: str, hf: str, ms: str, note: str = "") -> list[Entry]:
    """The output layer: a tensor of its own, or a copy of the embedding where config.json ties them."""
    return [
        rename(hf, ms, EMBEDDING, when="!tied", note=note),
        Copy({"hf": hf, "ms": ms}, {"hf": hf_embedding, "ms": ms_embedding}, when="tied"),
    ]


LEGACY_START = [rename("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight", EMBEDDING)]
LEGACY_END = [
    rename("model.norm.weight", "model.norm_out.weight", "hidden"),
    *tied_head(
        "model.embed_tokens.weight", "model.tok_embeddings.embedding_weight", "lm_head.weight", "lm_head.weight"
    ),
]
MCORE_START = [rename("model.embed_tokens.weight", "embedding.word_embeddings.weight", EMBEDDING)]
MCORE_END = [
    rename("model.norm.weight", "decoder.final_layernorm.weight", "hidden"),
    *tied_head(
        "model.embed_tokens.weight", "embedding.word_embeddings.weight", "lm_head.weight", "output_layer.weight"
    ),
]

LEGACY_NORMS = [
    rename("input_layernorm.weight", "attention_norm.weight", "hidden"),
    rename("post_attention_layernorm.weight", "ffn_norm.weight", "hidden"),
]
# (Hugging Face, MindSpore, axes of the rows, axes of the columns)
_QKV = (
    ("self_attn.q_proj", "attention.wq", "(heads dim)", "hidden"),
    ("self_attn.k_proj", "attention.wk", "(group dim)", "hidden"),
    ("self_attn.v_proj", "attention.wv", "(group dim)", "hidden"),
)
_OUTPUT = (("self_attn.o_proj", "attention.wo", "hidden", "(heads dim)"),)
_FFN = (
    ("mlp.gate_proj", "feed_forward.w1", "ffn", "hidden"),
    ("mlp.down_proj", "feed_forward.w2", "hidden", "ffn"),
    ("mlp.up_proj", "feed_forward.w3", "ffn", "hidden"),
)


def linear(layers: Iterable[tuple[str, str, str, str]], bias: str) -> list[Entry]:
    """Linear layers with other names, and their biases where the flag `bias` holds."""
    found: list[Entry] = []
    for hf, ms, rows, columns in layers:
        found.append(rename(f"{hf}.weight", f"{ms}.weight", f"{rows} {columns}"))
        found.append(rename(f"{hf}.bias", f"{ms}.bias", rows, when=bias))
    return found


LEGACY_QKV = linear(_QKV, "bias")
LEGACY_OUTPUT = linear(_OUTPUT, "output_bias")
LEGACY_FFN = linear(_FFN, "mlp_bias")


def qkv_by_group(ms: str, bias: str = "bias") -> list[Entry]:
    """Query, key and value in one tensor: of every group of heads its queries, its key and its value.

    With the flag "contiguous" all queries come first, then all keys, then all values.
    """
    by_group: tuple[tuple[str, int | str], ...] = (("q", "queries"), ("k", 1), ("v", 1))
    contiguous: tuple[tuple[str, int | str], ...] = (("q", "heads"), ("k", "group"), ("v", "group"))
    return [
        join(
            f"{ms}.{kind}",
            rows + (" hidden" if kind == "weight" else ""),
            *((f"self_attn.{name}_proj.{kind}", span) for name, span in spans),
            when=flag if kind == "weight" else f"{flag} {bias}",
        )
        for kind in ("weight", "bias")
        for rows, spans, flag in (
            ("(group part dim)", by_group, "!contiguous"),
            ("(part dim)", contiguous, "contiguous"),
        )
    ]


def gate_up_by_row(ms: str, hf: str = "mlp.", ffn: str = "ffn") -> list[Entry]:
    """Gate and up in one matrix, their rows taking turns; with the flag "halves" one behind the other."""
    return [
        join(
            f"{ms}.{kind}",
            rows + rest,
            (f"{hf}gate_proj.{kind}", 1, ffn + rest),
            (f"{hf}up_proj.{kind}", 1, ffn + rest),
            when=f"{flag}{bias}",
        )
        for kind, rest, bias in (("weight", " hidden", ""), ("bias", "", " mlp_bias"))
        for rows, flag in ((f"({ffn} part)", "!halves"), (f"(part {ffn})", "halves"))
    ]


def without(entries: Iterable[Entry], flag: str, note: str) -> list[Entry]:
    """The same rules, where the network has no place for the tensors that a flag of the model brings."""
    found: list[Entry] = []
    for entry in entries:
        if isinstance(entry, Rule) and flag in entry.when.split():
            found += [Drop(tensor.name, entry.over, entry.when, note) for tensor in entry.tensors("hf")]
        else:
            found.append(entry)
    return found


def lora(layers: Iterable[tuple[str, str, str, str]]) -> list[Entry]:
    """The adapters that a LoRA run adds to linear layers."""
    return [
        rename(f"{hf}.lora_{end.upper()}.weight", f"{ms}.tk_delta_lora_{end}", axes, optional=f"adapter of {ms}")
        for hf, ms, rows, columns in layers
        for end, axes in (("a", f"lora_rank {columns}"), ("b", f"{rows} lora_rank"))
    ]


def canonical_ms(name: str) -> str:
    """The other spelling of adapters in MindSpore files."""
    return name.replace(".mindpet_delta_lora_", ".tk_delta_lora_")


ATTENTION_LORA = lora([*_QKV, *_OUTPUT])
FFN_LORA = lora(_FFN)
BUFFERS: list[Entry] = [Drop("self_attn.rotary_emb.inv_freq")]


def layers(entries: Sequence[Entry], ms: str = LEGACY_LAYER, over: str = "layer") -> list[Entry]:
    """The rules of a layer, for all layers."""
    return prefixed(entries, HF_LAYER, ms, over=over)


LEGACY_LAYERS = layers([*LEGACY_NORMS, *LEGACY_QKV, *LEGACY_OUTPUT, *LEGACY_FFN, *ATTENTION_LORA, *FFN_LORA, *BUFFERS])
LEGACY = (*LEGACY_START, *LEGACY_LAYERS, *LEGACY_END)

# "High performance" names. Files of MindFormers 1.3 have the same names, with contiguous rows and halves.
LEGACY_CONCAT = (
    *LEGACY_START,
    *layers(
        [
            *LEGACY_NORMS,
            *qkv_by_group("attention.w_qkv"),
            *LEGACY_OUTPUT,
            *gate_up_by_row("feed_forward.w_gate_hidden"),
            *linear(_FFN[1:2], "mlp_bias"),
            *BUFFERS,
        ]
    ),
    *LEGACY_END,
)

MCORE_ATTENTION: list[Entry] = [
    rename("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    *qkv_by_group("self_attention.linear_qkv"),
    *linear([("self_attn.o_proj", "self_attention.linear_proj", "hidden", "(heads dim)")], "output_bias"),
    rename("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "hidden"),
]
MCORE_FFN: list[Entry] = [
    *gate_up_by_row("mlp.linear_fc1"),
    *linear([("mlp.down_proj", "mlp.linear_fc2", "hidden", "ffn")], "mlp_bias"),
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
