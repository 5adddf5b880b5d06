"""GLM4 in its two Hugging Face layouts: that of the ChatGLM code in the repository, and that of transformers."""

from collections.abc import Sequence
from dataclasses import replace

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.rules import Drop, Entry, join, prefixed, rename

_LAYER = "transformer.encoder.layers.{n}."
_EMBEDDING = "transformer.embedding.embedding_weight"
_HEAD = "transformer.output_layer.weight"


def facts(config: ModelConfig) -> Facts:
    """Those of a decoder; Glm4 has two more norms a layer."""
    found = decoder.facts(config)
    return replace(found, flags=found.flags | {"post_norms"}) if config.text("model_type") == "glm4" else found


def layout(config: ModelConfig, names: Sequence[str]) -> str:
    """ "native" for GlmForCausalLM and Glm4ForCausalLM, "chatglm" for the code in the repository."""
    native = config.text("model_type") in ("glm", "glm4") or any(name.startswith("model.") for name in names)
    return "native" if native else "chatglm"


CHATGLM: tuple[Entry, ...] = (
    rename("transformer.embedding.word_embeddings.weight", _EMBEDDING),
    Drop("transformer.rotary_pos_emb.inv_freq"),
    *prefixed(
        [
            rename("input_layernorm.weight", "input_layernorm.weight"),
            # Rows of all queries, then all keys, then all values.
            rename("self_attention.query_key_value.weight", "self_attention.query_key_value.weight"),
            rename("self_attention.query_key_value.bias", "self_attention.query_key_value.bias", optional="bias"),
            rename("self_attention.dense.weight", "self_attention.dense.weight"),
            rename("post_attention_layernorm.weight", "post_attention_layernorm.weight"),
            # Rows of gate, then rows of up.
            rename("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.weight"),
            rename("mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.weight"),
        ],
        _LAYER,
        _LAYER,
        over="layer",
    ),
    rename("transformer.encoder.final_layernorm.weight", "transformer.encoder.final_layernorm.weight"),
    *decoder.tied_head("transformer.embedding.word_embeddings.weight", _EMBEDDING, _HEAD, _HEAD),
)

_QKV = (("q", "heads"), ("k", "group"), ("v", "group"))

NATIVE: tuple[Entry, ...] = (
    rename("model.embed_tokens.weight", _EMBEDDING),
    *decoder.layers(
        [
            rename("input_layernorm.weight", "input_layernorm.weight"),
            *(
                join(
                    f"self_attention.query_key_value.{kind}",
                    "(part dim)" + rest,
                    *((f"self_attn.{name}_proj.{kind}", span) for name, span in _QKV),
                    when=when,
                )
                for kind, rest, when in (("weight", " hidden", ""), ("bias", "", "bias"))
            ),
            rename("self_attn.o_proj.weight", "self_attention.dense.weight"),
            rename("post_self_attn_layernorm.weight", "post_self_attn_layernorm.weight", when="post_norms"),
            rename("post_attention_layernorm.weight", "post_attention_layernorm.weight"),
            rename("post_mlp_layernorm.weight", "post_mlp_layernorm.weight", when="post_norms"),
            rename("mlp.gate_up_proj.weight", "mlp.dense_h_to_4h.weight"),
            rename("mlp.down_proj.weight", "mlp.dense_4h_to_h.weight"),
        ],
        _LAYER,
    ),
    rename("model.norm.weight", "transformer.encoder.final_layernorm.weight"),
    *decoder.tied_head("model.embed_tokens.weight", _EMBEDDING, "lm_head.weight", _HEAD),
)

MODEL = Model(
    name="glm-n",
    aliases=("glm4", "glm"),
    model_types=("chatglm", "glm", "glm4"),
    tables={"legacy:chatglm": CHATGLM, "legacy:native": NATIVE},
    facts=facts,
    layout=layout,
)
