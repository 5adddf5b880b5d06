#!/usr/bin/env python3
"""Damage a result again and again, and count what `verify` finds: python tools/damage_results.py --times 100000

A small result is made with what `--recorded` says (fingerprints, hashes, both, or nothing: then it is compared with its
source). Each time one of these is done to it: a bit of a file is flipped, the shards of a tensor are exchanged between
two ranks, files of ranks are exchanged, a file is cut off. Exits with 1 when something was not found.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkout  # noqa: E402, F401 - finds the package of this checkout
import numpy as np  # noqa: E402
from recorded import random_bits, write_tensors  # noqa: E402

from mindformers_ckpt.execution.options import Options  # noqa: E402
from mindformers_ckpt.formats import read_header  # noqa: E402
from mindformers_ckpt.formats.dtypes import by_name  # noqa: E402
from mindformers_ckpt.geometry.layout import Layout  # noqa: E402
from mindformers_ckpt.look.verify import verify  # noqa: E402
from mindformers_ckpt.look.whole import checkpoint_at  # noqa: E402
from mindformers_ckpt.planning.build import build_plan  # noqa: E402
from mindformers_ckpt.strategy.files import read_strategy, write_strategy  # noqa: E402
from mindformers_ckpt.strategy.model import Strategy  # noqa: E402
from mindformers_ckpt.transform import transform  # noqa: E402

_RANDOM = np.random.default_rng(11)
MODEL = {
    "matrix": random_bits(by_name("float32"), (32, 48), _RANDOM),
    "cube": random_bits(by_name("bfloat16"), (8, 12, 6), _RANDOM),
    "norm": random_bits(by_name("float32"), (48,), _RANDOM),
    "step": random_bits(by_name("int32"), (), _RANDOM),
}
_MESH = {"dp": 2, "mp": 2}
LAYOUTS = {
    "matrix": Layout.on(_MESH, None, "mp"),
    "cube": Layout.on(_MESH, "dp", "mp", None),
    "norm": Layout.on(_MESH, None),
}
RECORDED: dict[str, dict[str, Any]] = {
    "fingerprints": {"fingerprints": True},
    "hashes": {"hashes": True},
    "both": {"hashes": True, "fingerprints": True},
    "nothing": {},
}


def strategy_of(folder: Path) -> Strategy:
    """The strategy of the result in a folder; it is written there if it is not yet."""
    file = folder / "strategy/ckpt_strategy_rank_0.ckpt"
    if not file.exists():
        write_strategy(LAYOUTS, file)
    return read_strategy(file)


def make(folder: Path, format: str = "ckpt", **options: Any) -> Path:
    """Write source.ckpt, the strategy, and a result for its 4 ranks."""
    source, target = write_tensors(folder / "source.ckpt", MODEL), strategy_of(folder)
    about = {"source": "complete weights", "target": target.describe()}
    plan = build_plan(checkpoint_at(source), target, format=format)
    return transform(plan, folder / "result", Options(**options), about=about).destination


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip a bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def file_of(result: Path, rank: int) -> Path:
    return result / f"rank_{rank}/checkpoint_{rank}.ckpt"


def flip_a_bit(result: Path, chance: random.Random) -> None:
    file = file_of(result, chance.randrange(4))
    flip(file, chance.randrange(file.stat().st_size), chance.randrange(8))


def exchange_files(result: Path, chance: random.Random) -> None:
    order = list(range(4))
    while order == sorted(order):
        chance.shuffle(order)
    contents = [file_of(result, rank).read_bytes() for rank in range(4)]
    for rank, other in enumerate(order):
        file_of(result, rank).write_bytes(contents[other])


def exchange_shards(result: Path, chance: random.Random) -> None:
    """Exchange the contents of one tensor between two ranks that hold other boxes of it."""
    name = chance.choice(["matrix", "cube"])
    files = [file_of(result, rank) for rank in chance.choice([(0, 1), (2, 3), (0, 3), (1, 2)])]
    spans = [read_header(file).tensors[name].segments[0] for file in files]
    parts = [file.read_bytes()[span.offset : span.offset + span.length] for file, span in zip(files, spans)]
    for file, span, part in zip(files, spans, reversed(parts)):
        data = bytearray(file.read_bytes())
        data[span.offset : span.offset + span.length] = part
        file.write_bytes(data)


def cut_off(result: Path, chance: random.Random) -> None:
    file = file_of(result, chance.randrange(4))
    file.write_bytes(file.read_bytes()[: chance.randrange(1, file.stat().st_size)])


WAYS: tuple[Callable[[Path, random.Random], None], ...] = (
    flip_a_bit,
    flip_a_bit,
    flip_a_bit,
    exchange_shards,
    exchange_files,
    cut_off,
)


class Outcome(NamedTuple):
    """How often each way was tried, and each time that it was not found: its number and the way."""

    tried: Counter[str]
    missed: list[tuple[int, str]]


def damage(folder: Path, times: int, recorded: str = "fingerprints", seed: int = 1) -> Outcome:
    """Damage a result in a folder again and again."""
    result, chance = make(folder, **RECORDED[recorded]), random.Random(seed)
    strategy = strategy_of(folder)
    source = folder / "source.ckpt" if recorded == "nothing" else None
    whole = {rank: file_of(result, rank).read_bytes() for rank in range(4)}
    outcome = Outcome(Counter(), [])
    for number in range(times):
        way = WAYS[number % len(WAYS)]
        way(result, chance)
        outcome.tried[way.__name__] += 1
        if verify(result, strategy, against=source, contents="off").ok:
            outcome.missed.append((number, way.__name__))
        for rank, data in whole.items():
            file_of(result, rank).write_bytes(data)
    if not verify(result, strategy, against=source, contents="off").ok:
        raise SystemExit("the result that was put back as it was does not pass")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--recorded", choices=RECORDED, default="fingerprints")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = damage(Path(folder), options.times, options.recorded, options.seed)
    for way, count in outcome.tried.items():
        lost = sum(missed == way for _, missed in outcome.missed)
        print(f"{way.replace('_', ' ')}: {count} times, {count - lost} found")
    for number, way in outcome.missed[:20]:
        print(f"not found: number {number}, {way}", file=sys.stderr)
    print(f"{time.monotonic() - started:.0f} s")
    return int(bool(outcome.missed))


if __name__ == "__main__":
    sys.exit(main())
