"""PyTorch files are read without PyTorch, and without running what a pickle asks for."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface as hf
import ml_dtypes
import numpy as np
import pytest

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats import read_header

STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage", "float16": "HalfStorage"}


class Fake:
    """A tensor to be pickled the way torch pickles one: a part of a storage."""

    def __init__(self, array: Any, key: str, storage: Any, first: int = 0, stride: tuple[int, ...] | None = None):
        self.array, self.key, self.storage, self.first = array, key, storage, first
        self.stride = stride or tuple(step // array.itemsize for step in array.strides)


@pytest.fixture
def torch_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Modules with the names that a pickle refers to, so that Python's pickler can write them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*arguments: object) -> None:
        raise AssertionError("only its name is used")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    yield torch


class Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> Any:
        if isinstance(value, Reference):
            storage = getattr(sys.modules["torch"], STORAGES[value.tensor.storage.dtype.name])
            return ("storage", storage, value.tensor.key, "cpu", value.tensor.storage.size)
        return None

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, Fake):
            rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
            hooks: Any = collections.OrderedDict()
            return rebuild, (Reference(value), value.first, value.array.shape, value.stride, False, hooks)
        return NotImplemented


class Reference:
    def __init__(self, tensor: Fake):
        self.tensor = tensor


def pickled(value: object) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def fakes(tensors: Mapping[str, Any]) -> dict[str, Fake]:
    return {name: Fake(array, str(number), array) for number, (name, array) in enumerate(tensors.items())}


def write_zip(path: Path, content: object, tensors: Mapping[str, Fake], **changes: Any) -> None:
    with zipfile.ZipFile(path, "w", changes.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        archive.writestr("archive/byteorder", changes.get("order", "little"))
        for fake in {fake.key: fake for fake in tensors.values()}.values():
            archive.writestr(f"archive/data/{fake.key}", fake.storage.tobytes())


def write_old(path: Path, content: object, tensors: Mapping[str, Fake]) -> None:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    storages = {fake.key: fake.storage for fake in tensors.values()}
    with path.open("wb") as stream:
        for value in (0x1950A86A20F9469CFC6C, 1001, system, content, list(storages)):
            stream.write(pickled(value))
        for storage in storages.values():
            stream.write(struct.pack("<q", storage.size) + storage.tobytes())


Writer = Callable[[Path, object, Mapping[str, Fake]], None]
both = pytest.mark.parametrize("write", [write_zip, write_old], ids=["zip", "old"])


@both
def test_contents_are_byte_ranges(write: Writer, torch_names: object, tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32)
    tensors = {
        "a": Fake(whole[:12].reshape(3, 4), "0", whole),
        "b": Fake(whole[12:].reshape(2, 1, 6), "0", whole, first=12),
        "half": Fake(np.arange(5).astype(ml_dtypes.bfloat16), "1", np.arange(5).astype(ml_dtypes.bfloat16)),
        "scalar": Fake(np.array(7), "2", np.array(7)),
        "column": Fake(whole[:3].reshape(3, 1), "0", whole, stride=(1, 99)),
    }
    write(tmp_path / "a.bin", tensors, tensors)
    found = hf.read_file(tmp_path / "a.bin")
    hf.assert_equal(found, {name: fake.array for name, fake in tensors.items()})


@both
@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_weights_beside_other_things(write: Writer, wrapper: str, torch_names: object, tmp_path: Path) -> None:
    tensors = fakes({"a": np.arange(3, dtype=np.float32)})
    content = {wrapper: collections.OrderedDict(tensors), "epoch": 3, "config": types.SimpleNamespace(x=1)}
    write(tmp_path / "a.pth", content, tensors)
    assert list(read_header(tmp_path / "a.pth").tensors) == ["a"]


class Exploit:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of the file was run')",)


@both
def test_no_code_is_run(write: Writer, torch_names: object, tmp_path: Path) -> None:
    tensors: dict[str, Any] = fakes({"a": np.arange(3, dtype=np.float32)})
    write(tmp_path / "a.bin", {**tensors, "b": Exploit()}, tensors)
    with pytest.raises(FormatError, match="beside tensors it holds"):
        read_header(tmp_path / "a.bin")
    write(tmp_path / "b.bin", {"model": tensors, "b": Exploit()}, tensors)
    assert list(read_header(tmp_path / "b.bin").tensors) == ["a"]
    write(tmp_path / "c.bin", Exploit(), {})
    with pytest.raises(FormatError, match="holds no dictionary of tensors"):
        read_header(tmp_path / "c.bin")


def test_what_cannot_be_read_in_ranges_is_refused(torch_names: object, tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32)
    for tensor, said in (
        (Fake(array.reshape(3, 4), "0", array, stride=(1, 3)), "not contiguous"),
        (Fake(array.reshape(3, 4), "0", array[:6]), "larger than its storage"),
        (Fake(array.reshape(3, 4), "0", array, first=4), "larger than its storage"),
    ):
        write_zip(tmp_path / "a.bin", {"a": tensor}, {"a": tensor})
        with pytest.raises(FormatError, match=said):
            read_header(tmp_path / "a.bin")
    tensors = fakes({"a": np.zeros(4000, np.float32)})
    write_zip(tmp_path / "b.bin", tensors, tensors, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="compressed"):
        read_header(tmp_path / "b.bin")
    write_zip(tmp_path / "c.bin", tensors, tensors, order="big")
    with pytest.raises(FormatError, match="big-endian"):
        read_header(tmp_path / "c.bin")


@both
def test_every_truncation_is_an_error(write: Writer, torch_names: object, tmp_path: Path) -> None:
    tensors = fakes({"a": np.arange(3, dtype=np.float32), "b": np.arange(4, dtype=np.int64)})
    write(tmp_path / "a.bin", tensors, tensors)
    data = (tmp_path / "a.bin").read_bytes()
    for length in range(len(data)):
        (tmp_path / "a.bin").write_bytes(data[:length])
        with pytest.raises(FormatError):
            read_header(tmp_path / "a.bin")


def test_damage_is_never_another_error(torch_names: object, tmp_path: Path) -> None:
    tensors = fakes({"a": np.arange(3, dtype=np.float32)})
    write_old(tmp_path / "a.bin", tensors, tensors)
    data = (tmp_path / "a.bin").read_bytes()
    for position in range(len(data)):
        for byte in (0, 0x80, 0xFF, data[position] ^ 1):
            (tmp_path / "a.bin").write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
            try:
                read_header(tmp_path / "a.bin")
            except FormatError:
                continue


@both
def test_a_model_in_numbered_files(write: Writer, torch_names: object, tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes())
    source = hf.write_folder(tmp_path / "safetensors", tensors, hf.decoder_config())
    convert(Request("llama", source), tmp_path / "expected.ckpt")
    names = list(tensors)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "config.json").write_bytes((source / "config.json").read_bytes())
    for number, chosen in ((1, names[:9]), (2, names[9:])):
        part = fakes({name: tensors[name] for name in chosen})
        write(tmp_path / "torch" / f"pytorch_model-0000{number}-of-00002.bin", part, part)
    convert(Request("llama", tmp_path / "torch"), tmp_path / "found.ckpt")
    assert (tmp_path / "found.ckpt").read_bytes() == (tmp_path / "expected.ckpt").read_bytes()
