"""Swin Transformer: Microsoft's files, of pre-training (SimMIM) or fine-tuned, and those of transformers."""

import re
from collections.abc import Iterable, Mapping, Sequence

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models.bloom import norm
from mindformers_ckpt.convert.rules import Entry, Table, prefixed, rename, split, transpose

_BLOCK = re.compile(r"\blayers\.(\d+)\.blocks\.(\d+)\.")
_ENCODER = "encoder."
_POSITIONS = ("relative_position_bias_table", "relative_position_index")


def counted(names: Iterable[str]) -> Mapping[str, list[int]]:
    """The number of blocks of every stage, by the names of a file."""
    depths: dict[int, int] = {}
    for match in filter(None, map(_BLOCK.search, names)):
        depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    return {"depths": [depths.get(stage, 0) for stage in range(max(depths, default=-1) + 1)]}


def facts(config: ModelConfig) -> Facts:
    """Stages and their blocks."""
    depths = config.values.get("depths") or []
    return Facts(
        {},
        {
            "block": [{"s": stage, "b": block} for stage, depth in enumerate(depths) for block in range(depth)],
            "merge": [{"s": stage} for stage in range(len(depths) - 1)],
        },
    )


def layout(config: ModelConfig, names: Sequence[str]) -> str:
    """Whose names they are. Of MindSpore weights config.json tells what is to be written."""
    if config.text("model_type") == "swin" or any(name.startswith("swin.") for name in names):
        return "transformers"
    pretrained = any(name.startswith("decoder.") for name in names)
    return "pretrained" if config.values.get("is_pretrain", pretrained) else "microsoft"


def _linear(hf: str, ms: str, *, turned: bool = False) -> list[Entry]:
    weight = transpose if turned else rename
    return [weight(f"{hf}.weight", f"{ms}.weight"), rename(f"{hf}.bias", f"{ms}.bias")]


def _positions(hf: str) -> list[Entry]:
    return [
        rename(f"{hf}.{name}", f"attn.relative_position_bias.{name}", optional="" if "table" in name else name)
        for name in _POSITIONS
    ]


_MICROSOFT_BLOCK: list[Entry] = [
    *norm("norm1", "norm1"),
    *(
        split(
            f"attn.qkv.{kind}",
            "(part out)" + rest,
            *((f"attn.{name}.{kind}", 1, "out" + rest) for name in "qkv"),
            optional="" if kind == "weight" else "qkv bias",
        )
        for kind, rest in (("weight", " in"), ("bias", ""))
    ),
    *_positions("attn"),
    *_linear("attn.proj", "attn.proj"),
    *norm("norm2", "norm2"),
    *_linear("mlp.fc1", "mlp.mapping", turned=True),
    *_linear("mlp.fc2", "mlp.projection", turned=True),
    rename("attn_mask", "attn_mask", optional="mask"),
]
_TRANSFORMERS_BLOCK: list[Entry] = [
    *norm("layernorm_before", "norm1"),
    *(
        rename(f"attention.self.{hf}.{kind}", f"attn.{hf[0]}.{kind}", optional="" if kind == "weight" else "qkv bias")
        for hf in ("query", "key", "value")
        for kind in ("weight", "bias")
    ),
    *_positions("attention.self"),
    *_linear("attention.output.dense", "attn.proj"),
    *norm("layernorm_after", "norm2"),
    *_linear("intermediate.dense", "mlp.mapping", turned=True),
    *_linear("output.dense", "mlp.projection", turned=True),
]
_MERGE: list[Entry] = [
    rename("downsample.reduction.weight", "downsample.reduction.weight"),
    *norm("downsample.norm", "downsample.norm"),
]


def _stages(block: Sequence[Entry], hf: str) -> list[Entry]:
    ms = _ENCODER + "layers.{s}."
    return [
        *prefixed(block, hf + "layers.{s}.blocks.{b}.", ms + "blocks.{b}.", over="block"),
        *prefixed(_MERGE, hf + "layers.{s}.", ms, over="merge"),
    ]


def _decoder(hf: str) -> list[Entry]:
    """What pre-training has instead of a classifier."""
    kinds = ("weight", "bias")
    return [rename(f"{hf}.{kind}", f"decoder.{kind}", optional="decoder") for kind in kinds]


def _head(hf: str) -> list[Entry]:
    return [rename(f"{hf}.{kind}", f"head.{kind}", optional="head") for kind in ("weight", "bias")]


def _microsoft(prefix: str) -> Table:
    return (
        *_linear(f"{prefix}patch_embed.proj", f"{_ENCODER}patch_embed.projection"),
        *(
            entry._replace(optional="patch norm")
            for entry in norm(f"{prefix}patch_embed.norm", "encoder.patch_embed.norm")
        ),
        rename(f"{prefix}mask_token", f"{_ENCODER}mask_token", optional="mask token"),
        rename(f"{prefix}absolute_pos_embed", f"{_ENCODER}absolute_pos_embed", optional="positions"),
        *_stages(_MICROSOFT_BLOCK, prefix),
        *norm(f"{prefix}norm", f"{_ENCODER}norm"),
    )


MODEL = Model(
    name="swin",
    model_types=("swin",),
    tables={
        "legacy:microsoft": (*_microsoft(""), *_head("head")),
        "legacy:pretrained": (*_microsoft(_ENCODER), *_decoder("decoder.0")),
        "legacy:transformers": (
            *_linear("swin.embeddings.patch_embeddings.projection", "encoder.patch_embed.projection"),
            *norm("swin.embeddings.norm", "encoder.patch_embed.norm"),
            rename("swin.embeddings.mask_token", "encoder.mask_token", optional="mask token"),
            rename("swin.embeddings.position_embeddings", "encoder.absolute_pos_embed", optional="positions"),
            *_stages(_TRANSFORMERS_BLOCK, "swin.encoder."),
            *norm("swin.layernorm", "encoder.norm"),
            *_head("classifier"),
            *_decoder("decoder.0"),
        ),
    },
    facts=facts,
    layout=layout,
    counted=counted,
    options=("is_pretrain",),
)
