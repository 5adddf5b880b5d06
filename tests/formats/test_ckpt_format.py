from __future__ import annotations

import os
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest

from mindformers_ckpt.errors import FormatError, TransferError
from mindformers_ckpt.formats import (
    Header,
    Segment,
    TensorSpec,
    ckpt,
    ckpt_crc,
    ckpt_layout,
    layout_file,
    read_header,
    tensor_file,
)
from mindformers_ckpt.formats.dtypes import by_name

FLOAT32 = by_name("float32")
INT8 = by_name("int8")
MIB = 1024 * 1024


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def field(key: int, content: bytes) -> bytes:
    return bytes([key]) + varint(len(content)) + content


def record(
    name: str | bytes, dims: list[int], type_name: str | bytes, content: bytes, tensor_field: int = 0x12
) -> bytes:
    """One record as protobuf would write it."""
    raw_name = name.encode() if isinstance(name, str) else name
    raw_type = type_name.encode() if isinstance(type_name, str) else type_name
    tensor = b"".join(b"\x08" + varint(n % 2**64) for n in dims) + field(0x12, raw_type) + field(0x1A, content)
    return field(0x0A, field(0x0A, raw_name) + field(tensor_field, tensor))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.ckpt"


def scan_bytes(file: Path, data: bytes) -> dict[str, Any]:
    file.write_bytes(data)
    return read_header(file).tensors


def refusal(file: Path, data: bytes) -> str:
    """The message with which a file is refused; it names the file."""
    file.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


# Written by mindspore.save_checkpoint 2.10.0.
GOLDEN = [
    ("bool", (2,), b"\n\x11\n\x01w\x12\x0c\x08\x02\x12\x04Bool\x1a\x02", b"\x01\x00"),
    ("int8", (2,), b"\n\x11\n\x01w\x12\x0c\x08\x02\x12\x04Int8\x1a\x02", b"\x01\x00"),
    ("uint16", (2,), b"\n\x15\n\x01w\x12\x10\x08\x02\x12\x06UInt16\x1a\x04", b"\x01\0\0\0"),
    ("bfloat16", (2,), b"\n\x17\n\x01w\x12\x12\x08\x02\x12\x08BFloat16\x1a\x04", b"\x80?\0\0"),
    ("float32", (2,), b"\n\x1a\n\x01w\x12\x15\x08\x02\x12\x07Float32\x1a\x08", b"\0\0\x80?\0\0\0\0"),
    ("float32", (), b"\n\x14\n\x01w\x12\x0f\x12\x07Float32\x1a\x04", b"\0\0@@"),
    ("float64", (2,), b'\n"\n\x01w\x12\x1d\x08\x02\x12\x07Float64\x1a\x10', bytes(16)),
    ("complex64", (2,), b"\n$\n\x01w\x12\x1f\x08\x02\x12\tComplex64\x1a\x10", bytes(16)),
    ("float8_e4m3fn", (2,), b"\n\x19\n\x01w\x12\x14\x08\x02\x12\x0cFloat8E4M3FN\x1a\x02", b"8\0"),
    ("float8_e5m2", (2,), b"\n\x17\n\x01w\x12\x12\x08\x02\x12\nFloat8E5M2\x1a\x02", b"<\0"),
    ("hifloat8", (2,), b"\n\x15\n\x01w\x12\x10\x08\x02\x12\x08HiFloat8\x1a\x02", b"\x08\0"),
    ("qint4x2", (2,), b"\n\x11\n\x01w\x12\x0c\x08\x02\x12\x04Int4\x1a\x02", b"\x01\0"),
    ("str", (20,), b'\n"\n\x01w\x12\x1d\x08\x00\x12\x03str\x1a\x14', "hello".encode("utf-32-le")),
]


@pytest.mark.parametrize(("dtype", "shape", "head", "content"), GOLDEN)
def test_golden_records(
    dtype: str, shape: tuple[int, ...], head: bytes, content: bytes, file: Path, write_file: Any
) -> None:
    spec = TensorSpec("w", by_name(dtype), shape)
    layout = layout_file("ckpt", [spec])
    assert layout.frames == ((0, head),)
    write_file(file, layout, {"w": content})
    assert file.read_bytes() == head + content

    header = read_header(file)
    assert header.tensors == {"w": (spec, (Segment(len(head), len(content)),))}
    assert (header.path, header.format, header.size) == (file, "ckpt", len(head + content))
    assert (header.metadata, header.crc) == ({}, None)


