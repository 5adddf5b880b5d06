"""What MindSpore itself does with checkpoint files, and that ours are the same to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

from mindspore.train import serialization  # noqa: E402
from mindspore.train.checkpoint_pb2 import Checkpoint  # noqa: E402

from mindformers_ckpt.errors import FormatError  # noqa: E402
from mindformers_ckpt.formats import TensorSpec, ckpt_crc, ckpt_layout, layout_file, read_header  # noqa: E402
from mindformers_ckpt.formats.dtypes import by_name  # noqa: E402

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
LOADABLE = ["bool_", *INTEGERS, "float16", "bfloat16", "float32", "float64", "qint4x2"]
SAVED_BUT_NOT_LOADABLE = ["complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "hifloat8"]


def tensor(name: str, shape: tuple[int, ...] = (2, 3)) -> Any:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    return ms.Tensor(values, getattr(ms.dtype, name))


def save(path: Path, tensors: dict[str, Any], **options: Any) -> Path:
    ms.save_checkpoint([{"name": name, "data": data} for name, data in tensors.items()], str(path), **options)
    return path


@pytest.fixture
def rewrite(write_file: Callable[..., Path], read_content: Any) -> Callable[[Path], Path]:
    """Write what a file holds with our own layout, in a new file."""

    def write(path: Path) -> Path:
        header = read_header(path)
        specs = [record.spec for record in header.tensors.values()]
        contents = {name: read_content(path, record) for name, record in header.tensors.items() if record.segments}
        layout = layout_file(header.format, specs, header.metadata)
        return write_file(path.with_stem(path.stem + "_ours"), layout, contents)

    return write


@pytest.mark.parametrize("name", LOADABLE + SAVED_BUT_NOT_LOADABLE)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_ckpt_of_every_type(name: str, shape: tuple[int, ...], tmp_path: Path, rewrite: Any) -> None:
    data = tensor(name, shape)
    saved = save(tmp_path / "model.ckpt", {"w": data, "b": tensor("float32")})
    record = read_header(saved).tensors["w"]
    assert record.spec == TensorSpec("w", by_name(name.removesuffix("_")), shape)
    assert record.spec.dtype.ckpt == str(data.dtype)
    ours = rewrite(saved)
    assert ours.read_bytes() == saved.read_bytes()
    if name in LOADABLE:
        loaded = ms.load_checkpoint(str(ours))["w"]
        assert (loaded.dtype, loaded.shape) == (data.dtype, data.shape)
        assert bytes(loaded.get_bytes()) == bytes(data.get_bytes())
    else:
        with pytest.raises(ValueError, match=record.spec.dtype.ckpt):
            ms.load_checkpoint(str(ours))


def test_ckpt_with_appended_values(tmp_path: Path, rewrite: Any) -> None:
    values = {"text": "层x", "no_text": "", "step": 3, "scale": 2.5, "done": True}
    saved = save(tmp_path / "model.ckpt", {"w": tensor("float32")}, append_dict=values)
    specs = [record.spec for record in read_header(saved).tensors.values()]
    assert [(spec.name, spec.dtype.name, spec.shape) for spec in specs[1:]] == [
        ("text", "str", (8,)),
        ("no_text", "str", (4,)),
        ("step", "int64", ()),
        ("scale", "float32", ()),
        ("done", "bool", ()),
    ]
    ours = rewrite(saved)
    assert ours.read_bytes() == saved.read_bytes()
    assert ms.load_checkpoint(str(ours))["text"] == "层x"


def test_a_cut_tensor(tmp_path: Path, rewrite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # in KiB
    monkeypatch.setattr(ckpt_layout, "RECORD_LIMIT", 1024)
    tensors = {"w": tensor("bfloat16", (5, 307)), "exact": tensor("int64", (4, 64)), "b": tensor("int8")}
    saved = save(tmp_path / "model.ckpt", tensors)
    header = read_header(saved)
    assert [segment.length for segment in header.tensors["w"].segments] == [1024, 1024, 1022]
    assert [segment.length for segment in header.tensors["exact"].segments] == [1024, 1024]
    ours = rewrite(saved)
    assert ours.read_bytes() == saved.read_bytes()
    assert bytes(ms.load_checkpoint(str(ours))["w"].get_bytes()) == bytes(tensors["w"].get_bytes())


@pytest.mark.filterwarnings("ignore:getName:DeprecationWarning")
def test_a_tensor_cut_by_the_asynchronous_way(
    tmp_path: Path, read_content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    tensors = {"w": tensor("float32", (3, 100)), "row": tensor("float32", (1, 300))}
    saved = save(tmp_path / "model.ckpt", tensors, async_save="thread")
    serialization._wait_async_thread_save_ckpt()
    header = read_header(saved)
    assert [segment.length for segment in header.tensors["w"].segments] == [800, 400]
    assert [segment.length for segment in header.tensors["row"].segments] == [1200]  # and an empty record
    for name, data in tensors.items():
        assert read_content(saved, header.tensors[name]) == bytes(data.get_bytes())


def test_tensors_without_elements(tmp_path: Path) -> None:
    tensors = {"none": tensor("float32", (0,)), "w": tensor("float32"), "no_rows": tensor("float32", (0, 3))}
    saved = save(tmp_path / "model.ckpt", tensors)
    assert list(read_header(saved).tensors) == ["w"]

    # Why ours leaves them out as well: a record of shape (0,) comes back as a scalar, without an error.
    for dims, shape in [([0], ()), ([0, 3], (0, 3))]:
        message = Checkpoint()
        value = message.value.add(tag="none")
        value.tensor.dims.extend(dims)
        value.tensor.tensor_type = "Int8"
        value.tensor.tensor_content = b""
        path = tmp_path / "hand_made.ckpt"
        path.write_bytes(saved.read_bytes() + message.SerializeToString())
        assert ms.load_checkpoint(str(path))["none"].shape == shape
        assert read_header(path).tensors["none"].spec.shape == tuple(dims)


def test_crc_trailer(tmp_path: Path, rewrite: Any) -> None:
    saved = save(tmp_path / "model.ckpt", {"w": tensor("float32")}, crc_check=True)
    ckpt_crc.verify_crc(read_header(saved))
    ours = rewrite(saved)
    ckpt_crc.append_crc(ours)
    assert ours.read_bytes() == saved.read_bytes()
    assert ms.load_checkpoint(str(ours), crc_check=True)["w"].shape == (2, 3)


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_encrypted_files(mode: str, tmp_path: Path) -> None:
    key = b"0123456789ABCDEF"
    saved = save(tmp_path / "model.ckpt", {"w": tensor("float32")}, enc_key=key, enc_mode=mode)
    with pytest.raises(FormatError, match="encrypted"):
        read_header(saved)


def test_map_parameters(tmp_path: Path) -> None:
    # As serialization._write_mapparameter builds it; a CPU cannot fill a MapParameter.
    message = Checkpoint()
    table = message.value.add(tag="table").maptensor.tensor.add(dims=[2], tensor_type="int32")
    table.tensor_content = bytes(8)
    path = tmp_path / "model.ckpt"
    path.write_bytes(message.SerializeToString())
    with pytest.raises(FormatError, match="'table' is a MapParameter"):
        read_header(path)


def test_an_empty_checkpoint(tmp_path: Path) -> None:
    saved = save(tmp_path / "model.ckpt", {})
    assert saved.stat().st_size == 0
    with pytest.raises(ValueError, match="empty"):
        ms.load_checkpoint(str(saved))
    with pytest.raises(FormatError, match="empty"):
        read_header(saved)


@pytest.mark.parametrize("name", LOADABLE)
@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_safetensors_of_every_type(name: str, shape: tuple[int, ...], tmp_path: Path, rewrite: Any) -> None:
    data = tensor(name, shape)
    saved = save(tmp_path / "model.safetensors", {"w": data}, format="safetensors")
    assert read_header(saved).tensors["w"].spec == TensorSpec("w", by_name(name.removesuffix("_")), shape)
    ours = rewrite(saved)
    if name != "qint4x2":  # has two keys in its metadata, which MindSpore writes in changing order
        assert ours.read_bytes() == saved.read_bytes()
    loaded = ms.load_checkpoint(str(ours), format="safetensors")["w"]
    assert (loaded.dtype, loaded.shape) == (data.dtype, data.shape)
    if data.size:
        assert bytes(loaded.get_bytes()) == bytes(data.get_bytes())


@pytest.mark.parametrize("name", SAVED_BUT_NOT_LOADABLE)
def test_safetensors_of_types_that_mindspore_does_not_load(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if name == "complex64":
        save(path, {"w": tensor(name)}, format="safetensors")
        assert read_header(path).tensors["w"].spec.dtype.name == "complex64"
    else:
        with pytest.raises(Exception, match="is not covered"):
            save(path, {"w": tensor(name)}, format="safetensors")


def test_metadata_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"w": tensor("float32")}, format="safetensors", remove_redundancy=True)
    assert read_header(path).metadata == {"format": "ms", "remove_redundancy": "True"}
    save(path, {"w": tensor("float32")}, format="safetensors", crc_check=True)
    assert set(read_header(path).metadata) == {"format", "crc_num"}


def test_safetensors_of_many_tensors(tmp_path: Path, rewrite: Any) -> None:
    tensors = {f"{name}.{i}": tensor(name, (i + 1, 3)) for i, name in enumerate(LOADABLE)}
    ours = rewrite(save(tmp_path / "model.safetensors", tensors, format="safetensors"))
    loaded = ms.load_checkpoint(str(ours), format="safetensors")
    for name, data in tensors.items():
        assert loaded[name].dtype == data.dtype
        assert bytes(loaded[name].get_bytes()) == bytes(data.get_bytes())
