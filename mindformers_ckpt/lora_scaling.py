"""What B · A is multiplied by: given as options, or for every module by the settings of a PEFT adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mindformers_ckpt.errors import ConfigError, raise_problems
from mindformers_ckpt.lora_names import original_name
from mindformers_ckpt.patterns import match_patterns

_Number = TypeVar("_Number", int, float)

# The product is taken in single precision.
_LARGEST, _SMALLEST = 3.4028234e38, 1.2e-38


def number_fault(value: object) -> str | None:
    """What is wrong with a scaling or an alpha, None when nothing is: it must be a number of single precision."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"is {value!r}, a number is expected"
    if not -_LARGEST <= value <= _LARGEST:  # NaN too; an int may be too large for any float
        shown = str(value) if isinstance(value, float) else "an integer of many digits"
        return f"is {shown}; a number that single precision can hold is expected"
    if value and abs(value) < _SMALLEST:
        return f"is {value}, which single precision takes for zero"
    return None


def rank_fault(value: object) -> str | None:
    """What is wrong with the rank of factors, None when nothing is."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return f"is {value!r}, a whole number above 0 is expected"
    return None


@dataclass(frozen=True)
class Scaling:
    """What B · A is multiplied by: a number, or alpha / rank, or alpha / √rank (rsLoRA).

    Attributes:
        value: the number itself.
        alpha: lora_alpha of the training; the rank is that of the factors.
        rank: lora_rank of the training; factors of another rank are an error.
        rank_stabilised: rsLoRA.
        alphas, ranks: other alphas and ranks for modules, by regular expressions (`alpha_pattern` and `rank_pattern`
            of PEFT). `for_modules` turns them into names.
        origin: what says so, for messages.

    Raises ConfigError that lists all values that cannot be.
    """

    value: float | None = None
    alpha: float | None = None
    rank: int | None = None
    rank_stabilised: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    origin: str = "options"

    def __post_init__(self) -> None:
        numbers = {"the scaling": self.value, "alpha": self.alpha}
        faults = {name: number_fault(value) for name, value in numbers.items() if value is not None}
        faults |= {f"alpha_pattern {name!r}": number_fault(value) for name, value in self.alphas.items()}
        faults |= {f"rank_pattern {name!r}": rank_fault(value) for name, value in self.ranks.items()}
        if self.rank is not None:
            faults["the rank"] = rank_fault(self.rank)
        problems = [f"{name} {fault}" for name, fault in faults.items() if fault is not None]
        raise_problems(ConfigError, f"{self.origin}: not a scaling of LoRA", problems)

    @property
    def is_known(self) -> bool:
        """Whether there is a scaling for some module at all."""
        return self.value is not None or self.alpha is not None or bool(self.alphas)

    def for_modules(self, modules: Iterable[str]) -> tuple[Scaling, tuple[str, ...]]:
        """The same with the names of these modules instead of patterns, and what the user should know of it.

        As PEFT does it, a pattern is matched with the module's name in the model before it was wrapped
        ("model.layers.0.self_attn.q_proj"), and the first one that matches counts, in the order of the settings.
        (Before 0.15 PEFT matched another way.) A pattern that is a module's name, letter for letter, counts last.
        Raises ConfigError for patterns that are not regular expressions or do not end.
        """
        if self.value is not None or not (self.alphas or self.ranks):
            return self, ()
        names = sorted(set(map(original_name, modules)))
        patterns = list(dict.fromkeys([*self.alphas, *self.ranks]))
        matched = match_patterns(patterns, names, origin=self.origin)
        alphas, notes = _by_name(self.alphas, matched, names, f"{self.origin}: alpha_pattern")
        ranks, more = _by_name(self.ranks, matched, names, f"{self.origin}: rank_pattern")
        return replace(self, alphas=alphas, ranks=ranks), (*notes, *more)

    def of(self, module: str, rank: int) -> float:
        """The scaling of a branch. Raises ValueError that says what is missing or does not fit."""
        if self.value is not None:
            return self.value
        name = original_name(module)
        alpha, expected = self.alphas.get(name, self.alpha), self.ranks.get(name, self.rank)
        if alpha is None:
            raise ValueError("its scaling is not known; give --lora_scaling, or --alpha")
        if expected is not None and expected != rank:
            raise ValueError(
                f"it is of rank {rank}, not {expected} ({self.origin}); if it was padded, give --lora_scaling"
            )
        scaling = alpha / (math.sqrt(rank) if self.rank_stabilised else rank)
        fault = number_fault(scaling)
        if fault is not None:
            raise ValueError(f"its scaling {fault}")
        return scaling


def _by_name(
    values: Mapping[str, _Number], matched: Mapping[str, list[str]], names: Iterable[str], origin: str
) -> tuple[dict[str, _Number], list[str]]:
    """Module -> the value of the first pattern that matches it, and a note where another one says otherwise.

    The order is not always that of the training: PEFT sorts the patterns when it saves them.
    """
    found: dict[str, _Number] = {}
    first_of: dict[str, str] = {}
    differing: dict[str, tuple[str, str]] = {}
    for pattern, value in values.items():
        for name in matched[pattern]:
            first = first_of.setdefault(name, pattern)
            if found.setdefault(name, value) != value:
                differing.setdefault(name, (first, pattern))
    found.update({name: values[name] for name in names if name in values and name not in found})
    if not differing:
        return found, []
    name, (first, other) = next(iter(differing.items()))
    others = f" and {len(differing) - 1} more modules" if len(differing) > 1 else ""
    note = (
        f"{origin}: {first!r} and {other!r} both match {name}{others}, with different values; the first one counts, as "
        "in PEFT, which sorts them when it saves. If the training had another order, bring it into the file"
    )
    return found, [note]
