from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import load_file, save_file

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats import Segment, TensorSpec, layout_file, read_header, safetensors
from mindformers_ckpt.formats.dtypes import by_name

FLOAT32 = by_name("float32")
INT8 = by_name("int8")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


def encode(header: object, contents: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + contents


def entry(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


W = entry("F32", [2], 0, 8)


def test_golden_bytes(file: Path, write_file: Any) -> None:
    # Written by mindspore.save_checkpoint(..., format="safetensors") 2.10.0.
    golden = (
        b'\x58\0\0\0\0\0\0\0{"__metadata__":{"format":"ms"},'
        b'"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}  \x80?\0\0'
    )
    spec = TensorSpec("w", by_name("bfloat16"), (2,))
    layout = layout_file("safetensors", [spec])
    write_file(file, layout, {"w": b"\x80?\0\0"})
    assert file.read_bytes() == golden
    header = read_header(file)
    assert header.tensors == {"w": (spec, (Segment(96, 4),))}
    assert (header.path, header.format, header.size, header.crc) == (file, "safetensors", 100, None)
    assert header.metadata == {"format": "ms"}


def test_wide_types_come_first_and_all_are_aligned() -> None:
    names = ["bool", "float16", "float64", "int8", "float32", "int64", "bfloat16", "uint8"]
    layout = layout_file("safetensors", [TensorSpec(name, by_name(name), (3,)) for name in names])
    assert list(layout.tensors) == [
        "float64", "int64", "float32", "float16", "bfloat16", "bool", "int8", "uint8",
    ]  # fmt: skip
    for spec, segments in layout.tensors.values():
        assert segments[0].offset % spec.dtype.itemsize == 0
    assert len(layout.frames[0][1]) % 8 == 0


def test_metadata_of_a_written_file(file: Path, write_file: Any) -> None:
    specs = [TensorSpec("w", FLOAT32, ())]
    write_file(file, layout_file("safetensors", specs, {"format": "pt", "版本": "1", "crc_num": "5"}), {})
    assert read_header(file).metadata == {"format": "pt", "版本": "1"}
    with safe_open(file, framework="np") as opened:
        assert opened.metadata() == {"format": "pt", "版本": "1"}


def test_int4_is_int8_with_a_mark(file: Path, write_file: Any) -> None:
    specs = [TensorSpec("q", by_name("qint4x2"), (2,)), TensorSpec("w", INT8, (1,))]
    write_file(file, layout_file("safetensors", specs), {})
    header = read_header(file)
    assert [record.spec for record in header.tensors.values()] == specs
    assert header.metadata == {"format": "ms", "q": "Int4"}
    assert load_file(file)["q"].dtype == np.int8


@pytest.mark.parametrize("name", ["str", "hifloat8", "complex128"])
def test_types_that_the_format_lacks(name: str) -> None:
    with pytest.raises(FormatError, match=f"tensor 'w': .safetensors has no element type {name}"):
        layout_file("safetensors", [TensorSpec("w", by_name(name), (4,))])


@pytest.mark.parametrize("name", ["__metadata__", "w\ud800"])
def test_names_that_cannot_be_written(name: str) -> None:
    with pytest.raises(FormatError, match="tensor"):
        layout_file("safetensors", [TensorSpec(name, INT8, (1,))])
    with pytest.raises(FormatError, match="'w' is to be written twice"):
        layout_file("safetensors", [TensorSpec("w", INT8, (1,))] * 2)


def test_the_header_limit_holds_for_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "HEADER_LIMIT", 100)
    with pytest.raises(FormatError, match="header would take 104 bytes, over 100"):
        layout_file("safetensors", [TensorSpec("w" * 20, INT8, (1,))])


def test_files_of_the_reference_library(file: Path, read_content: Any) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.int16).reshape(2, 3),
        "a": np.array(True),
        "e": np.zeros((0, 4), np.float32),
        "层": np.arange(4, dtype=np.float64),
        "u": np.arange(3, dtype=np.uint32),
    }
    save_file(arrays, file, metadata={"format": "np"})
    header = read_header(file)
    assert header.metadata == {"format": "np"}
    assert set(header.tensors) == set(arrays)
    for name, array in arrays.items():
        record = header.tensors[name]
        assert (record.spec.dtype.name, record.spec.shape) == (array.dtype.name, array.shape)
        assert read_content(file, record) == array.tobytes()
    save_file({}, file)
    assert read_header(file).tensors == {}


