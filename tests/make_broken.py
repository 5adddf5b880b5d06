"""Make the small broken files in tests/data/broken: `python tests/make_broken.py`.

What each of them must give is the table in tests/test_broken_files.py. Nothing of the project is used here.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data" / "broken"
DEEP = 20_000


def varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def field(key: int, content: bytes) -> bytes:
    return bytes([key]) + varint(len(content)) + content


def number(key: int, value: int) -> bytes:
    return bytes([key]) + varint(value & (1 << 64) - 1)


def record(name: bytes, dims: list[int], kind: bytes, content: bytes) -> bytes:
    """A record of a `.ckpt` file."""
    tensor = b"".join(number(0x08, extent) for extent in dims) + field(0x12, kind) + field(0x1A, content)
    return field(0x0A, field(0x0A, name) + field(0x12, tensor))


def strategy(layouts: dict[bytes, tuple[list[int], list[int]]], stage: int = 0, mark: int = 2, **more: Any) -> bytes:
    """A strategy file: name -> device matrix and tensor map."""
    content = number(0x08, mark)
    content += field(0x12, field(0x0A, b"op") + field(0x12, number(0x08, stage)))
    for name, (matrix, tensor_map) in layouts.items():
        layout = field(0x0A, b"".join(number(0x08, extent) for extent in matrix))
        layout += field(0x12, b"".join(number(0x08, axis) for axis in tensor_map))
        layout += field(0x1A, b"".join(number(0x08, size) for size in more.get("sizes", [])))
        layout += field(0x22, b"".join(number(0x08, offset) for offset in more.get("offsets", [])))
        layout += number(0x28, 0) + number(0x30, 0) + number(0x38, more.get("shards", 0))
        content += field(0x1A, field(0x0A, name) + field(0x12, layout))
    return content


def safetensors(header: Any, contents: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + contents


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(kind: str = "FloatStorage", key: str = "0", elements: bytes = b"K\x06") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + elements + b"tQ"


def tensor(shape: bytes = b"K\x02K\x03\x86", stride: bytes = b"K\x03K\x01\x86", first: bytes = b"K\x00") -> bytes:
    """The pickle of a tensor, by the pickles of its parts."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + first + shape + stride + b"\x89NtR"


def torch_zip(
    pickle: bytes, compression: int = zipfile.ZIP_STORED, twice: bool = False, order: bytes = b"little"
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        members = [("a/data.pkl", pickle), ("a/byteorder", order), ("a/data/0", bytes(24))]
        for name, content in members + ([("a/data/00", bytes(24))] if twice else []):
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    data = stream.getvalue()
    return data.replace(b"a/data/00", b"a/data/0\0") if twice else data


def torch_dict(value: bytes) -> bytes:
    return b"\x80\x02}" + text("w") + value + b"s."


def shared(levels: int = 60) -> bytes:
    """A tuple of 2**levels parts, all of them one object; it is number `levels` of the memo."""
    pairs = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))
    return b"K\x00\x85q\x00" + pairs


def plan(**changes: Any) -> bytes:
    """A plan file with a digest that is right, whatever stands in it."""
    body = {
        "about": {"source": "s", "target": "t", "source_path": "/p"}, "partial": False, "destination": None,
        "warnings": [], "sources": [["/nowhere/a.ckpt", 100, 1]],
        "targets": [["rank_0/checkpoint_0.ckpt", 0, "ckpt", 0]], "tensors": [["w", "int8", [4]]], "lists": [[0]],
        "boxes": [[[0], [4]]], "places": [[[0, 0]]], "transfers": [["w", "int8", [4], 0, 0]],
    }  # fmt: skip
    body |= changes
    digest = hashlib.blake2b(json.dumps(body, separators=(",", ":"), sort_keys=True).encode(), digest_size=16)
    return json.dumps({"mindformers_ckpt_plan": 1, "digest": digest.hexdigest(), "plan": body}).encode()


def nested(depth: int = 5_000) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def flattened(**changes: Any) -> bytes:
    """A strategy file in JSON with one layout."""
    layout = {"dev_matrix": [1], "tensor_map": [-1], **changes}
    return json.dumps({"current_stage": 2, "parallel_layout_item": {"w": layout}}).encode()


W = {b"w": ([2], [0])}
BIG = b"\x8a\x08" + struct.pack("<q", 2**62)

