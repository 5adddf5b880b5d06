from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.strategies import DrawFn
from safetensors import deserialize

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats import TensorSpec, ckpt_layout, file_size, layout_file, read_header
from mindformers_ckpt.formats.dtypes import by_name

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
COMMON = ["bool", "int8", "int64", "uint16", "float16", "bfloat16", "float32", "float64", "float8_e5m2"]


@st.composite
def tensor_specs(draw: DrawFn, dtypes: list[str]) -> list[TensorSpec]:
    specs = []
    for name in draw(st.lists(NAMES, unique=True, max_size=8)):
        dtype = by_name(draw(st.sampled_from(dtypes)))
        shape = draw(SHAPES) if dtype.name != "str" else (4 * draw(st.integers(1, 9)),)
        specs.append(TensorSpec(name, dtype, shape))
    return specs


def contents_of(specs: list[TensorSpec]) -> dict[str, bytes]:
    """Different bytes for each tensor, none of them 0."""
    return {
        spec.name: bytes(1 + (7 * i + j) % 255 for j in range(spec.nbytes)) for i, spec in enumerate(specs) if spec.size
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


@settings(deadline=None)
@given(
    specs=tensor_specs([*COMMON, "complex64", "complex128", "hifloat8", "qint4x2", "str"]),
    limit=st.integers(36, 100),  # the longest str; one of several records is not of this world
)
def test_a_ckpt_says_what_was_written(
    specs: list[TensorSpec], limit: int, folder: Path, write_file: Any, read_content: Any
) -> None:
    specs.append(TensorSpec("__metadata__", by_name("int8"), ()))
    contents = contents_of(specs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ckpt_layout, "RECORD_LIMIT", limit)
        layout = layout_file("ckpt", specs)
        assert file_size("ckpt", specs) == layout.size
    path = write_file(folder / "model.ckpt", layout, contents)
    header = read_header(path)
    assert header.tensors == layout.tensors
    assert list(header.tensors) == [spec.name for spec in specs if spec.size]
    assert [record.spec for record in header.tensors.values()] == [spec for spec in specs if spec.size]
    assert {name: read_content(path, record) for name, record in header.tensors.items()} == contents
    assert header.size == layout.size == path.stat().st_size


@settings(deadline=None)
@given(specs=tensor_specs([*COMMON, "complex64", "qint4x2"]))
def test_a_safetensors_file_says_what_was_written(
    specs: list[TensorSpec], folder: Path, write_file: Any, read_content: Any
) -> None:
    layout = layout_file("safetensors", specs)
    assert file_size("safetensors", specs) == layout.size
    contents = contents_of(specs)
    path = write_file(folder / "model.safetensors", layout, contents)
    header = read_header(path)
    assert header.tensors == layout.tensors
    assert list(header.tensors) == list(layout.tensors)
    assert {record.spec for record in header.tensors.values()} == set(specs)
    for name, record in header.tensors.items():
        assert read_content(path, record) == contents.get(name, b"")
        assert all(segment.offset % record.spec.dtype.itemsize == 0 for segment in record.segments)
    for name, tensor in deserialize(path.read_bytes()):
        assert bytes(tensor["data"]) == contents.get(name, b"")
        assert tuple(tensor["shape"]) == header.tensors[name].spec.shape


@settings(deadline=None)
@given(garbage=st.binary(max_size=200).map(lambda tail: b"\x0a" + tail))
def test_garbage_is_refused(garbage: bytes, folder: Path) -> None:
    path = folder / "garbage.ckpt"
    path.write_bytes(garbage)
    with pytest.raises(FormatError, match=r"garbage\.ckpt"):
        read_header(path)


@settings(deadline=None)
@given(data=st.data())
def test_a_flipped_bit_in_a_head_is_refused_or_stays_in_bounds(
    data: st.DataObject, folder: Path, write_file: Any
) -> None:
    specs = [TensorSpec(f"layer.{i}", by_name("float32"), (2, i + 1)) for i in range(4)]
    layout = layout_file("ckpt", specs)
    path = write_file(folder / "flipped.ckpt", layout, {})
    offset, frame = data.draw(st.sampled_from(layout.frames))
    position = offset + data.draw(st.integers(0, len(frame) - 1))
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except FormatError:
        return
    for record in header.tensors.values():
        assert sum(segment.length for segment in record.segments) == record.spec.nbytes
        assert all(0 < segment.offset <= len(raw) - segment.length for segment in record.segments)
