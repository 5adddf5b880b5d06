"""Progress as lines of text: one now and then, with bytes, rate and time left."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[int, int], None]  # is told the bytes done, and those in all

_SECONDS_BETWEEN_LINES = 5.0


def lines_of(what: str, say: Callable[[str], None], *, last_too: bool = False) -> Progress:
    """A callback for (bytes done, bytes in all) that says a line every few seconds, and `last_too` at the end."""
    started = last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and not (last_too and done == total):
            return
        last = now
        rate = done / max(now - started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        say(f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s{left}")

    return update
