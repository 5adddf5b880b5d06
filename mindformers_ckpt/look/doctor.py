"""What this machine, its libraries and a file system are like for our work; facts for a person, and for an issue."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from mindformers_ckpt.disk import files as disk
from mindformers_ckpt.engine.machine import MEMORY_PER_PROCESS, free_memory, usable_cores
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.publish.strays import find_strays
from mindformers_ckpt.words import counted, shortened

_PACKAGES = (
    *("mindspore", "mindformers", "numpy", "safetensors", "ml_dtypes", "protobuf", "filelock", "psutil", "xxhash"),
    *("click", "rich", "botocore", "torch", "transformers", "peft"),
)
_MEGABYTE = 1 << 20
_TRIES = 20
# Hidden names that end as ours do (publish/replace.py, disk/files.py).
_MOST_STRAY = 20


class Finding(NamedTuple):
    """One line: what it is about, what was found, and whether it is a trap ("warning") or a fact ("")."""

    about: str
    text: str
    mark: str = ""


def versions() -> Iterator[Finding]:
    """This program, Python, the system, and the packages that matter; nothing is imported."""
    from mindformers_ckpt import __version__

    yield Finding("mindformers_ckpt", __version__)
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield Finding("Python", f"{platform.python_version()} on {system}")
    found = {name: _version(name) for name in _PACKAGES}
    for name, version in found.items():
        if version is not None:
            yield Finding(name, version)
    absent = [name for name, version in found.items() if version is None]
    if absent:
        yield Finding("not installed", ", ".join(absent))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def traps() -> Iterator[Finding]:
    """Combinations of versions and settings that are known to go wrong."""
    mindspore, safetensors, numpy = _version("mindspore"), _version("safetensors"), _version("numpy")
    if mindspore and safetensors and _numbers(safetensors) >= (0, 8):
        text = f"{safetensors} beside MindSpore writes wrong bytes for column slices, silently"
        yield Finding("safetensors", f"{text}; pip install 'safetensors<0.8'", "warning")
    if mindspore and numpy and _numbers(numpy) >= (2,) and sys.version_info < (3, 13):
        text = f"{numpy} beside MindSpore, which is compiled against 1.x: its bfloat16 raises; pip install 'numpy<2'"
        yield Finding("numpy", text, "warning")
    protobuf = _version("protobuf")
    if protobuf and _numbers(protobuf) < (4, 25):
        yield Finding("protobuf", f"{protobuf}: strategy files need 4.25 or later", "warning")
    if os.environ.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION") == "python":
        yield Finding("protobuf", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python: strategy files are read slowly")
    if sys.getfilesystemencoding().lower().replace("-", "") != "utf8":
        text = f"names of files are {sys.getfilesystemencoding()}, not UTF-8: set PYTHONUTF8=1"
        yield Finding("locale", text, "warning")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def machine() -> Iterator[Finding]:
    """Cores, memory, limits."""
    memory = free_memory()
    yield Finding("cores", str(usable_cores()))
    text = f"{memory / 1e9:.2f} GB free: enough for {memory // MEMORY_PER_PROCESS} processes that copy"
    yield Finding("memory", text, "warning" if memory < 2 * MEMORY_PER_PROCESS else "")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("open files", f"at most {soft} ({hard} may be asked for)", "warning" if soft < 256 else "")


def meeting(host: str, port: int) -> Iterator[Finding]:
    """Whether the ranks of a job could meet at an address, as far as this machine can tell."""
    import socket

    try:
        with socket.create_connection((host, port), timeout=2):
            yield Finding("meeting", f"{host}:{port} answers: a job, or another program, is there", "warning")
            return
    except OSError as error:
        reason = error.strerror or str(error)
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            yield Finding("meeting", f"{host}:{port}: not of this machine, and no answer ({reason}; {error.strerror})")
            return
    yield Finding("meeting", f"{host}:{port} is free on this machine")


# ------------------------------------------------------------------------------------------- a file system


def file_system(folder: Path) -> Iterator[Finding]:
    """What the file system of a folder is and can do; tried with small files in a folder of its own, then removed."""
    kind, device = _mount_of(folder)
    usage = shutil.disk_usage(folder)
    yield Finding("file system", f"{kind} ({device}) at {folder}")
    is_short = usage.free < 1e9
    yield Finding("free", f"{usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB", "warning" if is_short else "")
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("writing", "this user may not write there", "warning")
        return
    try:
        with TemporaryDirectory(prefix=".mindformers_ckpt_doctor_", dir=folder) as name:
            yield from _abilities(Path(name))
    except OSError as error:
        yield Finding("writing", f"{error.filename or folder}: {error.strerror}", "warning")


def _mount_of(folder: Path) -> tuple[str, str]:
    """Type and device of the file system that holds a folder."""
    best = ("unknown", "unknown", "")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            device, place, kind = line.split(" ")[:3]
            place = place.replace("\\040", " ")
            if len(place) >= len(best[2]) and folder.resolve().is_relative_to(place):
                best = (kind, device, place)
    return best[:2]


def _abilities(folder: Path) -> Iterator[Finding]:
    first, second = folder / "a", folder / "b"
    first.mkdir()
    second.mkdir()
    can = disk.exchange(first, second)
    yield Finding("exchange", "names change in one step" if can else "none: a result is put in place by three renames")
    yield Finding("locks", _locks(folder / "lock"))
    yield Finding("reserve", _reserves(folder / "reserved"))
    yield Finding("hard links", "yes" if _links(folder) else "none: files are copied in their place")
    raw = os.fsencode(folder) + b"/\xff"
    try:
        os.mkdir(raw)
        os.rmdir(raw)
        yield Finding("names", "any bytes")
    except OSError:
        yield Finding("names", "UTF-8 only")
    times = sorted(_small_file(folder / "small") for _ in range(_TRIES))
    text = f"{statistics.median(times) * 1e3:.2f} ms to make, sync, read and remove a small file"
    yield Finding("latency", f"{text} (slowest of {_TRIES}: {times[-1] * 1e3:.2f})")


def _locks(path: Path) -> str:
    import fcntl

    with path.open("w", encoding="ascii") as stream, path.open("r", encoding="ascii") as other:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"none ({error.strerror}): a file that names its owner stands for one"
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return "flock, and it excludes"
        return "flock is granted to two at once: runs for one folder must not overlap"


def _reserves(path: Path) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("wb") as stream:
        if not hasattr(libc, "fallocate64"):
            return "not on this system: a full disk is found while writing"
        code = libc.fallocate64(stream.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(_MEGABYTE))
    return "room for a file is reserved first" if code == 0 else "none: a full disk is found while writing"


def _links(folder: Path) -> bool:
    try:
        (folder / "one").touch()
        os.link(folder / "one", folder / "two")
    except OSError:
        return False
    return True


def _small_file(path: Path) -> float:
    """Seconds of a small file's life."""
    started = time.perf_counter()
    with path.open("wb") as stream:
        stream.write(b"x" * 4096)
        stream.flush()
        os.fsync(stream.fileno())
    path.read_bytes()
    path.unlink()
    return time.perf_counter() - started