def test_dims_and_lengths_over_one_byte(file: Path, write_file: Any) -> None:
    content = bytes(range(256)) * 129
    write_file(file, layout_file("ckpt", [TensorSpec("w" * 200, INT8, (129, 256))]), {"w" * 200: content})
    assert file.read_bytes() == record("w" * 200, [129, 256], "Int8", content)
    assert b"\x08\x81\x01\x08\x80\x02\x12\x04Int8\x1a\x80\x82\x02" in file.read_bytes()


def test_order_names_and_scalars(file: Path) -> None:
    data = (
        record("层.weight", [2, 3], "Float16", bytes(12))
        + record("step", [0], "Int64", bytes(8))
        + record("scale", [], "Float32", bytes(4))
        + record("", [1], "Int8", b"x")
    )
    tensors = scan_bytes(file, data)
    assert [(spec.name, spec.dtype.name, spec.shape) for spec, _ in tensors.values()] == [
        ("层.weight", "float16", (2, 3)),
        ("step", "int64", ()),
        ("scale", "float32", ()),
        ("", "int8", (1,)),
    ]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_tensors_without_elements_are_read_but_not_written(shape: tuple[int, ...], file: Path) -> None:
    empty = TensorSpec("e", FLOAT32, shape)
    tensors = scan_bytes(file, record("e", list(shape), "Float32", b"") + record("w", [1], "Int8", b"x"))
    assert tensors["e"] == (empty, ())

    layout = layout_file("ckpt", [empty, TensorSpec("w", INT8, (1,))])
    assert list(layout.tensors) == ["w"]
    with pytest.raises(FormatError, match="at least one tensor with elements"):
        layout_file("ckpt", [empty])


def test_the_dims_of_a_str_are_ignored(file: Path) -> None:
    tensors = scan_bytes(file, record("s", [7], "str", "ab".encode("utf-32-le")))
    assert tensors["s"].spec.shape == (8,)


# Tensors of several records


@pytest.mark.parametrize(
    ("nbytes", "lengths"),
    [
        (512 * MIB - 1, [512 * MIB - 1]),
        (512 * MIB, [512 * MIB]),
        (512 * MIB + 1, [512 * MIB, 1]),
        (1024 * MIB, [512 * MIB, 512 * MIB]),
        (1024 * MIB + 7, [512 * MIB, 512 * MIB, 7]),
    ],
)
def test_tensors_are_cut_every_512_mib(nbytes: int, lengths: list[int]) -> None:
    layout = layout_file("ckpt", [TensorSpec("w", INT8, (nbytes,)), TensorSpec("b", INT8, (1,))])
    segments = layout.tensors["w"].segments
    assert [segment.length for segment in segments] == lengths
    assert len(layout.frames) == len(lengths) + 1
    end = 0
    for (offset, frame), segment in zip(layout.frames, [*segments, layout.tensors["b"].segments[0]]):
        assert offset == end
        assert segment.offset == offset + len(frame)
        end = segment.offset + segment.length
    assert layout.size == end
    assert all(b"\x08" + varint(nbytes) in frame for _, frame in layout.frames[:-1])  # full dims in each


def test_a_sparse_file_over_2_gib_is_read_by_its_heads_only(
    file: Path, write_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [TensorSpec("embedding", FLOAT32, (640, MIB)), TensorSpec("bias", FLOAT32, (3,))]
    layout = layout_file("ckpt", specs)
    assert layout.size > 2**31
    write_file(file, layout, {})
    fetched = count_fetched_bytes(monkeypatch)
    header = read_header(file)
    assert header.tensors == layout.tensors
    assert len(header.tensors["embedding"].segments) == 5
    assert sum(fetched) <= 8 * 512


def count_fetched_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    fetched: list[int] = []
    pread = os.pread

    def counting_pread(descriptor: int, length: int, offset: int) -> bytes:
        data = pread(descriptor, length, offset)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counting_pread)
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)  # all is read by pread then
    return fetched


