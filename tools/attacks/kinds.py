"""What a kind of attack is, and the list of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple, Protocol


class Round(NamedTuple):
    """One round of a kind: what was attacked, how often, and what must not have happened."""

    what: str
    executions: int
    faults: list[str]


class Attack(Protocol):
    """A kind of attack. A round is decided by its seed, so that it can be run again."""

    def round(self, seed: int) -> Round: ...


class Kind(NamedTuple):
    """A kind, by where it is.

    Attributes:
        share: of the time of a campaign.
        shim: whether its process needs the shim of tests/kills.
    """

    module: str
    name: str
    share: float
    shim: bool = True

    def load(self, folder: Path) -> Attack:
        """The attack, with its files in `folder`."""
        attack: Attack = getattr(importlib.import_module(f"attacks.{self.module}"), self.name)(folder)
        return attack


KINDS = {
    "kills": Kind("files", "Kills", 2),
    "moments": Kind("files", "Moments", 2),
    "calls": Kind("files", "Calls", 2),
    "signals": Kind("files", "Signals", 1.5),
    "room": Kind("files", "Room", 1),
    "resumes": Kind("resumes", "Resumes", 1.5),
    "writers": Kind("writers", "Writers", 1),
    "jobs": Kind("jobs", "Jobs", 2),
    "meeting": Kind("meeting", "Meeting", 1, shim=False),
    "readers": Kind("readers", "Readers", 16, shim=False),
}
