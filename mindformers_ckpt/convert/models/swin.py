"""Swin Transformer: Microsoft's files, of pre-training (SimMIM) or fine-tuned, and those of transformers."""

from __future__ import annotations

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
    """Stages and their blocks. The captures of a stage bring its sizes with them."""
    depths = config.values.get("depths") or []
    first = config.integer("embed_dim")
    stages = [{"s": stage, **_sizes(config, first, stage)} for stage in range(len(depths))]
    return Facts(
        {
            "embedding": first,
            "channels": config.integer("num_channels"),
            "last_width": None if first is None or not depths else first << (len(depths) - 1),
        },
        {
            "block": [{**found, "b": block} for found, depth in zip(stages, depths) for block in range(depth)],
            "merge": stages[:-1],
        },
    )


def _sizes(config: ModelConfig, first: int | None, stage: int) -> dict[str, int]:
    """What config.json tells of a stage, which is twice as wide as the one before."""
    found: dict[str, int] = {}
    if first is not None:
        width = first << stage
        found = {"width": width, "all_heads": width, "merged": 4 * width, "next_width": 2 * width}
        ratio = config.values.get("mlp_ratio")
        if isinstance(ratio, (int, float)):
            found["inner"] = int(width * ratio)
    heads = config.values.get("num_heads")
    if isinstance(heads, list) and stage < len(heads):
        found["heads"] = heads[stage]
    return found


def layout(config: ModelConfig, names: Sequence[str]) -> str:
    """Whose names they are. Of MindSpore weights config.json tells what is to be written."""
    if config.text("model_type") == "swin" or any(name.startswith("swin.") for name in names):
        return "transformers"
    pretrained = any(name.startswith("decoder.") for name in names)
    return "pretrained" if config.values.get("is_pretrain", pretrained) else "microsoft"


def _linear(hf: str, ms: str, axes: str, *, turned: bool = False) -> list[Entry]:
    weight = transpose if turned else rename
    return [weight(f"{hf}.weight", f"{ms}.weight", axes), rename(f"{hf}.bias", f"{ms}.bias", axes.split()[0])]


def _positions(hf: str) -> list[Entry]:
    ms = "attn.relative_position_bias"
    table, index = _POSITIONS
    return [
        rename(f"{hf}.{table}", f"{ms}.{table}", "offsets heads"),
        rename(f"{hf}.{index}", f"{ms}.{index}", "tokens others", optional=index, integers=True),
    ]


# (suffix of a tensor of rows, its further axes, whether it may be left out)
_QKV_KINDS = (("weight", " width", ""), ("bias", "", "qkv bias"))
_MICROSOFT_BLOCK: list[Entry] = [
    *norm("norm1", "norm1", "width"),
    *(
        split(
            f"attn.qkv.{kind}",
            "(part all_heads)" + rest,
            *((f"attn.{name}.{kind}", 1, "all_heads" + rest) for name in "qkv"),
            optional=optional,
        )
        for kind, rest, optional in _QKV_KINDS
    ),
    *_positions("attn"),
    *_linear("attn.proj", "attn.proj", "width all_heads"),
    *norm("norm2", "norm2", "width"),
    *_linear("mlp.fc1", "mlp.mapping", "inner width", turned=True),
    *_linear("mlp.fc2", "mlp.projection", "width inner", turned=True),
    rename("attn_mask", "attn_mask", "windows tokens others", optional="mask"),
]
_TRANSFORMERS_BLOCK: list[Entry] = [
    *norm("layernorm_before", "norm1", "width"),
    *(
        rename(f"attention.self.{hf}.{kind}", f"attn.{hf[0]}.{kind}", "all_heads" + rest, optional=optional)
        for hf in ("query", "key", "value")
        for kind, rest, optional in _QKV_KINDS
    ),
    *_positions("attention.self"),
    *_linear("attention.output.dense", "attn.proj", "width all_heads"),
    *norm("layernorm_after", "norm2", "width"),
    *_linear("intermediate.dense", "mlp.mapping", "inner width", turned=True),
    *_linear("output.dense", "mlp.projection", "width inner", turned=True),
]
_MERGE: list[Entry] = [
    rename("downsample.reduction.weight", "downsample.reduction.weight", "next_width merged"),
    *norm("downsample.norm", "downsample.norm", "merged"),
]
_PATCHES = "embedding channels patch_height patch_width"


def _stages(block: Sequence[Entry], hf: str) -> list[Entry]:
    ms = _ENCODER + "layers.{s}."
    return [
        *prefixed(block, hf + "layers.{s}.blocks.{b}.", ms + "blocks.{b}.", over="block"),
        *prefixed(_MERGE, hf + "layers.{s}.", ms, over="merge"),
    ]


def _decoder(hf: str) -> list[Entry]:
    """What pre-training has instead of a classifier."""
    kinds = (("weight", "pixels last_width height columns"), ("bias", "pixels"))
    return [rename(f"{hf}.{kind}", f"decoder.{kind}", axes, optional="decoder") for kind, axes in kinds]


def _head(hf: str) -> list[Entry]:
    kinds = (("weight", "classes last_width"), ("bias", "classes"))
    return [rename(f"{hf}.{kind}", f"head.{kind}", axes, optional="head") for kind, axes in kinds]


def _start(mask: str, positions: str) -> list[Entry]:
    """What stands beside the patches: the token of masked ones, and positions where they are absolute."""
    axes = "batch token embedding"
    return [
        rename(mask, f"{_ENCODER}mask_token", axes, optional="mask token"),
        rename(positions, f"{_ENCODER}absolute_pos_embed", axes, optional="positions"),
    ]


def _microsoft(prefix: str) -> Table:
    return (
        *_linear(f"{prefix}patch_embed.proj", f"{_ENCODER}patch_embed.projection", _PATCHES),
        *(
            entry._replace(optional="patch norm")
            for entry in norm(f"{prefix}patch_embed.norm", "encoder.patch_embed.norm", "embedding")
        ),
        *_start(f"{prefix}mask_token", f"{prefix}absolute_pos_embed"),
        *_stages(_MICROSOFT_BLOCK, prefix),
        *norm(f"{prefix}norm", f"{_ENCODER}norm", "last_width"),
    )


MODEL = Model(
    name="swin",
    model_types=("swin",),
    tables={
        "legacy:microsoft": (*_microsoft(""), *_head("head")),
        "legacy:pretrained": (*_microsoft(_ENCODER), *_decoder("decoder.0")),
        "legacy:transformers": (
            *_linear("swin.embeddings.patch_embeddings.projection", "encoder.patch_embed.projection", _PATCHES),
            *norm("swin.embeddings.norm", "encoder.patch_embed.norm", "embedding"),
            *_start("swin.embeddings.mask_token", "swin.embeddings.position_embeddings"),
            *_stages(_TRANSFORMERS_BLOCK, "swin.encoder."),
            *norm("swin.layernorm", "encoder.norm", "last_width"),
            *_head("classifier"),
            *_decoder("decoder.0"),
        ),
    },
    facts=facts,
    layout=layout,
    counted=counted,
    options=("is_pretrain",),
)
