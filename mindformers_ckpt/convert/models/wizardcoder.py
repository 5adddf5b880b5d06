"""WizardCoder and StarCoder (GPTBigCode): many queries share one key and one value."""

from dataclasses import replace

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models import gpt2
from mindformers_ckpt.convert.models.bloom import norm, turned_linear
from mindformers_ckpt.convert.models.decoder import tied_head
from mindformers_ckpt.convert.rules import Drop, Entry, prefixed, split

_LINEAR = (
    ("attn.c_proj", "attention.projection", "hidden", "width"),
    ("mlp.c_fc", "output.mapping", "inner", "hidden"),
    ("mlp.c_proj", "output.projection", "hidden", "inner"),
)


def facts(config: ModelConfig) -> Facts:
    """The output layer is tied unless config.json says otherwise."""
    heads = config.integer("n_head", "num_attention_heads")
    found = gpt2.facts(config)
    dim = config.quotient(found.sizes["hidden"], heads, "n_embd", "n_head")
    sizes = {**found.sizes, "heads": heads, "head": heads, "dim": dim}
    flags = {"multi_query"} if config.values.get("multi_query", True) else set()
    return replace(found, sizes=sizes, flags=found.flags | flags)


def _qkv(kind: str, rest: str) -> list[Entry]:
    """One key and one value after all queries; without multi-query of every head its three."""
    names = [f"attention.dense{number}.{kind}" for number in (1, 2, 3)]
    spans: tuple[int | str, ...] = ("heads", 1, 1)
    return [
        split(f"attn.c_attn.{kind}", "(part dim)" + rest, *zip(names, spans), when="multi_query"),
        split(
            f"attn.c_attn.{kind}",
            "(head part dim)" + rest,
            *((name, 1, "(head dim)" + rest) for name in names),
            when="!multi_query",
        ),
    ]


_LAYER: list[Entry] = [
    *norm("ln_1", "layernorm1"),
    *_qkv("weight", " hidden"),
    *_qkv("bias", ""),
    *turned_linear(_LINEAR),
    *norm("ln_2", "layernorm2"),
    Drop("attn.bias"),
    Drop("attn.masked_bias"),
]

MODEL = Model(
    name="wizardcoder",
    aliases=("starcoder", "gpt_bigcode"),
    model_types=("gpt_bigcode",),
    tables={
        "legacy": (
            *gpt2.START,
            *prefixed(_LAYER, "transformer.h.{n}.", "backbone.blocks.{n}.", over="layer"),
            *gpt2.END,
            *tied_head(
                "transformer.wte.weight",
                "backbone.embedding.word_embedding.embedding_table",
                "lm_head.weight",
                "head.head_weight",
            ),
        )
    },
    facts=facts,
    canonical={"hf": gpt2.canonical_hf},
)
