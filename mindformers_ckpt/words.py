"""Numbers, lists and errors in words."""

from __future__ import annotations

from collections.abc import Iterable


def counted(count: int, word: str, words: str | None = None, *, of: int | None = None) -> str:
    """A number and its noun: "1 file", "1,024 files", "3 of 4 files"."""
    total = count if of is None else of
    share = "" if of is None else f" of {of:,}"
    return f"{count:,}{share} {word if total == 1 else words or word + 's'}"


def spans(numbers: Iterable[int]) -> str:
    """Numbers as spans: "0-7,12"; "none" when there are none."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found) or "none"


def short_spans(numbers: Iterable[int], limit: int = 4) -> str:
    """`spans`, with at most `limit` of them and the number of all: "0,8,16,24,… (128 ranks)"."""
    numbers = list(numbers)
    parts = spans(numbers).split(",")
    return ",".join(parts) if len(parts) <= limit else f"{','.join(parts[:limit])},… ({len(numbers)})"


def shortened(items: Iterable[object], limit: int = 5) -> str:
    """A list with at most `limit` items, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def in_one_line(error: BaseException) -> str:
    """An error with its class; several libraries raise ones without a text."""
    return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
