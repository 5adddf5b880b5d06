"""Pickles as data: a machine for their instructions that can do nothing.

A pickle is a program that names functions and calls them. Here the caller says what the few names mean that he
knows, and everything else is an object that holds nothing: nothing is imported, no attribute is set, no method of
what stands in the file is called. Values are only ever put into lists, tuples and dictionaries, never hashed,
compared or printed unless they are text or numbers, for a few bytes can describe a value that is deeper than the
stack or larger than the universe.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from mindformers_ckpt.formats.tensor_file import Malformed
from mindformers_ckpt.text_files import MAX_DEPTH

# Enough to describe 150,000 tensors (some 300 bytes and 45 instructions each); what an instruction makes takes up to
# 100 bytes of memory.
MOST_BYTES = 64 << 20
_MOST_INSTRUCTIONS = 8_000_000
_LONGEST_NUMBER = 64  # bytes or digits


class Foreign:
    """An object of a class that is not known; it holds nothing."""

    __slots__ = ()


class Builder(NamedTuple):
    """What a known name of a function stands for: it is called with the arguments that the pickle gives it."""

    build: Callable[..., object]


class Known(NamedTuple):
    """What a known name of a class stands for: its objects become records of their state."""

    name: str


class Record:
    """An object of a known class: the name of that, and the state that the pickle gives the object.

    It is compared and hashed by what it is, never by its state.
    """

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: object = None


class Stream(Protocol):
    """What is read from: a file, or bytes in memory."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self, size: int, /) -> bytes: ...


class PickleReader:
    """Reads the pickles that follow each other in a stream, 64 MiB and 8 million instructions of them at most.

    `find` gives the meaning of a name (module, name): a value, a Builder, a Known class, or a Foreign. `refer` gives
    what a persistent id stands for. `most` is a multiple of those bounds. `load` raises Malformed for whatever is not a
    pickle, or exceeds them.
    """

    def __init__(
        self, stream: Stream, find: Callable[[str, str], object], refer: Callable[[object], object], most: int = 1
    ) -> None:
        self._stream = stream
        self._most_bytes, self._most_instructions = most * MOST_BYTES, most * _MOST_INSTRUCTIONS
        self._left = self._most_bytes
        self._instructions_left = self._most_instructions
        self._find = find
        self._refer = refer
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def load(self) -> object:
        """The value of the next pickle."""
        self._stack, self._marks, self._memo = [], [], {}
        try:
            while self._instructions_left:
                self._instructions_left -= 1
                code = self._read(1)
                if code == b".":
                    return self._stack.pop()
                instruction = _INSTRUCTIONS.get(code)
                if instruction is None:
                    raise Malformed(f"its pickle has the unknown instruction {code!r}")
                instruction(self)
        except (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error) as error:
            # The error is not shown whole: it may hold a value of the file.
            raise Malformed(f"its pickle makes no sense ({type(error).__name__})") from None
        raise Malformed(f"its pickle has over {self._most_instructions} instructions")

    # Bytes

    def _read(self, size: int) -> bytes:
        if size > self._left:
            raise Malformed(f"its pickle describes more than {self._most_bytes >> 20} MiB")
        data = self._stream.read(size)
        if len(data) != size:
            raise Malformed("truncated inside its pickle")
        self._left -= size
        return data

    def _line(self, encoding: str = "utf-8") -> str:
        data = self._stream.readline(min(self._left, 1 << 16))
        self._left -= len(data)
        if not data.endswith(b"\n"):
            raise Malformed("truncated inside its pickle")
        return data[:-1].decode(encoding)

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._read(size), "little")

    # Values

    def push(self, value: object) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def mark(self) -> None:
        if len(self._marks) >= MAX_DEPTH:
            raise Malformed(f"its pickle is nested deeper than {MAX_DEPTH} levels")
        self._marks.append(len(self._stack))

    def pop_marked(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def top(self) -> Any:
        return self._stack[-1]

    def get(self, number: int) -> None:
        self.push(self._memo[number])

    def put(self, number: int) -> None:
        self._memo[number] = self.top()

    def memoize(self) -> None:
        self.put(len(self._memo))

    def number(self, size: int) -> None:
        self.push(int.from_bytes(self._read(size), "little", signed=size == 4))

    def long(self, size: int) -> None:
        length = self._unsigned(size)
        if length > _LONGEST_NUMBER:
            raise Malformed(f"its pickle has a number of {length} bytes")
        self.push(int.from_bytes(self._read(length), "little", signed=True))

    def text(self, size: int) -> None:
        self.push(_decoded(self._read(self._unsigned(size))))

    def binary(self, size: int) -> None:
        self.push(self._read(self._unsigned(size)))

    def written_number(self) -> None:
        """An integer in digits; 00 and 01 are False and True."""
        digits = self._line().rstrip("L")
        if len(digits) > _LONGEST_NUMBER:
            raise Malformed(f"its pickle has a number of {len(digits)} digits")
        self.push({"00": False, "01": True}[digits] if digits in ("00", "01") else int(digits))

    def tuple_of(self, count: int) -> None:
        start = len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise IndexError
        self._stack[start:] = [tuple(self._stack[start:])]

    def name(self, module: str, name: str) -> None:
        self.push(self._find(module, name))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self._find(module, name) if isinstance(module, str) and isinstance(name, str) else Foreign())

    def call(self) -> None:
        arguments, known = self.pop(), self.pop()
        if not isinstance(arguments, tuple):
            raise TypeError
        self.push(known.build(*arguments) if isinstance(known, Builder) else Foreign())

    def create(self) -> None:
        """A new object, as yet without a state."""
        _, known = self.pop(), self.pop()
        self.push(Record(known.name) if isinstance(known, Known) else Foreign())

    def set_state(self) -> None:
        state = self.pop()
        holder = self.top()
        if isinstance(holder, Record):
            holder.state = state

    def refer(self, reference: object) -> None:
        self.push(self._refer(reference))

    def extend(self, values: list[Any]) -> None:
        holder = self.top()
        if isinstance(holder, list):
            holder.extend(values)
        elif not isinstance(holder, Foreign):
            raise TypeError

    def set_items(self, items: list[Any]) -> None:
        holder = self.top()
        if isinstance(holder, dict):
            holder.update(_paired(items))
        elif not isinstance(holder, Foreign):
            raise TypeError


