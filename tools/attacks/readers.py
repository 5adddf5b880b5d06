"""Mutated and random files for every reader, as in tools/fuzz.py."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import fuzz
import fuzz_inputs

from attacks.kinds import Round

INPUTS = 500


class Readers:
    """Each round is some hundred inputs for one reader."""

    def __init__(self, folder: Path) -> None:
        self._cases = {name: fuzz.Case(name, folder) for name in fuzz_inputs.READERS}
        fuzz.limit_memory()

    def round(self, seed: int) -> Round:
        chance = random.Random(seed)
        name = chance.choice(list(self._cases))
        case = self._cases[name]
        for number, data in enumerate(itertools.islice(fuzz_inputs.inputs(chance, name), INPUTS)):
            try:
                case.run(data)
            except Exception as error:
                fault = f"input {number}: {type(error).__name__}: {error}; {data[:2000].hex()}"
                return Round(name, number + 1, [fault])
        return Round(name, INPUTS, [])
