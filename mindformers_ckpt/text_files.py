"""JSON, yaml and text files: read as input that may be hostile, written as UTF-8 whatever the locale.

What is read: regular files only (a FIFO would hang), of bounded size, UTF-8 with or without a byte order mark,
nested at most `MAX_DEPTH` deep. Keys that stand twice with different values, numbers that no computation could hold
and texts that are not Unicode are refused. All faults come as the error class that the caller names.

The functions without an error class raise ValueError with the reason, for callers that say more about it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.objects.path import ObjectPath

MAX_DEPTH = 64
MAX_BYTES = 1 << 28  # an index of 100,000 tensors has about 10 MB
MAX_OWN_BYTES = 1 << 32  # of plans and manifests, which name every tensor of every rank
MAX_PARTS = 1 << 22  # lists and objects in JSON from outside: each is three bytes there, and some seventy in memory
MAX_YAML_BYTES = 1 << 22  # yaml is parsed slowly; the yaml files of MindFormers have up to 17 kB
MAX_YAML_NODES = 100_000  # with aliases counted wherever they stand
MAX_DIGITS = 100
_MEMBERS_OF_A_LINE = 8
_READ_BYTES = 1 << 20

_LONG_NUMBER = re.compile(rb"\d{%d}" % (MAX_DIGITS + 1))
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"')
# What json.dumps leaves as it is: DEL, C1, soft hyphen, bidi marks and other invisible signs, half characters.
_UNPRINTABLE = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}:'))


def read_json(path: Path, error: type[CheckpointError], *, limit: int = MAX_BYTES, infinite: bool = False) -> Any:
    """Read a JSON file of at most `limit` bytes. Raises `error` saying what is wrong with it.

    `infinite` lets NaN and Infinity pass, which transformers writes into some config.json.
    """
    try:
        most_parts = MAX_PARTS if limit <= MAX_BYTES else None
        return parse_json(read_regular(path, limit), infinite=infinite, most_parts=most_parts)
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read: {_reason(cause)}") from cause


def read_json_object(
    path: Path, error: type[CheckpointError], *, limit: int = MAX_BYTES, infinite: bool = False
) -> dict[str, Any]:
    """Read a JSON file that must hold an object. Raises `error` saying what is wrong with it."""
    content = read_json(path, error, limit=limit, infinite=infinite)
    if not isinstance(content, dict):
        raise error(f"{path} cannot be read: a JSON object was expected, not {_kind(content)}")
    return content


def read_yaml_mapping(path: Path, error: type[CheckpointError]) -> dict[Any, Any]:
    """Read a yaml file that must hold a mapping, an empty one for an empty file. Raises `error`."""
    try:
        content = parse_yaml(read_regular(path, MAX_YAML_BYTES))
    except (OSError, ValueError) as cause:
        raise error(f"{path}: the configuration cannot be read: {_reason(cause)}") from cause
    if not isinstance(content, (dict, type(None))):
        raise error(f"{path}: a mapping of keys was expected, not {type(content).__name__}")
    return content or {}


def read_regular(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file. Raises OSError; ValueError for a FIFO, a device and more than `limit` bytes."""
    if isinstance(path, ObjectPath):
        if path.stat().st_size > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
        return path.read_bytes()
    # Without O_NONBLOCK the opening of a FIFO waits for a writer, for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
        # The size may be an old one (network file systems), and what a read asks for at once is reserved.
        content = bytearray()
        while status.st_size <= limit and len(content) <= limit:
            block = os.read(descriptor, min(_READ_BYTES, limit + 1 - len(content)))
            if not block:
                return bytes(content)
            content += block
    finally:
        os.close(descriptor)
    raise ValueError(f"it has more than {limit:,} bytes")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, whatever the locale. Raises OSError with the name of the file."""
    try:
        path.write_bytes(text.encode())
    except OSError as error:  # the system names no file when a disk fills up
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, value: Any, *, indent: int | None = None) -> None:
    """Write a JSON file: UTF-8, with an escape for all that is not printable."""
    write_text(path, readable_json(value, indent=indent) + "\n")


def write_records(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as `write_json`, with a line for each small object in it: there may be very many."""
    write_text(path, _printable(_in_lines(value, "\n")) + "\n")


def readable_json(value: Any, *, indent: int | None = None, separators: tuple[str, str] | None = None) -> str:
    """JSON text in which every character is what it is, unless it is not printable: then it is escaped."""
    return _printable(json.dumps(value, indent=indent, ensure_ascii=False, separators=separators))


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub(lambda match: json.dumps(match[0]).strip('"').replace("\x7f", "\\u007f"), text)


def _in_lines(value: Any, line: str) -> str:
    """JSON text; `line` begins a line at the depth of the value."""
    if isinstance(value, dict) and (line == "\n" or not _is_small(value)):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_in_lines(part, line + ' ')}" for key, part in value.items()]
        begin, end = "{}"
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        parts = [_in_lines(part, line + " ") for part in value]
        begin, end = "[]"
    else:
        return json.dumps(value, ensure_ascii=False)
    return f"{begin}{line} {f',{line} '.join(parts)}{line}{end}"