FILES: dict[str, bytes] = {
    # Checkpoints of MindSpore
    "overflow.ckpt": record(b"w", [2**62, 2**62], b"Float32", b"abcd"),
    "overflow_hidden_by_zero.ckpt": record(b"w", [2**62, 2**62, 0], b"Float32", b"") + record(b"b", [1], b"Int8", b"x"),
    "dimensions.ckpt": record(b"w", [2**62] * 300, b"Float32", b"abcd"),
    "negative_dimension.ckpt": record(b"w", [-2], b"Int8", b"ab"),
    "name_not_utf8.ckpt": record(b"\xff\xfe", [1], b"Int8", b"a"),
    "truncated.ckpt": record(b"w", [64], b"Int8", bytes(64))[:-10],
    "length_of_gigabytes.ckpt": b"\x0a" + varint(1 << 40) + bytes(20),
    "number_without_end.ckpt": b"\x0a" + b"\xff" * 40,
    "unknown_type.ckpt": record(b"w", [1], b"Float7", b"a"),
    "trailer_over_32_bits.ckpt": record(b"w", [1], b"Int8", b"a") + b"crc_num" + b"\xff" * 10,
    "empty.ckpt": b"",
    "strategy_as_checkpoint.ckpt": strategy(W),
    # safetensors
    "overflow.safetensors": safetensors({"w": entry([2**62, 2**62], 0, 0)}),
    "overflow_behind_zero.safetensors": safetensors({"w": entry([0, 2**62, 2**62], 0, 0)}),
    "true_as_dimension.safetensors": safetensors({"w": entry([True, 2], 0, 8)}, bytes(8)),
    "minus_zero.safetensors": safetensors(b'{"w":{"dtype":"I8","shape":[],"data_offsets":[-0,1]}}', b"1"),
    "nested.safetensors": safetensors(nested()),
    "long_number.safetensors": safetensors(b'{"w":' + b"9" * 5000 + b"}"),
    "key_twice.safetensors": safetensors(b'{"w":1,"w":2}'),
    "header_over_the_end.safetensors": struct.pack("<Q", 90_000_000) + b"{}",
    "half_character.safetensors": safetensors(b'{"\\ud800":1}'),
    "gap.safetensors": safetensors({"w": entry([1], 4, 8)}, bytes(8)),
    # PyTorch
    "no_zip.bin": b"PK\x03\x04" + bytes(40),
    "deflated.bin": torch_zip(b"\x80\x02" + b"(" * 1_000_000, zipfile.ZIP_DEFLATED),
    "entry_twice.bin": torch_zip(torch_dict(tensor()), twice=True),
    "byte_order.bin": torch_zip(torch_dict(tensor()), order=b"l" * 1000),
    "bytes_of_gigabytes.bin": torch_zip(b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"."),
    "marks.bin": torch_zip(b"\x80\x02" + b"(" * 65 + b"."),
    "deep_key.bin": torch_zip(b"\x80\x02})" + b"\x85" * DEEP + b"K\x01s."),
    "deep_tuple_in_set.bin": torch_zip(b"\x80\x04\x8f()" + b"\x85" * DEEP + b"\x90."),
    "shared_key.bin": torch_zip(b"\x80\x02" + shared() + b"0}h\x3cK\x01s."),
    "shared_shape.bin": torch_zip(b"\x80\x02" + shared() + b"0}" + text("w") + tensor(b"h\x3c", b"h\x3c") + b"s."),
    "shared_storage.bin": torch_zip(b"\x80\x02" + shared() + b"0h\x3cQ."),
    "long_number.bin": torch_zip(torch_dict(tensor(b"(\x8b" + struct.pack("<I", 8000) + b"\x7f" * 8000 + b"t"))),
    "true_as_dimension.bin": torch_zip(torch_dict(tensor(b"\x88K\x03\x86"))),
    "short_strides.bin": torch_zip(torch_dict(tensor(stride=b")"))),
    "overflow.bin": torch_zip(torch_dict(tensor(b"(" + BIG + BIG + b"K\x00t", b"K\x01K\x01K\x01\x87"))),
    "two_kinds_of_storage.bin": torch_zip(b"\x80\x02}" + storage() + b"0" + storage("LongStorage") + b"0."),
    "system_call.bin": torch_zip(b"\x80\x02cposix\nsystem\n" + text("exit 7") + b"\x85R."),
    "attribute_of_a_name.bin": torch_zip(
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__defaults__") + b")sb0}."
    ),
    "model_in_itself.bin": torch_zip(b"\x80\x02}q\x00" + text("model") + b"h\x00s."),
    "unknown_instruction.bin": torch_zip(b"\x80\x02\xff."),
    "wrong_magic_old.bin": b"\x80\x02K\x01.\x80\x02K\x01.",
    # Strategies
    "strategy/ranks.ckpt": strategy({b"w": ([1 << 28], [-1])}),
    "strategy/ranks_of_two_axes.ckpt": strategy({b"w": ([2**31 - 1, 2**31 - 1], [0, -1])}),
    "strategy/axes.ckpt": strategy({b"w": ([1] * 65, [-1])}),
    "strategy/no_ranks.ckpt": strategy({b"w": ([0], [-1])}),
    "strategy/stage.ckpt": strategy(W, stage=2**32 - 1),
    "strategy/merged_stage.ckpt": strategy({b"0-w": ([2], [0]), b"999999999999-w": ([2], [0])}, mark=1),
    "strategy/merged_stage_of_5000_digits.ckpt": strategy({b"0-w": W[b"w"], b"9" * 5000 + b"-w": W[b"w"]}, mark=1),
    "strategy/merged_stages_missing.ckpt": strategy({b"0-w": ([2], [0]), b"60000-w": ([2], [0])}, mark=1),
    "strategy/name_not_utf8.ckpt": strategy({b"\xff\xfe": ([2], [0])}),
    "strategy/optimizer_shard.ckpt": strategy(W, shards=2**31 - 1),
    "strategy/manual_split.ckpt": strategy(W, sizes=[64, 32], offsets=[0, 64]),
    "strategy/truncated.ckpt": strategy(W)[:-3],
    "strategy/checkpoint.ckpt": record(b"w", [1], b"Int8", b"a"),
    "strategy/nested.json": nested(),
    "strategy/infinite.json": flattened().replace(b"[1]", b"[1e999]"),
    "strategy/true.json": flattened(dev_matrix=[True]),
    "strategy/long_number.json": flattened().replace(b"[1]", b"[" + b"9" * 5000 + b"]"),
    "strategy/dimensions.json": flattened(tensor_map=[-1] * 65, tensor_shape=[1] * 65),
    "strategy/shape_of_another_map.json": flattened(tensor_shape=[2, 2]),
    # Plans
    "plan/nested.json": nested(),
    "plan/no_object.json": b'{"mindformers_ckpt_plan":1,"digest":"0100","plan":[]}',
    "plan/outside.json": plan(targets=[["rank_0/../../x0.ckpt", 0, "ckpt", 0]]),
    "plan/absolute.json": plan(targets=[["/rank_0/x0.ckpt", 0, "ckpt", 0]]),
    "plan/rank_twice.json": plan(targets=[["rank_0/a0.ckpt", 0, "ckpt", 0], ["rank_0/b0.ckpt", 0, "ckpt", 0]]),
    "plan/negative_number.json": plan(places=[[[-1, 0]]]),
    "plan/file_that_is_not_there.json": plan(places=[[[0, 0]], [[7, 0]]], transfers=[["w", "int8", [4], 0, 1]]),
    "plan/true_as_dimension.json": plan(tensors=[["w", "int8", [True]]]),
    "plan/overflow.json": plan(tensors=[["w", "int8", [2**62, 2**62]]]),
    "plan/box_upside_down.json": plan(boxes=[[[4], [0]]]),
    "plan/box_of_two_dimensions.json": plan(boxes=[[[0, 0], [4, 4]]]),
    "plan/tensor_not_made.json": plan(tensors=[["w", "int8", [4]], ["v", "int8", [4]]], lists=[[0, 1]]),
    "plan/tensor_of_another_shape.json": plan(tensors=[["w", "int8", [3]]]),
    "plan/tensor_of_another_type.json": plan(tensors=[["w", "uint8", [4]]]),
    "plan/made_twice.json": plan(transfers=[["w", "int8", [4], 0, 0], ["w", "int8", [4], 0, 0]]),
    "plan/path_with_nul.json": plan(sources=[["/a\0b", 1, 1]]),
    "plan/destination.json": plan(destination="relative"),
    "plan/about.json": plan(about={"source": ["x"]}),
    "plan/table_missing.json": plan(boxes=None),
    # Indexes of Hugging Face folders
    "index/outside.json": b'{"weight_map":{"a":"../x.safetensors"}}',
    "index/numbers.json": b'{"weight_map":{"a":1}}',
    "index/nested.json": nested(),
    "index/list.json": b'{"weight_map":["a"]}',
    "index/absent.json": b'{"weight_map":{"a":"x.safetensors"}}',
}  # fmt: skip


def main() -> None:
    for name, data in FILES.items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