_PLAIN_KEYS = (str, bytes, int, float, type(None), Record)


def with_plain_keys(pairs: Iterable[tuple[object, object]]) -> dict[Any, Any]:
    """A dictionary of pairs; a key that is neither text, a number nor a record is replaced by an object of its own.

    Such a key may be a tuple that takes forever, or more than the stack, to hash.
    """
    return {key if isinstance(key, _PLAIN_KEYS) else Foreign(): value for key, value in pairs}


def _paired(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError
    return with_plain_keys(zip(items[::2], items[1::2]))


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _foreign(reader: PickleReader, pops: int, size: int = 0) -> None:
    """Read an argument of `size` bytes, take values off the stack, and put an object that holds nothing."""
    reader._read(size)
    for _ in range(pops):
        reader.pop()
    reader.push(Foreign())


def _foreign_of_marked(reader: PickleReader) -> None:
    reader.pop_marked()
    reader.push(Foreign())


def _inst(reader: PickleReader) -> None:
    reader._line(), reader._line()
    _foreign_of_marked(reader)


def _dup(reader: PickleReader) -> None:
    reader.push(reader.top())


def _pop(reader: PickleReader) -> None:
    if reader._marks and reader._marks[-1] == len(reader._stack):
        reader._marks.pop()
    else:
        reader.pop()


def _set_item(reader: PickleReader) -> None:
    value, key = reader.pop(), reader.pop()
    reader.set_items([key, value])


def _append(reader: PickleReader) -> None:
    value = reader.pop()
    reader.extend([value])


def _add_items(reader: PickleReader) -> None:
    reader.pop_marked()
    reader.top()


_INSTRUCTIONS: dict[bytes, Callable[[PickleReader], object]] = {
    b"\x80": lambda reader: reader._read(1),  # the protocol
    b"\x95": lambda reader: reader._read(8),  # the size of a frame
    b"(": PickleReader.mark,
    b"0": _pop,
    b"1": PickleReader.pop_marked,
    b"2": _dup,
    # Constants and numbers
    b"N": lambda reader: reader.push(None),
    b"\x88": lambda reader: reader.push(True),
    b"\x89": lambda reader: reader.push(False),
    b"J": lambda reader: reader.number(4),
    b"K": lambda reader: reader.number(1),
    b"M": lambda reader: reader.number(2),
    b"\x8a": lambda reader: reader.long(1),
    b"\x8b": lambda reader: reader.long(4),
    b"I": PickleReader.written_number,
    b"L": PickleReader.written_number,
    b"F": lambda reader: reader.push(float(reader._line())),
    b"G": lambda reader: reader.push(struct.unpack(">d", reader._read(8))[0]),
    # Text and bytes. What Python 2 called a string is taken for text, as torch does.
    b"X": lambda reader: reader.text(4),
    b"\x8c": lambda reader: reader.text(1),
    b"\x8d": lambda reader: reader.text(8),
    b"T": lambda reader: reader.text(4),
    b"U": lambda reader: reader.text(1),
    b"V": lambda reader: reader.push(reader._line("raw-unicode-escape")),
    b"S": lambda reader: reader.push(reader._line("unicode-escape")[1:-1]),
    b"B": lambda reader: reader.binary(4),
    b"C": lambda reader: reader.binary(1),
    b"\x8e": lambda reader: reader.binary(8),
    b"\x96": lambda reader: reader.binary(8),
    b"\x97": lambda reader: reader.push(Foreign()),  # a buffer that stands elsewhere
    b"\x98": lambda reader: reader.top(),
    # Containers
    b")": lambda reader: reader.push(()),
    b"t": lambda reader: reader.push(tuple(reader.pop_marked())),
    b"\x85": lambda reader: reader.tuple_of(1),
    b"\x86": lambda reader: reader.tuple_of(2),
    b"\x87": lambda reader: reader.tuple_of(3),
    b"]": lambda reader: reader.push([]),
    b"l": lambda reader: reader.push(reader.pop_marked()),
    b"a": _append,
    b"e": lambda reader: reader.extend(reader.pop_marked()),
    b"}": lambda reader: reader.push({}),
    b"d": lambda reader: reader.push(_paired(reader.pop_marked())),
    b"s": _set_item,
    b"u": lambda reader: reader.set_items(reader.pop_marked()),
    b"\x8f": lambda reader: reader.push(Foreign()),  # a set
    b"\x90": _add_items,
    b"\x91": _foreign_of_marked,
    # What was seen before
    b"g": lambda reader: reader.get(int(reader._line()[:20])),
    b"h": lambda reader: reader.get(reader._unsigned(1)),
    b"j": lambda reader: reader.get(reader._unsigned(4)),
    b"p": lambda reader: reader.put(int(reader._line()[:20])),
    b"q": lambda reader: reader.put(reader._unsigned(1)),
    b"r": lambda reader: reader.put(reader._unsigned(4)),
    b"\x94": PickleReader.memoize,
    # Names, calls and objects
    b"c": lambda reader: reader.name(reader._line(), reader._line()),
    b"\x93": PickleReader.stack_name,
    b"R": PickleReader.call,
    b"b": PickleReader.set_state,
    b"i": _inst,
    b"o": _foreign_of_marked,
    b"\x81": PickleReader.create,
    b"\x92": lambda reader: _foreign(reader, 3),
    b"\x82": lambda reader: _foreign(reader, 0, 1),
    b"\x83": lambda reader: _foreign(reader, 0, 2),
    b"\x84": lambda reader: _foreign(reader, 0, 4),
    b"P": lambda reader: reader.refer(reader._line()),
    b"Q": lambda reader: reader.refer(reader.pop()),
}