def test_the_reference_library_reads_our_files(file: Path, write_file: Any) -> None:
    dtypes = [
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64",
    ]  # fmt: skip
    specs = [TensorSpec(f"层.{name}", by_name(name), (2, 3)) for name in dtypes]
    specs += [TensorSpec("scalar", FLOAT32, ()), TensorSpec("empty", FLOAT32, (0, 2))]
    rng = np.random.default_rng(0)
    contents = {spec.name: rng.integers(0, 2, spec.nbytes, np.uint8).tobytes() for spec in specs if spec.size}
    write_file(file, layout_file("safetensors", specs), contents)
    found = dict(deserialize(file.read_bytes()))
    assert set(found) == {spec.name for spec in specs}
    for spec in specs:
        tensor = found[spec.name]
        assert (tensor["dtype"], tensor["shape"]) == (spec.dtype.safetensors, list(spec.shape))
        assert bytes(tensor["data"]) == contents.get(spec.name, b"")
    with safe_open(file, framework="np") as opened:
        assert opened.get_tensor("层.float64").tobytes() == contents["层.float64"]
        assert opened.get_tensor("empty").shape == (0, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x58\0\0", "no .safetensors file, or truncated"),
        (encode({"w": W}, bytes(8))[:-1], "contents end at byte .*, the file at byte"),
        (encode({"w": W}, bytes(9)), "contents end at byte"),
        (encode({"w": W})[:40], "truncated: the header ends at byte"),
        (encode(b" {}"), "no .safetensors file"),
        (encode(b"{}")[:8] + b"[]", "no .safetensors file"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "no .safetensors file"),
        (b"\xff" * 8 + b"{}", "no .safetensors file"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (b"\x0a\x18\x0a\x01w" + bytes(60), "looks like a .ckpt file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (encode(b"{}{}"), "not valid JSON"),
        (encode(b'{"\xff": 1}'), "not valid JSON"),
        (encode(b"{" + b'"a":{' * 100_000), "not valid JSON"),
        (encode(b'{"w": NaN}'), "NaN is not JSON"),
        (encode(b'{"\\ud800":' + json.dumps(W).encode() + b"}", bytes(8)), "not valid JSON"),
        (encode(b'{"w":1,"w":2}'), "the key 'w' appears twice"),
        (encode(b'{"w":{"dtype":"F32","dtype":"F32"}}'), "the key 'dtype' appears twice"),
        (encode({"__metadata__": {"a": 1}}), "must map strings to strings"),
        (encode({"__metadata__": []}), "must map strings to strings"),
        (encode({"__metadata__": {"a": None}}), "must map strings to strings"),
        (encode({"w": []}), "'w' is not a JSON object"),
        (encode({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)), "'w' is not of the form"),
        (encode({"w": entry("F32", [2.0], 0, 8)}, bytes(8)), "'w' is not of the form"),
        (encode({"w": entry("F32", [True, 2], 0, 8)}, bytes(8)), "'w' is not of the form"),
        (encode({"w": entry("F32", [-2], 0, 8)}, bytes(8)), "'w' is not of the form"),
        (encode({"w": entry("F32", [2], "0", 8)}, bytes(8)), "'w' is not of the form"),
        (encode({"w": {**W, "data_offsets": [0, 4, 8]}}, bytes(8)), "'w' is not of the form"),
        (encode({"w": entry("F7", [2], 0, 8)}, bytes(8)), "'w': unknown .safetensors element type 'F7'"),
        (encode({"w": entry("F8_E8M0", [8], 0, 8)}, bytes(8)), "'w': unknown .safetensors element type"),
        (encode({"w": entry("F32", [3], 0, 8)}, bytes(8)), "'w' .* needs 12 bytes and has 8"),
        (encode({"w": entry("F32", [2], 8, 0)}, bytes(8)), "'w' begins at byte 8"),
        (encode({"w": entry("F32", [2], 1, 9)}, bytes(9)), "'w' begins at byte 1 of the contents, not at 0"),
        (encode({"w": W, "v": entry("I8", [1], 7, 8)}, bytes(8)), "'v' begins at byte 7 .* not at 8"),
        (encode({"w": W, "v": entry("I8", [1], 9, 10)}, bytes(10)), "'v' begins at byte 9 .* not at 8"),
        (encode({"w": W, "v": W}, bytes(8)), "'v' begins at byte 0 .* not at 8"),
        (encode({"w": entry("F32", [2**62, 4], 0, 0)}), "overflows"),
        (encode({"w": entry("F32", [2**63, 2**63, 0], 0, 0)}), "overflows"),
        (encode({"w": entry("F32", [2**64, 0], 0, 0)}), "not of the form"),
        (encode({"w": entry("F32", [0, 2**62, 2**62], 0, 0)}), "overflows"),
        (encode({"w": entry("F32", [1] * 65, 0, 4)}, bytes(4)), "'w' has 65 dimensions"),
        (encode(b'{"w":1e999}'), "'w' is not a JSON object"),
    ],
)
def test_broken_files(data: bytes, message: str, file: Path) -> None:
    file.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_metadata_of_null_is_none(file: Path) -> None:
    file.write_bytes(encode({"__metadata__": None, "w": W}, bytes(8)))
    assert list(load_file(file)) == list(read_header(file).tensors) == ["w"]
    assert read_header(file).metadata == {}


def test_a_cut_at_any_byte_is_noticed(file: Path) -> None:
    data = encode({"w": W, "v": entry("I8", [], 8, 9)}, bytes(9))
    for size in range(len(data)):
        file.write_bytes(data[:size])
        with pytest.raises(FormatError, match=file.name):
            read_header(file)


def test_a_claimed_header_of_100_mb_is_not_allocated(file: Path) -> None:
    file.write_bytes((99_999_999).to_bytes(8, "little") + b"{" + bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="truncated"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["F32", "I8", "U16"]),
            st.lists(st.integers(0, 3), max_size=2),
            st.integers(-1, 12),
            st.integers(-1, 24),
        ),
        max_size=3,
    ),
    st.integers(0, 24),
)
def test_the_reference_library_accepts_the_same_files(
    file: Path, entries: list[tuple[str, list[int], int, int]], size: int
) -> None:
    data = encode({f"t{i}": entry(*fields) for i, fields in enumerate(entries)}, bytes(size))
    file.write_bytes(data)
    try:
        expected = {name: tensor["shape"] for name, tensor in deserialize(data)}
    except SafetensorError:
        expected = None
    try:
        found = {name: list(record.spec.shape) for name, record in read_header(file).tensors.items()}
    except FormatError:
        found = None
    assert found == expected


