"""GPT-2. Hugging Face files have the prefix "transformer." or not; both are read, and it is written."""

from mindformers_ckpt.convert.config import ModelConfig, product
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models.bloom import NO_HEAD, norm
from mindformers_ckpt.convert.models.decoder import EMBEDDING, layer_run
from mindformers_ckpt.convert.rules import Copy, Drop, Entry, prefixed, rename, split

_EMBEDDING = "transformer.wte.weight"

START = [
    rename(_EMBEDDING, "backbone.embedding.word_embedding.embedding_table", EMBEDDING),
    rename("transformer.wpe.weight", "backbone.embedding.position_embedding.embedding_table", "position hidden"),
]
END = norm("transformer.ln_f", "backbone.layernorm")
_LAYER: list[Entry] = [
    *norm("ln_1", "layernorm1"),
    # Hugging Face keeps these matrices as [in, out], and only these are turned.
    split(
        "attn.c_attn.weight",
        "hidden (part width)",
        *((f"attention.dense{number}.weight", 1, "width hidden") for number in (1, 2, 3)),
    ),
    split("attn.c_attn.bias", "(part width)", *((f"attention.dense{number}.bias", 1, "width") for number in (1, 2, 3))),
    *(
        rename(f"{hf}.{kind}", f"{ms}.{kind}", axes if kind == "weight" else axes.split()[1])
        for hf, ms, axes in (
            ("attn.c_proj", "attention.projection", "width hidden"),
            ("mlp.c_fc", "output.mapping", "hidden inner"),
            ("mlp.c_proj", "output.projection", "inner hidden"),
        )
        for kind in ("weight", "bias")
    ),
    *norm("ln_2", "layernorm2"),
    Drop("attn.bias"),
    Drop("attn.masked_bias"),
]


def facts(config: ModelConfig) -> Facts:
    """The output layer is tied unless config.json says otherwise."""
    hidden = config.integer("n_embd", "hidden_size")
    sizes = {
        "vocab": config.integer("vocab_size"),
        "position": config.integer("n_positions", "max_position_embeddings"),
        "hidden": hidden,
        "width": hidden,  # of all heads
        "inner": config.integer("n_inner") or product(4, hidden),
    }
    tied = config.values.get("tie_word_embeddings", True)
    return Facts(sizes, layer_run(config), frozenset({"tied"} if tied else ()))


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
            Copy({"hf": "lm_head.weight"}, {"hf": _EMBEDDING}, when="tied"),
            rename("lm_head.weight", "head.weight", EMBEDDING, when="!tied", note=NO_HEAD),
        )
    },
    facts=facts,
    canonical={"hf": canonical_hf},
)
