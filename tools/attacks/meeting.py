"""Strangers at the meeting of a job's ranks, as in tools/fuzz_meeting.py."""

from __future__ import annotations

from pathlib import Path

import fuzz_meeting

from attacks.kinds import Round
from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.job.cluster.secret import Trust

STREAMS = 500


class Meeting:
    """A job of three ranks, and strangers that connect."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def round(self, seed: int) -> Round:
        faults = []
        try:
            fuzz_meeting.fuzz(STREAMS, seed, Trust(folder=self._folder, strict=True))
        except (AssertionError, CheckpointError, OSError) as error:
            faults.append(f"{type(error).__name__}: {error}")
        faults += [f"{path.name} is left behind" for path in self._folder.iterdir()]
        return Round("strangers", STREAMS, faults)
