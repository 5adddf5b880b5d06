"""The protobuf schema of strategy files (`node_strategy.proto` of MindSpore), built without generated code.

Generated modules refuse protobuf runtimes older than their generator; a descriptor built here works with
every runtime, and its own pool keeps it apart from the copy that MindSpore registers.

protobuf is imported when the first strategy is read: MindSpore 2.7 needs to be imported before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

_PACKAGE = "mindspore.straspb"
# message -> fields as (name, number, type, repeated); a type in upper case is a scalar of protobuf.
_MESSAGES: dict[str, list[tuple[str, int, str, bool]]] = {
    "ParallelStrategy": [("dim", 1, "UINT32", True)],
    "ParallelStrategys": [("stage", 1, "UINT32", False), ("parallel_strategy", 2, "ParallelStrategy", True)],
    "ParallelStrategyItem": [
        ("node_name", 1, "STRING", False),
        ("parallel_strategys", 2, "ParallelStrategys", False),
    ],
    "DevMatrix": [("dim", 1, "UINT32", True)],
    "TensorMap": [("dim", 1, "INT32", True)],
    "ParamSplitShape": [("dim", 1, "INT64", True)],
    "IndicesOffset": [("dim", 1, "INT64", True)],
    "ParallelLayouts": [
        ("dev_matrix", 1, "DevMatrix", True),
        ("tensor_map", 2, "TensorMap", True),
        ("param_split_shape", 3, "ParamSplitShape", True),
        ("indices_offset", 4, "IndicesOffset", True),
        ("field", 5, "INT32", False),
        ("opt_weight_shard_step", 6, "INT32", False),
        ("opt_weight_shard_size", 7, "INT32", False),
    ],
    "ParallelLayoutItem": [
        ("param_name", 1, "STRING", False),
        ("parallel_layouts", 2, "ParallelLayouts", False),
    ],
    "ParallelStrategyMap": [
        ("current_stage", 1, "UINT32", False),
        ("parallel_strategy_item", 2, "ParallelStrategyItem", True),
        ("parallel_layout_item", 3, "ParallelLayoutItem", True),
    ],
}


# The same, with parameters and their layouts left as bytes: thousands of parameters have some dozens of different
# layouts. In a job MindSpore has protobuf run in pure Python, where to parse a message takes long.
_UNREAD = {
    **_MESSAGES,
    "ParallelLayoutItem": [("param_name", 1, "STRING", False), ("parallel_layouts", 2, "BYTES", True)],
    "ParallelStrategyMap": [*_MESSAGES["ParallelStrategyMap"][:2], ("parallel_layout_item", 3, "BYTES", True)],
}
_NAME_TAG, _LONG = b"\x0a", b"\x80"  # how `param_name` begins, and the least length that takes two bytes


def strategy_map_class() -> Any:
    """The message class `ParallelStrategyMap`, the content of a strategy file."""
    return _classes(False)["ParallelStrategyMap"]


def unread_map_class() -> Any:
    """The same class for reading: `parallel_layout_item` are bytes, which `LayoutItems` reads."""
    return _classes(True)["ParallelStrategyMap"]


def unread_item_class() -> Any:
    """The class of such an item: `parallel_layouts` are the bytes of a `ParallelLayouts` message.

    It may be there several times, as any field of a message may: the messages are then merged (`read_layouts`).
    """
    return _classes(True)["ParallelLayoutItem"]


class LayoutItems:
    """Reads the items of parameters: what follows the name is parsed once, where it is the same for many."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[bytes, ...]] = {}

    def read(self, item: bytes) -> tuple[Any, tuple[bytes, ...]]:
        """The name of a parameter (bytes where it is not UTF-8) and its layouts, unread.

        Raises protobuf's DecodeError.
        """
        end = 2 + item[1] if len(item) > 1 else 0
        begins_with_name = item[:1] == _NAME_TAG and item[1:2] < _LONG and end <= len(item)
        parts = self._known.get(item[end:]) if begins_with_name else None
        if parts is not None:
            with suppress(UnicodeDecodeError):
                return item[2:end].decode(), parts
        message = unread_item_class()()
        message.ParseFromString(item)
        _check_complete(message, "item")
        parts = tuple(message.parallel_layouts)
        if begins_with_name and message.SerializeToString() == item:  # the name is there once, and nothing before it
            self._known[item[end:]] = parts
        return message.param_name, parts


def read_layouts(parts: Sequence[bytes]) -> Any:
    """The message `ParallelLayouts` that was left unread. Raises protobuf's DecodeError."""
    message = _classes(True)["ParallelLayouts"]()
    for part in parts:
        message.MergeFromString(part)
    _check_complete(message, "layout")
    return message


def _check_complete(message: Any, what: str) -> None:
    from google.protobuf.message import DecodeError

    if not message.IsInitialized():
        raise DecodeError(f"a required field is missing in the {what} of a parameter")


@cache
def _classes(unread: bool) -> dict[str, Any]:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="node_strategy.proto", package=_PACKAGE, syntax="proto2")
    for message_name, fields in (_UNREAD if unread else _MESSAGES).items():
        message = file.message_type.add(name=message_name)
        for name, number, kind, repeated in fields:
            label = field_type.LABEL_REPEATED if repeated else field_type.LABEL_REQUIRED
            field = message.field.add(name=name, number=number, label=label)
            if kind.isupper():
                field.type = getattr(field_type, f"TYPE_{kind}")
            else:
                field.type = field_type.TYPE_MESSAGE
                field.type_name = f".{_PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = {name: pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in names.items()}
