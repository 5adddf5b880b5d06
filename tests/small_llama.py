"""A Llama of one layer whose every element tells which checkpoint it is of, so that a mixture of two is seen.

The elements of checkpoint `tag` are the integers from 4096 · tag on, which float32 holds exactly.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from recorded import Tensor, write_tensors

from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import rank_file_name, write_strategy

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 6,
    "vocab_size": 12,
    "tie_word_embeddings": False,
}
# MindSpore's name -> Hugging Face's name and the shape; nothing but names differs.
_TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.tok_embeddings.embedding_weight": ("model.embed_tokens.weight", (12, 8)),
    "model.layers.0.attention_norm.weight": ("model.layers.0.input_layernorm.weight", (8,)),
    "model.layers.0.ffn_norm.weight": ("model.layers.0.post_attention_layernorm.weight", (8,)),
    "model.layers.0.attention.wq.weight": ("model.layers.0.self_attn.q_proj.weight", (16, 8)),
    "model.layers.0.attention.wk.weight": ("model.layers.0.self_attn.k_proj.weight", (8, 8)),
    "model.layers.0.attention.wv.weight": ("model.layers.0.self_attn.v_proj.weight", (8, 8)),
    "model.layers.0.attention.wo.weight": ("model.layers.0.self_attn.o_proj.weight", (8, 16)),
    "model.layers.0.feed_forward.w1.weight": ("model.layers.0.mlp.gate_proj.weight", (6, 8)),
    "model.layers.0.feed_forward.w2.weight": ("model.layers.0.mlp.down_proj.weight", (8, 6)),
    "model.layers.0.feed_forward.w3.weight": ("model.layers.0.mlp.up_proj.weight", (6, 8)),
    "model.norm_out.weight": ("model.norm.weight", (8,)),
    "lm_head.weight": ("lm_head.weight", (12, 8)),
}
ADAPTED = "model.layers.0.attention.wk.weight"
HUGGING_FACE_NAMES = {name: other for name, (other, _) in _TENSORS.items()}

Arrays = dict[str, Any]


def weights(tag: int) -> Arrays:
    """The whole checkpoint under MindSpore's names."""
    found, start = {}, 4096 * tag
    for name, (_, shape) in _TENSORS.items():
        size = math.prod(shape)
        found[name] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        start += size
    return found


def hugging_face_weights(tag: int) -> Arrays:
    return {HUGGING_FACE_NAMES[name]: array for name, array in weights(tag).items()}


def halves(tensors: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    """A checkpoint in two parts."""
    names = list(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    return {name: tensors[name] for name in first}, {name: tensors[name] for name in second}


def shards(tag: int) -> dict[int, Arrays]:
    """What two ranks hold: matrices are cut by rows."""
    return {
        rank: {
            name: array if array.ndim == 1 else np.split(array, 2)[rank].copy() for name, array in weights(tag).items()
        }
        for rank in range(2)
    }


def write_two_ranks_strategy(folder: Path, replicas: int = 1) -> Path:
    """The strategy of `shards`, `replicas` times over."""
    mesh = {"dp": replicas, "mp": 2}
    layouts = {
        name: Layout.on(mesh, "mp", None) if len(shape) == 2 else Layout.on(mesh, None)
        for name, (_, shape) in _TENSORS.items()
    }
    for rank in range(2 * replicas):
        write_strategy(layouts, folder / rank_file_name(rank))
    return folder


def write_mindspore(path: Path, arrays: Mapping[str, Any]) -> Path:
    """A file as MindSpore saves it; the suffix tells the format."""
    kind = by_name("float32")
    return write_tensors(path, {name: Tensor(kind, array.view(kind.carrier)) for name, array in arrays.items()})


def write_pytorch(path: Path, arrays: Mapping[str, Any]) -> Path:
    """A file as transformers saves it: .safetensors, or .bin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        _write_safetensors(path, arrays)
    else:
        _write_bin(path, arrays)
    return path


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def write_index(path: Path, places: Mapping[str, Iterable[str]]) -> Path:
    """An index that assigns tensors to files: file -> names."""
    weight_map = {name: file for file, names in places.items() for name in names}
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return path


def _write_safetensors(path: Path, arrays: Mapping[str, Any]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values()))


def _write_bin(path: Path, arrays: Mapping[str, Any]) -> None:
    """What `torch.save` writes of a state dict: a zip of a pickle and the contents."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little")

    def numbers(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    pickled = b"\x80\x02}("
    for key, (name, array) in enumerate(arrays.items()):
        strides = [step // array.itemsize for step in array.strides]
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu") + number(array.size)
        pickled += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + number(0)
        pickled += numbers(array.shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled + b"u.")
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{key}", array.tobytes())
