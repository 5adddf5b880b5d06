"""TeleChat 7B and 12B. The files of the 12B have the prefix "transformer." and an output layer."""

from collections.abc import Sequence

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models.decoder import EMBEDDING, LEGACY_LAYER, canonical_ms, layer_run
from mindformers_ckpt.convert.rules import Drop, Entry, Table, prefixed, rename
from mindformers_ckpt.errors import ConfigError

_KINDS = ("telechat_7b", "telechat_12b")
# Keys and values stay in one tensor, of every head its key and its value.
_LAYER: list[Entry] = [
    rename("input_layernorm.weight", "attention_norm.weight", "hidden"),
    rename("self_attention.query.weight", "attention.wq.weight", "width hidden"),
    rename("self_attention.key_value.weight", "attention.wk_v.weight", "(group key_value dim) hidden"),
    rename("self_attention.dense.weight", "attention.wo.weight", "hidden width"),
    rename("self_attention.dense.bias", "attention.wo.bias", "hidden"),
    rename("post_attention_layernorm.weight", "ffn_norm.weight", "hidden"),
    rename("mlp.gate_proj.weight", "feed_forward.w1.weight", "ffn hidden"),
    rename("mlp.down_proj.weight", "feed_forward.w2.weight", "hidden ffn"),
    rename("mlp.down_proj.bias", "feed_forward.w2.bias", "hidden"),
    rename("mlp.up_proj.weight", "feed_forward.w3.weight", "ffn hidden"),
    Drop("self_attention.rotary_emb.inv_freq"),
]


def facts(config: ModelConfig) -> Facts:
    """The sizes of its matrices, and the number of layers."""
    hidden, heads = config.integer("hidden_size"), config.integer("n_head", "num_attention_heads")
    sizes = {
        "vocab": config.integer("vocab_size"),
        "hidden": hidden,
        "width": hidden,  # of all heads
        "group": config.integer("num_key_value_heads") or heads,
        "key_value": 2,
        "dim": config.quotient(hidden, heads, "hidden_size", "n_head"),
        "ffn": config.integer("ffn_hidden_size", "intermediate_size"),
    }
    return Facts(sizes, layer_run(config))


def layout(config: ModelConfig, names: Sequence[str]) -> str:
    """The kind that `--telechat_type` names, or the one that the names show."""
    kind = config.text("telechat_type")
    if kind and kind not in _KINDS:
        raise ConfigError(f"--telechat_type {kind}: known are {', '.join(_KINDS)}")
    large = any(name.startswith("transformer.") or name == "lm_head.weight" for name in names)
    return kind or _KINDS[large]


def _table(prefix: str) -> Table:
    return (
        rename(f"{prefix}word_embeddings.weight", "model.tok_embeddings.embedding_weight", EMBEDDING),
        *prefixed(_LAYER, prefix + "h.{n}.", LEGACY_LAYER, over="layer"),
        rename(f"{prefix}ln_f.weight", "model.norm_out.weight", "hidden"),
    )


MODEL = Model(
    name="telechat",
    model_types=("telechat",),
    tables={
        "legacy:telechat_7b": _table(""),
        "legacy:telechat_12b": (*_table("transformer."), rename("lm_head.weight", "lm_head.weight", EMBEDDING)),
    },
    facts=facts,
    layout=layout,
    canonical={"ms": canonical_ms},
    options=("telechat_type",),
)
