"""Names of adapter parameters, and those of a model that PEFT has wrapped: the one place that knows them.

A name is read by its parts between dots. "exploration.head.weight" has no part of an adapter, although "lora" is in
it; "self_attn.q_proj.lora_A.weight" has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Whole parts: the factors and other parameters of LoRA ("lora_A", "lora_embedding_B", "lora_magnitude_vector"), all of
# MindPet ("mindpet_delta_lora_a", "tk_delta_lora_a", "mindpet_delta_adapter_…"), the pair of older diffusers
# ("lora.up"), and the trained rows of an embedding that PEFT keeps apart.
# "w_lora.lora.0.weight" is an ordinary weight of RWKV, and "q_lora_rank" a setting: no part of theirs is one.
_ADAPTER = re.compile(
    r"(?:^|\.)(?:lora_\w+|(?:mindpet|tk)_delta(?:_\w+)?|lora\.(?:up|down)|trainable_tokens_(?:delta|original)\w*)(?:\.|$)",
    re.IGNORECASE,
)
# "wq.mindpet_delta_lora_a", "wq.tk_delta_lora_A", "linear_qkv.lora_a.weight", "q_proj.lora_A.default.weight"
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:mindpet_delta_|tk_delta_)?lora_(?P<end>[abAB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
)
# PeftModel holds the model as base_model.model; DistributedDataParallel, torch.compile and FSDP may stand around it.
_WRAPPING = re.compile(r"(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)*base_model\.model\.")
# "lm_head.modules_to_save.default.weight" is the trained copy of "lm_head.original_module.weight".
_TRAINED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_ORIGINAL = ".original_module."
_BASE_LAYER = re.compile(r"\.base_layer(?=\.)")


class FactorName(NamedTuple):
    """What a factor's name says: the module it belongs to, and which of the two it is ("a" or "b")."""

    module: str
    end: str


def is_adapter_name(name: str) -> bool:
    """Whether a parameter belongs to an adapter of LoRA or its kin; optimizer states of one too."""
    return _ADAPTER.search(name) is not None


def factor_name(name: str) -> FactorName | None:
    """The name of a factor A or B of a linear layer, taken apart; None for any other name."""
    match = _FACTOR.fullmatch(name)
    return None if match is None else FactorName(match["module"], match["end"].lower())


def is_dora_name(name: str) -> bool:
    """Whether an adapter's parameter is the magnitude of DoRA."""
    return "lora_magnitude_vector" in name.lower()


def original_name(name: str) -> str:
    """The name in the model as it was before PEFT wrapped it, of a module or a parameter; others stay as they are."""
    wrapping = _WRAPPING.match(name)
    plain = name if wrapping is None else name[wrapping.end() :]
    return _BASE_LAYER.sub("", _TRAINED.sub("", plain).replace(_ORIGINAL, "."))


class OriginalNames(NamedTuple):
    """The parameters of a wrapped model that make up the model itself.

    Attributes:
        names: name in the original model -> name in the wrapped one.
        replaced: names of originals that a trained copy (`modules_to_save`) takes the place of.
        clashes: original names that several parameters have, with these.
    """

    names: dict[str, str]
    replaced: tuple[str, ...]
    clashes: dict[str, list[str]]


def original_names(names: Iterable[str]) -> OriginalNames:
    """The names of a model without adapters, by those of the model that PEFT has wrapped."""
    held: dict[str, list[str]] = {}
    for name in names:
        held.setdefault(original_name(name), []).append(name)
    found, replaced, clashes = {}, [], {}
    for plain, own in held.items():
        trained = [name for name in own if _TRAINED.search(name)]
        rest = [name for name in own if name not in trained]
        if trained and all(_ORIGINAL in name for name in rest):
            replaced += rest
            own = trained
        if len(own) > 1:
            clashes[plain] = own
        found[plain] = own[0]
    return OriginalNames(found, tuple(replaced), clashes)
