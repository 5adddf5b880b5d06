#!/usr/bin/env python3
"""Damage a result again and again, and count what `verify` finds: python tools/damage_results.py --times 100000

Small results are made of each kind (`--kind`: rank folders of `.ckpt` or `.safetensors` files, a checkpoint 2.0, a
converted model, merged weights) with what `--recorded` says: fingerprints, hashes, both, or nothing; then `.ckpt` files
are compared with their source, which knows nothing of what the head of a `.safetensors` file says beside its tensors,
nor of texts. Each time one of these is done to one of them: a bit of a
weight file is flipped, of its header, of the record of fingerprints in the manifest, or of a text beside the weights
(metadata.json, config.json …); the shards of a tensor are exchanged between two ranks, or two tensors of one size in a
file; files of ranks are exchanged; a file is replaced by that of another step; a file is cut off. Exits with 1 when
something was not found.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkout  # noqa: E402, F401 - finds the package of this checkout
import huggingface  # noqa: E402
import numpy as np  # noqa: E402
from recorded import Tensor, random_bits, write_tensors  # noqa: E402

import mindformers_ckpt as mc  # noqa: E402
from mindformers_ckpt.api.merge_lora import MergeRequest  # noqa: E402
from mindformers_ckpt.convert.request import Request  # noqa: E402
from mindformers_ckpt.convert.run import convert  # noqa: E402
from mindformers_ckpt.errors import CheckpointError  # noqa: E402
from mindformers_ckpt.execution.options import Options  # noqa: E402
from mindformers_ckpt.formats import read_header  # noqa: E402
from mindformers_ckpt.formats.dtypes import by_name  # noqa: E402
from mindformers_ckpt.geometry.layout import Layout  # noqa: E402
from mindformers_ckpt.look.verify import verify  # noqa: E402
from mindformers_ckpt.look.whole import checkpoint_at  # noqa: E402
from mindformers_ckpt.lora_scaling import Scaling  # noqa: E402
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


class Made(NamedTuple):
    """A result, what `verify` needs to be told of it, and the files that the same run makes of another step."""

    root: Path
    strategy: Strategy | None
    source: Path | None
    other: dict[Path, bytes]

    @property
    def weights(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.suffix in (".ckpt", ".safetensors"))

    @property
    def texts(self) -> list[Path]:
        """Files beside the weights, but for the manifest."""
        found = (
            path for path in self.root.rglob("*") if path.is_file() and path.suffix not in (".ckpt", ".safetensors")
        )
        return sorted(path for path in found if path.name != "manifest.json")

    def is_found(self, recorded: str) -> bool:
        """Whether `verify` says that something is wrong."""
        try:
            against = self.source if recorded == "nothing" else None
            return not verify(self.root, self.strategy, against=against, contents="off").ok
        except CheckpointError:
            return True


def make_kind(kind: str, folder: Path, recorded: str) -> Made:
    """A result of a kind, with the files of another step."""
    results = []
    for step in (0, 1):
        here = folder / f"{kind} {recorded} {step}"
        here.mkdir(parents=True)
        results.append(KINDS[kind](here, step, **RECORDED[recorded]))
    (root, strategy, source), (other, _, _) = results
    files = {root / path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()}
    return Made(root, strategy, source, files)


def model_of(step: int) -> dict[str, Tensor]:
    """The tensors of MODEL, and one more of the shape of another; those of another step differ in all values."""
    chance = np.random.default_rng(100 + step)
    forms = [(name, told.dtype, told.bits.shape) for name, told in MODEL.items()]
    forms.append(("bias", MODEL["norm"].dtype, MODEL["norm"].bits.shape))
    return {name: random_bits(dtype, shape, chance) for name, dtype, shape in forms}


def _resliced(folder: Path, step: int, format: str, **options: Any) -> tuple[Path, Strategy | None, Path | None]:
    source, target = write_tensors(folder / "source.ckpt", model_of(step)), strategy_of(folder)
    mc.transform(source, folder / "result", dst_strategy=target, format=format, **options)
    return folder / "result", None if format == "checkpoint2" else target, source


def _converted(folder: Path, step: int, **options: Any) -> tuple[Path, Strategy | None, Path | None]:
    names = huggingface.llama_shapes()
    tensors = {name: huggingface.random_tensor(f"{step}{name}", shape) for name, shape in names.items()}
    huggingface.write_folder(folder / "source", tensors, huggingface.decoder_config())
    request = Request("llama", folder / "source", qkv_concat=True)
    convert(request, folder / "whole.safetensors")
    back = Request("llama", folder / "whole.safetensors", True, hf_config=folder / "source")
    convert(back, folder / "result", options=Options(**options))
    return folder / "result", None, None


def _merged(folder: Path, step: int, **options: Any) -> tuple[Path, Strategy | None, Path | None]:
    target = folder / "strategy/ckpt_strategy_rank_0.ckpt"
    write_strategy({"layer.weight": Layout.on(_MESH, "mp", "dp")}, target)
    chance, dtype = np.random.default_rng(40 + step), by_name("float32")
    shapes = {"layer.weight": (16, 16), "other.weight": (8, 8), "layer.lora_a": (4, 16), "layer.lora_b": (16, 4)}
    write_tensors(folder / "source.ckpt", {name: random_bits(dtype, shape, chance) for name, shape in shapes.items()})
    plan = MergeRequest(
        folder / "source.ckpt", folder / "result", None, target, None, Scaling(2.0), format="safetensors"
    ).prepare()
    plan.run(Options(**options), None)
    return folder / "result", read_strategy(target), None


KINDS: dict[str, Callable[..., tuple[Path, Strategy | None, Path | None]]] = {
    "ckpt": partial(_resliced, format="ckpt"),
    "safetensors": partial(_resliced, format="safetensors"),
    "checkpoint2": partial(_resliced, format="checkpoint2"),
    "converted": _converted,
    "merged": _merged,
}


def _changed(chance: random.Random, path: Path, first: int, last: int) -> None:
    flip(path, chance.randrange(first, last), chance.randrange(8))


def flip_a_bit(made: Made, chance: random.Random) -> None:
    path = chance.choice(made.weights)
    _changed(chance, path, 0, path.stat().st_size)


def flip_in_a_header(made: Made, chance: random.Random) -> None:
    """Of a .ckpt file, whose heads are between its tensors, in the first of them."""
    path = chance.choice(made.weights)
    _changed(chance, path, 0, min(span.offset for told in read_header(path).tensors.values() for span in told.segments))


def flip_in_the_fingerprints(made: Made, chance: random.Random) -> None:
    path = made.root / "manifest.json"
    text = path.read_bytes()
    first = text.index(b'"fingerprints"')
    last = min(at for at in (text.find(b'"source_fingerprint"'), text.find(b'"sources"')) if at > 0)
    _changed(chance, path, first, last)


def flip_in_a_text(made: Made, chance: random.Random) -> None:
    path = chance.choice(made.texts)
    _changed(chance, path, 0, path.stat().st_size)


def cut_off(made: Made, chance: random.Random) -> None:
    path = chance.choice(made.weights)
    path.write_bytes(path.read_bytes()[: chance.randrange(1, path.stat().st_size)])


def exchange_files(made: Made, chance: random.Random) -> None:
    one, other = chance.sample(made.weights, 2)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def exchange_shards(made: Made, chance: random.Random) -> None:
    """The contents of one tensor of two files."""
    _exchange(chance.choice(_pairs(made, lambda one, other: one[0] != other[0] and one[1] == other[1])))


def exchange_tensors(made: Made, chance: random.Random) -> None:
    """The contents of two tensors of one file."""
    _exchange(chance.choice(_pairs(made, lambda one, other: one[0] == other[0])))


def of_another_step(made: Made, chance: random.Random) -> None:
    path = chance.choice(made.weights)
    path.write_bytes(made.other[path])


_Place = tuple[Path, str, int, bytes]  # a tensor in a file: where it begins, and its bytes


def _pairs(made: Made, fits: Callable[[_Place, _Place], bool]) -> list[tuple[_Place, _Place]]:
    """The pairs of tensors of one size, and of different bytes."""
    places: list[_Place] = []
    for path in made.weights:
        data = path.read_bytes()
        for name, told in read_header(path).tensors.items():
            start, length = told.segments[0]
            places.append((path, name, start, data[start : start + length]))
    pairs = itertools.combinations(places, 2)
    return [(a, b) for a, b in pairs if len(a[3]) == len(b[3]) and a[3] != b[3] and fits(a, b)]


def _exchange(pair: tuple[_Place, _Place]) -> None:
    one, other = pair
    for (path, _, start, _), (_, _, _, content) in ((one, other), (other, one)):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(content)


Damage = Callable[[Made, random.Random], None]
WAYS: tuple[Damage, ...] = (
    flip_a_bit,
    flip_in_a_header,
    exchange_shards,
    exchange_files,
    of_another_step,
    exchange_tensors,
    cut_off,
    flip_in_the_fingerprints,
    flip_in_a_text,
)


def comes_up(way: Damage, made: Made, recorded: str) -> bool:
    """Whether there is what a way of damage needs."""
    if way is exchange_shards:
        return bool(_pairs(made, lambda one, other: one[0] != other[0] and one[1] == other[1]))
    if way is exchange_tensors:
        return bool(_pairs(made, lambda one, other: one[0] == other[0]))
    if way is exchange_files:
        return len({path.read_bytes() for path in made.weights}) == len(made.weights) > 1
    if way is flip_in_the_fingerprints:
        return "fingerprints" in RECORDED[recorded]
    if way is flip_in_a_text:
        return bool(made.texts) and recorded != "nothing"
    return True


class Outcome(NamedTuple):
    """How often each way was tried, and each time that it was not found: its number and the way."""

    tried: Counter[str]
    missed: list[tuple[int, str]]


def damage(folder: Path, times: int, recorded: str = "fingerprints", seed: int = 1, kind: str = "ckpt") -> Outcome:
    """Damage a result of a kind again and again."""
    made, chance = make_kind(kind, folder, recorded), random.Random(seed)
    whole = {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file()}
    ways = [way for way in WAYS if comes_up(way, made, recorded)]
    outcome = Outcome(Counter(), [])
    for number in range(times):
        way = ways[number % len(ways)]
        way(made, chance)
        outcome.tried[way.__name__] += 1
        if not made.is_found(recorded):
            outcome.missed.append((number, way.__name__))
        for path, data in whole.items():
            path.write_bytes(data)
    if made.is_found(recorded):
        raise SystemExit("the result that was put back as it was does not pass")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--recorded", choices=RECORDED, default="fingerprints")
    parser.add_argument("--kind", choices=KINDS, action="append", help="one of all; may be given again")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    kinds = options.kind or (list(KINDS) if options.recorded != "nothing" else ["ckpt"])
    outcome = Outcome(Counter(), [])
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            found = damage(Path(folder), options.times // len(kinds), options.recorded, options.seed, kind)
            outcome.tried.update(found.tried)
            outcome.missed.extend((number, f"{way} ({kind})") for number, way in found.missed)
    for way, count in outcome.tried.items():
        lost = sum(missed.partition(" ")[0] == way for _, missed in outcome.missed)
        print(f"{way.replace('_', ' ')}: {count} times, {count - lost} found")
    for number, way in outcome.missed[:20]:
        print(f"not found: number {number}, {way}", file=sys.stderr)
    print(f"{time.monotonic() - started:.0f} s")
    return int(bool(outcome.missed))


if __name__ == "__main__":
    sys.exit(main())