def test_small_records_share_a_window(file: Path, write_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [TensorSpec(f"layer.{i}.scale", FLOAT32, ()) for i in range(2000)]
    write_file(file, layout_file("ckpt", specs), {})
    fetched = count_fetched_bytes(monkeypatch)
    assert len(read_header(file).tensors) == 2000
    assert len(fetched) < 2000 / 8


def test_pieces_cut_along_dimension_0(file: Path) -> None:
    # numpy.array_split, the asynchronous way of save_checkpoint: 3 rows in 2 pieces.
    data = record("w", [3, 2], "Int8", b"abcd") + record("w", [3, 2], "Int8", b"ef")
    spec, segments = scan_bytes(file, data)["w"]
    assert spec.shape == (3, 2)
    assert b"".join(data[offset : offset + length] for offset, length in segments) == b"abcdef"


def test_an_empty_last_piece(file: Path) -> None:
    # numpy.array_split of 1 row in 2 pieces.
    data = record("w", [1, 4], "Int8", b"abcd") + record("w", [1, 4], "Int8", b"") + record("b", [1], "Int8", b"x")
    tensors = scan_bytes(file, data)
    assert [segment.length for segment in tensors["w"].segments] == [4]
    assert list(tensors) == ["w", "b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (record("w", [2], "Int8", b"a") + record("b", [1], "Int8", b"x"), "'w' .* lacks 1 bytes"),
        (record("w", [2], "Int8", b"a"), "'w' .* lacks 1 bytes"),
        (record("w", [2], "Int8", b"abc"), "'w' .* has 1 bytes too many"),
        (record("w", [2], "Int8", b"ab") * 2, "'w' .* has 2 bytes too many"),
        (record("w", [2], "Int8", b"a") + record("w", [3], "Int8", b"b"), "'w' differ in dims or type"),
        (record("w", [2], "Int8", b"a") + record("w", [2], "UInt8", b"b"), "'w' differ in dims or type"),
        (record("w", [], "Float32", b""), "'w' .* lacks 4 bytes"),
        (record("w", [0], "Float32", bytes(8)), "'w' .* has 4 bytes too many"),
        (record("w", [0, 2], "Int8", b"a"), "'w' .* has 1 bytes too many"),
        (record("w", [2**62, 4], "Int8", b"a"), "'w': the shape .* overflows"),
        (record("w", [2**62, 2**62, 0], "Int8", b""), "'w': the shape .* overflows"),
        (record("w", [1] * 65, "Int8", b"a"), "'w' has 65 dimensions"),
    ],
)
def test_contents_must_fit_the_shape(data: bytes, message: str, file: Path) -> None:
    file.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_header(file)


def test_a_name_may_not_appear_twice(file: Path) -> None:
    data = record("w", [1], "Int8", b"a") + record("b", [1], "Int8", b"x")
    message = refusal(file, data + record("w", [1], "Int8", b"a"))
    assert "tensor 'w' appears a second time" in message
    assert f"at byte {len(data)}" in message
    assert "last good tensor 'b'" in message
    with pytest.raises(FormatError, match="'w' is to be written twice"):
        layout_file("ckpt", [TensorSpec("w", INT8, (1,))] * 2)


# Damaged and foreign files


def test_a_cut_at_any_byte_is_noticed(file: Path, write_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt_layout, "RECORD_LIMIT", 16)
    specs = [TensorSpec("a", FLOAT32, (3,)), TensorSpec("b", FLOAT32, (10,)), TensorSpec("c" * 200, INT8, ())]
    layout = layout_file("ckpt", specs)
    assert len(layout.frames) == 5
    write_file(file, layout, {"b": b"0123456789" * 4})
    data = file.read_bytes()
    ends = [record.segments[-1].offset + record.segments[-1].length for record in layout.tensors.values()]
    for size in range(1, len(data)):
        if size in ends:  # whole tensors only: this cut cannot be seen
            assert list(scan_bytes(file, data[:size])) == list(layout.tensors)[: ends.index(size) + 1]
            continue
        message = refusal(file, data[:size])
        complete = sum(end < size for end in ends)
        assert ["before any tensor", "last good tensor 'a'", "last good tensor 'b'"][complete] in message
        assert f" of {size}, " in message