def stray(folder: Path) -> Iterator[Finding]:
    """What runs of ours have left in a folder or beside it, and what those that are alive have there."""
    found = []
    for place in dict.fromkeys((folder, folder.parent)):
        with contextlib.suppress(OSError):  # no folder, or none of ours to read: nothing to be said of it
            found += find_strays(place)
    dead = [f"{item.path} ({item.what})" for item in found if not item.holder]
    alive = [f"{item.path} ({item.what}, of {item.holder})" for item in found if item.holder]
    if dead:
        text = f"left by runs that died: {shortened(dead, _MOST_STRAY)}"
        yield Finding("stray files", f"{text}; the next run for the same folder clears them", "warning")
    if alive:
        yield Finding("files of runs", f"in use: {shortened(alive, _MOST_STRAY)}")
    if not dead:
        yield Finding("stray files", "none")


# ------------------------------------------------------------------------------------------- a checkpoint

_SAMPLE = 256 * _MEGABYTE
_SECONDS = 5.0
_SMALLEST = 16 * _MEGABYTE


def checkpoint(paths: Sequence[Path], scratch: Path | None) -> Iterator[Finding]:
    """How fast this storage reads the files of a checkpoint, and writes; and what a run over all of it would take.

    At most 256 MB are read, and written into a file in `scratch`, which is removed.
    """
    total = sum(path.stat().st_size for path in paths)
    yield Finding("checkpoint", f"{counted(len(paths), 'file')}, {total / 1e9:.2f} GB")
    if total < _SMALLEST:
        yield Finding("T_io", "it is too small to tell how fast the storage is")
        return
    read = _reading(paths)
    if read is None:
        return
    yield Finding("reading", f"{read / 1e9:.2f} GB/s (of a sample, not out of memory where the system lets us choose)")
    if scratch is None or not os.access(scratch, os.W_OK):
        yield Finding("T_io", f"{total / read:.1f} s to read all of it once, with one process")
        return
    write = _writing(scratch)
    yield Finding("writing", f"{write / 1e9:.2f} GB/s, sync included")
    seconds = total / read + total / write
    text = f"{seconds:.1f} s to read all of it once and write as much, one after the other; a run does both at a time"
    yield Finding("T_io", text)


def _reading(paths: Sequence[Path]) -> float | None:
    """Bytes a second out of samples of files: from the middle of each, until enough is read."""
    buffer = memoryview(bytearray(4 * _MEGABYTE))
    done, seconds = 0, 0.0
    for path in paths[:: max(1, len(paths) // 32)]:
        with path.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = size // 3 // 4096 * 4096
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), start, 0, os.POSIX_FADV_DONTNEED)
            stream.seek(start)
            began = time.perf_counter()
            left = 8 * _MEGABYTE if len(paths) > 1 else _SAMPLE
            while left > 0 and (count := stream.readinto(buffer)):
                done, left = done + count, left - count
            seconds += time.perf_counter() - began
        if done >= _SAMPLE or seconds > _SECONDS:
            break
    return done / max(seconds, 1e-9) if done else None


def _writing(folder: Path) -> float:
    """Bytes a second into a new file, until they are on the disk."""
    block = os.urandom(_MEGABYTE)
    with TemporaryDirectory(prefix=".mindformers_ckpt_doctor_", dir=folder) as name:
        began = time.perf_counter()
        done = 0
        with (Path(name) / "sample").open("wb", buffering=0) as stream:
            while done < _SAMPLE and time.perf_counter() - began < _SECONDS:
                done += stream.write(block)
            os.fsync(stream.fileno())
        return done / (time.perf_counter() - began)


def existing(path: Path) -> Path:
    """The folder at a path, or the nearest one above it. Raises ConfigError when there is none."""
    path = Path(os.path.abspath(path))
    for folder in (path, *path.parents):
        if folder.is_dir():
            return folder
    raise ConfigError(f"{path}: there is no folder at all on the way to it")
