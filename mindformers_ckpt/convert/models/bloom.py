"""BLOOM. Hugging Face files have the prefix "transformer." or not; MindFormers' network has no such prefix."""

from collections.abc import Iterable

from mindformers_ckpt.convert.config import ModelConfig, product
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models.decoder import EMBEDDING, layer_run, tied_head
from mindformers_ckpt.convert.rules import Entry, Rule, prefixed, rename, split, transpose

_PREFIX = "transformer."
NO_HEAD = (
    "the output layer is not tied to the embedding here, and is written as head.weight; MindFormers' own network of "
    "this model computes with the embedding in its place, and has no such parameter"
)


def facts(config: ModelConfig) -> Facts:
    """The output layer is tied unless config.json says otherwise."""
    heads = config.integer("n_head", "num_attention_heads")
    hidden = config.integer("hidden_size", "n_embed")
    tied = config.values.get("tie_word_embeddings", True)
    sizes = {
        "head": heads,
        "dim": config.quotient(hidden, heads, "hidden_size", "n_head"),
        "hidden": hidden,
        "width": hidden,  # of all heads
        "inner": product(4, hidden),
        "vocab": config.integer("vocab_size"),
    }
    return Facts(sizes, layer_run(config), frozenset({"tied"} if tied else ()))


def norm(hf: str, ms: str, axes: str = "hidden") -> list[Rule]:
    """A layer norm: weight and bias are gamma and beta."""
    return [rename(f"{hf}.weight", f"{ms}.gamma", axes), rename(f"{hf}.bias", f"{ms}.beta", axes)]


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
    ("self_attention.dense", "attention.projection", "hidden", "width"),
    ("mlp.dense_h_to_4h", "output.mapping", "inner", "hidden"),
    ("mlp.dense_4h_to_h", "output.projection", "hidden", "inner"),
)


def turned_linear(layers: Iterable[tuple[str, str, str, str]]) -> list[Entry]:
    """Linear layers (names, axes of the rows and of the columns) whose matrices are transposed."""
    found: list[Entry] = []
    for hf, ms, rows, columns in layers:
        found.append(transpose(f"{hf}.weight", f"{ms}.weight", f"{rows} {columns}"))
        found.append(rename(f"{hf}.bias", f"{ms}.bias", rows))
    return found


_LAYER: list[Entry] = [
    *norm("input_layernorm", "layernorm1"),
    *_QKV,
    *norm("post_attention_layernorm", "layernorm2"),
    *turned_linear(_LINEAR),
]
_EMBEDDING = (f"{_PREFIX}word_embeddings.weight", "embedding.word_embedding.embedding_table")


def canonical_hf(name: str) -> str:
    """The name with the prefix of the language model, which published files lack."""
    return name if name.startswith((_PREFIX, "lm_head.")) else _PREFIX + name


def canonical_ms(name: str) -> str:
    """The name as the network has it; other converters put the prefix of Hugging Face before it."""
    return name[len(_PREFIX) :] if name.startswith(_PREFIX) else name


MODEL = Model(
    name="bloom",
    model_types=("bloom",),
    tables={
        "legacy": (
            rename(*_EMBEDDING, EMBEDDING),
            *norm(f"{_PREFIX}word_embeddings_layernorm", "embedding.norm"),
            *prefixed(_LAYER, _PREFIX + "h.{n}.", "blocks.{n}.", over="layer"),
            *norm(f"{_PREFIX}ln_f", "ln_f"),
            *tied_head(*_EMBEDDING, "lm_head.weight", "head.weight", note=NO_HEAD),
        )
    },
    facts=facts,
    canonical={"hf": canonical_hf, "ms": canonical_ms},
)
