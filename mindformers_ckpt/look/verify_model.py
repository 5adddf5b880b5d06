"""What a verification finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mindformers_ckpt.geometry.box import Box


@dataclass(frozen=True)
class Difference:
    """Something that is not as it should be.

    Attributes:
        what: in words.
        file: where it was found.
        tensor: its name; None for what concerns a whole file or result.
        rank: whose file it is.
        box: the part of the whole tensor that the file holds.
        offset: of the first byte in the file that differs.
    """

    what: str
    file: Path | None = None
    tensor: str | None = None
    rank: int | None = None
    box: Box | None = None
    offset: int | None = None

    def __str__(self) -> str:
        told = {
            "rank": None if self.rank is None else f"rank {self.rank}",
            "box": None if self.box is None else f"box {self.box}",
            "offset": None if self.offset is None else f"from byte {self.offset} of the file on",
        }
        where = ", ".join(text for text in told.values() if text is not None)
        subject = ": ".join(str(part) for part in (self.file, self.tensor) if part is not None)
        both = f"{subject} ({where})" if subject and where else subject or where
        return ": ".join(part for part in (both, self.what) if part)


@dataclass
class Verification:
    """What was checked, and what was found.

    Attributes:
        checked: a line for each check that was done, with how much it covered.
        unchecked: a line for each check that could not be done, with the reason.
        differences: all that is not as it should be, in the order of files.
        warnings: what you should know of choices that were made.
    """

    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences
