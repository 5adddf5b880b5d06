"""GPT-2. Hugging Face files have the prefix "transformer." or not; both are read, and it is written."""

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models.bloom import norm
from mindformers_ckpt.convert.models.decoder import layer_run
from mindformers_ckpt.convert.rules import Copy, Drop, Entry, prefixed, rename, split

_EMBEDDING = "transformer.wte.weight"

START = [
    rename(_EMBEDDING, "backbone.embedding.word_embedding.embedding_table"),
    rename("transformer.wpe.weight", "backbone.embedding.position_embedding.embedding_table"),
]
END = norm("transformer.ln_f", "backbone.layernorm")
_LAYER: list[Entry] = [
    *norm("ln_1", "layernorm1"),
    # Hugging Face keeps these matrices as [in, out], and only these are turned.
    split(
        "attn.c_attn.weight",
        "in (part out)",
        *((f"attention.dense{number}.weight", 1, "out in") for number in (1, 2, 3)),
    ),
    split("attn.c_attn.bias", "(part out)", *((f"attention.dense{number}.bias", 1, "out") for number in (1, 2, 3))),
    *(
        rename(f"{hf}.{kind}", f"{ms}.{kind}")
        for hf, ms in (
            ("attn.c_proj", "attention.projection"),
            ("mlp.c_fc", "output.mapping"),
            ("mlp.c_proj", "output.projection"),
        )
        for kind in ("weight", "bias")
    ),
    *norm("ln_2", "layernorm2"),
    Drop("attn.bias"),
    Drop("attn.masked_bias"),
]


def facts(config: ModelConfig) -> Facts:
    """Nothing but the number of layers."""
    return Facts({}, layer_run(config))


def canonical_hf(name: str) -> str:
    """The name with the prefix of the language model."""
    return name if name.startswith(("transformer.", "lm_head.")) else "transformer." + name


MODEL = Model(
    name="gpt2",
    aliases=("gpt",),
    model_types=("gpt2",),
    tables={
        "legacy": (
            *START,
            *prefixed(_LAYER, "transformer.h.{n}.", "backbone.blocks.{n}.", over="layer"),
            *END,
            # The output layer is the embedding.
            Copy({"hf": "lm_head.weight"}, {"hf": _EMBEDDING}),
        )
    },
    facts=facts,
    canonical={"hf": canonical_hf},
)
