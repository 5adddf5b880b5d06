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
    """A kind, by the module and the name of what makes the attack.

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
    "kills": Kind("files", "kills", 2),
    "moments": Kind("files", "moments", 2),
    "calls": Kind("files", "calls", 2),
    "signals": Kind("files", "signals", 1.5),
    "room": Kind("files", "room", 1),
    "mounts": Kind("files", "mounts", 1.5),
    "resumes": Kind("resumes", "Resumes", 1.5),
    "writers": Kind("writers", "Writers", 1),
    "jobs": Kind("jobs", "Jobs", 2),
    "meeting": Kind("meeting", "Meeting", 1, shim=False),
    "readers": Kind("readers", "Readers", 15, shim=False),
}
