"""GLM4 in its two Hugging Face layouts: that of the ChatGLM code in the repository, and that of transformers.

MindSpore's network has settings that change its parameters; they are options here, with its defaults:

- `qkv_concat` (true): query, key and value in one tensor, all queries before all keys before all values.
- `mlp_concat` (true): gate and up in one tensor, all of gate before all of up.
- `use_rearrange_rope` (false): in every head of query and key the even rows come before the odd ones.
"""

from collections.abc import Mapping, Sequence

from mindformers_ckpt.convert.config import ModelConfig, product, total
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.rules import Drop, Entry, join, prefixed, rename, split

_LAYER = "transformer.encoder.layers.{n}."
_EMBEDDING = "transformer.embedding.embedding_weight"
_HEAD = "transformer.output_layer.weight"


def facts(config: ModelConfig) -> Facts:
    """Those of a decoder, the ChatGLM names of its sizes included; Glm4 has two more norms a layer."""
    found = decoder.facts(config)
    flags = found.flags | {option for option in ("qkv_concat", "mlp_concat") if config.values.get(option) is not False}
    if config.flag("use_rearrange_rope"):
        flags |= {"rearranged"}
    if config.text("model_type") == "glm4":
        flags |= {"post_norms"}
    sizes: Mapping[str, int | None] = found.sizes
    if config.flag("multi_query_attention"):
        sizes = {**sizes, "group": config.integer("multi_query_group_num")}
    dim = config.integer("kv_channels") or sizes["dim"]
    ffn = config.integer("ffn_hidden_size") or sizes["ffn"]
    known = {
        "dim": dim,
        "ffn": ffn,
        "pair": config.quotient(dim, 2, "the size of a head (head_dim or kv_channels)"),
        "parity": 2,
        "halves": 2,
        "all_heads": total(sizes["heads"], product(2, sizes["group"])),
        "vocab": config.integer("padded_vocab_size", "vocab_size"),
    }
    return Facts({**sizes, **known}, found.runs, flags)


def layout(config: ModelConfig, names: Sequence[str]) -> str:
    """ "native" for GlmForCausalLM and Glm4ForCausalLM, "chatglm" for the code in the repository."""
    native = config.text("model_type") in ("glm", "glm4") or any(name.startswith("model.") for name in names)
    return "native" if native else "chatglm"


_FUSED = "self_attention.query_key_value"
_PARTS = (("q", "heads"), ("k", "group"), ("v", "group"))
# (suffix of a tensor of rows, its further axes)
_KINDS = (("weight", " hidden"), ("bias", ""))
# The rows of a head: by pairs as in Hugging Face, and as they are rearranged.
_PAIRED, _REARRANGED = "pair parity", "parity pair"


def _chatglm_qkv(kind: str, rest: str) -> list[Entry]:
    """Query, key and value, rows of one Hugging Face tensor."""
    optional = "bias" if kind == "bias" else ""
    fused = f"{_FUSED}.{kind}"
    paired, rearranged = (f"(part {order}){rest}" for order in (_PAIRED, _REARRANGED))
    return [
        rename(fused, fused, f"(all_heads dim){rest}", when="qkv_concat !rearranged", optional=optional),
        join(
            fused,
            rearranged,
            *((fused, span, rearranged if name == "v" else paired) for name, span in _PARTS),
            when="qkv_concat rearranged",
            optional=optional,
        ),
        split(
            fused,
            f"(part dim){rest}",
            *((f"self_attention.w{name}.{kind}", span) for name, span in _PARTS),
            when="!qkv_concat !rearranged",
            optional=optional,
        ),
        split(
            fused,
            paired,
            *((f"self_attention.w{name}.{kind}", span, paired if name == "v" else rearranged) for name, span in _PARTS),
            when="!qkv_concat rearranged",
            optional=optional,
        ),
    ]


