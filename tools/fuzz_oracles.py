"""What other libraries make of the same files: what they refuse may not be accepted, and both find the same in it."""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from typing import Any

TRAILER = b"crc_num"
HAS_TORCH = importlib.util.find_spec("torch") is not None


def load() -> None:
    """Import what is large, before the memory is limited."""
    if HAS_TORCH:
        import torch  # noqa: F401


def compare(reader: str, data: bytes, found: Any) -> None:
    """Raises AssertionError where the reader's result cannot be right."""
    if reader in ("ckpt", "safetensors", "torch"):
        for record in found.tensors.values():
            assert sum(segment.length for segment in record.segments) == record.spec.nbytes
            assert all(segment.offset + segment.length <= len(data) for segment in record.segments)
    oracle = {"ckpt": _protobuf, "safetensors": _safetensors, "strategy": _strategy, "torch": _torch}.get(reader)
    if oracle is not None:
        oracle(data, found)
    if reader.startswith("strategy"):
        for layout in (layout for stage in found.stages for layout in stage.values() if layout.rank_count < 4096):
            try:
                layout.cells  # noqa: B018
            except ValueError:
                continue


def _protobuf(data: bytes, header: Any) -> None:
    """Names, types, dims and contents, as the protobuf library reads them."""
    end = data.rfind(TRAILER)
    message = checkpoint_class()()
    message.ParseFromString(data[:end] if header.crc is not None else data)
    contents: dict[str, bytes] = {}
    for value in message.value:
        contents[value.tag] = contents.get(value.tag, b"") + value.tensor.tensor_content
        record = header.tensors[value.tag]
        assert record.spec.dtype.ckpt == value.tensor.tensor_type or value.tensor.tensor_type == "str"
        dims = tuple(value.tensor.dims)
        assert record.spec.shape == dims or dims in ((), (0,)) or value.tensor.tensor_type == "str", (record, dims)
    assert list(contents) == list(header.tensors)
    for name, record in header.tensors.items():
        found = b"".join(data[segment.offset : segment.offset + segment.length] for segment in record.segments)
        assert found == contents[name], name


@cache
def checkpoint_class() -> Any:
    """The message `Checkpoint` of MindSpore, without maps."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="checkpoint.proto", package="fuzz", syntax="proto2")
    messages: dict[str, list[tuple[str, int, Any]]] = {
        "Tensor": [
            ("dims", 1, field.TYPE_INT64),
            ("tensor_type", 2, field.TYPE_STRING),
            ("tensor_content", 3, field.TYPE_BYTES),
        ],
        "Value": [("tag", 1, field.TYPE_STRING), ("tensor", 2, "Tensor")],
        "Checkpoint": [("value", 1, "Value")],
    }
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for title, number, kind in fields:
            label = field.LABEL_REPEATED if title in ("dims", "value") else field.LABEL_OPTIONAL
            if isinstance(kind, str):
                message.field.add(
                    name=title, number=number, label=label, type=field.TYPE_MESSAGE, type_name=f".fuzz.{kind}"
                )
            else:
                message.field.add(name=title, number=number, label=label, type=kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("fuzz.Checkpoint"))


def _safetensors(data: bytes, header: Any) -> None:
    from safetensors import deserialize

    found = {name: (tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in deserialize(data)}
    ours = {}
    for name, record in header.tensors.items():
        content = b"".join(data[segment.offset : segment.offset + segment.length] for segment in record.segments)
        ours[name] = (record.spec.shape, content)
    assert found == ours


def _strategy(data: bytes, strategy: Any) -> None:
    """The names and device matrices that stand in the file."""
    from mindformers_ckpt.strategy.schema import strategy_map_class

    message = strategy_map_class()()
    message.ParseFromString(data)
    written = {item.param_name: item.parallel_layouts for item in message.parallel_layout_item}
    merged = message.current_stage == 1 and all(name.partition("-")[0].isdigit() for name in written)
    names = {name.partition("-")[2] if merged and "-" in name else name for name in written}
    found = {name for stage in strategy.stages for name in stage}
    assert found == names or found == set(written), (found, names)


def _torch(data: bytes, header: Any) -> None:
    """Names and shapes, where this environment has PyTorch and it can read the archive, of which it wants more."""
    if not HAS_TORCH:
        return
    import torch

    try:
        loaded = torch.load(io.BytesIO(data), weights_only=True)
    except (RuntimeError, UnicodeDecodeError):
        return
    found = {str(name): tuple(tensor.shape) for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}
    ours = {name: record.spec.shape for name, record in header.tensors.items()}
    assert found == ours, (found, ours)
