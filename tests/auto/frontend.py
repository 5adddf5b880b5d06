"""MindSpore's own compile of a parallel network, on CPU: the front end alone, which cuts the parameters.

MindSpore compiles semi_auto_parallel for Ascend and GPU only, and on CPU refuses where it asks for the name of the
device. Inside `for_ascend` that name is another one; nothing is built for the device, so nothing of it is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mindspore

_LIBRARY = Path(mindspore.__file__).parent / "lib" / "libmindspore_core.so"
_CONTEXT = "_ZN9mindspore9MsContext13inst_context_E"  # shared_ptr<MsContext> MsContext::inst_context_
_SEARCHED = 2048  # bytes of the context in which the name of the device is looked for
_HEADER = 24  # length, capacity and count of users, before the characters of a string (libstdc++, before C++11)


def _readable() -> list[tuple[int, int]]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, rights = line.split()[:2]
        if rights.startswith("r"):
            start, stop = area.split("-")
            found.append((int(start, 16), int(stop, 16)))
    return found


def _place_of_target() -> int | None:
    """The address of the pointer to the device's name, None where this build of MindSpore has another form."""
    try:
        context = ctypes.c_void_p.in_dll(ctypes.CDLL(str(_LIBRARY)), _CONTEXT).value
    except (OSError, ValueError):
        return None
    areas = _readable()
    for place in range(context or 0, (context or 0) + _SEARCHED, 8):
        if not any(start <= place and place + 8 <= stop for start, stop in areas):
            return None
        text = ctypes.c_uint64.from_address(place).value
        if any(start <= text - _HEADER and text + 4 <= stop for start, stop in areas):
            length = ctypes.c_uint64.from_address(text - _HEADER).value
            if length == 3 and ctypes.string_at(text, 4) == b"CPU\0":
                return place
    return None


def is_possible() -> bool:
    """Whether the front end can be run alone here."""
    return _place_of_target() is not None


@contextmanager
def for_ascend() -> Iterator[None]:
    """Have MindSpore take this process for one on Ascend."""
    place = _place_of_target()
    assert place is not None
    name = b"Ascend"
    numbers = b"".join(number.to_bytes(8, "little") for number in (len(name), len(name), 1 << 20))
    buffer = ctypes.create_string_buffer(numbers + name + b"\0")
    pointer = ctypes.c_uint64.from_address(place)
    before = pointer.value
    pointer.value = ctypes.addressof(buffer) + _HEADER
    try:
        yield
    finally:
        pointer.value = before


def compile_network(network: Any, *inputs: Any) -> None:
    """Compile a network as far as its parameters are cut, its strategy saved and its layouts kept."""
    from mindspore.parallel._auto_parallel_context import auto_parallel_context

    try:
        from mindspore.graph.api import _cell_graph_executor
    except ImportError:  # before MindSpore 2.9
        from mindspore.common.api import _cell_graph_executor
    # The number of ranks is that of the context: there are no groups of devices to ask.
    auto_parallel_context()._context_handle.set_hccl_test_avaible(True)
    with for_ascend():
        _cell_graph_executor.compile(network, *inputs, phase="export.train")