def _native_qkv(kind: str, rest: str) -> list[Entry]:
    """Query, key and value, each a Hugging Face tensor."""
    bias = " bias" if kind == "bias" else ""
    paired, rearranged = (f"(part {order}){rest}" for order in (_PAIRED, _REARRANGED))
    apart: list[Entry] = []
    for name, count in _PARTS:
        hf, ms = f"self_attn.{name}_proj.{kind}", f"self_attention.w{name}.{kind}"
        if name == "v":
            apart.append(rename(hf, ms, f"({count} dim){rest}", when=f"!qkv_concat{bias}"))
            continue
        apart.append(rename(hf, ms, f"({count} dim){rest}", when=f"!qkv_concat !rearranged{bias}"))
        axes = f"({count} {_REARRANGED}){rest}"
        apart.append(join(ms, axes, (hf, 1, f"({count} {_PAIRED}){rest}"), when=f"!qkv_concat rearranged{bias}"))
    return [
        join(
            f"{_FUSED}.{kind}",
            f"(part dim){rest}",
            *((f"self_attn.{name}_proj.{kind}", span) for name, span in _PARTS),
            when=f"qkv_concat !rearranged{bias}",
        ),
        join(
            f"{_FUSED}.{kind}",
            rearranged,
            *((f"self_attn.{name}_proj.{kind}", span, rearranged if name == "v" else paired) for name, span in _PARTS),
            when=f"qkv_concat rearranged{bias}",
        ),
        *apart,
    ]


def _gate_up(hf: str) -> list[Entry]:
    """Gate and up, rows of one Hugging Face tensor."""
    halves = (("mlp.dense_left.weight", 1), ("mlp.dense_right.weight", 1))
    return [
        rename(hf, "mlp.dense_h_to_4h.weight", "(halves ffn) hidden", when="mlp_concat"),
        split(hf, "(part ffn) hidden", *halves, when="!mlp_concat"),
    ]


CHATGLM: tuple[Entry, ...] = (
    rename("transformer.embedding.word_embeddings.weight", _EMBEDDING, decoder.EMBEDDING),
    Drop("transformer.rotary_pos_emb.inv_freq"),
    *prefixed(
        [
            rename("input_layernorm.weight", "input_layernorm.weight", "hidden"),
            *(entry for kind, rest in _KINDS for entry in _chatglm_qkv(kind, rest)),
            rename("self_attention.dense.weight", "self_attention.dense.weight", "hidden (heads dim)"),
            rename("post_attention_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
            *_gate_up("mlp.dense_h_to_4h.weight"),
            rename("mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.weight", "hidden ffn"),
        ],
        _LAYER,
        _LAYER,
        over="layer",
    ),
    rename("transformer.encoder.final_layernorm.weight", "transformer.encoder.final_layernorm.weight", "hidden"),
    *decoder.tied_head("transformer.embedding.word_embeddings.weight", _EMBEDDING, _HEAD, _HEAD),
)

NATIVE: tuple[Entry, ...] = (
    rename("model.embed_tokens.weight", _EMBEDDING, decoder.EMBEDDING),
    *decoder.layers(
        [
            rename("input_layernorm.weight", "input_layernorm.weight", "hidden"),
            *(entry for kind, rest in _KINDS for entry in _native_qkv(kind, rest)),
            rename("self_attn.o_proj.weight", "self_attention.dense.weight", "hidden (heads dim)"),
            rename("post_self_attn_layernorm.weight", "post_self_attn_layernorm.weight", "hidden", when="post_norms"),
            rename("post_attention_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
            rename("post_mlp_layernorm.weight", "post_mlp_layernorm.weight", "hidden", when="post_norms"),
            *_gate_up("mlp.gate_up_proj.weight"),
            rename("mlp.down_proj.weight", "mlp.dense_4h_to_h.weight", "hidden ffn"),
        ],
        _LAYER,
    ),
    rename("model.norm.weight", "transformer.encoder.final_layernorm.weight", "hidden"),
    *decoder.tied_head("model.embed_tokens.weight", _EMBEDDING, "lm_head.weight", _HEAD),
)

MODEL = Model(
    name="glm-n",
    aliases=("glm4", "glm"),
    model_types=("chatglm", "glm", "glm4"),
    tables={"legacy:chatglm": CHATGLM, "legacy:native": NATIVE},
    facts=facts,
    layout=layout,
    options=("qkv_concat", "mlp_concat", "use_rearrange_rope"),
)
