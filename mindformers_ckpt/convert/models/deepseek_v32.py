"""DeepSeek-V3.2: DeepSeek-V3 with an indexer beside its attention, under mcore names only.

The indexer gives every head first its rotary rows, as two halves, then the others; so has the PyNative network. The
networks of graph mode have the others first, and rotary rows in pairs, as those of the attention.
"""

from __future__ import annotations

from dataclasses import replace

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts
from mindformers_ckpt.convert.models import deepseek
from mindformers_ckpt.convert.rules import Entry, join, rename

_HF, _MS = "self_attn.indexer.", "self_attention.core_attention.indexer."


def facts(config: ModelConfig) -> Facts:
    """Those of DeepSeek-V3, and the sizes of the indexer."""
    found = deepseek.facts(config)
    dim, rope = config.integer("index_head_dim"), config.integer("qk_rope_head_dim")
    steps = config.quotient(dim, rope, "index_head_dim", "qk_rope_head_dim")
    indexer = {
        "index_head": config.integer("index_n_heads"),
        "index_dim": dim,
        "plain_steps": None if steps is None else steps - 1,  # rows that are not rotary, in steps of all that are
    }
    return replace(found, sizes={**found.sizes, **indexer})


def _rows(hf: str, ms: str, before: str = "", after: str = "") -> list[Entry]:
    """A tensor whose rows are those of heads of the indexer; `before` and `after` are its other axes."""
    pairs, halves = (f"({before}part {order}){after}" for order in ("rope_pairs pair", "pair rope_pairs"))
    return [
        rename(_HF + hf, _MS + ms, f"({before}index_dim){after}" if before else f"index_dim{after}", when="pynative"),
        join(
            _MS + ms,
            pairs,
            (_HF + hf, "plain_steps", pairs),
            (_HF + hf, 1, halves),
            when="!pynative",
            backwards=True,
        ),
    ]


INDEXER: list[Entry] = [
    *_rows("wq_b.weight", "linear_wq_b.weight", "index_head ", " query_rank"),
    *_rows("wk.weight", "linear_wk.weight", after=" hidden"),
    *_rows("k_norm.weight", "k_norm.gamma"),
    *_rows("k_norm.bias", "k_norm.beta"),
    rename(_HF + "weights_proj.weight", _MS + "linear_weights_proj.weight", "index_head hidden"),
]

MODEL = replace(
    deepseek.MODEL,
    name="deepseek_v32",
    aliases=("deepseek_v3_2",),
    model_types=("deepseek_v32",),
    tables={"mcore": deepseek.mcore([*deepseek.MCORE_ATTENTION, *INDEXER])},
    facts=facts,
)
