"""Files of distributed checkpoints for the fuzzers, and their readers: each file is one of a folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint2_files import SAMPLES
from dcp_files import HOSTILE, TORCH, metadata, saved, split

from mindformers_ckpt.formats import read_header
from mindformers_ckpt.formats.dcp_metadata import read_metadata_file
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.sources import dcp, dcp_safetensors
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.strategy.files import read_metadata

__all__ = ["HOSTILE", "READERS", "checkpoint2", "dcp_metadata", "distcp", "shards"]

Change = Callable[[random.Random, Any], None]

_NAMES = ("w", "layers.0.weight", "ä", "a[0:1]", "w" * 300)
_TYPES = ("float32", "bfloat16", "int64", "bool", "float8_e8m0fnu")
_SHAPES = ((5, 7), (3,), (), (2, 3, 4), (0, 3))


def dcp_metadata(chance: random.Random) -> bytes:
    """A `.metadata`, mostly one that can be read."""
    names = chance.sample(_NAMES, chance.randint(1, 3))
    types = _TYPES if chance.random() < 0.1 else _TYPES[:-1]
    shapes = {name: (chance.choice(types), chance.choice(_SHAPES)) for name in names}
    boxes = {name: split(chance, shape, chance.randrange(4)) for name, (_, shape) in shapes.items()}
    places: dict[tuple[str, Box], dict[str, Any]] = {}
    for name, own in boxes.items():
        for number, box in enumerate(own):
            file = chance.choice([f"__{number % 2}_0.distcp"] * 19 + ["../x", ""])
            places[name, box] = {"relative_path": file, "offset": 100 * number, "length": chance.choice([100, 100, -1])}
    others = ["optim.lr"] if chance.random() < 0.3 else []
    paths: dict[str, Any] = {name: ("model", name) for name in names}
    return metadata(shapes, boxes, places, paths=chance.choice([None, paths]), others=others, library=TORCH)


def distcp(chance: random.Random) -> bytes:
    """A tensor as torch.save writes it."""
    return saved(np.zeros(chance.choice([(5, 7), (7, 5), (35,)]), np.float32))


def checkpoint2(chance: random.Random, change: Change) -> bytes:
    """A metadata.json of MindFormers' own with some of its tensors, and something else in it."""
    content = json.loads(chance.choice(sorted(SAMPLES.glob("*/*/*/metadata.json"))).read_bytes())
    names = chance.sample(sorted(content["state_dict_metadata"]), 2)
    content["state_dict_metadata"] = {name: content["state_dict_metadata"][name] for name in names}
    stored = content["storage_data"]
    content["storage_data"] = {key: stored[key] for key in stored if any(f"'{name}'" in key for name in names)}
    for _ in range(chance.choice([0, 1, 1, 2])):
        change(chance, content)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def shards(chance: random.Random, change: Change) -> bytes:
    """A shard of HuggingFaceStorageWriter."""
    told: Any = {"w": {"saved_offsets": [0, 0]}, "b": {"saved_offsets": [0]}}
    if chance.random() < 0.6:
        change(chance, told)
    header = {
        "__metadata__": {"DCP_SHARDING_INFO": json.dumps(told), "format": "pt"},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(36)


def read_item(path: Path) -> Any:
    """Read a .distcp file that is one item, under metadata that says so."""
    box = Box.whole((5, 7))
    place = {"relative_path": path.name, "offset": 0, "length": path.stat().st_size}
    path.with_name(".metadata").write_bytes(metadata({"w": ("float32", (5, 7))}, {"w": [box]}, {("w", box): place}))
    return read_header(path)


def read_shard(path: Path) -> Any:
    """Read a file as the only shard of its folder."""
    folder = path.parent / "shards"
    folder.mkdir(exist_ok=True)
    link = folder / "shard-00001-model-00001-of-00001.safetensors"
    if not link.exists():
        link.symlink_to(path)
    return dcp_safetensors.read(Listing(folder))


def read_checkpoint2(path: Path) -> Any:
    """Read a metadata.json, and make what of it all readers make."""
    found = read_metadata(path)
    return found, found.strategy(), found.files_by_rank()


def read_dcp_metadata(path: Path) -> Any:
    """Read a `.metadata`, and the folder that it describes; every box must be one of its tensor."""
    folder = path.parent / "dcp"
    folder.mkdir(exist_ok=True)
    if not (folder / ".metadata").exists():
        (folder / ".metadata").symlink_to(path)
        for rank in range(2):
            (folder / f"__{rank}_0.distcp").write_bytes(bytes(1000))
    found = read_metadata_file(path)
    dcp.read(Listing(folder))
    for tensor in found.tensors.values():
        for chunk in tensor.chunks:
            assert Box.whole(tensor.shape).contains(chunk.box), tensor
            assert "/" not in chunk.file
    return found


READERS: dict[str, Callable[[Path], Any]] = {
    "dcp_metadata": read_dcp_metadata,
    "distcp": read_item,
    "checkpoint2": read_checkpoint2,
    "shards": read_shard,
}
