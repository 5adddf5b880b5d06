"""Folders that are known but not read as weights: each is named, with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.source import SUFFIXES, TORCH_SUFFIXES


class _Foreign(NamedTuple):
    """A kind of folder: how it is recognised, what it is, what to do."""

    matches: Callable[[Listing], bool]
    what: str
    advice: str


def _is_adapter(listing: Listing) -> bool:
    """An adapter alone; the adapter_config.json of a folder that holds weights, too, does not concern us here."""
    return "adapter_config.json" in listing.file_names and not _has_weights(listing)


def _has_weights(listing: Listing) -> bool:
    files = listing.weight_files((*SUFFIXES, *TORCH_SUFFIXES))
    return any(not file.name.startswith("adapter_model") for file in files)


def _has_only(pattern: str) -> Callable[[Listing], bool]:
    """Entries of such names, and no weight files beside them, which would be what is meant."""
    return lambda listing: any(re.fullmatch(pattern, name) for name in listing.names) and not _has_weights(listing)


_KINDS = (
    _Foreign(
        lambda listing: any(re.fullmatch(r".*_rank\d+_\.safetensors", name) for name in listing.file_names),
        "a checkpoint of hyper-parallel without its .metadata",
        "copy that, too: it says where in its tensor each box is",
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
