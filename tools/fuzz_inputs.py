"""Files for the fuzzers: whole ones drawn at random, the broken ones of tests/data/broken, and mutations of both."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import make_broken as made

# Reader -> the suffix of its files and their folder in the corpus.
READERS = {
    "ckpt": (".ckpt", ""),
    "safetensors": (".safetensors", ""),
    "torch": (".bin", ""),
    "strategy": (".ckpt", "strategy"),
    "strategy_json": (".json", "strategy"),
    "plan": (".json", "plan"),
    "index": (".json", "index"),
}
WORDS = [
    *(b"", b"\0", b"\xff" * 9 + b"\x01", b"[" * 70, b"1e999", b"NaN", b'"', b"-1", b"true", b"\xed\xa0\x80", b"(" * 70),
]
NUMBERS = [0, 1, 127, 128, 255, 65536, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
VALUES: list[Any] = [0, 1, -1, 3, 2**31, 2**63, 1e308, True, None, "", "w", "../x", "a/b", "\ud800", [], {}, [0], [[]]]
NAMES = [b"w", b"layers.0.weight", b"", b"a/b", "ä".encode(), b"adam_m.w", b"\xff", b"w" * 300]
_TYPES = {b"Float32": 4, b"BFloat16": 2, b"Int8": 1, b"Int64": 8, b"Bool": 1, b"str": 1}
_SAFE_TYPES = {"F32": 4, "BF16": 2, "I8": 1, "I64": 8, "BOOL": 1, "F8_E4M3": 1}


def seeds_of(name: str) -> list[bytes]:
    """Whole files first, and broken ones."""
    chance = random.Random(name)
    suffix, folder = READERS[name]
    broken = [data for path, data in made.FILES.items() if path.endswith(suffix) and path.rpartition("/")[0] == folder]
    return [*(_WHOLE[name](chance) for _ in range(8)), *broken]


def inputs(chance: random.Random, name: str) -> Iterator[bytes]:
    """Without end: whole files, each with some changed forms of it and of broken files."""
    while True:
        whole = _WHOLE[name](chance)
        yield whole
        for _ in range(9):
            yield mutated(chance, whole if chance.random() < 0.6 else chance.choice(_broken(name)))


def _broken(name: str) -> list[bytes]:
    if name not in _seeds:
        _seeds[name] = [data for data in seeds_of(name) if len(data) < 5000 or name == "torch"]
    return _seeds[name]


_seeds: dict[str, list[bytes]] = {}


def mutated(chance: random.Random, data: bytes) -> bytes:
    """The same bytes with a few of them changed."""
    changed = bytearray(data[:20_000])
    for _ in range(chance.choice([1, 1, 2, 3, 6])):
        at = chance.randrange(len(changed) + 1)
        number = chance.choice(NUMBERS).to_bytes(8, "little")
        kind = chance.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del changed[at : at + chance.choice([1, 2, 8, 64])]
        elif kind == 2:
            changed[at:at] = chance.choice(WORDS)
        elif kind == 3:
            changed[at : at + 8] = number
        elif kind == 4:
            changed[at : at + 1] = number[: chance.choice([1, 2, 4])]
        else:
            start = chance.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + chance.choice([1, 8, 64])]
    return bytes(changed)


def _shape(chance: random.Random) -> list[int]:
    return [chance.choice([1, 1, 2, 3, 4, 7, 0]) for _ in range(chance.randrange(4))]


def _count(shape: list[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _ckpt(chance: random.Random) -> bytes:
    records = []
    for number in range(chance.randint(1, 5)):
        shape, kind = _shape(chance), chance.choice(list(_TYPES))
        name = chance.choice([b"t%d" % number, chance.choice(NAMES)])
        content = chance.randbytes(_count(shape) * _TYPES[kind])
        cut = chance.randrange(len(content)) if chance.random() < 0.2 and len(content) > 1 else len(content)
        records += [made.record(name, shape, kind, part) for part in (content[:cut], content[cut:]) if part or not cut]
    return b"".join(records)


def _safetensors(chance: random.Random) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if chance.random() < 0.3 else {}
    end = 0
    for number in range(chance.randint(1, 5)):
        shape, kind = _shape(chance), chance.choice(list(_SAFE_TYPES))
        begin, end = end, end + _count(shape) * _SAFE_TYPES[kind]
        header[f"t{number}"] = made.entry(shape, begin, end, kind)
    return made.safetensors(header, chance.randbytes(end))


def _torch(chance: random.Random) -> bytes:
    small = [b"K" + bytes([chance.choice([0, 1, 2, 3, 6])]) for _ in range(5)]
    shape, stride = small[0] + small[1] + b"\x86", small[2] + small[3] + b"\x86"
    given = made.tensor(shape, stride, small[4]) if chance.random() < 0.6 else made.tensor()
    stream = io.BytesIO(made.torch_zip(made.torch_dict(given)))
    with zipfile.ZipFile(stream, "a") as archive:  # which PyTorch wants, and we do not
        archive.writestr(zipfile.ZipInfo("a/version"), b"3\n")
    return stream.getvalue()


def _layout(chance: random.Random, ranks: int = 8) -> tuple[list[int], list[int]]:
    matrix = []
    while ranks > 1:
        matrix.append(chance.choice([extent for extent in (1, 2, 3, 4, 8) if ranks % extent == 0]))
        ranks //= matrix[-1]
    axes = [chance.choice([-1, axis]) for axis in chance.sample(range(len(matrix)), len(matrix))]
    return matrix, axes


def _strategy(chance: random.Random) -> bytes:
    """Mostly one that can be read: all stages are there, and all layouts are for as many ranks."""
    mark = chance.choice([1, 2, 2])
    ranks = chance.choice([2, 4, 8, 8])
    layouts = {}
    for number in range(chance.randint(2, 5)):
        name = chance.choice([b"t%d" % number] * 9 + NAMES)
        matrix, axes = _layout(chance, ranks if chance.random() < 0.97 else 6)
        layouts[b"%d-%s" % (number % 2, name) if mark == 1 else name] = (matrix, [axis % 2**64 for axis in axes])
    stage, shards = chance.choice([0] * 9 + [1]), chance.choice([0] * 9 + [1, 2])
    return made.strategy(layouts, stage=stage, mark=mark, shards=shards)


def _strategy_json(chance: random.Random) -> bytes:
    matrix, axes = _layout(chance)
    more: dict[str, Any] = {"tensor_shape": [4] * len(axes)} if chance.random() < 0.5 else {}
    return made.flattened(dev_matrix=matrix, tensor_map=axes, **more)


def _plan(chance: random.Random) -> bytes:
    """A plan with a digest that is right, and mostly with something else in it that is not."""
    body = json.loads(made.plan())["plan"]
    for _ in range(chance.choice([0, 1, 1, 2])):
        _change(chance, body)
    try:
        return made.plan(**body)
    except (ValueError, RecursionError):
        return made.plan()


def _change(chance: random.Random, value: Any) -> None:
    """Replace, double or remove something in nested lists and objects."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and chance.random() < 0.8:
            value = value[key]
            continue
        draw = chance.random()
        if draw < 0.7:
            value[key] = deepcopy(chance.choice(VALUES))
        elif draw < 0.85 and isinstance(value, list):
            value.append(deepcopy(value[key]))
        else:
            del value[key]
        return


def _index(chance: random.Random) -> bytes:
    body: dict[str, Any] = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}, "metadata": {"total_size": 1}}
    if chance.random() < 0.6:
        _change(chance, body)
    return json.dumps(body).encode()


_WHOLE: dict[str, Callable[[random.Random], bytes]] = {
    "ckpt": _ckpt,
    "safetensors": _safetensors,
    "torch": _torch,
    "strategy": _strategy,
    "strategy_json": _strategy_json,
    "plan": _plan,
    "index": _index,
}