def _is_small(value: Mapping[str, Any]) -> bool:
    """Whether an object has a few members, which are numbers, texts and shapes."""
    return len(value) <= _MEMBERS_OF_A_LINE and not any(
        isinstance(part, dict) or (isinstance(part, list) and any(isinstance(inner, (dict, list)) for inner in part))
        for part in value.values()
    )


def parse_json(data: bytes, *, infinite: bool = False, most_parts: int | None = MAX_PARTS) -> Any:
    """The value of a JSON text of at most `most_parts` lists and objects. Raises ValueError: what is wrong with it."""
    text = _decoded(data)
    if not text.strip():
        raise ValueError("it is empty")
    check_structure(data, most_parts)
    hooks: dict[str, Any] = {} if infinite else {"parse_float": _finite, "parse_constant": _refused}
    if _LONG_NUMBER.search(data):
        hooks["parse_int"] = _whole
    try:
        value = json.loads(text, object_pairs_hook=_unique, **hooks)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if _HALF_CHARACTER.search(data):
        _check_unicode(value)
    return value


def parse_yaml(data: bytes) -> Any:
    """The value of a yaml text with one document; dates stay text. Raises ValueError saying what is wrong with it."""
    import yaml

    text = _decoded(data)
    try:
        loader = _yaml_loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_yaml(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"it is not valid yaml: {error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid yaml: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"it is not valid yaml: a value does not fit its tag ({error!r})") from None  # like !!int x


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def check_structure(data: bytes, most_parts: int | None) -> int:
    """Refuse JSON of too many lists and objects, or with a deep nest of them: before a parser makes them, and recurses.

    Returns how many keys all its objects have together, those that stand twice counted twice. Raises ValueError.
    """
    if b"\\" in data:
        data = _ESCAPE.sub(b"", data)
    # Two quotes side by side may go, whichever they are: what is in a text stays there, and what is not does not.
    marks = _STRING.sub(b"", data.translate(_AS_SQUARE, _NOT_STRUCTURE).replace(b'""', b""))
    brackets = marks.replace(b":", b"")
    if _is_too_deep(brackets):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if most_parts is not None and brackets.count(b"[") > most_parts:
        raise ValueError(f"it has more than {most_parts:,} lists and objects")
    return len(marks) - len(brackets)


def _is_too_deep(data: bytes) -> bool:
    """Whether brackets are nested too deep. The innermost pairs are taken out, once a level."""
    for _ in range(MAX_DEPTH):
        rest = data.replace(b"[]", b"")
        if len(rest) == len(data):
            return data.count(b"[") > MAX_DEPTH  # not closed
        data = rest
    return b"[" in data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. The same key twice is refused unless both say the same: readers would take one or the other."""
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] != value:
                raise ValueError(f"the key {key[:100]!r} stands in it twice, with different values")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"the number {text[:20]} in it is too large")
    return value


def _refused(text: str) -> float:
    raise ValueError(f"{text} stands in it, which is not a number")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits stands in it")
    return int(text)


def _check_unicode(value: Any) -> None:
    """Refuse half characters, which no file can hold. Bytes of a file name as Python writes them are none."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError("a text in it is not Unicode: an escape is half of a surrogate pair") from None


def _reason(error: Exception) -> object:
    return error.strerror or error if isinstance(error, OSError) else error


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


@lru_cache(maxsize=1)
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's safe loader with a bounded depth, without dates."""

        _depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            node = super().compose_node(parent, index)
            self._depth -= 1
            return node

    Loader.yaml_implicit_resolvers = {
        start: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def _check_yaml(root: Any) -> None:
    """Refuse keys that stand twice, and aliases that lead to themselves or expand without bounds."""
    sizes: dict[int, tuple[int, int]] = {}

    def measure(node: Any, level: int) -> tuple[int, int]:
        """Nodes below, aliases expanded, and levels of them."""
        known = sizes.get(id(node))
        if known is not None:
            return known
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a number of {len(node.value)} digits stands in it")
        if level > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep, or an alias leads to itself")
        below = [measure(child, level + 1) for child in _yaml_children(node)]
        size = 1 + sum(count for count, _ in below)
        depth = 1 + max((levels for _, levels in below), default=0)
        if size > MAX_YAML_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_YAML_NODES:,} values")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        sizes[id(node)] = size, depth
        return size, depth

    measure(root, 1)


def _yaml_children(node: Any) -> Iterable[Any]:
    if node.id == "mapping":
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            if key.id == "scalar":
                if key.value != "<<" and (key.tag, key.value) in seen:
                    raise ValueError(f"the key {key.value[:100]!r} stands twice (line {key.start_mark.line + 1})")
                seen.add((key.tag, key.value))
            yield key
            yield value
    elif node.id == "sequence":
        yield from node.value
