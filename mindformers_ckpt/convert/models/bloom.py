"""BLOOM. Files have the prefix "transformer." or not, on both sides alike."""

from collections.abc import Sequence

from mindformers_ckpt.convert.config import ModelConfig, quotient
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models.decoder import layer_run, tied_head
from mindformers_ckpt.convert.rules import Entry, Rule, Table, prefixed, rename, split, transpose

_PREFIX = "transformer."


def facts(config: ModelConfig) -> Facts:
    """The output layer is tied unless config.json says otherwise."""
    heads = config.integer("n_head", "num_attention_heads")
    hidden = config.integer("hidden_size", "n_embed")
    tied = config.values.get("tie_word_embeddings", True)
    sizes = {"head": heads, "dim": quotient(hidden, heads), "hidden": hidden}
    return Facts(sizes, layer_run(config), frozenset({"tied"} if tied else ()))


def layout(config: ModelConfig, names: Sequence[str]) -> str:
    """Whether names have the prefix."""
    return "prefixed" if any(name.startswith(_PREFIX) for name in names) else "plain"


def norm(hf: str, ms: str) -> list[Rule]:
    """A layer norm: weight and bias are gamma and beta."""
    return [rename(f"{hf}.weight", f"{ms}.gamma"), rename(f"{hf}.bias", f"{ms}.beta")]


# Of every head its query, its key and its value, in one tensor.
_QKV = [
    split(
        f"self_attention.query_key_value.{kind}",
        "(head part dim)" + rest,
        *((f"attention.dense{number}.{kind}", 1, "(head dim)" + rest) for number in (1, 2, 3)),
    )
    for kind, rest in (("weight", " hidden"), ("bias", ""))
]
_LINEAR = (
    ("self_attention.dense", "attention.projection"),
    ("mlp.dense_h_to_4h", "output.mapping"),
    ("mlp.dense_4h_to_h", "output.projection"),
)


def _table(prefix: str) -> Table:
    layer: list[Entry] = [
        *norm("input_layernorm", "layernorm1"),
        *_QKV,
        *norm("post_attention_layernorm", "layernorm2"),
        *(transpose(f"{hf}.weight", f"{ms}.weight") for hf, ms in _LINEAR),
        *(rename(f"{hf}.bias", f"{ms}.bias") for hf, ms in _LINEAR),
    ]
    embedding = (f"{prefix}word_embeddings.weight", f"{prefix}embedding.word_embedding.embedding_table")
    return (
        rename(*embedding),
        *norm(f"{prefix}word_embeddings_layernorm", f"{prefix}embedding.norm"),
        *prefixed(layer, prefix + "h.{n}.", prefix + "blocks.{n}.", over="layer"),
        *norm(f"{prefix}ln_f", f"{prefix}ln_f"),
        *tied_head(*embedding, "lm_head.weight", "head.weight"),
    )


MODEL = Model(
    name="bloom",
    model_types=("bloom",),
    tables={"legacy:prefixed": _table(_PREFIX), "legacy:plain": _table("")},
    facts=facts,
    layout=layout,
)