def test_headers_of_the_reference_library_need_no_json_parser(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {f"layers.{i}.wä": np.full((2, 3), i, np.float16) for i in range(5)}
    save_file({**arrays, "step": np.array(7)}, file, {"format": "ms", "a": "} , {"})
    monkeypatch.setattr(safetensors, "_as_json", None)
    header = read_header(file)
    assert header.metadata == {"format": "ms", "a": "} , {"}
    assert {name: record.spec.shape for name, record in header.tensors.items()} == {
        **dict.fromkeys(arrays, (2, 3)),
        "step": (),
    }


_ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(["a", "ab", "ä", "", 'q"', "__metadata__", "x\n", "\\"]),
        st.sampled_from(["F32", "I8", "F9"]),
        st.lists(st.integers(0, 2), max_size=2),
        st.integers(-1, 9),
    ),
    max_size=3,
)
_SPOILT = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2), st.sampled_from([*'",:{}[] 0129-.e\\ü\n\x00'])))


@settings(deadline=None, max_examples=1000)
@given(
    entries=_ENTRIES,
    metadata=st.sampled_from([None, {}, {"format": "ms"}, {"a": "Int4"}, {"a": "},"}, {"a": 1}]),
    spoilt=_SPOILT,
    size=st.integers(0, 24),
)
def test_a_header_says_the_same_however_it_is_parsed(
    file: Path, entries: list[tuple[str, str, list[int], int]], metadata: Any, spoilt: list[Any], size: int
) -> None:
    """Headers as they are written, some with letters put in, replaced or taken out."""
    parts = [] if metadata is None else [f'"__metadata__":{json.dumps(metadata, separators=(",", ":"))}']
    at = 0
    for name, code, shape, length in entries:
        written = json.dumps(entry(code, shape, at, at + length), separators=(",", ":"))
        parts.append(f"{json.dumps(name, ensure_ascii=False)}:{written}")
        at += length
    text = "{" + ",".join(parts) + "}"
    for place, dropped, letter in spoilt:
        place %= len(text)
        text = text[:place] + letter + text[place + dropped :]
    data = text.encode()
    file.write_bytes(len(data).to_bytes(8, "little") + data + bytes(size))
    assert _outcome(file) == _outcome(file, _as_plain=lambda text: None)


def _outcome(file: Path, **replaced: Any) -> object:
    """What a header says, or why it is refused."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(safetensors, name, value)
        try:
            header = safetensors.scan(file)
        except FormatError as error:
            return str(error)
        return header.metadata, list(header.tensors.items())