def test_a_cut_trailer_is_noticed(file: Path) -> None:
    data = record("w", [1], "Int8", b"a")
    file.write_bytes(data)
    ckpt_crc.append_crc(file)
    complete = file.read_bytes()
    for size in range(len(data) + 1, len(complete)):
        assert "last good tensor 'w'" in refusal(file, complete[:size])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a", "truncated"),
        (b"\x0a\xff\xff\xff\xff\x0f", "reaches over the end of the file"),
        (b"\x0a" + b"\xff" * 11, "longer than 10 bytes"),
        (b"\n\n\n\n\n\n\n\n\n\n\n\n", "damaged or no MindSpore checkpoint"),
        (record("w", [-1], "Int8", b""), "tensor 'w' has a negative dimension"),
        (record(b"\xff", [1], "Int8", b"a"), "not UTF-8"),
        (record("w", [1], b"\xff", b"a"), "not UTF-8"),
        (
            record("w", [1], "Int7", b"a"),
            "tensor 'w': unknown .ckpt element type 'Int7'.*save it with a known",
        ),
        (
            record("m", [1], "Int8", b"a", tensor_field=0x1A),
            "'m' is a MapParameter .*save the checkpoint without it",
        ),
        (field(0x0A, field(0x12, b"") + field(0x0A, b"w")), "lacks field 1"),
        (field(0x0A, field(0x0A, b"w") + field(0x22, b"")), "lacks field 2"),
        (
            field(0x0A, field(0x0A, b"w") + field(0x12, b"\x12\x04Int8")) + bytes(9),
            "contradict|lacks field 3",
        ),
        (b"\x0a\x03\x0a\x09w" + bytes(20), "contradict each other"),
        (field(0x0A, field(0x0A, b"w") + field(0x12, field(0x1A, b""))), "lacks field 2"),
        (record("w", [1], "Int8", b"a") + b"garbage", "no record begins here"),
    ],
)
def test_malformed_records(data: bytes, message: str, file: Path) -> None:
    file.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_header(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xd8\x5e\x3a\x7f" + bytes(60), "encrypted.*dec_key"),
        (b"\xd9\x5e\x3a\x7f" + bytes(60), "encrypted"),
        (b"\xda\x5e\x3a\x7f" + bytes(60), "encrypted"),
        (b"PK\x03\x04" + bytes(60), "zip archive.*PyTorch"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\x58\0\0\0\0\0\0\0{", "safetensors"),
        (b"\x08\x00\x12\x0b\x0a\x01w", "strategy file"),
        (b'{"stage_0": {}}', "strategy file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"\xde\xad\xbe\xef", "begins with de ad be ef"),
        (b"crc_num" + bytes(10), "no MindSpore checkpoint"),
        (b"", "empty"),
    ],
)
def test_foreign_files(data: bytes, message: str, file: Path) -> None:
    file.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_header(file)


def test_paths_that_are_no_readable_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"missing\.ckpt: cannot be read: No such file"):
        read_header(tmp_path / "missing.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        read_header(tmp_path / "folder.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")
    with pytest.raises(FormatError, match="not a regular file"):
        read_header(tmp_path / "pipe.ckpt")
    with pytest.raises(FormatError, match=r"must end in \.ckpt or \.safetensors"):
        read_header(str(tmp_path / "model.h5"))
    with pytest.raises(FormatError, match="unknown checkpoint format 'bin'"):
        layout_file("bin", [])


def test_lengths_of_gigabytes_allocate_nothing(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(b"\x0a" + varint(3 * 2**30) + b"\x0a" + varint(2 * 2**30))
        stream.truncate(4 * 2**30)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="the name and dims of a record take over 262144 bytes"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def test_long_names_and_many_dims_widen_the_window(file: Path) -> None:
    name = "n" * 100_000
    tensors = scan_bytes(file, record(name, [1] * 64, "Int8", b"x") + record("w", [1], "Int8", b"y"))
    assert tensors[name].spec.shape == (1,) * 64
    assert list(tensors) == [name, "w"]


def test_a_name_that_is_no_unicode_is_not_written() -> None:
    with pytest.raises(FormatError, match="not valid Unicode"):
        layout_file("ckpt", [TensorSpec("w\ud800", INT8, (1,))])


# The CRC-32 trailer


def test_the_trailer_is_read_and_verified(file: Path) -> None:
    data = record("w", [1], "Int8", b"a")
    file.write_bytes(data + b"crc_num" + zlib.crc32(data).to_bytes(10, "big"))
    header = read_header(file)
    assert header.crc == zlib.crc32(data)
    assert list(header.tensors) == ["w"]
    ckpt_crc.verify_crc(header)

    file.write_bytes(data[:-1] + b"b" + file.read_bytes()[len(data) :])
    with pytest.raises(FormatError, match=r"model\.ckpt: damaged: .* stores " + f"{zlib.crc32(data):08x}"):
        ckpt_crc.verify_crc(read_header(file))


def test_append_crc(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt_crc, "_CRC_BLOCK", 7)
    data = record("w", [3], "Int8", b"abc")
    file.write_bytes(data)
    with pytest.raises(FormatError, match="no CRC-32 trailer"):
        ckpt_crc.verify_crc(read_header(file))
    ckpt_crc.append_crc(file)
    assert file.read_bytes() == data + b"crc_num" + zlib.crc32(data).to_bytes(10, "big")
    ckpt_crc.verify_crc(read_header(file))
    with pytest.raises(FormatError, match="has a CRC-32 trailer already"):
        ckpt_crc.append_crc(file)


def test_append_crc_says_why_it_cannot_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(record("w", [3], "Int8", b"abc"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(TransferError, match="cannot append the CRC-32: Permission denied"):
        ckpt_crc.append_crc(file)


def test_a_tensor_that_ends_like_a_trailer_is_no_trailer(file: Path) -> None:
    # MindSpore looks at the last 17 bytes only, and cannot load this file.
    header_bytes = record("w", [17], "Int8", b"crc_num" + bytes(10))
    assert scan_bytes(file, header_bytes)["w"].spec.nbytes == 17
    assert read_header(file).crc is None


def test_a_trailer_over_32_bits(file: Path) -> None:
    assert "over 32 bits" in refusal(file, record("w", [1], "Int8", b"a") + b"crc_num" + b"\xff" * 10)


# Files that differ in their contents only


@pytest.mark.parametrize("end", [b"", b"crc_num" + (77).to_bytes(10, "big")], ids=["plain", "crc"])
def test_a_file_like_another_one_is_read_as_by_itself(end: bytes, tmp_path: Path) -> None:
    """Whichever byte differs, in a head, in a content or in the trailer."""
    data = record("a", [3], "Int8", b"abc") + record("empty", [0], "Int8", b"") + record("b", [2, 1], "Int16", b"abcd")
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    first.write_bytes(data + end)
    like = ckpt.scan(first)

    def outcome(*other: Header) -> Any:
        try:
            header = ckpt.scan(second, *other)
        except FormatError as error:
            return str(error)
        return header.size, header.tensors, header.crc, header.frames

    shared = 0
    changed = data + end
    for position in range(len(changed) + 1):
        altered = bytearray(changed)
        if position < len(changed):
            altered[position] ^= 1
        second.write_bytes(altered)
        assert outcome(like) == outcome()
        if not isinstance(outcome(like), str):
            shared += ckpt.scan(second, like).tensors is like.tensors
    contents = sum(segment.length for record_ in like.tensors.values() for segment in record_.segments)
    assert shared == contents + 1 + (4 if end else 0)  # a CRC-32 takes 4 of 10 bytes, more is an error
    for other in (data + b"\n", data[:-1], data[: len(data) // 2]):
        second.write_bytes(other)
        assert outcome(like) == outcome()


def test_files_of_a_stage_are_parsed_once(tmp_path: Path, write_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_file("ckpt", [TensorSpec(f"layer.{i}.scale", FLOAT32, (1000,)) for i in range(50)])
    paths = [tmp_path / f"{name}.ckpt" for name in "abc"]
    for path in paths:
        write_file(path, layout, {})
    parsed: list[Any] = []
    parse = ckpt._Scanner._parsed

    def counted(*arguments: Any) -> Any:
        parsed.append(arguments)
        return parse(*arguments)

    monkeypatch.setattr(ckpt._Scanner, "_parsed", counted)
    headers = [read_header(paths[0])]
    count = len(parsed)
    headers += [read_header(path, headers[0]) for path in paths[1:]]
    assert count >= 50
    assert len(parsed) == count
    assert all(header.tensors is headers[0].tensors for header in headers)
    assert [header.path for header in headers] == paths


def test_the_last_headers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_KEPT", 4)
    monkeypatch.setattr(tensor_file, "_recent", {})
    paths = [tmp_path / f"{number}.ckpt" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(record(f"w{number}", [1], "Int8", b"a"))
    headers = [read_header(path) for path in paths]
    assert [read_header(path) is header for path, header in zip(paths[2:], headers[2:])] == [True] * 4
    assert read_header(paths[0]) is not headers[0]
    assert len(tensor_file._recent) == 4
    paths[5].write_bytes(record("other", [1], "Int8", b"a"))
    assert list(read_header(paths[5]).tensors) == ["other"]
