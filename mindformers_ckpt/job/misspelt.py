"""Keys that were meant for us but would not reach us: misspelt, or in a section of the yaml.

A training that starts from random weights because of a typing error looks healthy for hours, so that a near miss is
an error. MindFormers' own keys are left alone; a test holds these rules against the keys of all its releases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SAME_WORDS = {"ckpt": "checkpoint", "trans": "transform"}
_ENDINGS = ("path", "dir", "folder", "file", "or", "name", "url", "flag")
_OTHERS = {"gpu_num_per_node"}  # looks like one of ours, and is one of other frameworks
# Below another key of the yaml these words can mean something else.
_COMMON = {"run_mode", "output_dir", "use_parallel", "resume_training", "npu_num_per_node"}


def misspelt(values: Mapping[Any, Any], keys: Sequence[str]) -> list[str]:
    """A line for each key of `values` that is nearly one of `keys`."""
    found = []
    for key in values:
        if isinstance(key, str) and key not in keys and key not in _OTHERS:
            meant = meant_key(key, keys)
            if meant is not None:
                found.append(f"{key}: did you mean {meant}?")
    return found


def misplaced(values: Mapping[Any, Any], keys: Sequence[str]) -> list[str]:
    """A line for each of `keys` that stands in a section, and not at the top, where it would count."""
    wanted = [key for key in keys if key not in _COMMON and key not in values]
    return [
        f"{key}: it has no effect in the section {section}; put it at the top, without indentation"
        for section, inside in values.items()
        if isinstance(inside, Mapping)
        for key in wanted
        if key in inside
    ]


def meant_key(key: str, keys: Sequence[str]) -> str | None:
    """The one of `keys` that was meant, None when it is probably another."""
    words = _words(key)
    if not words:
        return None
    for own in keys:
        if words == _words(own) or (_stem(words) == _stem(_words(own)) and len(_stem(words)) > 1):
            return own
    distances = {own: _distance_of(key, own) for own in keys}
    near = [own for own, distance in distances.items() if distance <= _allowed(own)]
    if near:
        return min(near, key=distances.__getitem__)
    starts = (own for own in keys if len(words) > 1 and _words(own)[: len(words)] == words)
    return next(starts, None)


def _words(key: str) -> tuple[str, ...]:
    """The words of a key in one way of writing."""
    parts = "".join(f"_{sign}" if sign.isupper() else sign for sign in key.strip()).replace("-", "_").lower()
    return tuple(_SAME_WORDS.get(word, word) for word in parts.split("_") if word)


def _stem(words: Sequence[str]) -> tuple[str, ...]:
    """The words without endings that say what sort of value it is."""
    return tuple(word for word in words if word not in _ENDINGS)


def _allowed(key: str) -> int:
    """How many slips of the typing hand make a near miss of a key."""
    return max(1, len(key) // 6)


def _distance_of(key: str, own: str) -> int:
    written = key.lower().replace("_", "").replace("-", "")
    return _distance(written, own.replace("_", ""), most=_allowed(own) + 1)


def _distance(first: str, second: str, most: int) -> int:
    """Letters that are wrong, lacking, too many or exchanged with their neighbours; `most` for that many and more."""
    if abs(len(first) - len(second)) >= most:
        return most
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        before, last, row = row, before, [i]
        for j, other in enumerate(second, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return min(row[-1], most)
