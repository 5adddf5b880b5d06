"""What a table finds in a source: the rules that apply, the names it knows, and those it lacks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from mindformers_ckpt.convert.model import Facts
from mindformers_ckpt.convert.rules import Bound, Copy, Drop, Rule, Side, Table, bind, fill
from mindformers_ckpt.convert.weights import Found, Weights

# Rotary frequencies, which old versions of transformers saved: they are computed anew.
_ROTARY_BUFFER = re.compile(r"(?:.+\.)?(?:rotary_emb|rotary_pos_emb|rope)\.inv_freq")


class Matching(NamedTuple):
    """What a table finds in a source.

    Rules to convert, in order; copies to write, with their names; the names that it knows and that it lacks;
    tensors that must be equal; what to tell of tensors that are left out.
    """

    entries: list[Bound]
    repeated: list[tuple[Copy, str]]
    used: set[str]
    missing: list[str]
    copies: list[tuple[Found, Found]]
    notes: dict[str, None]


def match(table: Table, facts: Facts, source: Weights, to: Side) -> Matching:
    """Match the names of a source that is to be converted to a side."""
    origin = other_side(to)
    bound = [
        (fill(entry, captures, facts.sizes) if isinstance(entry, Rule) else entry, captures)
        for entry, captures in bind(table, facts.runs)
        if facts.holds(entry.when)
    ]
    # Optional tensors of one tag and repetition come together: one that is there calls for the others.
    present = {
        (entry.rule.optional, *captures.values())
        for entry, captures in bound
        if isinstance(entry, Bound)
        and entry.rule.optional
        and any(name in source.tensors for name in entry.names(origin))
    }
    found = Matching([], [], set(), [], [], {})
    for entry, captures in bound:
        if isinstance(entry, Bound):
            if entry.rule.optional and (entry.rule.optional, *captures.values()) not in present:
                continue
            names = entry.names(origin)
            found.missing.extend(name for name in names if name not in source.tensors)
            found.used.update(names)
            if all(name in source.tensors for name in names):
                found.entries.append(entry)
        elif isinstance(entry, Copy):
            if not entry.optional or (entry.optional, *captures.values()) in present:
                _match_copy(entry, captures, source, to, origin, found)
        else:
            dropped = _dropped(entry.name.format(**captures), source)
            if entry.note and (dropped or origin == "ms"):
                found.notes[entry.note] = None
            if origin == "hf":
                found.used.update(dropped)
    if origin == "hf":
        found.used.update(filter(_ROTARY_BUFFER.fullmatch, source.tensors))
    return found


def other_side(side: Side) -> Side:
    """The side that weights come from when they go to this one, and the reverse."""
    return "ms" if side == "hf" else "hf"


def _dropped(name: str, source: Weights) -> list[str]:
    """The names that a `Drop` means: its own, or all that begin like it."""
    if not name.endswith("*"):
        return [name]
    return [known for known in source.tensors if known.startswith(name[:-1])]


def known_names(table: Table, facts: Facts, side: Side) -> set[str]:
    """All names that a table can read on a side."""
    found: set[str] = set()
    for entry, captures in bind(table, facts.runs):
        if not facts.holds(entry.when):
            continue
        if isinstance(entry, Rule):
            found.update(fill(entry, captures, facts.sizes).names(side))
        elif isinstance(entry, Copy):
            if side in entry.name:
                found.add(entry.name[side].format(**captures))
        elif isinstance(entry, Drop) and side == "hf":
            found.add(entry.name.format(**captures))
    return found


def _match_copy(
    copy: Copy, captures: Mapping[str, int], source: Weights, to: Side, origin: Side, found: Matching
) -> None:
    if origin in copy.name:
        name = copy.name[origin].format(**captures)
        found.used.add(name)
        if name in source.tensors and copy.of[origin] in source.tensors:
            found.copies.append((source.tensors[name], source.tensors[copy.of[origin]]))
    if to in copy.name:
        found.repeated.append((copy, copy.name[to].format(**captures)))
