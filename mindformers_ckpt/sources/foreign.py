"""Folders that are known but not read as weights: each is named, with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.source import SUFFIXES, TORCH_SUFFIXES

# MindFormers 1.7 and later (`mindformers/checkpoint`): "{prefix-}model-{rank:07d}-{world:07d}.safetensors".
_CHECKPOINT2_FILE = re.compile(r"(?:.*-)?(?:model|opt)-(\d{7})-(\d{7})\.safetensors")
_ITERATION = re.compile(r"iteration_\d{8}")
TRACKER_FILE = "latest_checkpointed_iteration.txt"


class _Foreign(NamedTuple):
    """A kind of folder: how it is recognised, what it is, what to do."""

    matches: Callable[[Listing], bool]
    what: str
    advice: str


def _is_checkpoint2(listing: Listing) -> bool:
    """Shards of one model in one folder. The two files of a job on one card are complete weights."""
    worlds = [int(match[2]) for name in listing.file_names if (match := _CHECKPOINT2_FILE.fullmatch(name)) is not None]
    if any(world > 1 for world in worlds):
        return True
    metadata = listing.json("metadata.json") if "metadata.json" in listing.file_names and not worlds else None
    return isinstance(metadata, dict) and "state_dict_metadata" in metadata


def _is_adapter(listing: Listing) -> bool:
    """An adapter alone; the adapter_config.json of a folder that holds weights, too, is no business of ours here."""
    return "adapter_config.json" in listing.file_names and not _has_weights(listing)


def _has_weights(listing: Listing) -> bool:
    files = listing.weight_files((*SUFFIXES, *TORCH_SUFFIXES))
    return any(not file.name.startswith("adapter_model") for file in files)


def _has(*endings: str) -> Callable[[Listing], bool]:
    return lambda listing: any(name.endswith(endings) for name in listing.file_names)


def _has_only(pattern: str) -> Callable[[Listing], bool]:
    """Entries of such names, and no weight files beside them, which would be what is meant."""
    return lambda listing: any(re.fullmatch(pattern, name) for name in listing.names) and not _has_weights(listing)


_KINDS = (
    _Foreign(
        _is_checkpoint2,
        "a checkpoint of MindFormers' own newer format (checkpoint 2.0), whose files are shards of one model",
        "it cannot be read yet: load it with MindFormers, or save with use_legacy_format: True",
    ),
    _Foreign(
        lambda listing: any(_ITERATION.fullmatch(name) for name in listing.names),
        "the save path of a checkpoint of MindFormers' own newer format (checkpoint 2.0)",
        "it cannot be read yet: load it with MindFormers, or save with use_legacy_format: True",
    ),
    _Foreign(
        _has(".distcp"),
        "a distributed checkpoint of PyTorch (DCP)",
        "it cannot be read yet: make a Hugging Face folder of it with torch first",
    ),
    _Foreign(
        lambda listing: any(re.fullmatch(r".*_rank\d+_\.safetensors", name) for name in listing.file_names),
        "a checkpoint of hyper-parallel",
        "it cannot be read yet",
    ),
    _Foreign(
        _is_adapter,
        "a PEFT adapter, without the weights of its model",
        "give the weights, and the adapter to merge-lora --adapter",
    ),
    _Foreign(
        _has_only(r".*\.gguf"),
        "a GGUF file, whose weights are quantised",
        "give the Hugging Face repository that it was made from",
    ),
    _Foreign(
        _has_only(r"mp_rank_\d+.*|global_step\d+|iter_\d{7}"),
        "a checkpoint of Megatron-LM or DeepSpeed",
        "it cannot be read: export it to Hugging Face format first",
    ),
)


def describe(listing: Listing) -> str | None:
    """What a folder is and what to do, None when it is none of these."""
    kind = next((kind for kind in _KINDS if kind.matches(listing)), None)
    return None if kind is None else f"{listing.folder} is {kind.what}; {kind.advice}"


def is_checkpoint2_file(name: str) -> bool:
    """Whether a file is by its name one shard of several of a checkpoint 2.0."""
    match = _CHECKPOINT2_FILE.fullmatch(name)
    return match is not None and int(match[2]) > 1
