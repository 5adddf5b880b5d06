"""Parameters that a job has and a checkpoint has not: which must be there, and which start anew.

A weight that a checkpoint of the model should have, and has not, is an error: the job would train or answer with
initial values. These need not be in a checkpoint:

- adapters, which a LoRA run adds;
- states of a kind that the checkpoint has none of: another optimizer, or weights alone;
- all states of a weight that is there, but has none: it was frozen before;
- counters of the training, and what is never saved (gradients that are summed up, caches of keys and values).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.lora_names import is_adapter_name
from mindformers_ckpt.state_names import COUNTERS, is_never_saved, state_of
from mindformers_ckpt.words import shortened


class Missing(NamedTuple):
    """Names that a job has and a checkpoint has not.

    Attributes:
        required: those that should be there.
        allowed: those that should be there, but that the user allows to be missing.
        notes: remarks on the others.
    """

    required: list[str]
    allowed: list[str]
    notes: list[str]


def missing_names(wanted: Collection[str], held: Collection[str], allowed: Sequence[str] = ()) -> Missing:
    """The names of `wanted` that are not in `held`; `allowed` are patterns of those that may be missing.

    A pattern is a name, or has `*`, `?` and `[...]` as file names have.
    """
    wanted, held = set(wanted), set(held)
    absent = sorted(name for name in wanted - held if not is_never_saved(name))
    if not absent:
        return Missing([], [], [])
    states: dict[str, list[str]] = {}
    required, adapters, counters, frozen, permitted = [], [], [], [], []
    known = held | wanted
    held_states = [state for name in held if (state := state_of(name, known)) is not None]
    present_kinds = {state.kind for state in held_states}
    trained = {state.weight for state in held_states}
    for name in absent:
        state = state_of(name, wanted)
        if is_adapter_name(name):
            adapters.append(name)
        elif name in COUNTERS:
            counters += [name] if present_kinds else []
        elif state is not None and state.kind not in present_kinds:
            states.setdefault(state.kind, []).append(name)
        elif state is not None and state.weight in held and state.weight not in trained:
            frozen.append(name)
        elif any(fnmatchcase(name, pattern) for pattern in allowed):
            permitted.append(name)
        else:
            required.append(name)
    notes = [
        f"the source holds no {kind}.* ({len(names)} parameters of the target strategy): optimizer states that "
        "are not in the checkpoint start from their initial values"
        for kind, names in states.items()
    ]
    for names, what in (
        (frozen, "states of weights that were frozen start from their initial values"),
        (adapters, "adapter parameters that are not in the source keep their initial values"),
        (counters, "counters of the training that are not in the source start from their initial values"),
    ):
        if names:
            notes.append(f"{what}: {shortened(names)}")
    return Missing(required, permitted, notes)


def weight_names(names: Collection[str]) -> set[str]:
    """The names without states of an optimizer and counters of the training."""
    return {
        name for name in names if name not in COUNTERS and state_of(name, names) is None and not is_never_saved(name)
    }


def has_states(names: Collection[str]) -> bool:
    """Whether there are states of an optimizer among the names."""
    return any(state_of(name, names) for name in names)


def patterns_of(allow_missing: bool | str | Sequence[str]) -> tuple[str, ...]:
    """The patterns of names that may be missing: all for True, none for False; in a text commas are between them.

    Raises ConfigError for anything else.
    """
    if isinstance(allow_missing, bool):
        return ("*",) if allow_missing else ()
    names = allow_missing.split(",") if isinstance(allow_missing, str) else allow_missing
    if isinstance(names, Sequence) and all(isinstance(name, str) and name.strip() for name in names):
        return tuple(name.strip() for name in names)
    raise ConfigError(
        f"allow_missing: True, False or a list of parameter names was expected, not {allow_missing!r:.80}"
    )
